"""The benchmark harness; and every group at toy size, whose checks of equal output are the point."""

import json
import time

import pytest
import torch

from benchmarks import harness
from benchmarks.__main__ import main
from benchmarks.harness import Row
from ffn.errors import FFNError


def row(name="a", unit="clips/s", value=60.0, reference_value=20.0, **others):
    return Row(name=name, unit=unit, value=value, best=value, repeats=3, threads=1, reference_value=reference_value, **others)


@pytest.mark.slow
@pytest.mark.parametrize("group", harness.groups())
def test_every_group_agrees_with_its_reference(group, tmp_path):
    rows = list(harness.run(group, "toy"))
    assert harness.picture(group, rows, tmp_path) == list(tmp_path.iterdir())
    assert len({row.name for row in rows}) == len(rows) > 0
    assert all(row.value > 0 for row in rows if row.unit not in ("", "MB")), "memory and slopes say nothing at this size"


def test_ratio_is_how_many_times_better():
    assert row().ratio == 3
    assert row(unit="ms").ratio == pytest.approx(1 / 3)
    assert row(reference_value=None).ratio is None


def test_compare_times_both_in_turn():
    calls = []
    made = harness.compare(
        "x", lambda: calls.append("ours"), lambda: (calls.append("theirs"), time.sleep(0.01)),
        reference="sleep", repeats=3, unit="clips/s", work=10, their_work=1, target=2.0,
    )  # fmt: skip
    assert calls == ["ours", "theirs"] * 4, "one call each to warm up, then in turn"
    assert made.reference_value < 100
    assert made.ratio > 10
    assert (made.repeats, made.target) == (3, 2.0)


def test_unequal_output_is_not_timed():
    harness.require_close("x", torch.ones(3), torch.ones(3) + 1e-7, rtol=1e-6)
    with pytest.raises(FFNError, match=r"x: ours and the reference differ \(largest difference 0.5\)"):
        harness.require_close("x", [1, 2], [1, 2.5], rtol=1e-6)
    with pytest.raises(FFNError, match="shapes"):
        harness.require_close("x", [1, 2], [1], rtol=1e-6)


def test_a_group_replaces_its_own_rows_only(tmp_path):
    path = tmp_path / "deep" / "machine.json"
    harness.record(path, "data", "full", [row("old")])
    harness.record(path, "network", "quick", [row("other", unit="ms")])
    harness.record(path, "data", "full", [row("new", target=30.0)])
    found = json.loads(path.read_text())
    assert list(found["groups"]) == ["data", "network"]
    assert [(r["name"], r["ratio"], r["target"]) for r in found["groups"]["data"]["rows"]] == [("new", 3.0, 30.0)]
    assert found["machine"]["torch"] == torch.__version__
    assert list(path.parent.iterdir()) == [path]


def test_results_do_not_name_the_machine():
    import socket

    assert socket.gethostname() not in json.dumps(harness.machine())
    assert harness.result_path(harness.RESULTS).suffix == ".json"


def test_table_has_a_line_per_row():
    lines = harness.table([row(), row("b", reference_value=None)]).splitlines()
    assert len(lines) == 4
    assert lines[2].split(" | ")[:4] == ["| a", "clips/s", "60", "60"]
    assert "3x" in lines[2]
    assert len({line.count("|") for line in lines}) == 1


def test_unknown_group(capsys):
    assert main(["nonsense"]) == 2
    assert "no group 'nonsense': expected some of" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("family", "model", "zen"), [(25, 1, "Zen3"), (25, 17, "Zen4"), (25, 160, "Zen4"), (26, 2, "Zen5"), (15, 1, "")]
)
def test_amds_generations_are_told_apart(family, model, zen, tmp_path, monkeypatch):
    """Results of one must not go into the file of another."""
    said = tmp_path / "cpuinfo"
    said.write_text(f"vendor_id\t: AuthenticAMD\ncpu family\t: {family}\nmodel\t\t: {model}\nmodel name\t: AMD EPYC\n")
    monkeypatch.setattr(harness, "Path", lambda path: said)
    assert harness._cpu() == f"AMD EPYC {zen}".strip()
