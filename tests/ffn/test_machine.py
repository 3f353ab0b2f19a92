"""What of this machine a process may use."""

from pathlib import Path

import pytest

from ffn import machine


@pytest.mark.parametrize(
    ("said", "most"), [("200000 100000\n", 2), ("50000 100000\n", 1), ("150000 100000\n", 2), ("max 100000\n", 64), ("", 64)]
)
def test_a_containers_limit_counts(said: str, most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if said:
        (tmp_path / "cpu.max").write_text(said)
    monkeypatch.setattr(machine, "QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(64)), raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    assert machine.cores() == most
