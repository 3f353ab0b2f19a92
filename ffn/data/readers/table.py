"""One's own data: a folder with a table of labels and splits, a layout, and keypoints as Parquet or NPZ.

    labels.csv            id,label,<protocol>,...     one row per sample; a protocol's cell is train, test or empty
    layout.json           {"layout": "coco17" or a whole layout, "space": "2d" or "3d", "image_size": [width, height]}
    classes.txt           optional: one class name per line, in the order to be used; otherwise the labels, sorted
    keypoints.parquet     id, frame, person, joint, and x, y, z (3D, metres) or x, y, score (2D, pixels); or
    keypoints/<id>.npz    array `keypoints` (M, T, V, 3), and optionally `image_size` (width, height)

Parquet: one row per joint seen, rows of one id together (sorted by id, for example). `frame` and `person` are whole numbers;
frames are counted from the sample's first, and what has no row is zero, which means not seen. `joint` is a number from 0 or
a joint's name. 2D may add columns `width` and `height`. Of more than two persons the two of lowest number are kept (NPZ: the
first two). 3D goes through `canonical_persons`, 2D through `unpadded`. The table is streamed: memory holds one sample and one
batch of rows.

An unknown class, a duplicate id, an unknown part or a missing column is an error, for labels decide everything else; a
sample whose keypoints cannot be used is left out and reported.
"""

import csv
import difflib
import functools
import hashlib
import io
import json
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ffn.data.readers.source import NOT_FINITE, UNREADABLE, Dropped, Source, Unusable, arrange, check_finite, not_finite
from ffn.data.store import Part, Sample, Space
from ffn.errors import FFNError
from ffn.layouts import Layout, layout
from ffn.protocols import require_name

if TYPE_CHECKING:
    from hashlib import _Hash

LABELS, LAYOUT, CLASSES, PARQUET, NPZ = "labels.csv", "layout.json", "classes.txt", "keypoints.parquet", "keypoints"

_LARGEST_RECORDING = 1 << 28
"""Numbers in one recording above which a frame number is taken for a mistake."""


@dataclass(frozen=True, kw_only=True)
class _Row:
    """One row of labels.csv."""

    line: int
    label: str
    splits: Mapping[str, Part]


@dataclass(frozen=True, kw_only=True)
class _Shape:
    """layout.json."""

    layout: Layout
    space: Space
    image_size: tuple[int, int] | None


def read(path: Path) -> Source:
    """The folder at `path`. Raises `FFNError` naming file and line where labels or layout do not hold together."""
    shape = _read_layout(path / LAYOUT)
    rows, protocols = _read_labels(path / LABELS)
    classes = _read_classes(path, rows)
    parquet, npz = path / PARQUET, path / NPZ
    if parquet.is_file() == npz.is_dir():
        found = "both" if npz.is_dir() else "neither"
        raise FFNError(f"{path}: expected either {PARQUET} or a folder {NPZ}/ of .npz files, found {found}")
    content = hashlib.sha256()
    for name in (LABELS, LAYOUT, CLASSES):
        content.update((path / name).read_bytes() if (path / name).is_file() else b"")
    recordings = _from_parquet(parquet, shape, content) if parquet.is_file() else _from_npz(npz, list(rows), shape, content)
    return Source(
        reader="table",
        layout=shape.layout,
        space=shape.space,
        classes=classes,
        protocols=protocols,
        items=_items(recordings, rows, {name: label for label, name in enumerate(classes)}, shape),
        total=len(rows),
        content=content,
    )


_Loaded = tuple[NDArray[Any], tuple[int, int] | None]
"""Keypoints (M, T, V, 3) and image size."""
_Recordings = Iterator[tuple[str, Callable[[], _Loaded]]]
"""Id and what loads it, or raises `Unusable`."""


def _items(
    recordings: _Recordings, rows: Mapping[str, _Row], labels: Mapping[str, int], shape: _Shape
) -> Iterator[Sample | Dropped]:
    absent = dict.fromkeys(rows)
    for identity, load in recordings:
        absent.pop(identity, None)
        try:
            if identity not in rows:
                raise Unusable(identity, f"not in {LABELS}")
            keypoints, image_size = load()
            image_size = image_size or shape.image_size
            if shape.space == "2d" and image_size is None:
                raise Unusable(identity, "no image size", f"add columns width and height, or image_size to {LAYOUT}")
            yield Sample(
                id=identity,
                label=labels[rows[identity].label],
                keypoints=arrange(keypoints, shape.space, identity),
                splits=rows[identity].splits,
                image_size=image_size if shape.space == "2d" else None,
            )
        except Unusable as error:
            yield error.dropped
    for identity in absent:
        yield Dropped(where=f"{LABELS}:{rows[identity].line}", reason="no keypoints", detail=identity)


def _from_npz(folder: Path, order: Sequence[str], shape: _Shape, content: "_Hash") -> _Recordings:
    files = {file.stem: file for file in folder.glob("*.npz")}
    for identity in [*(known for known in order if known in files), *sorted(files.keys() - set(order))]:
        yield identity, functools.partial(_load_npz, files[identity], shape, content)


def _load_npz(file: Path, shape: _Shape, content: "_Hash") -> _Loaded:
    where = f"{NPZ}/{file.name}"
    try:
        data = file.read_bytes()
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            keypoints = arrays["keypoints"]
            image_size = arrays.get("image_size")
    except (OSError, EOFError, KeyError, ValueError, TypeError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
        raise Unusable(where, UNREADABLE, f"expected an .npz with an array `keypoints` ({error})") from None
    content.update(f"{where}\0{hashlib.sha256(data).hexdigest()}\n".encode())
    wanted = (len(shape.layout.joints), 3)
    if keypoints.dtype.kind not in "fiu" or keypoints.ndim != 4 or keypoints.shape[2:] != wanted:
        raise Unusable(
            where, "malformed", f"keypoints {keypoints.dtype} {keypoints.shape}, expected numbers (M, T, {wanted[0]}, 3)"
        )
    check_finite(keypoints[:2], shape.layout, where)
    return keypoints.astype(np.float32), None if image_size is None else _image_size(image_size.ravel().tolist(), where)


def _from_parquet(path: Path, shape: _Shape, content: "_Hash") -> _Recordings:
    try:
        with path.open("rb") as file:
            content.update(hashlib.file_digest(file, "sha256").digest())
        with pq.ParquetFile(path) as table:
            columns = _columns(path, table.schema_arrow, shape)
            seen: set[str] = set()
            for identity, row, rows in _runs(table.iter_batches(columns=columns)):
                if identity in seen:
                    raise FFNError(f"{path}: row {row}: id {identity} comes again after another; keep the rows of one id together")
                seen.add(identity)
                yield identity, functools.partial(_build, rows, row, shape)
    except (pa.ArrowException, OSError) as error:
        raise FFNError(f"{path}: not a Parquet file that can be read ({str(error).splitlines()[0]})") from None


def _columns(path: Path, schema: pa.Schema, shape: _Shape) -> list[str]:
    """Names of the columns to be read."""
    third = "z" if shape.space == "3d" else "score"
    needed = ["id", "frame", "person", "joint", "x", "y", third]
    missing = [name for name in needed if name not in schema.names]
    if missing:
        raise FFNError(f"{path}: no column {', '.join(missing)}; a {shape.space} table needs {', '.join(needed)}")
    for name in ("frame", "person", "joint", "x", "y", third):
        kind = schema.field(name).type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
        number = pa.types.is_integer(kind) or (name in ("x", "y", third) and pa.types.is_floating(kind))
        if not number and not (name == "joint" and text):
            expected = "numbers" if name in ("x", "y", third) else "whole numbers"
            raise FFNError(f"{path}: column {name} is {kind}, expected {expected}{' or joint names' if name == 'joint' else ''}")
    return [*needed, *(name for name in ("width", "height") if name in schema.names)]


def _runs(batches: Iterable[pa.RecordBatch]) -> Iterator[tuple[str, int, pa.Table]]:
    """Runs of rows with one id, over the borders of batches: id, number of the first row (from 0), rows."""
    held: list[pa.Table] = []
    name, first, row = "", 0, 0
    for batch in batches:
        table = pa.Table.from_batches([batch])
        if not len(table):
            continue
        ids = pc.fill_null(pc.cast(table["id"], pa.string()), "").combine_chunks()
        starts = [0, *(np.flatnonzero(pc.not_equal(ids[1:], ids[:-1]).to_numpy(zero_copy_only=False)) + 1).tolist()]
        for start, end in zip(starts, [*starts[1:], len(table)], strict=True):
            identity = ids[start].as_py()
            if held and identity != name:
                yield name, first, pa.concat_tables(held)
                held = []
            if not held:
                name, first = identity, row + start
            held.append(table.slice(start, end - start))
        row += len(table)
    if held:
        yield name, first, pa.concat_tables(held)


def _build(table: pa.Table, first: int, shape: _Shape) -> _Loaded:
    """One sample's rows as an array."""

    def fault(row: int, reason: str, detail: str) -> Unusable:
        return Unusable(f"{PARQUET}: row {first + row}", reason, detail)

    joints = shape.layout.joints
    joint_column = table["joint"]
    if pa.types.is_dictionary(joint_column.type):
        joint_column = joint_column.cast(joint_column.type.value_type)
    if not pa.types.is_integer(joint_column.type):
        joint_column = pc.index_in(joint_column, value_set=pa.array(joints, joint_column.type))
    frame, person, joint = (_whole(column) for column in (table["frame"], table["person"], joint_column))
    for name, values in (("frame", frame), ("person", person), ("joint", joint)):
        if (values < 0).any():
            row = int(np.argmax(values < 0))
            raise fault(row, "malformed", f"{name} {table[name][row].as_py()}, expected {_EXPECTED[name]}")
    if joint.max() >= len(joints):
        row = int(np.argmax(joint >= len(joints)))
        raise fault(row, "malformed", f"joint {joint[row]}, expected 0 to {len(joints) - 1}")
    numbers, place = np.unique(person, return_inverse=True)
    frame = frame - frame.min()
    frames = int(frame.max()) + 1
    if frames * len(joints) * 6 > _LARGEST_RECORDING:
        raise fault(int(np.argmax(frame)), "malformed", f"frame {frames - 1} after the first; number frames one by one")
    third = "z" if shape.space == "3d" else "score"
    values = np.stack([table[name].to_numpy().astype(np.float32) for name in ("x", "y", third)], axis=1)
    kept = place < 2
    bad = not_finite(values).any(axis=1) & kept
    if bad.any():
        row = int(np.argmax(bad))
        raise fault(row, NOT_FINITE, f"{joints[joint[row]]} of person {person[row]}, frame {table['frame'][row].as_py()}")
    keypoints = np.zeros((min(len(numbers), 2), frames, len(joints), 3), np.float32)
    flat = (place * frames + frame) * len(joints) + joint
    order = np.argsort(flat, kind="stable")
    again = order[1:][flat[order[1:]] == flat[order[:-1]]]
    if len(again):
        row = int(again.min())
        raise fault(
            row, "malformed", f"{joints[joint[row]]} of person {person[row]}, frame {table['frame'][row].as_py()} comes twice"
        )
    keypoints[place[kept], frame[kept], joint[kept]] = values[kept]
    if "width" not in table.column_names or "height" not in table.column_names:
        return keypoints, None
    return keypoints, _image_size([table["width"][0].as_py(), table["height"][0].as_py()], f"{PARQUET}: row {first}")


_EXPECTED = {"frame": "0 or more", "person": "0 or more", "joint": "a number from 0 or a joint of the layout"}


def _whole(column: pa.ChunkedArray) -> NDArray[np.int64]:
    """Whole numbers, -1 where there is none."""
    return np.asarray(pc.fill_null(pc.cast(column, pa.int64()), -1).to_numpy())


def _image_size(values: Any, where: str) -> tuple[int, int]:
    whole = (
        isinstance(values, list) and len(values) == 2 and all(type(v) in (int, float) and v >= 1 and v == int(v) for v in values)
    )
    if not whole:
        raise Unusable(where, "malformed", f"image size {values!r}, expected width and height in pixels")
    return int(values[0]), int(values[1])


def _read_layout(path: Path) -> _Shape:
    try:
        plain = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise FFNError(f'{path}: no such file; write {{"layout": "coco17", "space": "2d"}}, for example') from None
    except json.JSONDecodeError as error:
        raise FFNError(f"{path}:{error.lineno}: not JSON: {error.msg}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise FFNError(f"{path}: cannot be read ({error})") from None
    if not isinstance(plain, dict) or plain.keys() - {"layout", "space", "image_size"} or not {"layout", "space"} <= plain.keys():
        raise FFNError(f"{path}: expected an object with `layout`, `space` and perhaps `image_size`")
    if plain["space"] not in get_args(Space):
        raise FFNError(f"{path}: space {plain['space']!r}, expected {' or '.join(get_args(Space))}")
    named = plain["layout"]
    try:
        skeleton = layout(named) if isinstance(named, str) else Layout.from_dict(named)
        size = _image_size(plain["image_size"], "image_size") if "image_size" in plain else None
    except FFNError as error:
        raise FFNError(f"{path}: {error}") from None
    return _Shape(layout=skeleton, space=plain["space"], image_size=size)


def _read_labels(path: Path) -> tuple[dict[str, _Row], tuple[str, ...]]:
    """Rows by id in the order of the file, and the protocols."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            return _parse_labels(path, csv.reader(file, strict=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise FFNError(f"{path}: not a CSV file in UTF-8 that can be read ({error})") from None


def _parse_labels(path: Path, lines: Any) -> tuple[dict[str, _Row], tuple[str, ...]]:
    header = [name.strip() for name in next(lines, [])]
    protocols = tuple(name for name in header if name not in ("id", "label"))
    if not {"id", "label"} <= set(header) or not protocols or len(set(header)) != len(header) or "" in header:
        raise FFNError(
            f"{path}:1: columns {', '.join(header) or '(none)'}; expected id, label and one column per protocol, each once"
        )
    for name in protocols:
        require_name(f"{path}:1: column", name)
    rows: dict[str, _Row] = {}
    for cells in lines:
        if not cells:
            continue
        where = f"{path}:{lines.line_num}"
        if len(cells) != len(header):
            raise FFNError(f"{where}: {len(cells)} cells, expected {len(header)} ({', '.join(header)})")
        row = dict(zip(header, (cell.strip() for cell in cells), strict=True))
        identity, label = row["id"], row["label"]
        if not identity or not label:
            raise FFNError(f"{where}: {'label' if identity else 'id'} is empty")
        if identity in rows:
            raise FFNError(f"{where}: id {identity} comes again (first on line {rows[identity].line}); ids must be unique")
        for name in protocols:
            if row[name] not in ("", *get_args(Part)):
                raise FFNError(f"{where}: {name} is {row[name]!r}, expected train, test or nothing")
        splits = {name: part for name in protocols for part in get_args(Part) if row[name] == part}
        rows[identity] = _Row(line=lines.line_num, label=label, splits=splits)
    if not rows:
        raise FFNError(f"{path}: no sample: the table has no rows")
    return rows, protocols


def _read_classes(path: Path, rows: Mapping[str, _Row]) -> tuple[str, ...]:
    file = path / CLASSES
    if not file.is_file():
        return tuple(sorted({row.label for row in rows.values()}))
    try:
        classes = tuple(line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise FFNError(f"{file}: cannot be read as UTF-8 ({error})") from None
    if len(set(classes)) != len(classes):
        raise FFNError(f"{file}: a class comes twice: {next(name for name in classes if classes.count(name) > 1)}")
    for row in rows.values():
        if row.label not in classes:
            near = difflib.get_close_matches(row.label, classes, n=1)
            hint = f"did you mean {near[0]}?" if near else f"add it to {CLASSES} or mend the label"
            raise FFNError(f"{path / LABELS}:{row.line}: unknown class {row.label!r}, not in {CLASSES}; {hint}")
    return classes
