"""SkeletonSet: the ingested data as one memory-mappable Arrow file, and its writer.

One record batch, one row per sample. Column `keypoints` is a large list of float16 whose values are one contiguous
buffer; a sample's values are (M, T, V, C) in C order. Split columns are called `split:<protocol>` and hold `train`,
`test` or null. Layout, space, classes and provenance are JSON in the schema metadata under `ffn`.
Source: Arrow columnar format 1.5, IPC file.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ffn.errors import FFNError
from ffn.layouts import Layout

FORMAT_VERSION = 1
CHANNELS = 3
"""3D: x, y, z in metres. 2D: x, y in pixels and a score in [0, 1]."""

Space = Literal["2d", "3d"]
Part = Literal["train", "test"]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One recording as a reader hands it over."""

    id: str
    label: int
    """Index into the set's classes."""
    keypoints: NDArray[np.floating[Any]]
    """(M, T, V, 3); M is 1 or 2, T at least 1, all finite."""
    splits: Mapping[str, Part] = field(default_factory=dict)
    """Protocol -> the part this sample belongs to; absent where it takes no part."""
    image_size: tuple[int, int] | None = None
    """2D: (width, height) in pixels."""


@dataclass(frozen=True, kw_only=True)
class Split:
    """A protocol's view of a set: the samples that train and those held out, labels counted over its own classes."""

    protocol: str
    classes: tuple[str, ...]
    """Names of the classes that the protocol's samples carry, in the set's order."""
    labels: NDArray[np.int64]
    """(len(set),) index into `classes`; -1 where the sample takes no part."""
    train: NDArray[np.int64]
    """Row numbers of the training samples."""
    test: NDArray[np.int64]
    """Row numbers of the held-out samples."""


@dataclass(frozen=True, kw_only=True)
class SkeletonSet:
    """An open set: columns in memory, keypoints mapped from the file."""

    path: Path
    layout: Layout
    space: Space
    classes: tuple[str, ...]
    digest: str
    """Sixteen hex digits that name the content: samples, labels, splits, layout, classes."""
    provenance: Mapping[str, Any]
    """Where the data came from: source, reader, source digest, version of ffn."""
    protocols: tuple[str, ...]
    ids: pa.StringArray
    labels: NDArray[np.int64]
    """(N,) index into `classes`."""
    frames: NDArray[np.int64]
    """(N,) frames T of each sample."""
    persons: NDArray[np.int64]
    """(N,) persons M of each sample, 1 or 2."""
    starts: NDArray[np.int64]
    """(N,) row of `keypoints` at which each sample begins; person m, frame t is row start + m * T + t."""
    image_sizes: NDArray[np.int64]
    """(N, 2) width and height in pixels; 0 in 3D."""
    keypoints: NDArray[np.float16]
    """(R, V, 3): every person's every frame, one row each, mapped copy-on-write."""
    splits: Mapping[str, pa.Array]
    """Protocol -> (N,) `train`, `test` or null."""

    @classmethod
    def open(cls, path: Path | str) -> Self:
        """Open the file at `path` by memory map. Raises `FFNError` where it is not a skeleton set."""
        path = Path(path)
        if not path.is_file():
            raise FFNError(f"{path}: no such skeleton set; make one with `ffn ingest SOURCE --out {path}`")
        try:
            with pa.memory_map(str(path)) as mapped:
                base = mapped.read_buffer(1).address
                mapped.seek(0)
                batch = pa.ipc.open_file(mapped).get_batch(0)
                meta = json.loads(batch.schema.metadata[b"ffn"])
                values = batch.column("keypoints").values
                offset, count = values.buffers()[1].address - base, len(values)
        except (pa.ArrowInvalid, KeyError, TypeError, ValueError, OSError) as error:
            raise FFNError(f"{path}: not a skeleton set, or cut short ({error}); ingest the data again") from None
        if meta["format"] != FORMAT_VERSION:
            raise FFNError(f"{path}: format {meta['format']}, this ffn reads {FORMAT_VERSION}; ingest the data again")
        skeleton = Layout.from_dict(meta["layout"])
        shape = (count // (len(skeleton.joints) * CHANNELS), len(skeleton.joints), CHANNELS)
        return cls(
            path=path,
            layout=skeleton,
            space=meta["space"],
            classes=tuple(meta["classes"]),
            digest=meta["digest"],
            provenance=meta["provenance"],
            protocols=tuple(meta["protocols"]),
            ids=batch.column("id"),
            labels=_numbers(batch.column("label"), np.int32),
            frames=_numbers(batch.column("frames"), np.int32),
            persons=_numbers(batch.column("persons"), np.int32),
            starts=_numbers(batch.column("keypoints").offsets, np.int64)[:-1] // (shape[1] * CHANNELS),
            image_sizes=np.stack([_numbers(batch.column(name), np.int32) for name in ("width", "height")], 1),
            keypoints=np.memmap(path, np.float16, "c", offset, shape),
            splits={name: batch.column(f"split:{name}") for name in meta["protocols"]},
        )

    def __len__(self) -> int:
        return len(self.labels)

    def sample(self, row: int) -> NDArray[np.float16]:
        """Keypoints of one sample, (M, T, V, 3)."""
        persons, frames, start = self.persons[row], self.frames[row], self.starts[row]
        return self.keypoints[start : start + persons * frames].reshape(persons, frames, *self.keypoints.shape[1:])

    def split(self, protocol: str) -> Split:
        """The protocol's training and held-out samples.

        Raises `FFNError` for an unknown protocol, an empty part, or held-out classes that no training sample shows.
        """
        if protocol not in self.splits:
            raise FFNError(f"{self.path}: no protocol {protocol!r}: expected one of {', '.join(self.protocols) or '(none)'}")
        part = np.array(self.splits[protocol].to_pylist(), object)
        train, test = (np.flatnonzero(part == name) for name in ("train", "test"))
        for name, rows in (("training", train), ("held-out", test)):
            if not len(rows):
                raise FFNError(f"{self.path}: protocol {protocol} has no {name} sample; choose another protocol or mend the splits")
        used = np.unique(self.labels[train])
        unseen = np.setdiff1d(self.labels[test], used)
        if len(unseen):
            names = ", ".join(self.classes[label] for label in unseen)
            raise FFNError(f"{self.path}: protocol {protocol} holds out classes that no training sample shows: {names}")
        labels = np.full(len(self), -1, np.int64)
        members = np.concatenate([train, test])
        labels[members] = np.searchsorted(used, self.labels[members])
        return Split(protocol=protocol, classes=tuple(self.classes[label] for label in used), labels=labels, train=train, test=test)


class SkeletonSetWriter:
    """Writes a set sample by sample with bounded memory, and publishes it whole or not at all.

    Used as a context manager: leaving it without an error publishes the file, leaving it with one removes every trace.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        layout: Layout,
        space: Space,
        classes: Sequence[str],
        protocols: Sequence[str],
        provenance: Mapping[str, Any],
    ) -> None:
        self.path = Path(path)
        self.layout, self.space, self.classes = layout, space, tuple(classes)
        self.protocols = tuple(protocols)
        """May be narrowed until the context closes, when it is known which have samples."""
        self.provenance = dict(provenance)
        self.digest = ""
        """The digest of what was written; known after the context has closed."""
        self._rows: list[tuple[str, int, int, int, int, int]] = []
        self._splits: dict[str, list[str | None]] = {name: [] for name in protocols}
        self._ids: set[str] = set()
        self._hash = hashlib.sha256()

    def __enter__(self) -> Self:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._keypoints_path = self.path.with_name(f".{self.path.name}.{os.getpid()}.keypoints")
        self._keypoints = self._keypoints_path.open("wb")
        return self

    def __len__(self) -> int:
        return len(self._rows)

    def write(self, sample: Sample) -> None:
        """Append one sample. Raises `FFNError` naming the sample where it does not fit the set."""
        shape = sample.keypoints.shape
        if len(shape) != 4 or shape[0] not in (1, 2) or not shape[1] or shape[2:] != (len(self.layout.joints), CHANNELS):
            raise FFNError(f"{sample.id}: keypoints {shape}, expected (1 or 2, T, {len(self.layout.joints)}, {CHANNELS})")
        if sample.id in self._ids:
            raise FFNError(f"{sample.id}: this sample id comes twice; ids must be unique")
        if not 0 <= sample.label < len(self.classes):
            raise FFNError(f"{sample.id}: label {sample.label}, expected 0 to {len(self.classes) - 1}")
        with np.errstate(over="ignore"):
            values = np.ascontiguousarray(sample.keypoints, np.float16)
        if not np.isfinite(values).all():
            m, t, v, _ = np.argwhere(~np.isfinite(values))[0]
            raise FFNError(f"{sample.id}: person {m}, frame {t}, {self.layout.joints[v]}: not a finite float16 number")
        width, height = sample.image_size or (0, 0)
        self._ids.add(sample.id)
        self._rows.append((sample.id, sample.label, shape[1], shape[0], width, height))
        for name, column in self._splits.items():
            column.append(sample.splits.get(name))
        self._keypoints.write(values.data)
        self._hash.update(values.data)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._keypoints.close()
        try:
            if kind is None:
                self._publish()
        finally:
            self._keypoints_path.unlink(missing_ok=True)

    def _publish(self) -> None:
        if not self._rows:
            raise FFNError(f"{self.path}: no sample to write; nothing was ingested")
        ids, labels, frames, persons, widths, heights = zip(*self._rows, strict=True)
        splits = {name: self._splits[name] for name in self.protocols}
        sizes = np.asarray(frames, np.int64) * np.asarray(persons, np.int64) * len(self.layout.joints) * CHANNELS
        mapped = np.memmap(self._keypoints_path, np.float16, "r")
        values = pa.Array.from_buffers(pa.float16(), len(mapped), [None, pa.py_buffer(mapped)])
        columns = {
            "id": pa.array(ids, pa.string()),
            "label": pa.array(labels, pa.int32()),
            "frames": pa.array(frames, pa.int32()),
            "persons": pa.array(persons, pa.int32()),
            "width": pa.array(widths, pa.int32()),
            "height": pa.array(heights, pa.int32()),
            **{f"split:{name}": pa.array(column, pa.string()) for name, column in splits.items()},
            "keypoints": pa.LargeListArray.from_arrays(np.concatenate([[0], np.cumsum(sizes)]), values),
        }
        content = {
            "format": FORMAT_VERSION,
            "layout": dataclasses.asdict(self.layout),
            "space": self.space,
            "classes": self.classes,
            "protocols": self.protocols,
        }
        self._hash.update(json.dumps([content, self._rows, splits], sort_keys=True).encode())
        self.digest = self._hash.hexdigest()[:16]
        meta = {**content, "digest": self.digest, "provenance": self.provenance}
        batch = pa.RecordBatch.from_arrays(list(columns.values()), names=list(columns))
        batch = batch.replace_schema_metadata({"ffn": json.dumps(meta)})
        with (
            publishing(self.path) as partial,
            pa.OSFile(str(partial), "wb") as sink,
            pa.ipc.new_file(sink, batch.schema) as writer,
        ):
            writer.write_batch(batch)


def _numbers(column: pa.Array, kind: type[np.integer[Any]]) -> NDArray[np.int64]:
    """A column without nulls, of numpy's `kind`, as int64. (Arrow's own way imports pandas first, which takes half a second.)"""
    return np.frombuffer(column.buffers()[1], kind, len(column), column.offset * np.dtype(kind).itemsize).astype(np.int64)


@contextlib.contextmanager
def publishing(path: Path) -> Iterator[Path]:
    """Yield a hidden name beside `path` to be written, then make it durable and move it to `path` in one step.

    It has the suffix of `path`, from which some writers take the format. On an error it is removed.
    """
    partial = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        yield partial
        with partial.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
