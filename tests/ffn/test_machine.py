"""What of this machine a process may use: its cores, and code compiled for them."""

import subprocess
import sys
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


@pytest.mark.slow
def test_loops_run_where_openmp_is_not_complete() -> None:
    """numba brings its layer, which is found, but a library that the layer needs is missing: numba's own choice runs the loops."""
    code = """
import importlib.machinery, sys

class Broken(importlib.machinery.ExtensionFileLoader):
    def create_module(self, spec):
        raise ImportError("libgomp.so.1.0.0: cannot open shared object file: No such file or directory")

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "numba.np.ufunc.omppool":
            return importlib.machinery.ModuleSpec(name, Broken(name, "omppool.so"), origin="omppool.so")

sys.meta_path.insert(0, Finder())
import numba, numpy as np
from ffn.machine import compiled_in_parallel

def doubled(x):
    for i in numba.prange(len(x)):
        x[i] *= 2

x = np.ones(9)
for _ in range(2):
    compiled_in_parallel(doubled)(x)
print(x.sum(), numba.threading_layer())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    total, layer = done.stdout.split()
    assert (total, layer != "omp") == ("36.0", True)
    (line,) = [line for line in done.stderr.splitlines() if "OpenMP" in line]
    assert line.startswith("compiled loops without OpenMP's threads: libgomp.so.1.0.0: cannot open")


@pytest.mark.parametrize("error", [AttributeError, OSError, TypeError])
def test_memory_is_kept_where_the_c_library_can(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    machine.keep_memory()

    def missing(name: None) -> None:
        raise error

    monkeypatch.setattr("ctypes.CDLL", missing)
    machine.keep_memory()
