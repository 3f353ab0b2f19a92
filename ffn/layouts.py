"""Skeleton layouts: named joints, bones and the graph, one constant per layout."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from ffn.errors import FFNError


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Named joints and how they hang together. Joints are 0-based."""

    name: str
    joints: tuple[str, ...]
    parents: tuple[int, ...]
    """Parent of every joint; a root is its own parent. Bone v runs from parents[v] to v."""
    center: int
    """Root of the spatial partition: neighbours closer to it and further from it get weights of their own."""
    links: tuple[tuple[int, int], ...] = ()
    """Edges of the graph, (child, parent), where they differ from the bones."""
    spine: tuple[int, int] | None = None
    """3D: (bottom, top) of the bone that normalisation turns to +z; its top is the origin."""
    shoulders: tuple[int, int] | None = None
    """3D: (left, right) shoulders, whose line normalisation turns to +x."""

    @property
    def edges(self) -> tuple[tuple[int, int], ...]:
        """Edges of the graph, (child, parent): `links`, or the bones."""
        return self.links or tuple((v, p) for v, p in enumerate(self.parents) if v != p)

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Self:
        """The inverse of `dataclasses.asdict`, from JSON types. Raises `FFNError` where it is not a layout."""
        try:
            values = {**plain, "joints": tuple(plain["joints"]), "parents": tuple(plain["parents"])}
            values["links"] = tuple((child, parent) for child, parent in plain.get("links", ()))
            for name in ("spine", "shoulders"):
                values[name] = tuple(plain[name]) if plain.get(name) else None
            made = cls(**values)
        except (KeyError, TypeError, ValueError) as error:
            raise FFNError(f"not a layout ({error}); expected name, joints, parents, center") from None
        count = len(made.joints)
        indices = [
            *made.parents,
            made.center,
            *(v for link in made.links for v in link),
            *(made.spine or ()),
            *(made.shoulders or ()),
        ]
        if len(made.parents) != count or not all(isinstance(v, int) and 0 <= v < count for v in indices):
            raise FFNError(f"layout {made.name}: {count} joints need {count} parents, every joint number 0 to {count - 1}")
        return made


_SIDES = ("left", "right")

COCO17 = Layout(
    name="coco17",
    joints=(
        "nose",
        *(f"{side} {part}" for part in ("eye", "ear", "shoulder", "elbow", "wrist", "hip", "knee", "ankle") for side in _SIDES),
    ),
    parents=(0, 0, 0, 1, 2, 0, 0, 5, 6, 7, 8, 0, 0, 11, 12, 13, 14),
    center=0,
    # MMAction2's COCO graph hangs the hips on the shoulders, its bones hang them on the nose.
    links=(
        (15, 13), (13, 11), (16, 14), (14, 12), (11, 5), (12, 6), (9, 7), (7, 5),
        (10, 8), (8, 6), (5, 0), (6, 0), (1, 0), (3, 1), (2, 0), (4, 2),
    ),
)  # fmt: skip

NTU25 = Layout(
    name="ntu25",
    joints=(
        "base of spine", "middle of spine", "neck", "head",
        "left shoulder", "left elbow", "left wrist", "left hand",
        "right shoulder", "right elbow", "right wrist", "right hand",
        "left hip", "left knee", "left ankle", "left foot",
        "right hip", "right knee", "right ankle", "right foot",
        "spine", "left hand tip", "left thumb", "right hand tip", "right thumb",
    ),
    parents=(1, 20, 20, 2, 20, 4, 5, 6, 20, 8, 9, 10, 0, 12, 13, 14, 0, 16, 17, 18, 20, 22, 7, 24, 11),
    center=20,
    # MMAction2's NTU graph hangs the hand tips on the hands, its bones hang them on the thumbs.
    links=(
        (0, 1), (1, 20), (2, 20), (3, 2), (4, 20), (5, 4), (6, 5), (7, 6), (8, 20), (9, 8), (10, 9), (11, 10),
        (12, 0), (13, 12), (14, 13), (15, 14), (16, 0), (17, 16), (18, 17), (19, 18), (21, 7), (22, 7), (23, 11), (24, 11),
    ),
    spine=(0, 1),
    shoulders=(4, 8),
)  # fmt: skip

KINECT20 = Layout(
    name="kinect20",
    joints=(
        "hip centre", "spine", "shoulder centre", "head",
        "left shoulder", "left elbow", "left wrist", "left hand",
        "right shoulder", "right elbow", "right wrist", "right hand",
        "left hip", "left knee", "left ankle", "left foot",
        "right hip", "right knee", "right ankle", "right foot",
    ),
    parents=(1, 2, 2, 2, 2, 4, 5, 6, 2, 8, 9, 10, 0, 12, 13, 14, 0, 16, 17, 18),
    center=2,
    spine=(0, 1),
    shoulders=(4, 8),
)  # fmt: skip

LAYOUTS: dict[str, Layout] = {layout.name: layout for layout in (COCO17, NTU25, KINECT20)}


def layout(name: str) -> Layout:
    """The layout called `name`; `FFNError` where there is none."""
    if name not in LAYOUTS:
        raise FFNError(f"unknown layout {name!r}: expected one of {', '.join(LAYOUTS)}")
    return LAYOUTS[name]
