"""What of this machine a process may use: its cores, and code compiled for them."""

import math
import os
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


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, of numbers and numpy arrays, as machine code; kept on disk for other processes where there is a place for it.

    Indices are not checked. Sums and products may be fused, nothing else of their rounding changes.
    """
    from numba import njit

    settings: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": {"contract"}}
    try:
        made: Callable[..., Any] = njit(function, cache=True, **settings)
    except RuntimeError:  # no place: not beside the code, not NUMBA_CACHE_DIR, not the home folder
        made = njit(function, **settings)
    return made
