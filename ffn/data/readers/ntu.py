"""NTU RGB+D 60/120 `.skeleton` files, in a folder (with its subfolders) or a zip.

A file is text: the number of frames; per frame the number of bodies; per body a line of 10 numbers (bodyID, clippedEdges,
left hand confidence and state, right hand confidence and state, isRestricted, leanX, leanY, trackingState), a line with
the number of joints (25) and a line of 12 numbers per joint: x y z (metres, depth camera), depthX depthY, colorX colorY
(pixels of the 1920 x 1080 colour image), orientation w x y z, trackingState (0 not tracked, 1 inferred, 2 tracked).

What becomes of it, in this order:
1. Bodies get a slot by their place in the frame: the first is slot 0, the second slot 1, up to four; further ones are left
   out, and the bodyID is not used. A slot without a body in a frame is zero there.
2. A slot's motion energy is the sum over x, y and z of the standard deviation over all joints of all its frames in
   which it has a body. The two slots of most energy are kept, the most energetic first.
3. 3D keeps (x, y, z); 2D keeps (colorX, colorY, trackingState / 2) of the same two slots.
4. `canonical_persons`, for 2D as well.

A body in a slot with a joint that is not finite (in the coordinates that are kept, or in x, y, z, which steps 1 and 2
need) drops the sample. The class set is always NTU's 120; which of them a protocol uses follows from its samples.

Source: MMAction2 `tools/data/skeleton/gen_ntu_rgbd_raw.py`: `read_xyz` with its four bodies at most. Departures: a body
counts as present where any coordinate is non-zero (there: where the coordinates' sum is), equal energies keep the order of
the slots, no padding to 300 frames, no repeated frames in gaps, and normalisation waits until the clip is made.
"""

import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from ffn.data.persons import canonical_persons
from ffn.data.readers.source import NOBODY, NOT_FINITE, Source, Unusable, each_file, file_names, not_finite, stem
from ffn.data.store import Sample, Space
from ffn.errors import FFNError
from ffn.layouts import NTU25
from ffn.protocols import NTU_PROTOCOLS, ntu_classes, ntu_missing, ntu_splits, parse_ntu

SUFFIX = ".skeleton"
IMAGE_SIZE = (1920, 1080)
"""Width and height of the colour image, pixels."""

_SLOTS = 4
_JOINTS = len(NTU25.joints)
_BODY, _JOINT = 10, 12  # numbers on a body's and on a joint's line
_STRIDE = _BODY + 1 + _JOINTS * _JOINT  # numbers of one body
_LINES = 2 + _JOINTS  # lines of one body


def read(path: Path, *, space: Space = "3d", workers: int = 1) -> Source:
    """The `.skeleton` files of a folder or zip. Files are sorted by name, so the result does not depend on `workers`."""
    names, content = file_names(path, SUFFIX), hashlib.sha256()
    parse = functools.partial(_sample, space=space)
    return Source(
        reader="ntu",
        layout=NTU25,
        space=space,
        classes=ntu_classes(),
        protocols=NTU_PROTOCOLS,
        items=each_file(path, names, parse, content, workers),
        total=len(names),
        content=content,
    )


def read_file(path: Path, *, space: Space = "3d") -> NDArray[np.float32]:
    """Keypoints (1 or 2, T, 25, 3) of one `.skeleton` file, whatever it is called. Raises `FFNError` naming file and line."""
    try:
        text = path.read_bytes()
    except OSError as error:
        raise FFNError(f"{path}: cannot be read ({error.strerror})") from None
    return keypoints(text, space, str(path))


def keypoints(text: bytes, space: Space, where: str) -> NDArray[np.float32]:
    """Keypoints (1 or 2, T, 25, 3) of a file's text: 3D metres, 2D pixels and score.

    Raises `Unusable`, an `FFNError`, with `where` and the line.
    """
    bodies = parse_bodies(text, where)
    columns = [0, 1, 2] if space == "3d" else [5, 6, 11]
    _check_finite(bodies, sorted({0, 1, 2, *columns}), where)
    slots = _slots(bodies)
    chosen = np.argsort([-_energy(slot) for slot in slots[..., :3]], kind="stable")[:2]
    kept = slots[chosen][..., columns]
    if space == "2d":
        kept[..., 2] /= 2
    kept = canonical_persons(kept) if len(kept) else kept
    if not kept.size:
        raise Unusable(where, NOBODY)
    return kept.astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class Bodies:
    """The bodies of a file, in the order of the file."""

    frames: int
    frame: NDArray[np.int64]
    """(B,) frame of each body, from 0."""
    slot: NDArray[np.int64]
    """(B,) place of each body in its frame, from 0."""
    joints: NDArray[np.float64]
    """(B, 25, 12) the numbers of each joint's line."""


def parse_bodies(text: bytes, where: str) -> Bodies:
    """The text of a `.skeleton` file as numbers. Raises `Unusable` naming `where` and the line that does not fit."""
    if not text.strip():
        raise Unusable(where, "empty file", f"{len(text)} bytes")
    try:
        values = _numbers(text)
        starts, counts = _walk(values)
    except (ValueError, IndexError):
        _raise_fault(text, where)
    first = np.asarray(starts, np.int64)
    per_frame = np.asarray(counts, np.int64)
    joints = values[first[:, None] + np.arange(_BODY + 1, _STRIDE)].reshape(-1, _JOINTS, _JOINT)
    frame = np.repeat(np.arange(len(per_frame)), per_frame)
    slot = np.arange(len(first)) - np.repeat(np.cumsum(per_frame) - per_frame, per_frame)
    return Bodies(frames=len(per_frame), frame=frame, slot=slot, joints=joints)


def _numbers(text: bytes) -> NDArray[np.float64]:
    """All numbers of a text, whatever space is between them. Raises `ValueError` where one is none.

    Arrow reads a number in a third of Python's time; what is a number Python decides, which takes a few more forms.
    """
    text = text.strip()
    try:
        whole = pa.LargeStringArray.from_buffers(1, pa.py_buffer(np.array([0, len(text)])), pa.py_buffer(text))
        numbers: NDArray[np.float64] = pc.ascii_split_whitespace(whole).values.cast(pa.float64()).to_numpy()
    except pa.ArrowInvalid:
        return np.fromiter(map(float, text.split()), np.float64)
    return numbers


def _walk(values: NDArray[np.float64]) -> tuple[list[int], list[int]]:
    """Where each body's numbers start, and how many bodies each frame has. Raises `ValueError` or `IndexError` off the format."""
    starts: list[int] = []
    counts: list[int] = []
    at = 1
    for _ in range(_count(values.item(0))):
        bodies = _count(values.item(at))
        at += 1
        for _ in range(bodies):
            if values.item(at + _BODY) != _JOINTS:
                raise ValueError
            starts.append(at)
            at += _STRIDE
        counts.append(bodies)
    if at != len(values):
        raise ValueError
    return starts, counts


def _count(value: float) -> int:
    if not value.is_integer() or value < 0:
        raise ValueError
    return int(value)


def _raise_fault(text: bytes, where: str) -> NoReturn:
    """Raise `Unusable` for the first line that leaves the format: line by line, which costs too much for files without a fault."""
    lines = _Lines(text, where)
    for frame in range(lines.count("the number of frames")):
        bodies = lines.count(f"the number of bodies in frame {frame}")
        for body in range(bodies):
            which = f"body {body + 1} of the {bodies} announced in frame {frame}"
            lines.take(_BODY, which)
            if lines.count(f"the number of joints of {which}") != _JOINTS:
                raise lines.fault("malformed", f"expected {_JOINTS} joints in {which}")
            for joint in NTU25.joints:
                lines.take(_JOINT, f"{joint} of {which}")
    lines.at += 1
    raise lines.fault("malformed", "the file goes on after the last frame announced")


class _Lines:
    """The lines of a text that are not blank, taken one at a time."""

    def __init__(self, text: bytes, where: str) -> None:
        self.lines = [(number, line.split()) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
        self.where, self.at = where, 0

    def fault(self, reason: str, detail: str) -> Unusable:
        """The fault of the line last taken."""
        return Unusable(f"{self.where}:{self.lines[min(self.at, len(self.lines)) - 1][0]}", reason, detail)

    def take(self, count: int, what: str) -> list[float]:
        if self.at == len(self.lines):
            raise self.fault("cut short", f"the file ends where {what} should follow")
        fields = self.lines[self.at][1]
        self.at += 1
        if len(fields) != count:
            ends = self.at == len(self.lines) and len(fields) < count
            raise self.fault("cut short" if ends else "malformed", f"expected {count} numbers ({what}), found {len(fields)}")
        try:
            return [float(text) for text in fields]
        except ValueError as error:
            raise self.fault("malformed", f"{what}: {error}") from None

    def count(self, what: str) -> int:
        (value,) = self.take(1, what)
        if not value.is_integer() or value < 0:
            raise self.fault("malformed", f"expected {what}, found {value:g}")
        return int(value)


def _check_finite(bodies: Bodies, columns: list[int], where: str) -> None:
    bad = not_finite(bodies.joints[:, :, columns]).any(axis=2) & (bodies.slot < _SLOTS)[:, None]
    if bad.any():
        body, joint = np.argwhere(bad)[0].tolist()
        frame = int(bodies.frame[body])
        # Before the joint's line: one for the number of frames, one per frame so far, the bodies before, two of the body's own.
        line = 1 + (frame + 1) + body * _LINES + 2 + joint + 1
        raise Unusable(f"{where}:{line}", NOT_FINITE, f"{NTU25.joints[joint]} of body {bodies.slot[body] + 1} in frame {frame}")


def _slots(bodies: Bodies) -> NDArray[np.float64]:
    """(slots, T, 25, 12): the bodies by their place in the frame, zero where a frame has none."""
    kept = bodies.slot < _SLOTS
    slots = np.zeros((bodies.slot[kept].max(initial=-1) + 1, bodies.frames, _JOINTS, _JOINT))
    slots[bodies.slot[kept], bodies.frame[kept]] = bodies.joints[kept]
    return slots


def _energy(slot: NDArray[np.float64]) -> float:
    """Motion energy of one slot (T, 25, 3)."""
    present = slot[slot.any(axis=(1, 2))]
    return float(present.std(axis=(0, 1)).sum()) if len(present) else 0.0


def _sample(name: str, text: bytes, *, space: Space) -> Sample:
    identity = stem(name)
    try:
        parsed = parse_ntu(identity)
    except FFNError as error:
        raise Unusable(name, "not an NTU name", str(error)) from None
    if identity in ntu_missing():
        raise Unusable(name, "on the published list of missing skeletons")
    return Sample(
        id=identity,
        label=parsed.action - 1,
        keypoints=keypoints(text, space, name),
        splits=ntu_splits(parsed),
        image_size=IMAGE_SIZE if space == "2d" else None,
    )
