from collections import Counter

import pytest

from ffn import protocols
from ffn.errors import FFNError
from ffn.protocols import NtuName, UclaName, ntu_splits, parse_ntu, parse_ucla, require_name, ucla_splits


def test_ntu_name():
    assert parse_ntu("S012C003P106R002A120") == NtuName(setup=12, camera=3, subject=106, replication=2, action=120)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "S001C001P001R001A001.skeleton",
        "S01C001P001R001A001",
        "s001c001p001r001a001",
        "S001C001P001R001A001x",
        "S001C001P001R001A000",
        "S001C001P001R001A121",
        "S001C004P001R001A001",
        "S033C001P001R001A001",
        "S001C001P000R001A001",
        "S00\u0661C001P001R001A001",
    ],
)
def test_what_is_no_ntu_name(name):
    with pytest.raises(FFNError, match="not an NTU name"):
        parse_ntu(name)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("S001C001P001R001A001", {"ntu60-xsub": "train", "ntu60-xview": "test", "ntu120-xsub": "train", "ntu120-xset": "test"}),
        ("S017C002P003R001A060", {"ntu60-xsub": "test", "ntu60-xview": "train", "ntu120-xsub": "test", "ntu120-xset": "test"}),
        ("S002C003P038R001A010", {"ntu60-xsub": "train", "ntu60-xview": "train", "ntu120-xsub": "train", "ntu120-xset": "train"}),
        ("S018C001P041R001A061", {"ntu120-xsub": "test", "ntu120-xset": "train"}),
        ("S017C001P001R001A061", {"ntu120-xsub": "train", "ntu120-xset": "test"}),
        ("S018C001P103R001A060", {"ntu120-xsub": "train", "ntu120-xset": "train"}),
    ],
)
def test_ntu_membership(name, expected):
    assert ntu_splits(parse_ntu(name)) == expected


def test_training_subjects_count_as_published():
    assert len(protocols.NTU60_TRAINING_SUBJECTS) == 20
    assert len(protocols.NTU120_TRAINING_SUBJECTS) == 53
    assert max(protocols.NTU120_TRAINING_SUBJECTS) <= 106


def test_published_lists():
    missing = [parse_ntu(name) for name in protocols.ntu_missing()]
    assert len(missing) == 535
    assert Counter("ntu60-xsub" in ntu_splits(name) for name in missing) == {True: 302, False: 233}
    assert len(protocols.ntu_classes()) == len(set(protocols.ntu_classes())) == 120
    assert protocols.ntu_classes()[42] == "falling"


def test_ucla():
    name = parse_ucla("a08_s02_e03_v01")
    assert name == UclaName(action=8, subject=2, episode=3, view=1)
    assert ucla_splits(name) == {"ucla-xview": "train"}
    assert ucla_splits(parse_ucla("a12_s02_e03_v02")) == {"ucla-xview": "train"}
    assert ucla_splits(parse_ucla("a12_s02_e03_v03")) == {"ucla-xview": "test"}


@pytest.mark.parametrize("name", ["a07_s01_e00_v01", "a01_s01_e00_v04", "a01_s01_e00", "A01_s01_e00_v01"])
def test_what_is_no_ucla_name(name):
    with pytest.raises(FFNError, match="not an NW-UCLA name"):
        parse_ucla(name)


@pytest.mark.parametrize("name", ["ntu60-xsub", "default", "2fold", "_x", "v1.2_B", "x" * 100])
def test_names(name):
    require_name("column", name)


@pytest.mark.parametrize("name", ["", ".x", "-x", "a b", "a/b", "..", "a:b", "größe", "x\n", "x" * 101])
def test_what_cannot_be_a_name(name):
    with pytest.raises(FFNError, match=r"^the column '.*' cannot name files and metrics; expected 1 to 100 letters"):
        require_name("the column", name)
