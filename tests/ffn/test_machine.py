"""What of this machine a process may use: its cores, and code compiled for them."""

from pathlib import Path

import numba
import numpy as np
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


def test_code_is_compiled_where_nothing_can_be_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """numba refuses to cache where it finds no folder that it may write to."""

    def njit(function, *, cache=False, **settings):
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return numba_njit(function, **settings)

    numba_njit = numba.njit
    monkeypatch.setattr(numba, "njit", njit)
    assert machine.compiled(lambda x: x.sum())(np.arange(4)) == 6


@pytest.mark.parametrize("error", [AttributeError, OSError, TypeError])
def test_memory_is_kept_where_the_c_library_can(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    machine.keep_memory()

    def missing(name: None) -> None:
        raise error

    monkeypatch.setattr("ctypes.CDLL", missing)
    machine.keep_memory()
