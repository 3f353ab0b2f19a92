"""What a pipeline run found, as Markdown: one table of results, or a comparison of presets over seeds. No torch."""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from ffn import markdown, paper
from ffn.config import FUSIONS, PRESETS, STREAMS
from ffn.protocols import NTU_PROTOCOLS, UCLA_PROTOCOLS


@dataclass(frozen=True, kw_only=True)
class Result:
    """Held-out accuracy of one stream or fusion of one training."""

    preset: str
    protocol: str
    stream: str
    """A stream or a fusion."""
    seed: int
    top1: float
    """A fraction."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What the seeds of one preset, protocol and stream gave."""

    values: tuple[float, ...]
    """A fraction per seed."""
    paper: float | None
    """What the paper reports for it: a fraction, measured on the real NTU recordings. Never ours."""
    paper_space: str = ""
    """Keypoints of the paper's figure, `2d` or `3d`."""

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def spread(self) -> float | None:
        """Sample standard deviation; None with a single seed."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None


def compares(results: Iterable[Result]) -> bool:
    """Whether there is something to compare: more than one preset or seed."""
    return len({(result.preset, result.seed) for result in results}) > 1


def by_protocol(results: Iterable[Result]) -> dict[str, dict[str, float]]:
    """Top-1 as protocol -> stream or fusion -> fraction, protocols and columns in the house's order, unknown ones last."""
    table: dict[str, dict[str, float]] = {}
    for result in in_order(results):
        table.setdefault(result.protocol, {})[result.stream] = result.top1
    return table


def in_order(results: Iterable[Result]) -> list[Result]:
    """By protocol, preset, stream and seed, each in the house's order."""
    protocol, preset, stream = _place([*NTU_PROTOCOLS, *UCLA_PROTOCOLS]), _place(list(PRESETS)), _place([*STREAMS, *FUSIONS])
    return sorted(results, key=lambda r: (protocol(r.protocol), preset(r.preset), stream(r.stream), r.seed))


Cells: TypeAlias = Mapping[str, Mapping[str, Mapping[str, Cell]]]
"""Protocol -> preset -> stream or fusion -> what its seeds gave."""


def cells(results: Iterable[Result], *, space: str) -> Cells:
    """What the seeds of every preset gave, and the paper's figures.

    The paper's figure is that of keypoints in `space`, or else of the other one.
    """
    table: dict[str, dict[str, dict[str, list[float]]]] = {}
    for result in in_order(results):
        row = table.setdefault(result.protocol, {}).setdefault(result.preset, {})
        row.setdefault(result.stream, []).append(result.top1)
    return {
        protocol: {
            preset: {stream: _cell(values, preset, protocol, stream, space) for stream, values in row.items()}
            for preset, row in rows.items()
        }
        for protocol, rows in table.items()
    }


def _cell(values: Sequence[float], preset: str, protocol: str, stream: str, space: str) -> Cell:
    for kind in (space, "3d" if space == "2d" else "2d"):
        figure = paper.reported(preset, protocol, stream=stream, space=kind)
        if figure is not None:
            return Cell(values=tuple(values), paper=figure, paper_space=kind)
    return Cell(values=tuple(values), paper=None)


def table(results: Iterable[Result]) -> str:
    """Top-1 in percent, a row per protocol, a column per stream and fusion."""
    rows = by_protocol(results)
    columns = _columns(rows.values())
    lines = [
        [protocol, *(f"{100 * row[column]:.1f}" if column in row else "" for column in columns)] for protocol, row in rows.items()
    ]
    return markdown.table(["protocol", *columns], lines) + "\n"


def comparison(cells: Cells) -> str:
    """A table per protocol: presets with mean ± spread over their seeds, the paper's figures in columns of their own."""
    parts = []
    for protocol, rows in cells.items():
        header = ["preset", "seeds"]
        lines = [[preset, str(max(len(cell.values) for cell in row.values()))] for preset, row in rows.items()]
        for column in _columns(rows.values()):
            ours = [row.get(column) for row in rows.values()]
            header.append(column)
            for line, cell in zip(lines, ours, strict=True):
                line.append(percent(cell) if cell else "")
            if any(cell and cell.paper is not None for cell in ours):
                header.append(f"paper {column}")
                for line, cell in zip(lines, ours, strict=True):
                    line.append(f"{100 * cell.paper:.2f} ({cell.paper_space})" if cell and cell.paper is not None else "")
        parts.append(f"## {protocol}\n\n{markdown.table(header, lines)}\n")
    return "\n".join([*parts, NOTE])


NOTE = """\
Held-out top1 of the last epoch in percent; ± is the sample standard deviation over the seeds. Columns marked "paper" are the
figures of the paper for real NTU RGB+D recordings with 2D or 3D keypoints, as marked: nothing here was measured for them.
"""


def percent(cell: Cell) -> str:
    """`89.1 ± 0.4`, or `89.1` with a single seed."""
    return f"{100 * cell.mean:.1f}" + (f" ± {100 * cell.spread:.1f}" if cell.spread is not None else "")


def _columns(rows: Iterable[Iterable[str]]) -> list[str]:
    place = _place([*STREAMS, *FUSIONS])
    return sorted({column for row in rows for column in row}, key=place)


def _place(known: Sequence[str]) -> Callable[[str], tuple[int, str]]:
    return lambda name: (known.index(name) if name in known else len(known), name)
