import os
import pickle
import re

import numpy as np
import pytest

from ffn.data.readers import mmaction
from ffn.data.readers.source import NOT_FINITE, Dropped
from ffn.errors import FFNError
from ffn.protocols import ntu_classes


def annotation(name, label, persons=1, frames=5, *, joints=17, channels=2, **changes):
    rng = np.random.default_rng(label)
    made = {
        "frame_dir": name,
        "label": label,
        "total_frames": frames,
        "img_shape": (1080, 1920),
        "original_shape": (1080, 1920),
        "keypoint": (rng.uniform(1, 900, (persons, frames, joints, channels))).astype(np.float16),
    }
    if channels == 2:
        made["keypoint_score"] = rng.uniform(0.1, 1, (persons, frames, joints)).astype(np.float16)
    return made | changes


@pytest.fixture
def write(tmp_path):
    def write(annotations, split=None, protocol=4):
        path = tmp_path / "data.pkl"
        names = [a.get("frame_dir") for a in annotations]
        split = {"xsub_train": names[:1], "xsub_val": names[1:]} if split is None else split
        path.write_bytes(pickle.dumps({"split": split, "annotations": annotations}, protocol))
        return path

    return write


# From protocol 4 on, names carry their lengths, so the old package cannot be written over the new one.
@pytest.mark.parametrize(
    ("protocol", "package"),
    [(2, b"numpy._core"), (3, b"numpy._core"), (4, b"numpy._core"), (5, b"numpy._core"), (2, b"numpy.core"), (3, b"numpy.core")],
)
def test_2d(write, protocol, package):
    annotations = [
        annotation("S001C001P001R001A001", 0, 2),
        annotation("S001C001P003R001A060", np.int64(59), img_shape=np.array([720, 1280])),
    ]
    path = write(annotations, protocol=protocol)
    path.write_bytes(re.sub(rb"numpy\._?core", package, path.read_bytes()))
    opened = mmaction.read(path)
    assert (opened.layout.name, opened.space, opened.classes, opened.protocols) == ("coco17", "2d", ntu_classes(), ("ntu60-xsub",))
    first, second = opened.items
    assert (first.id, first.label, first.splits, first.image_size) == (
        "S001C001P001R001A001",
        0,
        {"ntu60-xsub": "train"},
        (1920, 1080),
    )
    assert (second.label, second.splits, second.image_size) == (59, {"ntu60-xsub": "test"}, (1280, 720))
    assert first.keypoints.dtype == np.float16
    np.testing.assert_array_equal(first.keypoints[..., :2], annotation("", 0, 2)["keypoint"])
    np.testing.assert_array_equal(first.keypoints[..., 2], annotation("", 0, 2)["keypoint_score"])


def test_3d_goes_through_canonical_persons(write):
    values = annotation("a", 0, 2, joints=25, channels=3)["keypoint"]
    values[0, [1, 3, 4]] = 0
    path = write([annotation("a", 0, keypoint=values), annotation("b", 1, keypoint=values[:1])], {"train": ["a"], "test": ["b"]})
    opened = mmaction.read(path)
    first, second = opened.items
    assert (opened.layout.name, opened.space, opened.protocols, opened.classes) == ("ntu25", "3d", ("default",), ("0", "1"))
    np.testing.assert_array_equal(first.keypoints, values[::-1])
    np.testing.assert_array_equal(second.keypoints, values[:1, [0, 2]])
    assert first.image_size is None


def test_ntu120_is_known_by_setup_or_label(write):
    small, setup, label = "S001C001P001R001A001", "S018C001P003R001A001", "S001C001P003R001A061"
    for name, number in ((setup, 0), (label, 60)):
        opened = mmaction.read(write([annotation(small, 0), annotation(name, number)], {"xset_train": [small], "xset_val": [name]}))
        assert opened.protocols == ("ntu120-xset",)


def test_of_more_persons_the_first_two(write):
    path = write([annotation("a", 0, 3), annotation("b", 0)])
    first, _ = mmaction.read(path).items
    np.testing.assert_array_equal(first.keypoints[..., :2], annotation("a", 0, 3)["keypoint"][:2])


def test_a_third_part_takes_no_part(write):
    path = write([annotation(name, 0) for name in "abc"], {"fold_train": ["a"], "fold_val": ["b"], "fold_test": ["c"]})
    opened = mmaction.read(path)
    assert opened.protocols == ("fold",)
    assert [item.splits for item in opened.items] == [{"fold": "train"}, {}, {"fold": "test"}]


def test_what_cannot_be_used_is_left_out(write):
    good = annotation("good", 0)
    broken = np.array(good["keypoint"])
    broken[0, 3, 6, 1] = np.nan
    annotations = [
        good,
        annotation("nan", 0, keypoint=broken),
        annotation("nobody", 0, keypoint=np.zeros((1, 5, 17, 2)), keypoint_score=np.zeros((1, 5, 17))),
        annotation("no frames", 0, 1, 0),
        annotation("no persons", 0, 0),
        annotation("joints", 0, joints=16),
        annotation("score", 0, keypoint_score=np.zeros((1, 5, 16))),
        annotation("label", 0) | {"label": "walk"},
        annotation("negative", 0) | {"label": -1},
        annotation("huge", 0) | {"label": 10**9},
        {key: value for key, value in annotation("missing", 0).items() if key != "keypoint"},
        annotation("shape", 0, img_shape=(0, 0)),
        annotation("objects", 0, keypoint=np.array([[[[None]]]])),
        {},
    ]
    split = {"x_train": ["good"], "x_val": ["nan", "absent"]}
    items = list(mmaction.read(write(annotations, split)).items)
    reasons = {item.where: f"{item.reason}: {item.detail}" for item in items if isinstance(item, Dropped)}
    assert len(items) == len(annotations) + 1
    assert len(reasons) == len(annotations)
    assert reasons["annotation 1 (nan)"] == f"{NOT_FINITE}: person 0, frame 3, right shoulder"
    assert reasons["annotation 2 (nobody)"].startswith("nobody visible")
    assert reasons["annotation 3 (no frames)"].startswith("nobody visible")
    assert reasons["annotation 5 (joints)"] == "malformed: keypoint float16 (1, 5, 16, 2), expected numbers (M, T, 17, 2)"
    assert reasons["annotation 7 (label)"] == "malformed: expected `label` to be a whole number, found str"
    assert reasons["annotation 13"] == "malformed: expected `frame_dir` to be a text, found NoneType"
    assert reasons["annotation 9 (huge)"] == "malformed: label 1000000000, expected 0 to 99999"
    assert reasons["absent"].startswith("listed in a split, but not annotated")


class Payload:
    def __init__(self, call):
        self.call = call

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("hidden", [False, True])
def test_a_pickle_with_code_is_refused_before_it_runs(write, tmp_path, protocol, hidden):
    mark = tmp_path / "executed"
    payload = Payload((os.mkdir, (str(mark),)))
    path = write([annotation("a", 0) | {"keypoint" if hidden else "extra": payload}], {}, protocol)
    with pytest.raises(FFNError, match=f"^{re.escape(str(path))}: the pickle asks for {os.mkdir.__module__}.mkdir; only numpy"):
        mmaction.read(path)
    assert not mark.exists()


@pytest.mark.parametrize("name", ["builtins.eval", "builtins.getattr", "numpy.load", "numpy.fromfile", "numpy.core.numeric.array"])
def test_only_what_arrays_need_is_known(tmp_path, name):
    module, _, attribute = name.rpartition(".")
    path = tmp_path / "data.pkl"
    path.write_bytes(f"c{module}\n{attribute}\n(S'x'\ntR.".encode())
    with pytest.raises(FFNError, match=f"the pickle asks for {name}"):
        mmaction.read(path)


@pytest.mark.parametrize("text", [b"", b"no pickle", pickle.dumps({"split": {}})[:-4], b"c_codecs\nencode\n(Vx\nVrot13\ntR."])
def test_no_pickle(tmp_path, text):
    path = tmp_path / "data.pkl"
    path.write_bytes(text)
    with pytest.raises(FFNError, match=f"^{re.escape(str(path))}: not a pickle, or cut short"):
        mmaction.read(path)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ([], "expected a dict with `split` and `annotations`"),
        ({"split": {}, "annotations": [1]}, "expected a dict with `split` and `annotations`"),
        ({"split": ["a"], "annotations": []}, "expected `split` to be a dict of lists"),
        ({"split": {"x_train": [1]}, "annotations": []}, "expected `split` to be a dict of lists"),
        ({"split": {}, "annotations": []}, "no sample"),
        ({"split": {}, "annotations": [{}]}, "no annotation has a `keypoint` array"),
        ({"split": {}, "annotations": [annotation("a", 0, joints=18)]}, "18 joints of 2 numbers; known are 17 .coco17."),
        ({"split": {"xsub": ["a"]}, "annotations": [annotation("a", 0)]}, "split 'xsub': expected a name that ends in"),
        ({"split": {"p q_train": ["a"]}, "annotations": [annotation("a", 0)]}, "split 'p q_train': protocol 'p q' cannot name"),
        ({"split": {"p_train": ["a"], "p_val": ["a"]}, "annotations": [annotation("a", 0)]}, "sample a is in both parts of p"),
    ],
)
def test_what_is_no_data_set(tmp_path, content, expected):
    path = tmp_path / "data.pkl"
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(FFNError, match=f"^{re.escape(str(path))}: {expected}"):
        mmaction.read(path)


def test_classes_are_not_built_for_a_label_that_is_left_out(write):
    assert mmaction.read(write([annotation("a", 1), annotation("b", 0) | {"label": 10**9}])).classes == ("0", "1")


@pytest.mark.parametrize("label", [-1, 1, 59, 120, 10**9])
def test_a_label_that_contradicts_its_ntu_name_is_left_out(write, label):
    good, bad = "S001C001P001R001A001", "S001C001P003R001A001"
    opened = mmaction.read(write([annotation(good, 0), annotation(bad, 0) | {"label": label}]))
    first, second = opened.items
    assert (first.id, opened.protocols) == (good, ("ntu60-xsub",))
    assert str(second) == f"annotation 1 ({bad}): malformed: label {label}, expected 0 for action 1 of the name"


def test_no_persons_in_3d(write):
    path = write([annotation("a", 0, joints=25, channels=3), annotation("b", 0, 0, joints=25, channels=3)])
    _, second = mmaction.read(path).items
    assert str(second) == "annotation 1 (b): nobody visible"
