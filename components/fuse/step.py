"""Fuse: the streams' scores joined by sample id, for every fusion they allow."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

from components import say, step, tracking
from ffn.checkpoint import publishing_folder
from ffn.config import digest
from ffn.errors import FFNError
from ffn.fusion import fuse, fusions
from ffn.scores import Scores, measure

RESULT = "result.json"
FACTS = ("name", "protocol", "data_digest", "classes", "weights", "top1")
"""What a reader of `result.json` relies on."""

READABLE = 60
"""Classes of a confusion matrix that a person can still read in KFP's pages."""


class OfStream(Protocol):
    """What a stream made: scores, a checkpoint."""

    @property
    def stream(self) -> str: ...


Made = TypeVar("Made", bound=OfStream)


@step
def run(*, scores: list[Path], parent: str, fused: Path, confusion: Path) -> tuple[dict[str, str], list[str], list[list[int]]]:
    """Do `fuse_all` and log every fusion as a run of its own.

    Returns what there is to say of the widest: preset, protocol, seed and the `top1` of every fusion; its classes and its
    confusion matrix (rows are true classes), both empty where the classes are more than `READABLE`. A file at `confusion` tells
    kfp's local cache that the step was done.
    """
    tops = {}
    for name, made in fuse_all(scores, fused).items():
        metrics = measure(made)
        names = tracking.names(made.preset, made.protocol, name, made.seed)
        key = digest("fuse", made.data_digest, names, made.ids, hashlib.sha256(made.probabilities.tobytes()).hexdigest())
        with tracking.child(parent, key=key, kind="fuse", names=names) as track:
            track.params(names)
            track.result(metrics, made.classes)
        tops[f"top1 {name}"] = f"{metrics.top1:.4f}"
        say(f"{name}  top1 {100 * metrics.top1:.2f} %")
    confusion.parent.mkdir(parents=True, exist_ok=True)
    confusion.touch()
    facts = {what: value for what, value in names.items() if what != "stream"} | tops
    few = len(made.classes) <= READABLE
    return facts, list(made.classes) if few else [], metrics.confusion.tolist() if few else []


def fuse_all(paths: list[Path], out: Path) -> dict[str, Scores]:
    """Fusion name -> scores; writes `<name>.arrow` for each, and `result.json` with what there is to say of the widest.

    Raises `FFNError` where two tables are of one stream, or do not fit together.
    """
    tables = {stream: table for stream, (_, table) in by_stream(paths, Scores.read).items()}
    made: dict[str, Scores] = {}
    with publishing_folder(out) as partial:
        for name, weights in plan(tables).items():
            made[name] = fuse(tables, weights, name)
            made[name].write(partial / f"{name}.arrow")
            said = {what: getattr(made[name], what) for what in ("protocol", "data_digest", "classes")}
            (partial / RESULT).write_text(json.dumps({"name": name, **said, "weights": weights, **measure(made[name]).to_dict()}))
    return made


def by_stream(paths: Iterable[Path], read: Callable[[Path], Made]) -> dict[str, tuple[Path, Made]]:
    """Stream -> (path, what `read` makes of it). Raises `FFNError` naming two paths of one stream."""
    found: dict[str, tuple[Path, Made]] = {}
    for path in paths:
        made = read(path)
        if made.stream in found:
            raise FFNError(f"{found[made.stream][0]} and {path}: both of stream {made.stream}, expected one of each stream")
        found[made.stream] = path, made
    return found


def read_fusion(folder: Path) -> dict[str, Any]:
    """What `fuse_all` said of the widest fusion in `folder`. Raises `FFNError` where there is none."""
    try:
        said = json.loads((folder / RESULT).read_text())
        return {what: said[what] for what in FACTS}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FFNError(f"{folder}: not fused scores ({error}); make them with `ffn fuse`") from None


def plan(streams: Mapping[str, Scores]) -> dict[str, dict[str, float]]:
    """The paper's fusions of these streams, the widest last; an equal one of all where the paper has none of that width."""
    found = dict(sorted(fusions(streams).items(), key=lambda item: len(item[1])))
    if not any(set(weights) == set(streams) for weights in found.values()):
        found["+".join(streams)] = dict.fromkeys(streams, 1.0)
    return found
