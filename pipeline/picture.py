"""The picture of the graph, drawn from the compiled pipeline and from nothing else."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import yaml

from ffn.errors import FFNError

INK, SOFT, LINE = "#24292f", "#57606a", "#8c959f"
FILLS = ("#ffffff", "#f6f8fa", "#eaf2fb", "#fff4e5")
"""Colours of the boxes by depth."""


@dataclass(frozen=True, kw_only=True)
class Graph:
    """Tasks and boxes by path (`run/ntu60-xsub/streams/train`), and what waits for what, at the depth where it is said."""

    nodes: Mapping[str, str]
    """Path -> label, tasks and the boxes that are drawn as one node because another shows their inside."""
    boxes: Mapping[str, str]
    """Path -> label, the outer before the inner."""
    edges: tuple[tuple[str, str], ...]
    """(before, after); without those that follow from others."""


def read(pipeline: Path) -> Graph:
    """The graph of a compiled pipeline. Raises `FFNError` where the file is not one."""
    try:
        spec = next(yaml.load_all(pipeline.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)))
        return _graph(spec)
    except (OSError, yaml.YAMLError, KeyError, TypeError, StopIteration) as error:
        raise FFNError(f"{pipeline}: not a compiled pipeline ({error}); make one with `ffn compile`") from None


def draw(pipeline: Path, picture: Path) -> None:
    """Draw a compiled pipeline as SVG. Raises `FFNError` where graphviz is not installed."""
    if not shutil.which("dot"):
        raise FFNError("drawing needs graphviz: install it (Debian: apt-get install graphviz) and try again")
    graph = read(pipeline)
    made = subprocess.run(["dot", "-Tsvg"], input=dot(graph), text=True, capture_output=True, check=True).stdout
    for number, (before, after) in enumerate(graph.edges):
        title = f"{before} -> {after}"
        made = re.sub(rf'(id="e{number}" class="edge">\s*<title>).*?(</title>)', rf"\g<1>{escape(title)}\g<2>", made)
    picture.write_text(re.sub(r"<!--.*?-->\n?", "", made, flags=re.DOTALL))


def dot(graph: Graph) -> str:
    """The graph in graphviz's language."""
    font = 'fontname="Helvetica,Arial,sans-serif"'
    look = f'shape=box, style="rounded,filled", fillcolor=white, color="{INK}", fontcolor="{INK}", fontsize=13, height=0.42'
    lines = [
        "digraph ffn { rankdir=LR; compound=true; bgcolor=white; nodesep=0.25; ranksep=0.5; pad=0.15",
        f'graph [{font}, fontsize=12, fontcolor="{SOFT}", style="rounded,filled", color="{LINE}", labeljust=l]',
        f'node [{font}, {look}, margin="0.14,0.06"]',
        f'edge [color="{INK}", arrowsize=0.7]',
        *_inside(graph, ""),
    ]
    for number, (before, after) in enumerate(graph.edges):
        tail, head = _anchor(graph, before, last=True), _anchor(graph, after, last=False)
        clip = f', lhead="cluster_{after}"' if after in graph.boxes else ""  # ltail too makes graphviz 2.43 abort
        lines.append(f'"{tail}" -> "{head}" [id="e{number}"{clip}]')
    return "\n".join([*lines, "}"])


def _inside(graph: Graph, box: str) -> Iterator[str]:
    depth = box.count("/") + 1 if box else 0
    for path, label in graph.nodes.items():
        if _parent(path) == box:
            yield f'"{path}" [label="{label}"]'
    for path, label in graph.boxes.items():
        if _parent(path) == box:
            yield f'subgraph "cluster_{path}" {{ label="{label}"; margin=11; fillcolor="{FILLS[min(depth, len(FILLS) - 1)]}"'
            yield from _inside(graph, path)
            yield "}"


def _anchor(graph: Graph, path: str, *, last: bool) -> str:
    """A task inside the box `path` from which, or to which, its arrow can run; a task is its own."""
    if path not in graph.boxes:
        return path
    inner = [other for other in (*graph.nodes, *graph.boxes) if _parent(other) == path]
    taken = {edge[0 if last else 1] for edge in graph.edges}
    free = [other for other in inner if other not in taken]
    return _anchor(graph, next((other for other in free if other in graph.boxes), free[0]), last=last)


def _parent(path: str) -> str:
    return path.rpartition("/")[0]


def _graph(spec: Mapping[str, Any]) -> Graph:
    nodes: dict[str, str] = {}
    boxes: dict[str, str] = {}
    edges: list[tuple[str, str]] = []

    def walk(dag: Mapping[str, Any], box: str) -> None:
        shown: dict[str, str] = {}  # what a nested pipeline does -> the one whose inside is drawn
        names = {task: _name(task, said) for task, said in dag["tasks"].items()}
        for task in _ordered(dag["tasks"]):
            said = dag["tasks"][task]
            path = f"{box}/{names[task]}".lstrip("/")
            component = said["componentRef"]["name"]
            inner = spec["components"][component].get("dag")
            does = str(_does(spec, component, names[task]))
            if inner and does in shown:
                nodes[path] = f"{names[task]}\\n(as {shown[does]})"
            elif inner:
                shown[does] = names[task]
                boxes[path] = _label(names[task], said)
                walk(inner, path)
            else:
                nodes[path] = names[task]
        for task, said in dag["tasks"].items():
            direct = _direct(dag["tasks"], said.get("dependentTasks", []))
            edges.extend((f"{box}/{names[before]}".lstrip("/"), f"{box}/{names[task]}".lstrip("/")) for before in direct)

    walk(spec["root"]["dag"], "")
    return Graph(nodes=nodes, boxes=boxes, edges=tuple(sorted(edges)))


def _name(task: str, said: Mapping[str, Any]) -> str:
    return str(said.get("taskInfo", {}).get("name", task))


def _label(name: str, said: Mapping[str, Any]) -> str:
    """What the spec says of a box: the items of a loop, the condition of a branch."""
    if "parameterIterator" in said:
        items = json.loads(said["parameterIterator"]["items"]["raw"])
        return f"each of {', '.join(items)}"
    if condition := said.get("triggerPolicy", {}).get("condition"):
        return re.sub(r"inputs\.parameter_values\['pipelinechannel--(\w+?)-Output'\]", r"\1", f"if {condition}")
    return name


def _ordered(tasks: Mapping[str, Any]) -> list[str]:
    """Tasks, each after those it waits for; otherwise by name, numbers by value."""
    by_name = sorted(
        tasks, key=lambda task: [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", task)]
    )
    done: list[str] = []
    while len(done) < len(tasks):
        done += [task for task in by_name if task not in done and set(tasks[task].get("dependentTasks", [])) <= set(done)]
    return done


def _direct(tasks: Mapping[str, Any], before: list[str]) -> list[str]:
    """Of the tasks `before`, those that no other of them waits for, directly or through others."""

    def upstream(task: str) -> set[str]:
        near = set(tasks[task].get("dependentTasks", []))
        return near.union(*(upstream(other) for other in near))

    return [task for task in before if not any(task in upstream(other) for other in before if other != task)]


def _does(spec: Mapping[str, Any], component: str, name: str) -> Any:
    """What a component does, without the names that the compiler and its own name `name` give: equal boxes, equal values."""
    body = spec["components"][component]
    if "executorLabel" in body:
        return spec["deploymentSpec"]["executors"][body["executorLabel"]]["container"]
    tasks = {}
    for task, said in body["dag"]["tasks"].items():
        rest = json.dumps({key: value for key, value in said.items() if key != "componentRef"}, sort_keys=True)
        tasks[task] = (
            rest.replace(f'"constant": "{name}"', '"constant": "its name"'),
            _does(spec, said["componentRef"]["name"], name),
        )
    return tasks
