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

MAGIC = b"ARROW1"
"""How a set begins; a note is JSON."""

GAP = 2**18
"""Bytes between two wanted pieces that are fetched with them: a request costs about as much."""


def found(store: str, key: str) -> Note | None:
    """The note of the set made from `key`, if `store` still holds both."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "note"
        if storage.remote(store):
            if not storage.fetch(f"{store}/data/{key}.json", file):
                return None
        else:
            file = Path(store) / "data" / f"{key}.json"
        try:
            note: Note = json.loads(file.read_text())
            whole = _mark(note["set"]) == (note["size"], note["tag"])
        except (OSError, ValueError, KeyError, TypeError):
            return None
    return note if whole else None


def keep(store: str, key: str, make: Callable[[Path], Mapping[str, Any]]) -> Note:
    """The set that `make` writes to the file it is given, kept as `key`; what `make` returns are the note's facts."""
    uri = f"{store}/data/{key}.arrow"
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "set" if storage.remote(store) else Path(uri)
        facts = make(file)
        if storage.remote(store):
            storage.publish(file, uri)
        keypoints = SkeletonSet.open(file).keypoints
        size, tag = _mark(uri)
        note = {"set": uri, "size": size, "tag": tag, "keypoints": [keypoints.offset, keypoints.nbytes], "facts": facts}  # type: ignore[attr-defined]
        # Last: what a kill cuts off before is made anew.
        told = Path(f"{scratch if storage.remote(store) else store}/data/{key}.json")
        told.parent.mkdir(parents=True, exist_ok=True)
        with publishing(told) as partial:
            partial.write_text(json.dumps(note))
        if storage.remote(store):
            storage.publish(told, f"{store}/data/{key}.json")
    return note


@contextlib.contextmanager
def opened(data: Path, wanted: Callable[[SkeletonSet], Rows] | None = None) -> Iterator[SkeletonSet]:
    """The set that the artifact `data` is or tells of, with the keypoints of the rows `wanted` (none: no row); others may be zeros.

    `path` of the set is a file as long as the block lasts. Raises `FFNError` where the set is gone or was made anew meanwhile.
    """
    with data.open("rb") as file:
        note = None if file.read(len(MAGIC)) == MAGIC else json.loads(data.read_text())
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
    return Path(place).stat().st_size, ""


def held_out(protocol: str) -> Callable[[SkeletonSet], Rows]:
    """The rows that `protocol` holds out."""
    return lambda data: data.split(protocol).test


def training(protocol: str) -> Callable[[SkeletonSet], Rows]:
    """The rows that `protocol` trains on, and the held-out one that the registered model shows as its example."""
    return lambda data: np.concatenate([(split := data.split(protocol)).train, split.test[:1]])


def example(protocol: str) -> Callable[[SkeletonSet], Rows]:
    """The row that the registered model shows as its example."""
    return lambda data: data.split(protocol).test[:1]
