"""The paper's rows as data, and the counts of the networks they name."""

import sys
from decimal import Decimal
from pathlib import Path

import pytest

from ffn import paper
from ffn.config import PRESETS, S1_ALPHA
from ffn.errors import FFNError
from pipeline import cli

COUNTS = {
    "S0": (3_088_704, 3.8222),
    "S0-2": (1_093_328, 1.4993),
    "S1": (3_414_643, 4.2047),
    "S2": (1_419_267, 1.8818),
    "S3-cvsta": (2_218_371, 1.9364),
    "S3-drop": (1_419_267, 1.8818),
    "S3-mscam": (2_484_739, 2.5065),
    "S3-aff4": (2_102_723, 2.4616),
    "S3-aff2": (2_366_979, 2.6161),
    "S3-aff1": (2_895_491, 2.9252),
    "ST-GCN++": (1_393_016, 1.9477),
    "2s-AGCN": (3_459_344, 4.3488),
    "AAGCN": (3_760_228, 4.3515),
    "CTR-GCN": (1_436_496, 1.9521),
    "MS-G3D": (2_975_763, 6.8396),
}
ALL = {row.name: row for row in paper.merged()}


def counted(name: str) -> tuple[float, float]:
    parameters, macs = paper.count(PRESETS[ALL[name].preset].model)
    return parameters / 1e6, macs / 1e9


@pytest.mark.parametrize("name", COUNTS)
def test_counts(name):
    parameters, macs = paper.count(PRESETS[name].model)
    assert (parameters, round(macs / 1e9, 4)) == COUNTS[name]


@pytest.mark.parametrize("name", ["S0", "S0-2", "S1", "S2", "S3(CVSTA)", "S3(Drop-att)"])
def test_both_columns_are_the_papers_at_its_digits(name):
    parameters, macs = counted(name)
    assert (f"{parameters:.2f}", f"{macs:.2f}") == (ALL[name].parameters, ALL[name].macs)


@pytest.mark.parametrize("name", ["S3(MS-CAM)", "S3(AFF-4)", "S3(AFF-2)", "S3(AFF-1)"])
def test_attention_stays_within_a_hundredth(name):
    parameters, macs = counted(name)
    assert macs == pytest.approx(float(ALL[name].macs), abs=0.01)
    missing = 0 if name == "S3(MS-CAM)" else 0.459  # what the page says of AFF
    assert f"{parameters + missing:.2f}" == ALL[name].parameters


def test_every_row_is_a_preset_and_every_preset_a_row():
    assert {row.preset for row in paper.ROWS} == set(PRESETS) - {"S4-small"}
    assert [PRESETS[f"S1-alpha{tenth / 10}"].model.alpha for tenth in range(11) if tenth != 2] == [
        config.model.alpha for config in S1_ALPHA
    ]
    for row in paper.ROWS:
        assert PRESETS[row.preset].training.epochs == (110 if "Two-stage" in row.name or row.preset == "S4" else 80), row


def test_tables_agree_on_rows_they_share():
    for row in paper.ROWS:
        whole = ALL[row.name]
        assert row.preset == whole.preset
        assert row.parameters in ("", whole.parameters)
        assert row.macs in ("", whole.macs)
        assert row.top5 in ("", whole.top5)
        assert row.top1 == whole.top1[: len(row.top1)]


def test_s4_alone_is_proposed_j():
    """Table 8 gives one digit of Table 7, columns as corrected."""
    assert [Decimal(percent).quantize(Decimal("0.1")) for percent in ALL["S4"].top1] == [
        Decimal(percent) for percent in ALL["Proposed(j)"].top1
    ]


def test_reported_accuracy():
    assert paper.reported("S4", "ntu60-xsub") == pytest.approx(0.9279)
    assert paper.reported("S4", "ntu60-xsub", stream="4s") == pytest.approx(0.9424)
    assert paper.reported("S4", "ntu120-xset", space="3d") == pytest.approx(0.8452)
    assert paper.reported("S3-aff1", "ntu120-xsub") == pytest.approx(0.8538)
    assert paper.reported("S3-aff2", "ntu120-xsub") is None
    assert paper.reported("S2", "ntu60-xsub", stream="b") is None
    assert paper.reported("CTR-GCN", "ntu60-xsub") is None, "the paper does not say which streams"
    assert paper.reported("S0", "ntu60-xsub") == pytest.approx(0.8905), "not Table 8's ST-GCN"
    assert paper.reported("S4-small", "ntu60-xsub") is None
    assert paper.reported("S2", "ucla-xview") is None


def test_the_page_is_current(tmp_path):
    assert cli.main(["paper", "--markdown", str(tmp_path / "new" / "paper.md")]) == 0
    page = Path(__file__).parents[2] / "docs" / "paper.md"
    assert page.read_text() == (tmp_path / "new" / "paper.md").read_text(), "write it anew: ffn paper --markdown docs/paper.md"


def test_the_command_prints_every_row(capsys):
    assert cli.main(["paper"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(ALL) + 2
    (mscam,) = (line for line in lines if "S3-mscam" in line)
    assert [cell.strip() for cell in mscam.split("|")[3:-1]] == ["3, 5", "2.4847", "2.48", "0", "2.5065", "2.50", "+0.01"]


def test_counting_without_fvcore_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "fvcore.nn", None)
    with pytest.raises(FFNError, match="fvcore"):
        paper.count.__wrapped__(PRESETS["S2"].model)
