"""What of this machine a process may use: its cores, and code compiled for them."""

import os
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


V3 = dict.fromkeys(machine.LEVELS["x86-64-v3"], True)
V4 = V3 | dict.fromkeys(machine.LEVELS["x86-64-v4"], True)


@pytest.mark.parametrize(
    ("able", "level"),
    [(V4, "x86-64-v4"), (V3, "x86-64-v3"), (V3 | {"avx512f": True}, "x86-64-v3"), (V4 | {"fma": False}, None), ({}, None)],
)
def test_a_processor_is_of_the_best_level_whose_instructions_it_has(
    able: dict[str, bool], level: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llvmlite.binding.get_host_cpu_features", lambda: able)
    assert machine.level() == level


@pytest.mark.parametrize(
    ("target", "able", "wide"),
    [(None, V4, True), (None, V3, False), ("x86-64-v4", {}, True), ("x86-64-v3", V4, False)],
)
def test_vectors_are_those_of_the_processor_that_is_compiled_for(
    target: str | None, able: dict[str, bool], wide: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llvmlite.binding.get_host_cpu_features", lambda: able)
    monkeypatch.setattr(numba.config, "CPU_NAME", target)
    assert machine.wide_vectors() is wide


@pytest.mark.slow
@pytest.mark.skipif(machine.level() is None, reason="no x86-64 processor of level 3")
def test_an_images_loops_are_found_compiled_and_stay_as_they_are(tmp_path: Path) -> None:
    """Compiled for the level when the image is built; in a pod another process finds them, and compiles what is missing."""
    (tmp_path / "loops.py").write_text("from ffn.machine import compiled\n\n@compiled\ndef total(x):\n    return x.sum()\n")
    shipped, level = tmp_path / "compiled", str(machine.level())

    def run(code: str, **environment: str) -> list[str]:
        path = os.pathsep.join([str(tmp_path), *sys.path])
        clean = {name: value for name, value in os.environ.items() if not name.startswith("NUMBA_")}
        done = subprocess.run(
            [sys.executable, "-c", code], env=clean | {"PYTHONPATH": path, "TMPDIR": str(tmp_path)} | environment,
            capture_output=True, text=True,
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout.split()

    run(
        "import numpy as np; from loops import total; total(np.ones(3, np.float32))",
        NUMBA_CPU_NAME=level, NUMBA_CPU_FEATURES=machine.FEATURES, NUMBA_CACHE_DIR=str(shipped / level),
    )  # fmt: skip
    before = {path: path.read_bytes() for path in shipped.rglob("*") if path.is_file()}
    assert before
    said = run(f"""
import numpy as np, numba, pathlib
from ffn import machine
machine.SHIPPED = pathlib.Path({str(shipped)!r})
from loops import total
print(total(np.ones(3, np.float32)), *map(len, (total.stats.cache_hits, total.stats.cache_misses)))
print(total(np.ones(3)), *map(len, (total.stats.cache_hits, total.stats.cache_misses)))
print(numba.config.CPU_NAME)
""")
    assert said == ["3.0", "1", "0", "3.0", "1", "1", level]
    assert {path: path.read_bytes() for path in shipped.rglob("*") if path.is_file()} == before
    assert {path.name for path in tmp_path.iterdir()} <= {"compiled", "loops.py", "__pycache__"}


@pytest.mark.parametrize("error", [AttributeError, OSError, TypeError])
def test_memory_is_kept_where_the_c_library_can(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    machine.keep_memory()

    def missing(name: None) -> None:
        raise error

    monkeypatch.setattr("ctypes.CDLL", missing)
    machine.keep_memory()
