"""What changed between two registered versions: code, data, streams, settings, accuracy, classes, packages.

Where a version comes from and what was measured is in the registry and in MLflow's runs; the rest is read from the model itself,
whose description travels with its weights.
"""

import itertools
import json
import os
import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from components import registry
from components.registry import Version
from ffn.config import digest
from pipeline.local import Workspace
from pipeline.models import columns, commit

NOT_RECORDED, ABSENT, DIRTY = "(not recorded)", "-", "-dirty"
WIDTH = 120
"""Of the lines below the table."""
MOST_NAMES = 6
"""Class names that a cell lists."""

CODE = {"commit": "git_commit", "image": "image", "pipeline version": "pipeline_version"}
DATA = {"samples": "samples", "training samples": "train_samples", "held-out samples": "test_samples"}
"""Fact -> the version's tag that holds it."""

WHOLE = ("accuracy", "packages")
"""Parts that are recorded whole or not at all: what only the other version has is absent, not forgotten."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is recorded of a version."""

    version: Version
    parts: Mapping[str, Mapping[str, str]]
    """Part -> fact -> its value; a fact that is not recorded is not there."""
    classes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Change:
    """A fact that differs: what it is in the one version and in the other."""

    part: str
    fact: str
    a: str
    b: str


@registry.asked_by_a_person()
def diff(a: str, b: str, *, workspace: Workspace) -> str:
    """What differs between the versions named `a` and `b`, as text for a terminal.

    Raises `FFNError` where there is no such version, or its model cannot be read.
    """
    os.environ.update(workspace.environment())
    first, second = registry.find(a), registry.find(b)
    if first.uri == second.uri:
        return f"{a} and {b} are the same version: {_called(first)}"
    return report(facts(first), facts(second))


def facts(version: Version) -> Facts:
    """What is recorded of `version`. Raises `FFNError` where its model cannot be read."""
    tags, model = version.tags, "artifacts/fused"
    weights = json.loads(registry.read(version, f"{model}/fusion.json"))
    streams = {name: json.loads(registry.read(version, f"{model}/{name}/config.json")) for name in weights}
    first = next(iter(streams))
    fused = {tags["fusion"]: float(tags["top1"])} if "fusion" in tags and "top1" in tags else {}
    parts = {
        "code": _tagged(tags, CODE),
        "data": data(streams[first]) | _tagged(tags, DATA),
        "streams": {"weights": ", ".join(f"{name} {weight:g}" for name, weight in weights.items())},
        "settings": settings({name: said["config"] for name, said in streams.items()}),
        "accuracy": {name: f"{100 * top1:.2f} %" for name, top1 in (registry.measured(version) | fused).items()},
        "packages": packages(registry.read(version, "python_env.yaml"), registry.read(version, "requirements.txt")),
    }
    classes = json.loads(registry.read(version, f"{model}/{first}/labels.json"))
    return Facts(version=version, parts=parts, classes=tuple(classes))


def data(description: Mapping[str, Any]) -> dict[str, str]:
    """What the `config.json` of a checkpoint says of the recordings."""
    layout, size = description["layout"], description.get("image_size", (0, 0))
    return {
        "protocol": description["protocol"],
        "digest": description["data_digest"],
        "space": description["space"] + ("" if description["space"] == "3d" else " {} x {}".format(*size)),
        "layout": f"{layout['name']} ({digest(layout)})",
    }


def settings(configs: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """`preset` and `section.field` -> value, of configurations by stream; where the streams disagree, each one's."""
    flat = {stream: dict(_flat(config)) for stream, config in configs.items()}
    found = {}
    for name in dict.fromkeys(name for values in flat.values() for name in values):
        each = {stream: values.get(name, NOT_RECORDED) for stream, values in flat.items()}
        one = len(set(each.values())) == 1
        found[name] = next(iter(each.values())) if one else ", ".join(f"{stream} {value}" for stream, value in each.items())
    return found


def packages(environment: str, requirements: str) -> dict[str, str]:
    """Python and each package that the model asks for -> its version, of its `python_env.yaml` and `requirements.txt`."""
    python = re.search(r"^python: *(\S+)", environment, re.MULTILINE)
    asked = (re.fullmatch(r"([\w.-]+(?:\[.*?\])?)(.*)", line.strip()) for line in requirements.splitlines())
    return ({"python": python[1]} if python else {}) | {found[1]: found[2].removeprefix("==") or "any" for found in asked if found}


def changes(a: Facts, b: Facts) -> list[Change]:
    """What differs, part by part."""
    return [
        Change(part=part, fact=fact, a=_value(a, part, fact), b=_value(b, part, fact))
        for part, fact in _all(a, b)
        if not _same(a, b, part, fact)
    ] + class_changes(a.classes, b.classes)


def class_changes(a: Sequence[str], b: Sequence[str]) -> list[Change]:
    """How the class names differ: how many there are, which went, which came, and the first of the rest that moved."""
    gone, new = [name for name in a if name not in b], [name for name in b if name not in a]
    stayed = zip((name for name in a if name in b), (name for name in b if name in a), strict=True)
    moved = next(((ours, theirs) for ours, theirs in stayed if ours != theirs), None)
    rows = [("number", str(len(a)), str(len(b)))] if len(a) != len(b) else []
    rows += [("removed", _listed(gone), ABSENT)] if gone else []
    rows += [("added", ABSENT, _listed(new))] if new else []
    rows += [("order", f"{a.index(moved[0]) + 1}. {moved[0]} ...", f"{b.index(moved[1]) + 1}. {moved[1]} ...")] if moved else []
    return [Change(part="classes", fact=fact, a=ours, b=theirs) for fact, ours, theirs in rows]


def report(a: Facts, b: Facts) -> str:
    """Both versions, a table of what differs between them, and a line for the rest."""
    found = changes(a, b)
    blocks = [columns([_title(a.version), _title(b.version)])]
    if found:
        parts = ["", *(change.part for change in found)]
        new = ["" if part == before else part for before, part in itertools.pairwise(parts)]
        rows = [(part, change.fact, change.a, _compared(change)) for part, change in zip(new, found, strict=True)]
        blocks.append(columns([("", "", _called(a.version), _called(b.version)), *rows]))
    else:
        blocks.append(["nothing that is recorded differs"])
    blocks += [block for block in (_commits(a, b), _rest(a, b)) if block]
    return "\n\n".join("\n".join(block) for block in blocks)


def _commits(a: Facts, b: Facts) -> list[str]:
    """How to see what changed in the code."""
    ours, theirs = (facts.parts["code"].get("commit", "") for facts in (a, b))
    lines = []
    if ours and theirs and (span := [text.removesuffix(DIRTY)[:12] for text in (ours, theirs)])[0] != span[1]:
        lines.append(f"code: git log --oneline {span[0]}..{span[1]}")
    if DIRTY in ours + theirs:
        lines.append(f"{DIRTY}: the code had changes that are in no commit")
    return lines


def _rest(a: Facts, b: Facts) -> list[str]:
    """One line of what is the same, and one of what neither version has recorded."""
    recorded = list(_all(a, b))
    same = _grouped((part, fact) for part, fact in recorded if _same(a, b, part, fact))
    number = len(same.pop("settings", []))  # of too many to name
    said = [f"{part} ({', '.join(facts)})" for part, facts in same.items()]
    said += [f"{number} setting{'s' if number > 1 else ''}"] if number else []
    said += [f"{len(a.classes)} classes"] if a.classes == b.classes else []
    expected = [(part, fact) for part, facts in (("code", CODE), ("data", DATA)) for fact in facts]
    unknown = _grouped(entry for entry in expected if entry not in recorded)
    lines = {"same": said, "not recorded": [f"{part} ({', '.join(facts)})" for part, facts in unknown.items()]}
    texts = [f"{what}: {', '.join(which)}" for what, which in lines.items() if which]
    return [part for text in texts for part in textwrap.wrap(text, WIDTH, subsequent_indent="  ", break_on_hyphens=False)]


def _grouped(entries: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """Part -> its facts."""
    found: dict[str, list[str]] = {}
    for part, fact in entries:
        found.setdefault(part, []).append(fact)
    return found


def _all(a: Facts, b: Facts) -> Iterator[tuple[str, str]]:
    """Part and fact of everything that is recorded of either, in the order of the one with more to say."""
    for part in a.parts:
        more, less = sorted((a.parts[part], b.parts[part]), key=len, reverse=True)
        for fact in dict.fromkeys([*more, *less]):
            yield part, fact


def _same(a: Facts, b: Facts, part: str, fact: str) -> bool:
    ours, theirs = a.parts[part].get(fact), b.parts[part].get(fact)
    return ours == theirs and not (ours or "").endswith(DIRTY)


def _value(facts: Facts, part: str, fact: str) -> str:
    value = facts.parts[part].get(fact)
    if value is None:
        return ABSENT if part in WHOLE and facts.parts[part] else NOT_RECORDED
    # A digest is known by its first digits, and two of them side by side are wider than a terminal.
    return commit(value) if fact == "commit" else re.sub(r"(sha256:[0-9a-f]{12})[0-9a-f]+", r"\1", value)


def _compared(change: Change) -> str:
    """The second version's value; of an accuracy with the difference in percentage points."""
    if change.part != "accuracy" or not (change.a.endswith("%") and change.b.endswith("%")):
        return change.b
    return f"{change.b} ({float(change.b[:-1]) - float(change.a[:-1]):+.2f})"


def _title(version: Version) -> tuple[str, ...]:
    when = f"registered {version.registered:%Y-%m-%d %H:%M} UTC" if version.registered else ""
    return _called(version), " ".join(version.aliases), when, f"run {version.tags.get('run') or NOT_RECORDED}"


def _called(version: Version) -> str:
    return f"{version.name}/{version.number}"


def _listed(names: Sequence[str]) -> str:
    rest = len(names) - MOST_NAMES
    return ", ".join(names[:MOST_NAMES]) + (f" and {rest} more" if rest > 0 else "")


def _tagged(tags: Mapping[str, str], wanted: Mapping[str, str]) -> dict[str, str]:
    return {fact: tags[tag] for fact, tag in wanted.items() if tags.get(tag)}


def _flat(config: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    for section, fields in config.items():
        if not isinstance(fields, dict):
            yield section, str(fields)
            continue
        for name, value in fields.items():
            yield f"{section}.{name}", ",".join(map(str, value)) if isinstance(value, list) else str(value)
