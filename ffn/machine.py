"""What of this machine a process may use: its cores, and code compiled for them."""

import ctypes
import functools
import importlib
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

QUOTA = Path("/sys/fs/cgroup/cpu.max")
"""What a container's CPU limit is written to, as microseconds of every so many, or `max`."""


def cores() -> int:
    """Processor cores that this process may use, at least 1: those of its affinity, fewer where its container's limit is lower.

    A pod of two CPUs sees every core of its node, and a process for each would outgrow the pod's memory.
    """
    seen = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(seen, math.ceil(_limit())))


def _limit() -> float:
    try:
        quota, period = QUOTA.read_text().split()
        return int(quota) / int(period)
    except (OSError, ValueError):  # not Linux, cgroups of the first version, or `max`
        return os.cpu_count() or 1


def keep_memory() -> None:
    """Let this process keep what it frees for its next use, where the C library is glibc.

    A step of training frees a gigabyte and asks for it again; given back to the kernel, every page of it is cleared and
    mapped anew.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        return
    for option, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_TOP_PAD, 2**26)):
        mallopt(option, value)


_REORDERED = {"contract", "reassoc", "nsz"}
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # malloc.h


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, of numbers and numpy arrays, as machine code; kept on disk for other processes where there is a place for it.

    Indices are not checked. Sums and products may be fused, nothing else of their rounding changes.
    """
    return _compiled(function)


def compiled_sums(function: Callable[..., Any]) -> Callable[..., Any]:
    """`compiled`; sums may be taken in another order than the one they are written in, the same in every run.

    It goes into every compiled function that calls it: a process that compiles would otherwise call a copy optimised on its own,
    one that finds the caller in the cache the caller's own copy, and their sums could be in two orders.
    """
    return _compiled(function, fastmath=_REORDERED, forceinline=True)


def compiled_in_parallel(function: Callable[..., Any]) -> Callable[..., Any]:
    """`compiled`, the passes of its `prange` shared by threads, as many as numba is told (`numba.set_num_threads`).

    The order of its sums is the one they are written in: numba optimises such a function once more when it keeps it on disk, and
    with another order allowed a process that finds it there would get other last digits than the one that compiled it.
    Where they can be the threads are OpenMP's, those torch computes on: others would compete for the cores with them, which
    go on waiting for a while after each operator.
    """
    _prefer_openmp()
    return _compiled(function, parallel=True)


@functools.cache
def _prefer_openmp() -> None:
    """Have numba take OpenMP's threads where they can be loaded; a library that they need may be missing, as in slim images."""
    import numba

    try:
        importlib.import_module("numba.np.ufunc.omppool")
    except ModuleNotFoundError:  # numba was built without them
        return
    except ImportError as error:
        print(f"compiled loops without OpenMP's threads: {error}", file=sys.stderr, flush=True)
        return
    numba.config.THREADING_LAYER = "omp"  # type: ignore[attr-defined]  # made when numba starts


def _compiled(function: Callable[..., Any], **settings: Any) -> Callable[..., Any]:
    from numba import njit

    every: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": {"contract"}} | settings
    try:
        made: Callable[..., Any] = njit(function, cache=True, **every)
    except RuntimeError:  # no place: not beside the code, not NUMBA_CACHE_DIR, not the home folder
        made = njit(function, **every)
    return made
