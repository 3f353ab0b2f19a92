"""What every reader hands to `ffn.data.ingest`, and how readers walk over the files of a folder or a zip."""

import concurrent.futures
import concurrent.futures.process
import contextlib
import hashlib
import multiprocessing
import os
import zipfile
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ffn.data.persons import canonical_persons, unpadded
from ffn.data.store import Sample, Space
from ffn.errors import FFNError
from ffn.layouts import Layout

if TYPE_CHECKING:
    from hashlib import _Hash

NOBODY = "nobody visible"
NOT_FINITE = "NaN, infinite or too large joint"
UNREADABLE = "unreadable"

_LARGEST = float(np.finfo(np.float16).max)


@dataclass(frozen=True, kw_only=True)
class Dropped:
    """A sample or file that was left out."""

    where: str
    """File or sample, with the line where there is one."""
    reason: str
    """The kind of fault, the same words for every sample that has it."""
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}" + (f": {self.detail}" if self.detail else "")


class Unusable(FFNError):
    """One sample cannot be used; others can."""

    def __init__(self, where: str, reason: str, detail: str = "") -> None:
        self.dropped = Dropped(where=where, reason=reason, detail=detail)
        super().__init__(str(self.dropped))


@dataclass(frozen=True, kw_only=True)
class Source:
    """An opened source of recordings: what is known before the first sample is read, and the samples."""

    reader: str
    layout: Layout
    space: Space
    classes: tuple[str, ...]
    protocols: tuple[str, ...]
    items: Iterable[Sample | Dropped]
    """Read once, in an order that depends on the content alone."""
    total: int | None = None
    """Items to come, where that is known."""
    content: "_Hash" = field(default_factory=hashlib.sha256)
    """Hash of names and bytes; complete when `items` is exhausted."""


def arrange(keypoints: NDArray[Any], space: Space, where: str) -> NDArray[Any]:
    """Keypoints (M, T, V, 3) as the store keeps them, two persons at most: 3D by `canonical_persons`, 2D by `unpadded`.

    Raises `Unusable` where nobody is visible.
    """
    if keypoints.size:
        kept = canonical_persons(keypoints) if space == "3d" else unpadded(keypoints)
        if kept.size:
            return kept
    raise Unusable(where, NOBODY)


def file_names(path: Path, suffix: str) -> list[str]:
    """Sorted names of the files in a folder (and its subfolders) or zip that end in `suffix`; hidden ones are left out."""
    if path.is_dir():
        names = [file.relative_to(path).as_posix() for file in path.rglob(f"*{suffix}") if file.is_file()]
    else:
        try:
            with zipfile.ZipFile(path) as archive:
                names = [name for name in archive.namelist() if name.endswith(suffix)]
        except (zipfile.BadZipFile, OSError) as error:
            raise FFNError(f"{path}: not a zip file that can be read ({error})") from None
    return sorted(name for name in names if not any(part.startswith((".", "__MACOSX")) for part in name.split("/")))


def each_file(
    path: Path, names: Sequence[str], parse: Callable[[str, bytes], Sample], content: "_Hash", workers: int
) -> Iterator[Sample | Dropped]:
    """`parse(name, bytes)` of every file of a folder or zip, in the order of `names`, whatever the number of `workers`.

    `parse` can be pickled. A file that raises `Unusable` is yielded as dropped. At most a few batches are in memory.
    """
    batches = [names[start : start + _BATCH] for start in range(0, len(names), _BATCH)]
    for batch in _batches(path, batches, parse, min(workers, len(names) // _FILES_PER_WORKER)):
        for name, digest, item in batch:
            content.update(f"{name}\0{digest}\n".encode())
            yield item


def stem(name: str) -> str:
    """`a/b.c` -> `b`."""
    return PurePosixPath(name).stem


_BATCH = 8
_FILES_PER_WORKER = 1000  # fewer are parsed sooner than a process has imported the main program
_Parsed = list[tuple[str, str, Sample | Dropped]]


def _batches(
    path: Path, batches: Sequence[Sequence[str]], parse: Callable[[str, bytes], Sample], workers: int
) -> Iterator[_Parsed]:
    if workers < 2:
        with _opened(path) as read:
            for batch in batches:
                yield _parse_batch(read, parse, batch)
        return
    # Not forked: the caller may hold threads (torch, Arrow, MLflow), whose locks a forked child would inherit.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, context, _start_worker, (path, parse)) as pool:
        pending: deque[concurrent.futures.Future[_Parsed]] = deque()
        try:
            for batch in batches:
                pending.append(pool.submit(_work, batch))
                if len(pending) >= 3 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except concurrent.futures.process.BrokenProcessPool:
            raise FFNError(
                f"{path}: a reading process died, of memory or of a main script without a main guard; use workers=1"
            ) from None
        finally:
            for future in pending:
                future.cancel()


_worker: tuple[Callable[[str], bytes], Callable[[str, bytes], Sample]]
_worker_files = contextlib.ExitStack()  # keeps the archive open for as long as the worker lives


def _start_worker(path: Path, parse: Callable[[str, bytes], Sample]) -> None:
    global _worker
    _worker = _worker_files.enter_context(_opened(path)), parse


def _work(names: Sequence[str]) -> _Parsed:
    return _parse_batch(*_worker, names)


def _parse_batch(read: Callable[[str], bytes], parse: Callable[[str, bytes], Sample], names: Sequence[str]) -> _Parsed:
    return [(name, *_parse_file(read, parse, name)) for name in names]


def _parse_file(read: Callable[[str], bytes], parse: Callable[[str, bytes], Sample], name: str) -> tuple[str, Sample | Dropped]:
    try:
        data = read(name)
    except (OSError, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:  # RuntimeError: an encrypted entry
        return "", Dropped(where=name, reason=UNREADABLE, detail=str(error).replace(os.linesep, " "))
    try:
        return hashlib.sha256(data).hexdigest(), parse(name, data)
    except Unusable as error:
        return hashlib.sha256(data).hexdigest(), error.dropped


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Callable[[str], bytes]]:
    if path.is_dir():
        yield lambda name: (path / name).read_bytes()
    else:
        with zipfile.ZipFile(path) as archive:
            yield archive.read


def not_finite(values: NDArray[Any]) -> NDArray[np.bool_]:
    """Where a value is NaN, infinite, or becomes so in float16."""
    return np.asarray(~(np.abs(values) <= _LARGEST))


def check_finite(keypoints: NDArray[Any], layout: Layout, where: str) -> None:
    """Raise `Unusable` with person, frame and joint of the first value that is not finite."""
    bad = not_finite(keypoints)
    if not bad.any():
        return
    m, t, v, _ = np.argwhere(bad)[0]
    raise Unusable(where, NOT_FINITE, f"person {m}, frame {t}, {layout.joints[v]}")
