import json
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest

from ffn.data.store import Sample, SkeletonSet, SkeletonSetWriter, publishing
from ffn.errors import FFNError
from ffn.layouts import COCO17


def sample(name, label=0, persons=1, frames=3, splits=None, **changes):
    x = np.random.default_rng(sum(map(ord, name))).uniform(1, 900, (persons, frames, 17, 3))
    return Sample(**{"id": name, "label": label, "keypoints": x, "splits": splits or {}, "image_size": (640, 480)} | changes)


def write(path, samples, *, classes=("walk", "run", "sit"), protocols=("p", "q"), provenance=None):
    writer = SkeletonSetWriter(
        path, layout=COCO17, space="2d", classes=classes, protocols=protocols, provenance=provenance or {"source": "test"}
    )
    with writer:
        for item in samples:
            writer.write(item)
    return writer


@pytest.fixture
def samples():
    return [
        sample("a", 0, 2, 4, {"p": "train", "q": "train"}),
        sample("b", 2, 1, 1, {"p": "test"}),
        sample("c", 2, 2, 7, {"p": "train", "q": "test"}),
        sample("d", 1),
    ]


def test_what_is_written_is_read(tmp_path, samples):
    writer = write(tmp_path / "deep" / "set.arrow", samples)
    opened = SkeletonSet.open(tmp_path / "deep" / "set.arrow")
    assert (opened.layout, opened.space, opened.classes, opened.protocols) == (COCO17, "2d", ("walk", "run", "sit"), ("p", "q"))
    assert (opened.digest, opened.provenance) == (writer.digest, {"source": "test"})
    assert opened.ids.to_pylist() == ["a", "b", "c", "d"]
    assert opened.labels.tolist() == [0, 2, 2, 1]
    assert opened.frames.tolist() == [4, 1, 7, 3]
    assert opened.persons.tolist() == [2, 1, 2, 1]
    assert opened.starts.tolist() == [0, 8, 9, 23]
    assert opened.image_sizes.tolist() == [[640, 480]] * 4
    for row, item in enumerate(samples):
        np.testing.assert_array_equal(opened.sample(row), item.keypoints.astype(np.float16))
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["set.arrow"]


def test_it_is_an_arrow_file_like_any_other(tmp_path, samples):
    write(tmp_path / "set.arrow", samples)
    with pa.ipc.open_file(str(tmp_path / "set.arrow")) as file:
        table = file.read_all()
    assert table["split:p"].to_pylist() == ["train", "test", "train", None]
    assert len(table["keypoints"][0]) == 2 * 4 * 17 * 3
    assert json.loads(table.schema.metadata[b"ffn"])["space"] == "2d"


def test_writing_into_the_keypoints_leaves_the_file_alone(tmp_path, samples):
    write(tmp_path / "set.arrow", samples)
    SkeletonSet.open(tmp_path / "set.arrow").keypoints[:] = 0
    assert SkeletonSet.open(tmp_path / "set.arrow").keypoints.any()


def test_opening_imports_no_pandas(tmp_path, samples):
    """Arrow's conversions to and from Python do, which costs every process half a second and tens of megabytes."""
    write(tmp_path / "set.arrow", samples)
    code = """
import sys
from ffn.data.store import SkeletonSet
SkeletonSet.open(sys.argv[1]).split("p")
sys.exit("pandas" in sys.modules)
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "set.arrow")], check=True)


def test_split_counts_its_own_classes(tmp_path, samples):
    write(tmp_path / "set.arrow", samples)
    split = SkeletonSet.open(tmp_path / "set.arrow").split("p")
    assert split.classes == ("walk", "sit")
    assert (split.train.tolist(), split.test.tolist(), split.labels.tolist()) == ([0, 2], [1], [0, 1, 1, -1])


def test_split_that_cannot_be_used(tmp_path, samples):
    write(tmp_path / "set.arrow", samples, protocols=("p", "q", "r"))
    opened = SkeletonSet.open(tmp_path / "set.arrow")
    with pytest.raises(FFNError, match="no protocol 'x': expected one of p, q, r"):
        opened.split("x")
    with pytest.raises(FFNError, match="protocol q holds out classes that no training sample shows: sit"):
        opened.split("q")
    with pytest.raises(FFNError, match="protocol r has no training sample"):
        opened.split("r")


def test_digest_names_the_content(tmp_path, samples):
    def digest(name, items, **changes):
        return write(tmp_path / name, items, **changes).digest

    same = digest("a.arrow", samples)
    assert same == digest("b.arrow", samples, provenance={"source": "elsewhere"})
    others = [
        digest("c.arrow", samples[::-1]),
        digest("c.arrow", samples[:3]),
        digest("c.arrow", samples, classes=("walk", "run", "sit", "lie")),
        digest("c.arrow", samples, protocols=("p",)),
        digest("c.arrow", [*samples[:3], sample("d", 2)]),
        digest("c.arrow", [*samples[:3], sample("d", 1, splits={"p": "test"})]),
        digest("c.arrow", [*samples[:3], sample("d", 1, image_size=(1, 1))]),
        digest("c.arrow", [*samples[:3], sample("d", 1, keypoints=samples[3].keypoints * 1.01)]),
    ]
    assert len({same, *others}) == 1 + len(others)


@pytest.mark.parametrize(
    ("bad", "expected"),
    [
        (sample("a"), "a: this sample id comes twice"),
        (sample("x", 3), "x: label 3, expected 0 to 2"),
        (sample("x", -1), "x: label -1, expected 0 to 2"),
        (sample("x", keypoints=np.zeros((3, 1, 17, 3))), "x: keypoints .3, 1, 17, 3., expected .1 or 2, T, 17, 3."),
        (sample("x", keypoints=np.zeros((1, 0, 17, 3))), "x: keypoints"),
        (sample("x", keypoints=np.zeros((1, 2, 25, 3))), "x: keypoints"),
        (sample("x", keypoints=np.full((1, 2, 17, 3), np.nan)), "x: person 0, frame 0, nose: not a finite float16 number"),
        (sample("x", keypoints=np.full((1, 2, 17, 3), 1e6)), "x: person 0, frame 0, nose: not a finite float16 number"),
    ],
)
def test_a_sample_that_does_not_fit_stops_the_writing_and_leaves_nothing(tmp_path, samples, bad, expected):
    with pytest.raises(FFNError, match=expected):
        write(tmp_path / "set.arrow", [*samples, bad])
    assert list(tmp_path.iterdir()) == []


def test_an_old_set_outlives_a_failed_one(tmp_path, samples):
    before = write(tmp_path / "set.arrow", samples).digest
    with pytest.raises(FFNError, match="no sample to write"):
        write(tmp_path / "set.arrow", [])
    assert SkeletonSet.open(tmp_path / "set.arrow").digest == before
    assert [path.name for path in tmp_path.iterdir()] == ["set.arrow"]


def test_what_is_no_set(tmp_path, samples):
    path = tmp_path / "set.arrow"
    with pytest.raises(FFNError, match="no such skeleton set; make one with"):
        SkeletonSet.open(path)
    path.write_bytes(b"")
    with pytest.raises(FFNError, match="not a skeleton set, or cut short"):
        SkeletonSet.open(path)
    write(path, samples)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(FFNError, match="not a skeleton set, or cut short"):
        SkeletonSet.open(path)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, pa.schema([("id", pa.string())])) as file:
        file.write_batch(pa.record_batch({"id": ["a"]}))
    with pytest.raises(FFNError, match="not a skeleton set, or cut short"):
        SkeletonSet.open(path)


def test_publishing_is_all_or_nothing(tmp_path):
    path = tmp_path / "picture.png"
    for text in ("old", "new"):
        with publishing(path) as partial:
            partial.write_text(text)
            assert (partial.parent, partial.suffix, partial.name[0]) == (tmp_path, ".png", ".")
    with pytest.raises(OSError, match="full"), publishing(path) as partial:
        raise OSError(f"disk full after {partial.write_text('half')} bytes")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]
