import json
import zipfile

import numpy as np
import pytest

from ffn.data.ingest import ingest
from ffn.data.readers import ucla
from ffn.data.readers.source import NOT_FINITE, Dropped
from ffn.data.store import SkeletonSet


def recording(seed=0, frames=4, **changes):
    skeletons = np.random.default_rng(seed).normal(size=(frames, 20, 3)).round(5).tolist()
    return {"file_name": "x", "skeletons": skeletons, "label": 1} | changes


@pytest.fixture
def folder(tmp_path):
    for number, name in enumerate(("a01_s01_e00_v01", "a01_s02_e00_v03")):
        (tmp_path / f"{name}.json").write_text(json.dumps(recording(number)))
    return tmp_path


def test_samples(folder):
    opened = ucla.read(folder)
    first, second = opened.items
    assert (opened.layout.name, opened.space, len(opened.classes), opened.protocols) == ("kinect20", "3d", 10, ("ucla-xview",))
    assert (first.id, first.label, first.splits) == ("a01_s01_e00_v01", 0, {"ucla-xview": "train"})
    assert second.splits == {"ucla-xview": "test"}
    np.testing.assert_array_equal(first.keypoints[0], np.array(recording()["skeletons"], np.float32))


def test_zip_with_a_folder_inside(folder, tmp_path):
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        for path in folder.glob("*.json"):
            archive.write(path, f"all_sqe/{path.name}")
    assert [item.id for item in ucla.read(tmp_path / "data.zip").items] == ["a01_s01_e00_v01", "a01_s02_e00_v03"]


@pytest.mark.parametrize(("name", "label", "kept"), [("a08", 7, True), ("a08", 6, True), ("a08", 8, True), ("a08", 1, False)])
def test_the_stated_label(tmp_path, name, label, kept):
    (tmp_path / f"{name}_s01_e00_v01.json").write_text(json.dumps(recording(label=label)))
    (item,) = ucla.read(tmp_path).items
    assert isinstance(item, Dropped) != kept
    assert kept or str(item) == "a08_s01_e00_v01.json: label disagrees with the name: label 1, expected 7"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ".json: empty file: 0 bytes"),
        ('{"skeletons": [\n[[1, 2', ".json:2: malformed: not JSON, or cut short"),
        ("[]", ".json: malformed: expected `skeletons`"),
        ('{"skeletons": "x"}', ".json: malformed: expected `skeletons`"),
        ('{"skeletons": [[[1, 2, 3]]]}', ".json: malformed: skeletons (1, 1, 3), expected (T, 20, 3)"),
        (json.dumps(recording(skeletons=np.zeros((3, 20, 3)).tolist())), ".json: nobody visible"),
        (json.dumps(recording()).replace("[[[", "[[[NaN, 0, 0], [", 1), ".json: malformed"),
        (
            json.dumps(recording(skeletons=[[[1, 2, 3]] * 20, [[1, 2, 3]] * 19 + [[1, np.nan, 3]]])),
            f".json: {NOT_FINITE}: person 0, frame 1, right foot",
        ),
    ],
)
def test_what_cannot_be_used_is_left_out(folder, text, expected):
    (folder / "a02_s01_e00_v01.json").write_text(text)
    (folder / "notes.json").write_text("{}")
    dropped = [item for item in ucla.read(folder).items if isinstance(item, Dropped)]
    assert str(dropped[0]).startswith(f"a02_s01_e00_v01{expected}")
    assert str(dropped[1]).startswith("notes.json: not an NW-UCLA name")


@pytest.mark.real
def test_the_real_set(real_data, tmp_path):
    report = ingest(real_data / "data" / "nw-ucla.zip", tmp_path / "ucla.arrow")
    opened = SkeletonSet.open(tmp_path / "ucla.arrow")
    split = opened.split("ucla-xview")
    assert (report.samples, len(split.train), len(split.test), report.dropped) == (1484, 1020, 464, ())
    assert (opened.frames.min(), opened.frames.max()) == (1, 201)
    assert split.classes == opened.classes
    assert sum(report.classes.values()) == 1484
