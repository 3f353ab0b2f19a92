"""How cost grows: ingesting, opening, sampling and a training step against samples, frames, persons and batch."""

import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from benchmarks import data, network
from benchmarks.harness import Row, Scale, measured, threads, timed
from ffn.config import PRESETS
from ffn.data.sampler import Sampler
from ffn.data.store import SkeletonSet

SIZES: dict[Scale, tuple[int, ...]] = {
    "toy": (20, 60),
    "quick": (1_000, 3_000, 10_000),
    "full": (1_000, 3_000, 10_000, 30_000, 100_000),
}
STEEPEST = 1.15
"""The largest slope in a double logarithmic plot that passes for linear."""


def run(scale: Scale) -> Iterator[Row]:
    """Every point, and for every line the slope of its upper half: 1 is linear, 0 constant."""
    lines: dict[str, list[tuple[int, Row]]] = {}
    for line, x, row in chain(_data_points(scale), _network_points(scale)):
        lines.setdefault(line, []).append((x, row))
        yield row
    for line, points in lines.items():
        (x, a), (y, b) = points[len(points) // 2 - 1], points[-1]
        slope = float(np.log(b.best / a.best) / np.log(y / x))
        yield measured(f"{line}: slope", [slope], "", limit=STEEPEST)


def draw(rows: Sequence[Row], path: Path) -> None:
    """The lines, one panel per thing that grows, both axes logarithmic."""
    lines: dict[str, list[tuple[int, Row]]] = {}
    for row in rows:
        if " = " in row.name:
            line, x = row.name.rsplit(" = ", 1)
            lines.setdefault(line, []).append((int(x), row))
    kinds = sorted({line.rsplit(" against ", 1)[1] for line in lines})
    figure = Figure(figsize=(3.4 * len(kinds), 3.6), layout="constrained")
    for axes, kind in zip(np.atleast_1d(figure.subplots(1, len(kinds))), kinds, strict=True):
        for line, points in lines.items():
            what, of = line.rsplit(" against ", 1)
            if of == kind:
                axes.loglog([x for x, _ in points], [row.value for _, row in points], "o-", label=f"{what}, {points[0][1].unit}")
        places = sorted({x for line, points in lines.items() if line.endswith(f" against {kind}") for x, _ in points})
        axes.set_xticks(places[-1::-2], [f"{x:,}" for x in places[-1::-2]])  # every second one has room for its name
        axes.minorticks_off()
        axes.set_xlabel(kind)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="x-small")
    figure.savefig(path, metadata={"Date": None})


def point(line: str, x: int, values: Sequence[float], unit: str) -> tuple[str, int, Row]:
    return line, x, measured(f"{line} = {x}", values, unit)


def _data_points(scale: Scale) -> Iterator[tuple[str, int, Row]]:
    with tempfile.TemporaryDirectory() as scratch, threads(1):
        source, out = Path(scratch) / "set.pkl", Path(scratch) / "set.arrow"
        for samples in SIZES[scale]:
            data.write_pickle(source, samples)
            seconds, peak, milliseconds = data.alone(_ingest_and_open, source, out)
            yield point("ingest against samples", samples, [seconds], "s")
            yield point("ingest, peak against samples", samples, [peak], "MB")
            yield point("open against samples", samples, [milliseconds], "ms")
            made = Sampler.of(SkeletonSet.open(out), "bm", data.CLIP)
            yield point("batch of 64 against samples", samples, _batches(made, 64), "ms")
        for batch in (8, 32, 128, 512, 1024) if scale != "toy" else (2, 8):
            yield point("batch against clips", batch, _batches(made, batch), "ms")
        for frames in (25, 50, 100, 200, 400) if scale != "toy" else (10, 20):
            yield point("batch of 64 against frames", frames, _batches(_clipped(made, frames=frames), 64), "ms")
        two = torch.nonzero(made.persons == 2)[:, 0]
        for persons in (1, 2):
            batches = _batches(_clipped(made, persons=persons), 64, two)
            yield point("batch of 64 pairs against persons", persons, batches, "ms")


def _network_points(scale: Scale) -> Iterator[tuple[str, int, Row]]:
    made, config = network.network("S4"), PRESETS["S4"]
    shapes: dict[str, dict[int, tuple[int, int, int]]] = {  # (N, M, T)
        "clips": {clips: (clips, 2, 100) for clips in (2, 4, 8, 16)},
        "frames": {frames: (4, 2, frames) for frames in (25, 50, 100, 200)},
        "persons": {persons: (4, persons, 100) for persons in (1, 2, 4)},
    }
    with threads(2):
        for of, sizes in shapes.items():
            for x, shape in sizes.items() if scale != "toy" else [(2, (2, 1, 16)), (4, (4, 1, 16))]:
                clips = (*shape, 17, 3)
                step = network.training_step(made, config, clips)
                yield point(f"step of S4 against {of}", x, [1e3 * timed(step) for _ in range(7)][2:], "ms")
                yield point(f"kept by S4 against {of}", x, [network.kept(made, torch.randn(clips))], "MB")


def _ingest_and_open(source: Path, out: Path) -> tuple[float, float, float]:
    """Seconds and peak memory (MB) of ingesting, and milliseconds of opening what came of it."""
    return *data.ingest_pickle(source, out), data.open_set(out)[0]


def _clipped(made: Sampler, **clip: Any) -> Sampler:
    return replace(made, clip=replace(made.clip, **clip))


def _batches(made: Sampler, count: int, rows: torch.Tensor | None = None) -> list[float]:
    """Milliseconds of one core for each of seven batches drawn at random."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.arange(len(made.frames)) if rows is None else rows
    return [
        1e3
        * timed(
            lambda: made.train_batch(rows[torch.randint(len(rows), (count,), generator=generator)], generator), time.thread_time
        )
        for _ in range(9)
    ][2:]
