"""The skeleton set between steps: made once of one state of the recordings, kept in the durable store, read there by range.

KFP copies an artifact whole into every pod that names it, forty times the set in a run of four protocols. Where there is a store
the artifact `data` is a note instead, JSON that says where the set is; a step fetches the columns and the rows that it works on.
In a folder (a volume) the set is read in place. Without a store, on one machine, the artifact is the set itself.
"""

import contextlib
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from components import storage
from ffn.data.store import SkeletonSet, publishing

Rows = NDArray[np.int64]
Note = Mapping[str, Any]
"""`set` (where it is), `size` and `tag` (an object's entity tag), `keypoints` (first byte, bytes), `facts` of the ingestion."""

GAP = 2**18
"""Bytes between two wanted pieces that are fetched with them: a request costs about as much."""


def found(store: str, key: str) -> Note | None:
    """The note of the set made from `key`, if `store` still holds both."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(store, "data", f"{key}.json")
        if storage.remote(store):
            file = Path(scratch, file.name)
            storage.fetch(f"{store}/data/{file.name}", file)
        note = note_in(file)
    return note if note and _mark(note["set"]) == (note["size"], note["tag"]) else None


def keep(store: str, key: str, make: Callable[[Path], Mapping[str, Any]]) -> Note:
    """The set that `make` writes to the file it is given, kept as `key`; what `make` returns are the note's facts."""
    uri, remote = f"{store}/data/{key}", storage.remote(store)
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch if remote else store, "data")
        root.mkdir(parents=True, exist_ok=True)
        file, told = root / f"{key}.arrow", root / f"{key}.json"
        facts = make(file)
        keypoints = SkeletonSet.open(file).keypoints
        assert isinstance(keypoints, np.memmap)
        if remote:
            storage.publish(file, f"{uri}.arrow")
        size, tag = _mark(f"{uri}.arrow")
        where = [keypoints.offset, keypoints.nbytes]
        note = {"set": f"{uri}.arrow", "size": size, "tag": tag, "keypoints": where, "facts": facts}
        # Last: what a kill cuts off before is made anew.
        with publishing(told) as partial:
            partial.write_text(json.dumps(note))
        if remote:
            storage.publish(told, f"{uri}.json")
    return note


def note_in(file: Path) -> Note | None:
    """The note that a file holds; None for a set and for whatever else is no note."""
    try:
        with file.open("rb") as content:
            if content.read(1) != b"{":  # a set is larger than one reads to see that
                return None
        note = json.loads(file.read_text())
    except (OSError, ValueError):
        return None
    return note if {"set", "size", "tag", "keypoints", "facts"} <= note.keys() else None


@contextlib.contextmanager
def opened(data: Path, wanted: Callable[[SkeletonSet], Rows] | None = None) -> Iterator[SkeletonSet]:
    """The set that the artifact `data` is or tells of, with the keypoints of the rows `wanted` (none: no row); others may be zeros.

    `path` of the set is a file as long as the block lasts. Raises `FFNError` where `data` is neither a set nor a note, and where
    the set is gone or was made anew meanwhile.
    """
    note = note_in(data)
    if note is None or not storage.remote(note["set"]):
        yield SkeletonSet.open(note["set"] if note else data)
        return
    (first, count), size = note["keypoints"], note["size"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "set.arrow"
        with path.open("wb") as file:
            file.truncate(size)
        storage.read(note["set"], [(0, first), (first + count, size)], path, tag=note["tag"])
        if wanted:
            bare = SkeletonSet.open(path)
            storage.read(note["set"], pieces(bare, wanted(bare), first), path, tag=note["tag"])
        yield SkeletonSet.open(path)


def pieces(data: SkeletonSet, rows: Rows, first: int) -> list[tuple[int, int]]:
    """The byte ranges, from and up to, of the samples `rows` in the file of a set whose keypoints begin at the byte `first`."""
    width = data.keypoints.itemsize * int(np.prod(data.keypoints.shape[1:]))
    rows = np.unique(rows)
    begins = first + data.starts[rows] * width
    ends = begins + data.persons[rows] * data.frames[rows] * width
    joined: list[tuple[int, int]] = []
    for begin, end in sorted(zip(begins.tolist(), ends.tolist(), strict=True)):
        if joined and begin - joined[-1][1] <= GAP:
            joined[-1] = joined[-1][0], max(end, joined[-1][1])
        else:
            joined.append((begin, end))
    return joined


def _mark(place: str) -> tuple[int, str]:
    if storage.remote(place):
        return storage.mark(place) or (0, "")
    return Path(place).stat().st_size if Path(place).is_file() else 0, ""


def held_out(protocol: str) -> Callable[[SkeletonSet], Rows]:
    """The rows that `protocol` holds out."""
    return lambda data: data.split(protocol).test


def training(protocol: str) -> Callable[[SkeletonSet], Rows]:
    """The rows that `protocol` trains on, and the held-out one that the registered model shows as its example."""
    return lambda data: np.concatenate([(split := data.split(protocol)).train, split.test[:1]])


def example(protocol: str) -> Callable[[SkeletonSet], Rows]:
    """The row that the registered model shows as its example."""
    return lambda data: data.split(protocol).test[:1]
