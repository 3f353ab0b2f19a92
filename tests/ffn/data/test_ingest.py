import json
import os
import pickle
import re
import shutil
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest

import ffn
from ffn.data.ingest import ingest, source_version
from ffn.data.readers import source
from ffn.data.readers.source import NOT_FINITE
from ffn.data.store import SkeletonSet
from ffn.errors import FFNError
from ffn.inference import FusedModel
from ffn.layouts import COCO17, NTU25


def test_ntu(ntu_folder, tmp_path):
    report = ingest(ntu_folder, tmp_path / "set.arrow")
    opened = SkeletonSet.open(tmp_path / "set.arrow")
    assert opened.protocols == ("ntu60-xsub", "ntu60-xview", "ntu120-xsub", "ntu120-xset")
    assert report.protocols == {
        "ntu60-xsub": {"train": 4, "test": 2},
        "ntu60-xview": {"train": 4, "test": 2},
        "ntu120-xsub": {"train": 5, "test": 3},
        "ntu120-xset": {"train": 4, "test": 4},
    }
    assert report.classes == {"drink water": 3, "eat meal/snack": 2, opened.classes[59]: 1, opened.classes[60]: 2}
    assert (report.samples, report.dropped, report.digest, report.source, report.reader) == (8, (), opened.digest, "ntu", "ntu")
    assert opened.provenance | {"source_digest": ""} == {
        "source": "ntu",
        "reader": "ntu",
        "ffn": ffn.__version__,
        "source_digest": "",
    }
    assert opened.split("ntu60-xview").classes == ("drink water", "eat meal/snack", opened.classes[59])
    assert json.loads((tmp_path / "set.arrow.report.json").read_text()) == report.to_dict()
    assert (tmp_path / "set.arrow.report.md").read_text() == report.to_markdown()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ntu", "set.arrow", "set.arrow.report.json", "set.arrow.report.md"]


def test_2d_is_another_set(ntu_folder, tmp_path):
    flat = ingest(ntu_folder, tmp_path / "2d.arrow", space="2d")
    assert flat.digest != ingest(ntu_folder, tmp_path / "3d.arrow").digest
    opened = SkeletonSet.open(tmp_path / "2d.arrow")
    assert opened.space == "2d"
    assert opened.image_sizes.tolist() == [[1920, 1080]] * 8


def test_digest_depends_on_neither_path_nor_time_nor_workers(ntu_folder, tmp_path, monkeypatch):
    before = ingest(ntu_folder, tmp_path / "a.arrow")
    moved = tmp_path / "elsewhere" / "other name"
    shutil.copytree(ntu_folder, moved)
    os.utime(next(moved.iterdir()), (0, 0))
    monkeypatch.setattr(source, "_BATCH", 1)
    monkeypatch.setattr(source, "_FILES_PER_WORKER", 1)
    after = ingest(moved, tmp_path / "b.arrow", workers=2)
    assert before.digest == after.digest
    first, second = (SkeletonSet.open(tmp_path / name).provenance for name in ("a.arrow", "b.arrow"))
    assert first["source_digest"] == second["source_digest"]
    assert str(tmp_path) not in json.dumps(dict(second))


def test_what_can_be_skipped_is_skipped_and_said(ntu_folder, tmp_path):
    clean = ingest(ntu_folder, tmp_path / "clean.arrow")
    text = (ntu_folder / "S001C001P003R001A001.skeleton").read_bytes()
    lines = text.split(b"\r\n")
    nan = [*lines[:6], b" ".join([b"nan", *lines[6].split()[1:]]), *lines[7:]]
    bad = {
        "S004C001P001R001A001": text[: len(text) // 2],
        "S004C001P001R002A001": b"",
        "S004C001P001R003A001": b"\n".join([lines[0], b"2", *lines[2:]]),
        "S004C001P001R004A001": b"\n".join(nan),
        "holiday": text,
        "S001C002P005R002A008": text,
        "S004C001P001R005A001": b"2\n0\n0\n",
    }
    for name, content in bad.items():
        (ntu_folder / f"{name}.skeleton").write_bytes(content)
    (ntu_folder / "again").mkdir()
    shutil.copy(ntu_folder / "S001C001P003R001A001.skeleton", ntu_folder / "again")
    (ntu_folder / "notes.txt").write_text("not looked at")
    report = ingest(ntu_folder, tmp_path / "set.arrow")
    assert report.digest == clean.digest
    dropped = dict(report.dropped)
    assert len(report.dropped) == len(dropped) == len(bad) + 1
    assert any(
        re.match(r"S004C001P001R001A001.skeleton:\d+$", where) and why.startswith("cut short") for where, why in dropped.items()
    )
    assert dropped["S004C001P001R002A001.skeleton"] == "empty file: 0 bytes"
    assert dropped["S004C001P001R003A001.skeleton:30"].startswith("malformed: expected 10 numbers (body 2 of the 2 announced")
    assert dropped["S004C001P001R004A001.skeleton:7"] == f"{NOT_FINITE}: neck of body 1 in frame 0"
    assert dropped["holiday.skeleton"].startswith("not an NTU name")
    assert dropped["S001C002P005R002A008.skeleton"] == "on the published list of missing skeletons"
    assert dropped["S004C001P001R005A001.skeleton"] == "nobody visible"
    assert dropped["S001C001P003R001A001"] == "the same id again: the first one was kept"
    assert sum(report.reasons.values()) == len(bad) + 1
    page = report.to_markdown()
    assert all(line.count("\n") == 0 and where in page for where, line in report.dropped)


def test_a_protocol_with_an_empty_part_is_left_out_and_said(ntu_folder, tmp_path):
    for path in ntu_folder.glob("S018*"):
        path.unlink()
    for path in ntu_folder.glob("S002*"):
        path.unlink()
    report = ingest(ntu_folder, tmp_path / "set.arrow")
    assert report.empty_protocols == {"ntu120-xset": {"train": 0, "test": 4}}
    assert "ntu120-xset | 0 | 4" in report.to_markdown()
    opened = SkeletonSet.open(tmp_path / "set.arrow")
    assert opened.protocols == ("ntu60-xsub", "ntu60-xview", "ntu120-xsub")
    with pytest.raises(FFNError, match="no protocol 'ntu120-xset': expected one of ntu60-xsub, ntu60-xview, ntu120-xsub"):
        opened.split("ntu120-xset")


def refused(path, out, expected):
    before = sorted(out.parent.iterdir())
    with pytest.raises(FFNError) as caught:
        ingest(path, out)
    message = str(caught.value)
    assert expected in message
    assert str(path) in message
    assert "\n" not in message
    assert sorted(out.parent.iterdir()) == before


def test_every_protocol_with_an_empty_part(ntu_folder, tmp_path):
    for path in sorted(ntu_folder.iterdir())[1:]:
        path.unlink()
    refused(ntu_folder, tmp_path / "set.arrow", "an empty part in every protocol (ntu60-xsub 0 train and 1 test, ")


def test_no_sample_that_can_be_used(ntu_folder, tmp_path):
    for path in ntu_folder.iterdir():
        path.write_bytes(b"")
    refused(
        ntu_folder,
        tmp_path / "set.arrow",
        "no sample that can be used; the first of 8 left out: S001C001P003R001A001.skeleton: empty",
    )


def test_no_source(tmp_path):
    refused(tmp_path / "nothing", tmp_path / "set.arrow", "no such file or folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", tmp_path / "set.arrow", "no sample found; expected *.skeleton")
    (tmp_path / "empty.zip").write_bytes(b"PK but no zip")
    refused(tmp_path / "empty.zip", tmp_path / "set.arrow", "not a zip file, or cut short; fetch it again")
    with zipfile.ZipFile(tmp_path / "text.zip", "w") as archive:
        archive.writestr("readme.txt", "x")
    refused(tmp_path / "text.zip", tmp_path / "set.arrow", "no sample found")


def test_a_pickle_with_code(tmp_path):
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    (tmp_path / "data.pkl").write_bytes(pickle.dumps({"split": {}, "annotations": [{"keypoint": Payload()}]}))
    refused(tmp_path / "data.pkl", tmp_path / "set.arrow", f"the pickle asks for {os.mkdir.__module__}.mkdir")


def test_pickle(tmp_path):
    def annotation(name, label):
        return {"frame_dir": name, "label": label, "keypoint": np.ones((1, 4, 17, 2)), "keypoint_score": np.ones((1, 4, 17))}

    content = {
        "split": {"p_train": ["a"], "p_val": ["b"]},
        "annotations": [annotation("a", 1), annotation("b", 1), annotation("b", 0)],
    }
    (tmp_path / "data.pkl").write_bytes(pickle.dumps(content))
    report = ingest(tmp_path / "data.pkl", tmp_path / "set.arrow")
    assert (report.reader, report.samples, report.protocols) == ("mmaction", 2, {"p": {"train": 1, "test": 1}})
    assert report.dropped == (("b", "the same id again: the first one was kept"),)
    assert report.classes == {"1": 2}


def table(folder, classes="walk\n"):
    (folder / "keypoints").mkdir(parents=True)
    (folder / "labels.csv").write_text("id,label,p\na,walk,train\nb,walk,test\n")
    (folder / "classes.txt").write_text(classes)
    (folder / "layout.json").write_text('{"layout": "ntu25", "space": "3d"}')
    for name in "ab":
        np.savez(folder / "keypoints" / f"{name}.npz", keypoints=np.ones((1, 3, 25, 3)))
    return folder


def test_table(tmp_path):
    report = ingest(table(tmp_path / "mine"), tmp_path / "set.arrow")
    assert (report.reader, report.samples, report.classes) == ("table", 2, {"walk": 2})


@pytest.mark.parametrize("layout", [NTU25, COCO17])
def test_prediction_prepares_as_ingestion_stores(tmp_path, layout):
    folder, space = table(tmp_path / "mine"), "3d" if layout is NTU25 else "2d"
    (folder / "layout.json").write_text(json.dumps({"layout": layout.name, "space": space, "image_size": [640, 480]}))
    padded = np.zeros((2, 12, len(layout.joints), 3))
    padded[1, 2:7] = np.random.default_rng(0).normal(size=(5, len(layout.joints), 3))
    padded[1, 4] = 0
    for name in "ab":
        np.savez(folder / "keypoints" / f"{name}.npz", keypoints=padded)
    ingest(folder, tmp_path / "set.arrow")
    stored = SkeletonSet.open(tmp_path / "set.arrow").sample(0)
    assert stored.shape[:2] == (1, 4 if space == "3d" else 7)
    model = FusedModel(streams={"j": (SimpleNamespace(layout=layout, space=space), None)}, weights={"j": 1.0})
    np.testing.assert_array_equal(model._prepared(0, padded), stored)


def test_table_with_an_unknown_class(tmp_path):
    refused(table(tmp_path / "mine", "run\n"), tmp_path / "set.arrow", "labels.csv:2: unknown class 'walk'")


def test_ucla(tmp_path):
    recording = {"skeletons": np.ones((3, 20, 3)).tolist(), "label": 1}
    (tmp_path / "data").mkdir()
    for view in (1, 3):
        (tmp_path / "data" / f"a01_s01_e00_v0{view}.json").write_text(json.dumps(recording))
    report = ingest(tmp_path / "data", tmp_path / "set.arrow", progress=True)
    assert (report.reader, report.protocols) == ("ucla", {"ucla-xview": {"train": 1, "test": 1}})


def test_an_error_on_the_way_leaves_the_old_set(tmp_path):
    folder = table(tmp_path / "mine")
    ingest(folder, tmp_path / "set.arrow")
    (folder / "labels.csv").write_text("id,label,p\na,walk,train\nb,walk,train\n")
    refused(folder, tmp_path / "set.arrow", "an empty part in every protocol (p 2 train and 0 test)")
    assert len(SkeletonSet.open(tmp_path / "set.arrow")) == 2


def test_source_version(ntu_folder, tmp_path):
    before = source_version(ntu_folder)
    assert source_version(ntu_folder) == before
    first = next(ntu_folder.iterdir())
    os.utime(first, (1, 1))
    touched = source_version(ntu_folder)
    first.rename(ntu_folder / "S005C001P001R001A001.skeleton")
    renamed = source_version(ntu_folder)
    (ntu_folder / "notes.txt").write_text("x")
    assert len({before, touched, renamed, source_version(ntu_folder)}) == 4
    file = tmp_path / "data.pkl"
    file.write_bytes(b"x")
    one = source_version(file)
    file.write_bytes(b"xy")
    assert source_version(file) != one
    with pytest.raises(FFNError, match="no such file or folder"):
        source_version(tmp_path / "nothing")
