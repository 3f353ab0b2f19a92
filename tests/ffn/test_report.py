"""Tables of what a run found: ours and the paper's are never mixed."""

import statistics

import pytest

from ffn import plots, report
from ffn.report import Result


def found(preset: str, seed: int, top1: float, *, protocol: str = "ntu60-xsub", stream: str = "j") -> Result:
    return Result(preset=preset, protocol=protocol, stream=stream, seed=seed, top1=top1)


RESULTS = [
    found("S4", 0, 0.80),
    found("S0", 0, 0.70),
    found("S0", 1, 0.72),
    found("S0", 2, 0.77),
    found("S4", 0, 0.85, stream="4s"),
    found("mine", 0, 0.5, protocol="my-split"),
]


def rows(text: str) -> dict[str, list[str]]:
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    return {line[0]: line[1:] for line in lines}


def test_a_run_of_one_training_per_stream_is_a_table_of_protocols() -> None:
    results = [found("S4", 0, 0.812, stream=stream) for stream in ("4s", "bm", "j")]
    assert not report.compares(results)
    assert rows(report.table(results)) == {
        "protocol": ["j", "bm", "4s"], "----------": ["---:"] * 3, "ntu60-xsub": ["81.2"] * 3,
    }  # fmt: skip


def test_a_comparison_gives_mean_and_spread_over_seeds() -> None:
    assert report.compares(RESULTS)
    cells = report.cells(RESULTS, space="2d")
    cell = cells["ntu60-xsub"]["S0"]["j"]
    assert cell.values == (0.70, 0.72, 0.77)
    assert cell.mean == pytest.approx(0.73)
    assert cell.spread == pytest.approx(statistics.stdev([0.70, 0.72, 0.77]))
    assert cells["ntu60-xsub"]["S4"]["j"].spread is None
    first = report.comparison(cells).split("## my-split")[0]
    assert rows(first)["S0"][:2] == ["3", "73.0 ± 3.6"]


def test_the_papers_figures_stand_in_columns_of_their_own_and_change_nothing_of_ours() -> None:
    cells = report.cells(RESULTS, space="3d")
    text = report.comparison(cells)
    ntu, mine = text.split("## my-split")
    assert rows(ntu)["preset"] == ["seeds", "j", "paper j", "4s", "paper 4s"]
    assert rows(ntu)["S4"] == ["1", "80.0", "88.89 (3d)", "85.0", "94.24 (2d)"]
    assert rows(ntu)["S0"][2:] == ["89.05 (2d)", "", ""]
    assert "paper" not in mine.split("\n\n")[1]
    assert cells["ntu60-xsub"]["S4"]["j"].values == (0.80,)
    assert cells["ntu60-xsub"]["S4"]["j"].paper == pytest.approx(0.8889)


def test_presets_stand_in_the_papers_order_and_protocols_in_the_houses() -> None:
    cells = report.cells(reversed(RESULTS), space="2d")
    assert list(cells) == ["ntu60-xsub", "my-split"]
    assert list(cells["ntu60-xsub"]) == ["S0", "S4"]


def test_the_figure_draws_every_seed_and_the_paper() -> None:
    figure = plots.comparison(report.cells(RESULTS, space="2d"))
    left, right = figure.axes
    assert left.get_title(loc="left") == "ntu60-xsub: j, top1 %"
    assert right.get_title(loc="left") == "my-split: j, top1 %"
    dots = sorted(y for line in left.lines if line.get_marker() == "o" for y in line.get_ydata())
    assert dots == pytest.approx([70, 72, 77, 80])
    assert [line.get_ydata()[0] for line in left.lines if line.get_marker() == "D"] == pytest.approx([89.05, 92.79])
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["paper, 2d"]
