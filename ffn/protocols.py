"""Evaluation protocols of NTU RGB+D 60/120 and NW-UCLA: what a sample's name says, and which part it belongs to.

Standard library only. A sample's name decides its membership; nothing else does.

Source: Shahroudy et al., "NTU RGB+D", CVPR 2016 (cross-subject, cross-view); Liu et al., "NTU RGB+D 120", TPAMI 2019
(cross-subject, cross-setup); the two published lists of samples with missing skeletons, here joined into one; Wang et al.,
"Cross-view Action Modeling, Learning and Recognition", CVPR 2014 (NW-UCLA: the first two views train, the third tests).
"""

import functools
import importlib.resources
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ffn.errors import FFNError

if TYPE_CHECKING:
    from ffn.data.store import Part

NTU_PROTOCOLS: tuple[str, ...] = ("ntu60-xsub", "ntu60-xview", "ntu120-xsub", "ntu120-xset")
UCLA_PROTOCOLS: tuple[str, ...] = ("ucla-xview",)

NTU60_SETUPS, NTU60_ACTIONS = 17, 60
"""NTU RGB+D 60 is the part of NTU RGB+D 120 up to this setup and this action."""

NTU60_TRAINING_SUBJECTS = frozenset({1, 2, 4, 5, 8, 9, 13, 14, 15, 16, 17, 18, 19, 25, 27, 28, 31, 34, 35, 38})
NTU120_TRAINING_SUBJECTS = NTU60_TRAINING_SUBJECTS | {
    45, 46, 47, 49, 50, 52, 53, 54, 55, 56, 57, 58, 59, 70, 74, 78, 80, 81, 82, 83, 84, 85, 86, 89, 91, 92, 93, 94, 95, 97, 98,
    100, 103,
}  # fmt: skip
NTU_TRAINING_CAMERAS = frozenset({2, 3})
UCLA_TRAINING_VIEWS = frozenset({1, 2})

UCLA_ACTIONS: dict[int, str] = {
    1: "pick up with one hand",
    2: "pick up with two hands",
    3: "drop trash",
    4: "walk around",
    5: "sit down",
    6: "stand up",
    8: "donning",
    9: "doffing",
    11: "throw",
    12: "carry",
}
"""Action number in the file name -> class name; the classes are counted in this order."""

_NTU = re.compile(r"S(\d{3})C(\d{3})P(\d{3})R(\d{3})A(\d{3})", re.ASCII)
_NTU_LARGEST = {"setup": 32, "camera": 3, "action": 120}
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
_UCLA = re.compile(r"a(\d{2})_s(\d{2})_e(\d{2})_v(\d{2})", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class NtuName:
    """What the name of an NTU RGB+D sample says; all numbers from 1."""

    setup: int
    camera: int
    subject: int
    replication: int
    action: int


@dataclass(frozen=True, kw_only=True)
class UclaName:
    """What the name of an NW-UCLA sample says; views from 1."""

    action: int
    subject: int
    episode: int
    view: int


def require_name(what: str, name: str) -> None:
    """Raise `FFNError`, beginning with `what`, unless `name` can name a file, a metric and a registered model everywhere.

    That is 1 to 100 ASCII letters, digits, `_`, `-` and `.`, beginning with neither `.` nor `-`.
    """
    if not _NAME.fullmatch(name):
        allowed = "1 to 100 letters of a-z and A-Z, digits, _, - and ., not beginning with . or -"
        raise FFNError(f"{what} {name!r} cannot name files and metrics; expected {allowed}")


def parse_ntu(name: str) -> NtuName:
    """`SsssCcccPpppRrrrAaaa` (no suffix) as numbers. Raises `FFNError` where `name` is not one."""
    match = _NTU.fullmatch(name)
    if not match:
        raise FFNError(f"{name!r} is not an NTU name; expected SsssCcccPpppRrrrAaaa, like S001C002P003R002A013")
    parsed = NtuName(**dict(zip(("setup", "camera", "subject", "replication", "action"), map(int, match.groups()), strict=True)))
    for part, value in vars(parsed).items():
        if value < 1 or value > _NTU_LARGEST.get(part, value):
            allowed = f"1 to {_NTU_LARGEST[part]}" if part in _NTU_LARGEST else "1 or more"
            raise FFNError(f"{name!r} is not an NTU name: {part} {value}, expected {allowed}")
    return parsed


def parse_ucla(name: str) -> UclaName:
    """`aXX_sYY_eZZ_vWW` (no suffix) as numbers. Raises `FFNError` where `name` is not one."""
    match = _UCLA.fullmatch(name)
    if not match:
        raise FFNError(f"{name!r} is not an NW-UCLA name; expected aXX_sYY_eZZ_vWW, like a01_s02_e03_v01")
    action, subject, episode, view = map(int, match.groups())
    if action not in UCLA_ACTIONS:
        raise FFNError(f"{name!r} is not an NW-UCLA name: action {action}, expected one of {', '.join(map(str, UCLA_ACTIONS))}")
    if view not in (1, 2, 3):
        raise FFNError(f"{name!r} is not an NW-UCLA name: view {view}, expected 1, 2 or 3")
    return UclaName(action=action, subject=subject, episode=episode, view=view)


def ntu_splits(name: NtuName) -> dict[str, "Part"]:
    """Protocol -> the part this sample belongs to; the NTU-60 protocols only for what NTU RGB+D 60 holds."""
    splits = {
        "ntu120-xsub": _part(name.subject in NTU120_TRAINING_SUBJECTS),
        "ntu120-xset": _part(name.setup % 2 == 0),
    }
    if name.setup <= NTU60_SETUPS and name.action <= NTU60_ACTIONS:
        splits["ntu60-xsub"] = _part(name.subject in NTU60_TRAINING_SUBJECTS)
        splits["ntu60-xview"] = _part(name.camera in NTU_TRAINING_CAMERAS)
    return splits


def ucla_splits(name: UclaName) -> dict[str, "Part"]:
    """Protocol -> the part this sample belongs to."""
    return {"ucla-xview": _part(name.view in UCLA_TRAINING_VIEWS)}


@functools.cache
def ntu_classes() -> tuple[str, ...]:
    """The 120 class names of NTU RGB+D, A001 first."""
    return tuple(_resource("ntu_classes.txt"))


@functools.cache
def ntu_missing() -> frozenset[str]:
    """Names of the samples whose skeletons are missing or incomplete: 302 of NTU RGB+D 60, 535 of 120."""
    return frozenset(_resource("ntu_missing.txt"))


def _part(trains: bool) -> "Part":
    return "train" if trains else "test"


def _resource(name: str) -> list[str]:
    text = importlib.resources.files("ffn.data").joinpath("resources", name).read_text(encoding="utf-8")
    return [line.strip() for line in text.splitlines() if line.strip()]
