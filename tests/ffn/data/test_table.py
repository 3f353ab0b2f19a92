import dataclasses
import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ffn.data.readers import table
from ffn.data.readers.source import NOT_FINITE, Dropped
from ffn.errors import FFNError
from ffn.layouts import COCO17, NTU25

LABELS = "id,label,mine,theirs\na,walk,train,\nb,run,test,train\n"


def keypoints(seed, persons=1, frames=3, joints=17):
    rng = np.random.default_rng(seed)
    values = np.concatenate(
        [rng.uniform(1, 900, (persons, frames, joints, 2)), rng.uniform(0.1, 1, (persons, frames, joints, 1))], -1
    )
    return values.astype(np.float32)


def long_table(arrays, third="score", **extra):
    """Rows of every joint of every person and frame of every sample."""
    rows = [
        (name, t, m, v, *map(float, x[m, t, v])) for name, x in arrays.items() for t in range(x.shape[1]) for m in range(len(x))
        for v in range(x.shape[2])
    ]  # fmt: skip
    columns = dict(zip(("id", "frame", "person", "joint", "x", "y", third), map(list, zip(*rows, strict=True)), strict=True))
    return pa.table(columns | {name: [value] * len(rows) for name, value in extra.items()})


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "labels.csv").write_text(LABELS)
    (folder / "layout.json").write_text('{"layout": "coco17", "space": "2d", "image_size": [640, 480]}')
    return folder


@pytest.fixture
def arrays():
    return {"a": keypoints(0, 2), "b": keypoints(1, 1, 4)}


@pytest.fixture
def npz(folder, arrays):
    (folder / "keypoints").mkdir()
    for name, x in arrays.items():
        np.savez(folder / "keypoints" / f"{name}.npz", keypoints=x)
    return folder


@pytest.fixture
def parquet(folder, arrays):
    pq.write_table(long_table(arrays), folder / "keypoints.parquet")
    return folder


@pytest.mark.parametrize("kind", ["npz", "parquet"])
def test_both_kinds_hold_the_same(request, arrays, kind):
    opened = table.read(request.getfixturevalue(kind))
    first, second = opened.items
    assert (opened.layout, opened.space, opened.classes, opened.protocols) == (COCO17, "2d", ("run", "walk"), ("mine", "theirs"))
    assert (first.id, first.label, first.splits, first.image_size) == ("a", 1, {"mine": "train"}, (640, 480))
    assert (second.id, second.label, second.splits) == ("b", 0, {"mine": "test", "theirs": "train"})
    np.testing.assert_array_equal(first.keypoints, arrays["a"])
    np.testing.assert_array_equal(second.keypoints, arrays["b"])


def test_parquet_over_many_batches(folder):
    arrays = {f"clip {number:03}": keypoints(number, 1 + number % 2, 2 + number % 5) for number in range(40)}
    rows = long_table(arrays)
    pq.write_table(rows, folder / "keypoints.parquet", row_group_size=97)
    (folder / "labels.csv").write_text("id,label,p\n" + "".join(f"{name},x,train\n" for name in arrays))
    items = list(table.read(folder).items)
    assert [item.id for item in items] == list(arrays)
    for item in items:
        np.testing.assert_array_equal(item.keypoints, arrays[item.id])


def test_parquet_as_it_may_come(folder, arrays):
    """Shuffled within a sample, joints by name, persons and frames from anywhere, image size in columns, id as a category."""
    rows = long_table(arrays, width=1280, height=720)
    order = np.concatenate([np.random.default_rng(0).permutation(102), np.arange(102, len(rows))])
    rows = rows.take(order)
    names = [COCO17.joints[joint] for joint in rows["joint"].to_pylist()]
    rows = rows.set_column(3, "joint", pa.array(names).dictionary_encode())
    rows = rows.set_column(1, "frame", pa.array([frame + 1000 for frame in rows["frame"].to_pylist()], pa.int16()))
    rows = rows.set_column(2, "person", pa.array([7 * person + 3 for person in rows["person"].to_pylist()]))
    rows = rows.set_column(0, "id", rows["id"].dictionary_encode())
    pq.write_table(rows, folder / "keypoints.parquet")
    first, second = table.read(folder).items
    np.testing.assert_array_equal(first.keypoints, arrays["a"])
    np.testing.assert_array_equal(second.keypoints, arrays["b"])
    assert first.image_size == (1280, 720)


def test_what_has_no_row_is_zero_and_the_two_first_persons_stay(folder):
    arrays = {"a": keypoints(0, 3, 4), "b": keypoints(1)}
    rows = long_table(arrays)
    keep = [
        not (row["id"] == "a" and (row["frame"], row["person"], row["joint"]) in {(1, 0, 4), (2, 1, 16)})
        for row in rows.to_pylist()
    ]
    pq.write_table(rows.filter(pa.array(keep)), folder / "keypoints.parquet")
    first, _ = table.read(folder).items
    expected = arrays["a"][:2]
    expected[0, 1, 4] = expected[1, 2, 16] = 0
    np.testing.assert_array_equal(first.keypoints, expected)


def test_3d_and_a_layout_of_ones_own(folder):
    own = dataclasses.replace(NTU25, name="mine")
    (folder / "layout.json").write_text(json.dumps({"layout": dataclasses.asdict(own), "space": "3d"}))
    arrays = {"a": keypoints(0, 2, 5, 25), "b": keypoints(1, 1, 5, 25)}
    arrays["a"][0, [0, 2, 3]] = 0
    pq.write_table(long_table(arrays, "z"), folder / "keypoints.parquet")
    opened = table.read(folder)
    first, _ = opened.items
    assert opened.layout == own
    assert first.image_size is None
    np.testing.assert_array_equal(first.keypoints, arrays["a"][::-1])


def test_classes_fix_the_order(npz):
    (npz / "classes.txt").write_text("walk\n\nstand still\nrun\n")
    opened = table.read(npz)
    assert opened.classes == ("walk", "stand still", "run")
    assert [item.label for item in opened.items] == [0, 2]


@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [
        ("classes.txt", "walk\nruns\n", "labels.csv:3: unknown class 'run', not in classes.txt; did you mean runs?"),
        ("classes.txt", "walk\nwalk\n", "classes.txt: a class comes twice: walk"),
        ("labels.csv", "", "labels.csv:1: columns (none); expected id, label and one column per protocol"),
        ("labels.csv", "id,class,p\n", "labels.csv:1: columns id, class, p; expected"),
        ("labels.csv", "id,label\n", "labels.csv:1: columns id, label; expected"),
        ("labels.csv", "id,label,p\n", "labels.csv: no sample"),
        ("labels.csv", "id,label,p,by room\n", "labels.csv:1: column 'by room' cannot name files"),
        ("labels.csv", "id,label,p\na,walk,train\na,run,test\n", "labels.csv:3: id a comes again (first on line 2)"),
        ("labels.csv", "id,label,p\na,walk,val\n", "labels.csv:2: p is 'val', expected train, test or nothing"),
        ("labels.csv", "id,label,p\n\na,walk\n", "labels.csv:3: 2 cells, expected 3"),
        ("labels.csv", "id,label,p\na,,train\n", "labels.csv:2: label is empty"),
        ("labels.csv", b"id,label,p\na,\xff,train\n", "labels.csv: not a CSV file in UTF-8"),
        ("layout.json", "{", "layout.json:1: not JSON"),
        ("layout.json", "[]", "layout.json: expected an object"),
        ("layout.json", '{"layout": "coco17"}', "layout.json: expected an object with `layout`, `space`"),
        ("layout.json", '{"layout": "coco17", "space": "4d"}', "layout.json: space '4d', expected 2d or 3d"),
        ("layout.json", '{"layout": "coco", "space": "2d"}', "layout.json: unknown layout 'coco'"),
        ("layout.json", '{"layout": {"name": "x"}, "space": "2d"}', "layout.json: not a layout"),
        ("layout.json", '{"layout": "coco17", "space": "2d", "image_size": [0, 1]}', "layout.json: image_size: malformed"),
    ],
)
def test_tables_that_do_not_hold_together(npz, file, text, expected):
    (npz / file).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(FFNError, match=f"^{re.escape(f'{npz}/{expected}')}"):
        table.read(npz)


def test_what_is_missing(folder):
    with pytest.raises(FFNError, match=r"expected either keypoints.parquet or a folder keypoints/ .* found neither"):
        table.read(folder)
    (folder / "layout.json").unlink()
    with pytest.raises(FFNError, match=r"layout.json: no such file; write"):
        table.read(folder)


def only(items):
    """The line of the sample left out, where the other one is kept."""
    items = list(items)
    dropped = [str(item) for item in items if isinstance(item, Dropped)]
    assert len(dropped) == 1
    assert len(items) == 2
    return dropped[0]


@pytest.mark.parametrize(
    ("change", "row", "expected"),
    [
        ({"x": np.nan}, 20, f"{NOT_FINITE}: left ear of person 1, frame 0"),
        ({"y": np.inf}, 0, f"{NOT_FINITE}: nose of person 0, frame 0"),
        ({"x": 1e6}, 0, f"{NOT_FINITE}: nose of person 0, frame 0"),
        ({"joint": 17}, 5, "malformed: joint 17, expected 0 to 16"),
        ({"joint": -1}, 5, "malformed: joint -1, expected a number from 0"),
        ({"frame": None}, 5, "malformed: frame None, expected 0 or more"),
        ({"joint": 4}, 5, "malformed: right ear of person 0, frame 0 comes twice"),
        ({"frame": 10**9}, 5, "malformed: frame 1000000000 after the first"),
    ],
)
def test_a_row_that_cannot_be_used(folder, arrays, change, row, expected):
    rows = long_table(arrays).to_pylist()
    rows[row] |= change
    pq.write_table(pa.Table.from_pylist(rows), folder / "keypoints.parquet")
    message = only(table.read(folder).items)
    assert message.startswith(f"keypoints.parquet: row {row}: {expected}")


def test_samples_and_labels_that_miss_each_other(folder):
    pq.write_table(long_table({"a": keypoints(0), "c": keypoints(1)}), folder / "keypoints.parquet")
    dropped = [str(item) for item in table.read(folder).items if isinstance(item, Dropped)]
    assert dropped == ["c: not in labels.csv", "labels.csv:3: no keypoints: b"]


def test_rows_of_one_id_lie_apart(folder, arrays):
    rows = long_table(arrays)
    pq.write_table(pa.concat_tables([rows, rows.slice(0, 1)]), folder / "keypoints.parquet")
    with pytest.raises(FFNError, match=rf"keypoints.parquet: row {len(rows)}: id a comes again"):
        list(table.read(folder).items)


def test_parquet_that_cannot_be_read(folder, arrays):
    path = folder / "keypoints.parquet"
    path.write_bytes(b"PAR1 but no more")
    with pytest.raises(FFNError, match=f"{path}: not a Parquet file"):
        list(table.read(folder).items)
    pq.write_table(long_table(arrays).drop_columns("score"), path)
    with pytest.raises(FFNError, match=f"{path}: no column score; a 2d table needs id, frame, person, joint, x, y, score"):
        list(table.read(folder).items)
    pq.write_table(long_table(arrays).set_column(1, "frame", pa.array([0.5] * 170)), path)
    with pytest.raises(FFNError, match=f"{path}: column frame is double, expected whole numbers"):
        list(table.read(folder).items)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (
            {"keypoints": np.zeros((1, 3, 16, 3))},
            r"keypoints/a.npz: malformed: keypoints float64 \(1, 3, 16, 3\), expected numbers",
        ),
        ({"keypoints": np.zeros((1, 3, 17, 3))}, "a: nobody visible"),
        ({"keypoints": np.zeros((0, 3, 17, 3))}, "a: nobody visible"),
        ({"keypoints": np.full((1, 3, 17, 3), np.nan)}, f"keypoints/a.npz: {NOT_FINITE}: person 0, frame 0, nose"),
        ({"joints": np.zeros(3)}, "keypoints/a.npz: unreadable: expected an .npz with an array `keypoints`"),
        ({"keypoints": np.array([{}])}, "keypoints/a.npz: unreadable: expected an .npz"),
        ({"keypoints": keypoints(0), "image_size": np.zeros(2)}, "keypoints/a.npz: malformed: image size"),
    ],
)
def test_an_npz_that_cannot_be_used(npz, content, expected):
    np.savez(npz / "keypoints" / "a.npz", **content)
    assert re.match(expected, only(table.read(npz).items))


def test_an_npz_cut_short(npz):
    path = npz / "keypoints" / "b.npz"
    path.write_bytes(path.read_bytes()[:200])
    assert only(table.read(npz).items).startswith("keypoints/b.npz: unreadable")


def test_2d_needs_an_image_size(npz):
    (npz / "layout.json").write_text('{"layout": "coco17", "space": "2d"}')
    np.savez(npz / "keypoints" / "b.npz", keypoints=keypoints(0), image_size=[320, 240])
    assert only(table.read(npz).items).startswith("a: no image size: add columns width and height, or image_size to layout.json")


@pytest.mark.parametrize("persons", [0, 1])
def test_an_empty_recording_in_3d(npz, persons):
    (npz / "layout.json").write_text('{"layout": "coco17", "space": "3d"}')
    np.savez(npz / "keypoints" / "a.npz", keypoints=np.zeros((persons, 3 * (1 - persons), 17, 3)))
    assert only(table.read(npz).items) == "a: nobody visible"


def test_2d_loses_its_padding(npz, arrays):
    padded = np.zeros((2, 9, 17, 3), np.float32)
    padded[1, 2:5] = arrays["a"][0]
    np.savez(npz / "keypoints" / "a.npz", keypoints=padded)
    first, _ = table.read(npz).items
    np.testing.assert_array_equal(first.keypoints, padded[1:, :5])
