"""Fuse: the streams' scores joined by sample id, for every fusion they allow."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from components import say, step, tracking
from ffn.checkpoint import publishing_folder
from ffn.config import digest
from ffn.errors import FFNError
from ffn.fusion import fuse, fusions
from ffn.scores import Scores, measure

FUSION = "fusion.json"


@step
def run(*, scores: list[Path], parent: str, out: Path) -> dict[str, str]:
    """Do `fuse_all` and log every fusion as a run of its own; returns what names the protocol."""
    for name, fused in fuse_all(scores, out).items():
        metrics = measure(fused)
        names = {"preset": fused.preset, "protocol": fused.protocol, "stream": name}
        with tracking.child(
            parent,
            key=digest("fuse", fused.data_digest, names),
            name="/".join(names.values()),
            kind="fuse",
            tags={f"ffn.{name}": value for name, value in names.items()},
        ) as track:
            track.params(names)
            track.result(metrics, fused.classes)
        say(f"{name}  top1 {100 * metrics.top1:.2f} %")
    return {"protocol": fused.protocol}


def fuse_all(paths: list[Path], out: Path) -> dict[str, Scores]:
    """Fusion name -> scores; writes `<name>.arrow` for each, and `fusion.json` with name, weights and measures of the widest."""
    tables = {table.stream: table for table in map(Scores.read, paths)}
    made: dict[str, Scores] = {}
    with publishing_folder(out) as partial:
        for name, weights in plan(tables).items():
            made[name] = fuse(tables, weights, name)
            made[name].write(partial / f"{name}.arrow")
            (partial / FUSION).write_text(json.dumps({"name": name, "weights": weights, **measure(made[name]).to_dict()}))
    return made


def read_fusion(folder: Path) -> dict[str, Any]:
    """Name, weights and measures of the fusion in `folder`. Raises `FFNError` where there is none."""
    try:
        fusion: dict[str, Any] = json.loads((folder / FUSION).read_text())
    except (OSError, ValueError) as error:
        raise FFNError(f"{folder}: not fused scores ({error}); make them with `ffn fuse`") from None
    return fusion


def plan(streams: Mapping[str, Scores]) -> dict[str, dict[str, float]]:
    """The paper's fusions of these streams, the widest last; an equal one of all where the paper has none of that width."""
    found = dict(sorted(fusions(streams).items(), key=lambda item: len(item[1])))
    if not any(set(weights) == set(streams) for weights in found.values()):
        found["+".join(streams)] = dict.fromkeys(streams, 1.0)
    return found
