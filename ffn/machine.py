"""What of this machine a process may use."""

import math
import os
from pathlib import Path

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
