"""The harness: timing two ways in turn, one table, one JSON file per machine.

A group is a module beside this one with `run(scale) -> Iterator[Row]`. It first checks that both ways give the same output
(`require_close`), then times them in turn (`compare`), so that a machine that slows down slows both. At scale `toy` a group
does all of it in seconds: that is what the tests run. It may have `workloads(scale) -> Mapping[str, Callable]`, which
`--profile` puts under torch's profiler, and `draw(rows, path)`, which makes a picture of its rows.
"""

import contextlib
import gc
import importlib
import json
import pkgutil
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike

from ffn.data.store import publishing
from ffn.errors import FFNError
from ffn.machine import cores

Scale = Literal["toy", "quick", "full"]
RESULTS = Path(__file__).parent / "results"
REPEATS: dict[Scale, int] = {"toy": 1, "quick": 5, "full": 15}
"""How often `compare` measures each way."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measured number beside its reference."""

    name: str
    unit: str
    """A unit that ends in `/s` is a rate, more is better; of any other unit less is better."""
    value: float
    """Median of the repeats."""
    best: float
    """The best of the repeats."""
    repeats: int
    threads: int
    reference: str = ""
    """What the reference is."""
    reference_value: float | None = None
    """Median of the reference, measured in turn with ours."""
    reference_best: float | None = None
    """The best of the reference: beside `best`, what a machine says that was never quite at rest."""
    target: float | None = None
    """The ratio that was asked for."""
    limit: float | None = None
    """The value that was asked for."""

    @property
    def ratio(self) -> float | None:
        """How many times better than the reference: faster, or less of the unit."""
        if self.reference_value is None:
            return None
        up, down = (self.value, self.reference_value) if self.unit.endswith("/s") else (self.reference_value, self.value)
        return up / down if down else float("inf")


def compare(
    name: str,
    ours: Callable[[], object],
    theirs: Callable[[], object],
    *,
    reference: str,
    repeats: int,
    unit: str = "ms",
    work: float = 1.0,
    their_work: float | None = None,
    target: float | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Row:
    """Time `ours` and `theirs` in turn, `repeats` times each after one call to warm up; medians.

    With unit `ms` or `s` the value is the time of a call; with a rate such as `clips/s`, `work` of them per call of `ours` and
    `their_work` (default: as many) per call of `theirs`. With `time.thread_time` as `clock`, what one core computes is measured
    by that core's seconds: other work on the machine that takes it away for a while does not count.
    """
    ours(), theirs()
    pairs = [(timed(ours, clock), timed(theirs, clock)) for _ in range(repeats)]
    mine, others = zip(*pairs, strict=True)
    convert, convert_theirs = _converter(unit, work), _converter(unit, work if their_work is None else their_work)
    return Row(
        name=name,
        unit=unit,
        value=convert(statistics.median(mine)),
        best=convert(min(mine)),
        repeats=repeats,
        threads=torch.get_num_threads(),
        reference=reference,
        reference_value=convert_theirs(statistics.median(others)),
        reference_best=convert_theirs(min(others)),
        target=target,
    )


def measured(name: str, values: Sequence[float], unit: str, **others: Any) -> Row:
    """A row of numbers measured elsewhere (memory, percentiles, other processes); `others` are fields of `Row`."""
    best = max if unit.endswith("/s") else min
    return Row(
        name=name, unit=unit, value=statistics.median(values), best=best(values),
        **({"repeats": len(values), "threads": torch.get_num_threads()} | others),
    )  # fmt: skip


def require_close(name: str, ours: ArrayLike, theirs: ArrayLike, *, rtol: float, atol: float = 0.0) -> None:
    """Raise `FFNError` where two ways that are about to be timed do not give the same output."""
    a, b = np.asarray(ours), np.asarray(theirs)
    if a.shape != b.shape or not np.allclose(a, b, rtol=rtol, atol=atol):
        worst = f"largest difference {np.abs(a - b).max():.3g}" if a.shape == b.shape else f"shapes {a.shape} and {b.shape}"
        raise FFNError(f"{name}: ours and the reference differ ({worst}); nothing was timed")


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Let torch compute on `count` threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def groups() -> list[str]:
    """Names of the groups: the modules beside this one."""
    return [
        found.name for found in pkgutil.iter_modules([str(Path(__file__).parent)]) if not found.ispkg and found.name not in _OWN
    ]


def run(group: str, scale: Scale) -> Iterator[Row]:
    """The rows of one group, as they are measured."""
    yield from _module(group).run(scale)


def profile(group: str, scale: Scale) -> dict[str, str]:
    """Where the time of a group's workloads goes: name -> table of the thirty operators that cost most by themselves."""
    workloads: Mapping[str, Callable[[], object]] = getattr(_module(group), "workloads", lambda scale: {})(scale)
    cuda = torch.cuda.is_available()
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * cuda
    tables = {}
    for name, work in workloads.items():
        for _ in range(4):  # the first calls pay for memory that the next ones find
            work()
        with torch.profiler.profile(activities=activities) as recorded:
            work()
            synchronize()
        order = f"self_{'device' if cuda else 'cpu'}_time_total"
        tables[name] = recorded.key_averages().table(sort_by=order, row_limit=30, max_name_column_width=60)
    return tables


def picture(group: str, rows: Sequence[Row], folder: Path) -> list[Path]:
    """Let the group draw its rows, if it has a `draw(rows, path)`, into a file of this machine's in `folder`."""
    draw = getattr(_module(group), "draw", None)
    if draw is None:
        return []
    path = result_path(folder).with_suffix(f".{group}.svg")
    draw(rows, path)
    return [path]


def machine() -> dict[str, Any]:
    """What decides the numbers, without the machine's name."""
    facts: dict[str, Any] = {"cpu": _cpu(), "cores": cores(), "python": platform.python_version(), "torch": torch.__version__}
    return facts | ({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {})


def result_path(folder: Path) -> Path:
    """The file of this machine's results, such as `amd-epyc-zen5-2c.json`."""
    facts = machine()
    name = f"{facts['cpu']} {facts['cores']}c {facts.get('gpu', '')}"
    return folder / f"{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}.json"


def record(path: Path, group: str, scale: Scale, rows: Iterable[Row]) -> None:
    """Put `rows` in place of the group's former ones in the file at `path`; the other groups' stay."""
    known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    entry = {
        "commit": _commit(),
        "date": datetime.now(UTC).date().isoformat(),
        "scale": scale,
        "rows": [asdict(row) | {"ratio": row.ratio} for row in rows],
    }
    text = json.dumps({"machine": machine(), "groups": dict(sorted((known.get("groups", {}) | {group: entry}).items()))}, indent=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    with publishing(path) as partial:
        partial.write_text(text + "\n", encoding="utf-8")


def table(rows: Iterable[Row]) -> str:
    """The rows as a Markdown table."""
    lines: list[tuple[str, ...]] = [("what", "unit", "median", "best", "reference", "its median", "ratio", "asked", "n", "threads")]
    lines.append(("---", "---", *["---:"] * 2, "---", *["---:"] * 5))
    for row in rows:
        ratio, target = (f"{x:.3g}x" if x is not None else "" for x in (row.ratio, row.target))
        target = target or (_short(row.limit) if row.limit is not None else "")
        theirs = _short(row.reference_value) if row.reference_value is not None else ""
        numbers = (_short(row.value), _short(row.best), row.reference, theirs, ratio, target, str(row.repeats), str(row.threads))
        lines.append((row.name, row.unit, *numbers))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


_OWN = ("__main__", "harness")
_ZEN = {"23": "Zen2", "25": "Zen3", "26": "Zen5"}
_ZEN4 = {*range(0x10, 0x20), *range(0x60, 0x80), *range(0xA0, 0xB0)}
"""Models of family 25 that are of the fourth generation."""


def _module(group: str) -> Any:
    if group not in groups():
        raise FFNError(f"no group {group!r}: expected some of {', '.join(groups())}")
    return importlib.import_module(f"benchmarks.{group}")


def timed(call: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of one call."""
    gc.collect()
    synchronize()
    began = clock()
    call()
    synchronize()
    return clock() - began


def _converter(unit: str, work: float) -> Callable[[float], float]:
    if unit.endswith("/s"):
        return lambda seconds: work / seconds
    factor = {"s": 1.0, "ms": 1e3, "us": 1e6}[unit]
    return lambda seconds: seconds * factor / work


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _cpu() -> str:
    """Model of the processor; AMD's server name says nothing, so the generation is added."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    facts = dict(re.findall(r"^(model name|vendor_id|cpu family|model)\s*: (.*)$", text, re.MULTILINE))
    name = re.sub(r"\((R|TM)\)| CPU| Processor|@.*", "", facts.get("model name", platform.machine())).strip()
    if facts.get("vendor_id") != "AuthenticAMD":
        return name
    family = facts.get("cpu family", "")
    zen = "Zen4" if family == "25" and int(facts.get("model", "0")) in _ZEN4 else _ZEN.get(family, "")
    return f"{name} {zen}".strip()


def _commit() -> str:
    """The commit that was measured, with `+` where files differ from it."""
    try:
        said = subprocess.run(
            ["git", "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"],
            cwd=Path(__file__).parent, capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return said.stdout.strip()
