"""Synthetic recordings in NTU RGB+D's own text format: bodies that move, seen by three Kinects that err.

A performance is one subject doing one action once; three cameras see it, as in NTU. Subjects differ in limb lengths, tempo,
range and posture; setups in camera height and distance; replication 1 faces camera 2, replication 2 faces camera 3, camera 1
stands between them. The trunk follows from its angles, arms and legs from where hands and feet go, limb lengths kept.
Everything random is keyed by (seed, what it is for), so a performance does not depend on how many others are made.
Source: Shahroudy et al., NTU RGB+D (CVPR 2016), Liu et al., NTU RGB+D 120 (TPAMI 2020): set-up, file names, format.
"""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ffn.errors import FFNError
from ffn.protocols import NTU60_ACTIONS, NTU60_SETUPS, NTU120_TRAINING_SUBJECTS, ntu_missing

Floats = NDArray[np.float64]

VERSION = 1
"""Raised whenever the same settings would write other bytes."""
FPS = 30
CAMERAS = (1, 2, 3)
MARKER = "synth.json"
_LEFT, _RIGHT = 0, 1
_OUTWARD = np.array([[1.0, 1.0, 1.0], [-1.0, 1.0, 1.0]])
"""(side, 3): turns (outward, up, forward) into the body's (left, up, forward)."""


def write_ntu(folder: Path | str, *, repeats: int = 10, seed: int = 0) -> int:
    """Write `repeats` performances of each of the actions, three files each, into `folder`; return the number of files.

    With two performances or more, every class has training and held-out samples in each protocol that contains it.
    A folder that was made with the same settings is left as it is. The folder appears whole or not at all.
    Raises `FFNError` where `folder` holds anything else, or where `repeats` is under 2 or more than there are names for.
    """
    folder = Path(folder)
    settings = {"version": VERSION, "repeats": repeats, "seed": seed}
    count = len(ACTIONS) * repeats * len(CAMERAS)
    if repeats < 2:
        raise FFNError(f"repeats {repeats}: expected at least 2, or a protocol would lack training or held-out samples")
    if _is_made(folder, settings):
        return count
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        for action in ACTIONS:
            for performance in performances(action, repeats, seed):
                bodies = perform(performance, seed)
                for camera in CAMERAS:
                    (partial / f"{performance.name(camera)}.skeleton").write_text(record(bodies, performance, camera, seed))
        (partial / MARKER).write_text(json.dumps(settings) + "\n")
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return count


def _is_made(folder: Path, settings: dict[str, int]) -> bool:
    """Whether `folder` already holds exactly this; `FFNError` where it holds something else."""
    if folder.exists() and not folder.is_dir():
        raise FFNError(f"{folder}: is a file; name a folder for the synthetic recordings")
    if not folder.exists() or not any(folder.iterdir()):
        return False
    try:
        made = json.loads((folder / MARKER).read_text())
    except (OSError, ValueError):
        made = None
    if made != settings:
        what = f"was made with other settings ({json.dumps(made)})" if made else "is not empty and was not made by synth"
        raise FFNError(f"{folder}: {what}; name another folder or remove this one")
    return True


# ---------------------------------------------------------------- who performs what, where, and under which name


@dataclass(frozen=True, kw_only=True)
class Performance:
    """One subject doing one action once, in front of three cameras."""

    setup: int
    subject: int
    replication: int
    action: int
    take: int
    """Counts the performances of the action, from 0."""

    def name(self, camera: int) -> str:
        """The sample's name, as NTU's files carry it."""
        return f"S{self.setup:03d}C{camera:03d}P{self.subject:03d}R{self.replication:03d}A{self.action:03d}"


def performances(action: int, repeats: int, seed: int = 0) -> list[Performance]:
    """The first `repeats` performances of an action (1 to 120).

    As in NTU, classes to 60 come from setups to 17 and subjects to 40, the others from setups and subjects above.
    Training and held-out subjects alternate; with even and odd setups they make each of the four combinations in turn.
    Raises `FFNError` where there are fewer names than `repeats`.
    """
    old = action <= NTU60_ACTIONS
    setups = range(1, NTU60_SETUPS + 1) if old else range(NTU60_SETUPS + 1, 33)
    subjects = range(1, 41) if old else range(41, 107)
    rng = np.random.default_rng([seed, 1, action])
    cells: dict[tuple[bool, int], list[tuple[int, int, int]]] = {}
    for trains, odd in product((True, False), (0, 1)):
        names = product(
            [s for s in setups if s % 2 == odd], [p for p in subjects if (p in NTU120_TRAINING_SUBJECTS) == trains], (1, 2)
        )
        cells[trains, odd] = [tuple(name) for name in rng.permutation(list(names)).tolist()]
    made: list[Performance] = []
    for take in range(repeats):
        cell = cells[take % 2 == 0, (take + take // 2 + action) % 2]
        while cell:
            setup, subject, replication = cell.pop()
            chosen = Performance(setup=setup, subject=subject, replication=replication, action=action, take=take)
            if not any(chosen.name(camera) in ntu_missing() for camera in CAMERAS):
                made.append(chosen)
                break
        else:
            raise FFNError(f"repeats {repeats}: NTU has names for {take} performances of A{action:03d} only; ask for fewer")
    return made


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A body and its manner. Lengths in metres."""

    trunk: Floats
    """(4,) base of spine to middle, to shoulders' height, to neck, to head."""
    shoulder: float
    hip: float
    """Half the width between the shoulders, between the hips."""
    arm: Floats
    """(4,) upper arm, forearm, wrist to hand, hand to tip."""
    leg: Floats
    """(3,) thigh, shank, ankle to toes."""
    tempo: float
    reach: float
    """Factors on the speed and on the range of movement."""
    side: int
    """The hand that leads, 0 left, 1 right."""
    stoop: float
    """Degrees the trunk leans forward at rest."""
    hands: Floats
    """(3,) where the hands rest, as an offset (outward, up, forward) in arm lengths."""

    @property
    def arm_length(self) -> float:
        """Shoulder to wrist, stretched."""
        return float(self.arm[0] + self.arm[1])

    @property
    def leg_length(self) -> float:
        """Hip to ankle, stretched."""
        return float(self.leg[0] + self.leg[1])


def subject(number: int, seed: int = 0) -> Subject:
    """The subject of that number: the same body and manner in every performance."""
    rng = np.random.default_rng([seed, 2, number])
    height = rng.normal(1.70, 0.09) / 1.70
    trunk, arm, leg = height * rng.normal(1, 0.04, 3)
    return Subject(
        trunk=trunk * np.array([0.29, 0.22, 0.07, 0.14]),
        shoulder=height * rng.normal(0.175, 0.012),
        hip=height * rng.normal(0.085, 0.006),
        arm=arm * np.array([0.275, 0.245, 0.075, 0.075]),
        leg=leg * np.array([0.40, 0.39, 0.13]),
        tempo=rng.uniform(0.85, 1.2),
        reach=rng.uniform(0.88, 1.1),
        side=int(rng.random() < 0.65),
        stoop=rng.normal(4, 3),
        hands=rng.normal(0, [0.04, 0.015, 0.05]),
    )


# ---------------------------------------------------------------- how a body moves

_POLE_LEG = (0.12, 0.05, 1.0)
_IDLE = (
    ((0.28, -0.62, 0.0), (1.0, -0.1, -0.6)),
    ((-0.30, -0.62, 0.42), (0.7, -0.7, -0.4)),
    ((-0.20, -0.12, 0.50), (0.5, -1.0, 0.0)),
)
"""Where an idle hand may be, and where its elbow points: on the hip, before the belly, at the chin."""


@dataclass(frozen=True, kw_only=True)
class Motion:
    """What a body does over T frames, in its own frame (left, up, forward), before it is given limb lengths.

    Hands and feet are (side, T, 3) in (outward, up, forward): hands in arm lengths from their shoulder, feet in leg lengths
    from where they stand. An action writes into the arrays; they start at rest.
    """

    pelvis: Floats
    """(T, 3) displacement (left, up, forward) from standing, in leg lengths."""
    trunk: Floats
    """(T, 3) lean forward, lean left, turn left, in degrees."""
    head: Floats
    """(T, 2) nod, turn left, in degrees."""
    hands: Floats
    """(2, T, 3) wrist from shoulder."""
    elbows: Floats
    """(2, T, 3) where the elbow points."""
    wrists: Floats
    """(2, T, 3) where the hand points, added to the forearm's direction."""
    feet: Floats
    """(2, T, 3) ankle from its place on the ground."""
    grasp: Floats
    """(2, T, 3) a place in space that the hand goes to, metres in the body's frame, origin on the ground."""
    grasps: Floats
    """(2, T, 1) how far it goes there, 0 to 1."""


@dataclass(frozen=True, kw_only=True)
class Take:
    """One performance's time and manner, handed to an action."""

    t: Floats
    """(T,) seconds."""
    rng: np.random.Generator
    subject: Subject
    side: int
    tempo: float
    reach: float

    @property
    def seconds(self) -> float:
        """How long the recording is."""
        return len(self.t) / FPS

    def rest(self, idle: float = 0.4) -> Motion:
        """Standing and swaying a little, hands beside the body or, with probability `idle`, elsewhere."""
        frames = len(self.t)
        m = Motion(
            pelvis=self.sway(3, 0.012) * [1, 0.2, 1],
            trunk=self.sway(3, 2.0) + np.array([self.subject.stoop, 0, 0]),
            head=self.sway(2, 4.0) + np.array([5, 0]),
            hands=np.tile([0.16, -0.965, 0.08], (2, frames, 1)) + self.subject.hands,
            elbows=np.tile([0.4, -0.4, -0.9], (2, frames, 1)),
            wrists=np.zeros((2, frames, 3)),
            feet=np.zeros((2, frames, 3)) + self.rng.normal(0, [0.04, 0, 0.05], (2, 1, 3)),
            grasp=np.zeros((2, frames, 3)),
            grasps=np.zeros((2, frames, 1)),
        )
        for side in (_LEFT, _RIGHT):
            if self.rng.random() < idle:
                place, elbow = _IDLE[self.rng.integers(len(_IDLE))]
                m.hands[side], m.elbows[side] = place + self.rng.normal(0, 0.05, 3), elbow
            m.hands[side] += self.sway(3, 0.03)
        # Who is told to begin looks aside as often as ahead: the first frame says little about the rest.
        m.trunk[:, 2] += self.rng.normal(0, 22) * (1 - self.ease(self.between(-0.3, 0.3) * self.seconds, 0.7))
        return m

    def sway(self, channels: int, size: float) -> Floats:
        """(T, channels) slow, smooth wandering of about that size."""
        rate = self.rng.uniform(0.15, 0.9, (3, channels))
        phase = self.rng.uniform(0, 2 * np.pi, (3, channels))
        waves: Floats = np.sin(2 * np.pi * rate * self.t[:, None, None] + phase).sum(1)
        return waves * size / 3**0.5

    def ease(self, start: float, over: float) -> Floats:
        """(T,) from 0 to 1, beginning at `start` seconds, of least jerk."""
        u = np.clip((self.t - start) / over, 0, 1)
        return u**3 * (10 - 15 * u + 6 * u**2)

    def hold(self, start: float, stop: float, rise: float, fall: float | None = None) -> Floats:
        """(T,) up from 0 to 1 within `rise` seconds of `start`, down again from `stop`."""
        return self.ease(start, rise) - self.ease(stop, rise if fall is None else fall)

    def between(self, low: float, high: float) -> float:
        """A number of this performance's own."""
        return float(self.rng.uniform(low, high))

    def beat(self, low: float, high: float) -> Floats:
        """(T,) phase in radians of a rhythm of so many hertz at tempo 1, not perfectly even, begun anywhere."""
        rate = self.between(low, high) * self.tempo
        return 2 * np.pi * rate * self.t + self.sway(1, 0.3)[:, 0] + self.between(0, 2 * np.pi)


def _mix(values: Floats, weight: Floats, target: Any) -> None:
    """Move `values` (..., T, C) in place by `weight` (T,) towards `target`, which broadcasts."""
    values += weight[:, None] * (np.asarray(target) - values)


def _columns(*columns: Floats | float) -> Floats:
    return np.stack(np.broadcast_arrays(*columns), -1).astype(float)


def _span(take: Take) -> tuple[float, float]:
    """When the action begins and ends, in seconds: early or late, seldom the whole recording."""
    start = take.between(-0.1, 0.3)
    return start * take.seconds, (start + take.between(0.68, 0.88)) * take.seconds


# ---------------------------------------------------------------- the actions, one person


def _sit_down(take: Take) -> Motion:
    m = take.rest()
    over = take.between(0.7, 1.0) / take.tempo
    start = take.between(0.05, 0.95) * (take.seconds - over)
    down = take.ease(start, over)
    tilt = np.sin(np.pi * np.clip((take.t - start) / over, 0, 1)) ** 2
    seat = take.between(0.44, 0.54)
    m.pelvis[:] += _columns(0.0, -seat * down, -take.between(0.42, 0.5) * down - 0.1 * tilt * (1 - down))
    m.trunk[:, 0] += take.between(28, 42) * tilt + take.between(-8, 8) * down
    m.head[:, 0] -= 10 * tilt
    knees = [take.between(0.0, 0.2), -take.between(0.72, 0.8), take.between(0.4, 0.55)]
    for side in (_LEFT, _RIGHT):
        _mix(m.hands[side], down, knees)
        m.hands[side] += tilt[:, None] * [0.05, 0.1, 0.2]
    return m


def _stand_up(take: Take) -> Motion:
    m = _sit_down(take)
    return Motion(**{name: np.flip(track, -2) for name, track in vars(m).items()})


def _before_chest(take: Take, m: Motion, on: Floats) -> Floats:
    """Bring both hands together before the chest; returns the place, (3,) from the left shoulder in arm lengths."""
    together = -take.subject.shoulder / take.subject.arm_length
    place = np.array([together, take.between(-0.45, -0.3), take.between(0.48, 0.58)])
    _mix(m.hands, on, place)
    _mix(m.elbows, on, [1.0, -1.0, -0.2])
    _mix(m.wrists, on, [0.0, 0.5, 0.8])
    m.head[:, 0] += 8 * on
    return place


def _clap(take: Take) -> Motion:
    m = take.rest()
    start, stop = _span(take)
    on = take.hold(start, stop, 0.35)
    _before_chest(take, m, on)
    apart = np.abs(np.sin(take.beat(1.9, 2.5) / 2)) * take.reach * take.between(0.38, 0.48)
    m.hands[..., 0] += on * (apart + 0.02)
    return m


def _rub_hands(take: Take) -> Motion:
    m = take.rest()
    start, stop = _span(take)
    on = take.hold(start, stop, 0.35)
    _before_chest(take, m, on)
    # Held a little apart, as far as clapping hands are on average: only the movement tells the two.
    m.hands[..., 0] += on * take.between(0.14, 0.24)
    stroke = np.sin(take.beat(1.5, 2.0)) * take.reach * take.between(0.24, 0.3)
    m.hands[..., 2] += on * stroke * np.array([[0.7], [-0.7]])
    m.hands[..., 1] += on * stroke * np.array([[0.8], [-0.8]])
    return m


def _wave(take: Take) -> Motion:
    m = take.rest()
    start, stop = _span(take)
    on = take.hold(start, stop, 0.4)
    _mix(m.hands[take.side], on, [take.between(0.25, 0.45), take.between(-0.05, 0.65), take.between(0.3, 0.5)])
    _mix(m.elbows[take.side], on, [0.6, -1.0, -0.1])
    _mix(m.wrists[take.side], on, [0.0, 0.8, 0.0])
    swing = np.sin(take.beat(1.7, 2.4)) * take.reach * take.between(0.24, 0.34)
    m.hands[take.side, :, 0] += on * swing
    m.wrists[take.side, :, 0] += on * swing * 1.5
    return m


def _kick(take: Take) -> Motion:
    m = take.rest()
    over = take.between(0.75, 0.95) / take.tempo
    start = take.between(0.1, 0.9) * (take.seconds - over)
    u = np.clip((take.t - start) / over, 0, 1)
    back, front = np.exp(-(((u - 0.25) / 0.13) ** 2)), np.exp(-(((u - 0.58) / 0.15) ** 2))
    leg, stance = take.side, 1 - take.side
    height = take.between(0.45, 0.7) * take.reach
    m.feet[leg] += _columns(0.0, 0.25 * back + height * front, -0.42 * back + 0.85 * take.reach * front)
    outward = _OUTWARD[stance, 0] * take.subject.hip / take.subject.leg_length
    busy = take.hold(start, start + 0.8 * over, 0.25)
    m.pelvis[:] += _columns(outward * 0.8 * busy, -0.02 * busy, 0.03 * front)
    m.trunk[:, 0] += 8 * back - 12 * front
    m.trunk[:, 2] += _OUTWARD[leg, 0] * (10 * back - 12 * front)
    m.hands[stance] += _columns(0.25 * front, 0.12 * (front + back), 0.45 * front - 0.1 * back)
    m.hands[leg] += _columns(0.2 * front, 0.10 * (front + back), 0.35 * back - 0.35 * front)
    return m


def _jump(take: Take) -> Motion:
    m = take.rest()
    over = take.between(0.9, 1.1) / take.tempo
    start = take.between(0.05, 0.95) * (take.seconds - over)
    u = np.clip((take.t - start) / over, 0, 1)
    crouch = np.exp(-(((u - 0.22) / 0.1) ** 2)) + 0.7 * np.exp(-(((u - 0.8) / 0.09) ** 2))
    air = np.clip(1 - ((u - 0.52) / 0.2) ** 2, 0, None)
    height = take.between(0.3, 0.45) * take.reach
    m.pelvis[:] += _columns(0.0, height * air - 0.26 * crouch, -0.12 * crouch)
    m.feet[:] += _columns(0.0, height * 1.15 * air, -0.08 * air)
    m.trunk[:, 0] += 20 * crouch
    m.hands[:] += _columns(0.1 * air, 0.3 * air + 0.1 * crouch, 0.35 * air - 0.25 * crouch)
    return m


def _circle_arms(take: Take) -> Motion:
    m = take.rest()
    start, stop = _span(take)
    on = take.hold(start, stop, 0.35)
    phase = take.beat(1.1, 1.6) * take.rng.choice([-1, 1])
    radius = take.between(0.5, 0.75) * take.reach
    _mix(m.elbows, on, [0.2, -1.0, -0.4])
    _mix(m.hands, on, _columns(0.65, radius * np.sin(phase) - 0.05, radius * np.cos(phase)))
    return m


def _swing_arms(take: Take) -> Motion:
    m = take.rest()
    start, stop = _span(take)
    on = take.hold(start, stop, 0.35)
    phase = take.beat(1.0, 1.5)
    for side in (_LEFT, _RIGHT):
        angle = take.between(0.8, 1.1) * take.reach * np.sin(phase + np.pi * side) + 0.25
        _mix(m.hands[side], on, _columns(0.15, -0.95 * np.cos(angle), 0.95 * np.sin(angle)))
    m.trunk[:, 2] -= on * 9 * np.sin(phase)
    return m


def _strides(take: Take, m: Motion, on: Floats, phase: Floats) -> list[Floats]:
    """Bounce and swing the arms as runners do; returns how far each foot is off the ground, (T,) in [0, 1], by turns."""
    m.pelvis[:, 1] += on * (0.02 * np.cos(2 * phase) - 0.04)
    m.pelvis[:, 0] += on * 0.05 * np.sin(phase)
    m.trunk[:, 0] += on * take.between(2, 10)
    m.trunk[:, 2] += on * 7 * np.sin(phase)
    for side, sign in ((_LEFT, 1), (_RIGHT, -1)):
        swing = -sign * np.sin(phase) * take.between(0.22, 0.32)
        _mix(m.hands[side], on, _columns(0.08, -0.58 + 0.35 * swing, 0.3 + swing))
        _mix(m.elbows[side], on, [0.3, -0.4, -1.0])
    return [np.clip(sign * np.sin(phase), 0, None) ** 1.2 * on for sign in (1, -1)]


def _run(take: Take) -> Motion:
    m = take.rest()
    on = take.hold(*_span(take), 0.3)
    for side, lift in enumerate(_strides(take, m, on, take.beat(1.3, 1.7))):
        m.feet[side] += _columns(0.0, 0.36 * take.reach * lift, 0.22 * lift)
    return m


def _kick_butt(take: Take) -> Motion:
    m = take.rest()
    on = take.hold(*_span(take), 0.3)
    for side, lift in enumerate(_strides(take, m, on, take.beat(1.3, 1.7))):
        m.feet[side] += _columns(0.0, 0.42 * take.reach * lift, -0.40 * lift)
    return m


# ---------------------------------------------------------------- the actions, two persons


@dataclass(frozen=True, kw_only=True)
class Meeting:
    """Two persons who face each other. The frame is a person's own, its origin where that person starts."""

    takes: tuple[Take, Take]
    start: float
    """When they step up to each other, in seconds."""
    arrived: float
    near: float
    """How far apart they then are, in metres."""
    step: float
    """How far each has come, in metres."""

    @property
    def height(self) -> float:
        """Of their shoulders, on average, in metres."""
        return float(np.mean([_stand(t.subject) + t.subject.trunk[:2].sum() for t in self.takes]))

    def centre(self) -> float:
        """How far before a person's start the middle lies, in metres."""
        return self.step + self.near / 2


def _meet(takes: tuple[Take, Take], near: float) -> tuple[Meeting, tuple[Motion, Motion]]:
    first = takes[0]
    start, over = first.between(0.0, 0.12) * first.seconds, first.between(0.45, 0.6)
    step = first.between(0.1, 0.32)
    meeting = Meeting(takes=takes, start=start, arrived=start + over, near=near * first.between(0.93, 1.07), step=step)
    one, other = (_walk(take, take.rest(idle=0.15), start, over, step) for take in takes)
    return meeting, (one, other)


def _walk(take: Take, m: Motion, start: float, over: float, metres: float) -> Motion:
    """Two steps forward, the leading side's foot first."""
    far = metres / take.subject.leg_length
    m.pelvis[:, 2] += far * take.ease(start, over)
    for side, at in ((take.side, 0.0), (1 - take.side, 0.4)):
        way = take.ease(start + at * over, 0.6 * over)
        m.feet[side] += _columns(0.0, 0.35 * far * 4 * way * (1 - way), far * way)
    return m


def _grasp(m: Motion, side: int, weight: Floats, place: Floats) -> None:
    m.grasp[side], m.grasps[side] = place, weight[:, None]


def _shake_hands(takes: tuple[Take, Take]) -> tuple[Meeting, tuple[Motion, Motion]]:
    meeting, motions = _meet(takes, 0.85)
    first = takes[0]
    stop = first.between(0.85, 1.1) * first.seconds
    on = first.hold(meeting.arrived - 0.25, stop, 0.4)
    pump = first.between(0.1, 0.14) * np.sin(first.beat(1.7, 2.2)) * first.ease(meeting.arrived + 0.1, 0.2)
    height = meeting.height - first.between(0.28, 0.36) + pump
    for m in motions:
        _grasp(m, _RIGHT, on, _columns(-0.03, height, meeting.centre() - 0.04))
        m.trunk[:, 0] += 5 * on
    return meeting, motions


def _high_five(takes: tuple[Take, Take]) -> tuple[Meeting, tuple[Motion, Motion]]:
    meeting, motions = _meet(takes, 0.8)
    first = takes[0]
    clap = first.between(meeting.arrived + 0.15, max(meeting.arrived + 0.2, 0.75 * first.seconds))
    raised = first.hold(clap - 0.5, clap + 0.12, 0.4, 0.45)
    struck = np.exp(-(((first.t - clap) / 0.13) ** 2))
    height = meeting.height + first.between(0.0, 0.25)
    for m in motions:
        _grasp(m, _RIGHT, raised, _columns(-0.05, height + 0.05 * struck, meeting.centre() - 0.28 + 0.24 * struck))
        _mix(m.elbows[_RIGHT], raised, [0.6, -1.0, -0.1])
        _mix(m.wrists[_RIGHT], raised, [0.0, 1.0, 0.1])
    return meeting, motions


def _punch(takes: tuple[Take, Take]) -> tuple[Meeting, tuple[Motion, Motion]]:
    meeting, motions = _meet(takes, 0.8)
    first = takes[0]
    hitter, victim = motions
    side = first.side
    guard = first.hold(meeting.arrived - 0.3, first.between(0.85, 1.1) * first.seconds, 0.35)
    times = meeting.arrived + 0.15 + np.cumsum(first.rng.uniform(0.35, 0.6, int(first.rng.integers(2, 4)))) / first.tempo - 0.3
    struck = np.exp(-(((first.t[:, None] - times) / 0.09) ** 2)).sum(1)
    hurt = np.exp(-(((first.t[:, None] - times - 0.12) / 0.14) ** 2)).sum(1)
    _mix(hitter.hands[side], guard, [0.1, -0.3, 0.35])
    _mix(hitter.elbows[side], guard, [0.6, -1.0, -0.3])
    far = meeting.centre() + meeting.near / 2 - 0.12
    _grasp(hitter, side, np.clip(struck, 0, 1), _columns(0.0, meeting.height + first.between(-0.15, 0.15), far))
    hitter.trunk[:, 2] -= _OUTWARD[side, 0] * 18 * struck
    hitter.trunk[:, 0] += 6 * struck
    victim.trunk[:, 0] -= 18 * hurt
    victim.pelvis[:, 2] -= 0.08 * hurt
    victim.head[:, 0] -= 15 * hurt
    return meeting, motions


SOLO: dict[int, Callable[[Take], Motion]] = {
    8: _sit_down,
    9: _stand_up,
    10: _clap,
    23: _wave,
    24: _kick,
    27: _jump,
    34: _rub_hands,
    97: _circle_arms,
    98: _swing_arms,
    99: _run,
    100: _kick_butt,
}
"""NTU's class number -> how one person moves."""
PAIRED: dict[int, Callable[[tuple[Take, Take]], tuple[Meeting, tuple[Motion, Motion]]]] = {
    50: _punch,
    58: _shake_hands,
    112: _high_five,
}
"""NTU's class number -> how two persons move."""
ACTIONS = tuple(sorted({*SOLO, *PAIRED}))


# ---------------------------------------------------------------- from motion to joints

_ANKLE = 0.07
"""Height of the ankle above the ground, metres."""


def _stand(body: Subject) -> float:
    """Height of the base of the spine, standing, in metres."""
    return 0.995 * body.leg_length + _ANKLE


def _turn(degrees: Floats) -> Floats:
    """Rotation matrices (T, 3, 3) that lean forward, lean left, then turn left by `degrees` (T, 3)."""
    ahead, left, turned = np.radians(degrees).T
    one, zero = np.ones_like(ahead), np.zeros_like(ahead)

    def about(axis: int, angle: Floats) -> Floats:
        cos, sin = np.cos(angle), np.sin(angle)
        plane = np.array([[one, zero, zero], [zero, cos, -sin], [zero, sin, cos]])
        return np.roll(plane, (axis, axis), (0, 1)).transpose(2, 0, 1)

    matrices: Floats = about(1, turned) @ about(0, ahead) @ about(2, -left)
    return matrices


def _unit(vectors: Floats) -> Floats:
    units: Floats = vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-9)
    return units


def _two_bones(root: Floats, goal: Floats, pole: Floats, upper: float, lower: float) -> tuple[Floats, Floats]:
    """Middle and end joint (T, 3) of a limb from `root` towards `goal`, bent towards `pole`; its two lengths are kept."""
    along = _unit(goal - root)
    distance = np.clip(np.linalg.norm(goal - root, axis=-1, keepdims=True), abs(upper - lower) + 0.05, 0.998 * (upper + lower))
    bend = _unit(pole - along * (along * pole).sum(-1, keepdims=True))
    cosine = (upper**2 + distance**2 - lower**2) / (2 * upper * distance)
    return root + upper * (along * cosine + bend * np.sqrt(1 - cosine**2)), root + along * distance


def joints(body: Subject, m: Motion) -> Floats:
    """The 25 joints of NTU, (T, 25, 3) metres (left, up, forward), origin on the ground where the person starts."""
    out = np.zeros((len(m.pelvis), 25, 3))
    half, chest, hips = (_turn(m.trunk * share) for share in (0.5, 1.0, np.array([0.3, 0.3, 0.4])))
    base = m.pelvis * body.leg_length + [0, _stand(body), 0]
    middle = base + half[:, :, 1] * body.trunk[0]
    top = middle + chest[:, :, 1] * body.trunk[1]
    neck = top + chest[:, :, 1] * body.trunk[2]
    skull = chest @ _turn(np.stack([m.head[:, 0], 0 * m.head[:, 0], m.head[:, 1]], -1))
    out[:, 0], out[:, 1], out[:, 20], out[:, 2] = base, middle, top, neck
    out[:, 3] = neck + body.trunk[3] * _unit(skull @ np.array([0.0, 0.95, 0.25]))
    for side, (arm, leg, tip) in enumerate(((4, 12, 21), (8, 16, 23))):
        mirror = _OUTWARD[side]
        reach = m.hands[side] * mirror * body.arm_length
        # Collar bones lift the shoulder when the hand goes up.
        lift = 0.05 * np.clip(m.hands[side, :, 1] + 0.4, 0, 1)[:, None] * [0.0, 1.0, 0.0]
        shoulder = top + np.einsum("tij,tj->ti", chest, lift + np.array([mirror[0] * body.shoulder, -0.035, 0.0]))
        goal = shoulder + np.einsum("tij,tj->ti", chest, reach)
        goal = goal + m.grasps[side] * (m.grasp[side] - goal)
        elbow, wrist = _two_bones(shoulder, goal, np.einsum("tij,tj->ti", chest, m.elbows[side] * mirror), body.arm[0], body.arm[1])
        point = _unit(_unit(wrist - elbow) + np.einsum("tij,tj->ti", chest, m.wrists[side] * mirror))
        inward = _unit(np.cross(point, np.cross(chest @ np.array([-mirror[0], 0.3, 0.6]), point)))
        hand = wrist + point * body.arm[2]
        out[:, arm], out[:, arm + 1], out[:, arm + 2], out[:, arm + 3] = shoulder, elbow, wrist, hand
        out[:, tip], out[:, tip + 1] = hand + point * body.arm[3], wrist + 0.045 * (point + inward)
        hip = base + hips @ np.array([mirror[0] * body.hip, -0.02, 0.0])
        ankle = [mirror[0] * (body.hip + 0.02), _ANKLE, 0.0] + m.feet[side] * mirror * body.leg_length
        knee, ankle = _two_bones(hip, ankle, np.broadcast_to(np.array(_POLE_LEG) * mirror, hip.shape), body.leg[0], body.leg[1])
        # A foot on the ground lies flat, a lifted one hangs from its shank.
        shank = _unit(ankle - knee)
        lifted = np.clip((ankle[:, 1:2] - _ANKLE) / 0.12, 0, 1)
        hanging = 0.9 * np.cross(shank, [1.0, 0.0, 0.0]) + 0.45 * shank
        flat = np.array([mirror[0] * 0.2, -0.4, 0.9])
        out[:, leg], out[:, leg + 1], out[:, leg + 2] = hip, knee, ankle
        out[:, leg + 3] = ankle + body.leg[2] * _unit(flat + lifted * (hanging - flat))
    return out


def perform(performance: Performance, seed: int = 0) -> Floats:
    """What really happens: (M, T, 25, 3) metres in the room (y up, origin between the cameras' lines of sight), no noise."""
    rng = np.random.default_rng([seed, 3, performance.action, performance.take])
    paired = performance.action in PAIRED
    t = np.arange(rng.integers(50, 80) if paired else rng.integers(45, 78)) / FPS
    target = {1: 45.0, 2: -45.0}[performance.replication]
    if not paired:
        take = _take(t, rng, performance.subject, seed)
        body = joints(take.subject, SOLO[performance.action](take))
        return _place(body, target + rng.normal(0, 10), rng.normal(0, 0.12, 2))[None]
    # Two persons stand across the line of sight of the camera they perform for.
    partner = performance.subject + int(rng.integers(1, 9))
    takes = (_take(t, rng, performance.subject, seed), _take(t, rng, partner, seed))
    meeting, motions = PAIRED[performance.action](takes)
    facing, centre = target + rng.choice([-90, 90]) + rng.normal(0, 12), rng.normal(0, 0.1, 2)
    bodies = []
    for take, motion, angle in zip(takes, motions, (facing, facing + 180), strict=True):
        ahead = np.array([np.sin(np.radians(angle)), np.cos(np.radians(angle))])
        bodies.append(_place(joints(take.subject, motion), angle, centre - ahead * meeting.centre()))
    return np.stack(bodies)


def _take(t: Floats, rng: np.random.Generator, number: int, seed: int) -> Take:
    who = subject(number, seed)
    side = who.side if rng.random() < 0.85 else 1 - who.side
    return Take(
        t=t, rng=rng, subject=who, side=side, tempo=who.tempo * rng.uniform(0.9, 1.1), reach=who.reach * rng.uniform(0.9, 1.1)
    )


def _place(body: Floats, facing: float, where: Floats) -> Floats:
    """Turn a body (T, 25, 3) to `facing` (degrees about y, 0 looks along z) and put it at `where` (x, z)."""
    rotation = _turn(np.array([[0.0, 0.0, facing]]))[0]
    placed: Floats = body @ rotation.T + [where[0], 0.0, where[1]]
    return placed


# ---------------------------------------------------------------- what a camera makes of it

_ANGLES = {1: 0.0, 2: 45.0, 3: -45.0}
_TRUNK, _ENDS = [0, 1, 2, 3, 20], [7, 11, 15, 19, 21, 22, 23, 24]
_COLOUR, _DEPTH = (1081.0, 960.0, 540.0), (365.0, 256.0, 212.0)
"""(focal length, centre x, centre y) in pixels of a Kinect v2."""
_BASELINE = 0.052
"""Metres from the depth camera to the colour camera."""


def _seen(room: Floats, performance: Performance, camera: int, seed: int) -> Floats:
    """`room` (..., 3) in the camera's own frame: x to the sensor's left, y up, z ahead. It looks at the middle of the bodies."""
    rng = np.random.default_rng([seed, 4, performance.setup])
    height, distance, aim = rng.uniform(1.1, 2.0), rng.uniform(2.6, 3.8), rng.uniform(0.75, 1.1)
    angle = np.radians(_ANGLES[camera])
    place = np.array([distance * np.sin(angle), height, distance * np.cos(angle)])
    ahead = _unit(np.array([0.0, aim, 0.0]) - place)
    left = _unit(np.cross([0.0, 1.0, 0.0], ahead))
    seen: Floats = (room - place) @ np.stack([left, np.cross(ahead, left), ahead], -1)
    return seen


def _occluded(seen: Floats) -> NDArray[np.bool_]:
    """(M, T, 25) whether some trunk, head or thigh hides the joint from the camera, at the origin of `seen` (M, T, 25, 3)."""
    persons = len(seen)
    hidden = np.zeros(seen.shape[:3], bool)
    thighs = (seen[:, :, [12, 16]] + seen[:, :, [13, 17]]) / 2
    blockers = np.concatenate([seen[:, :, [0, 1, 20, 3]], (seen[:, :, [0]] + seen[:, :, [1]]) / 2, thighs], 2)
    radii = np.array([0.12, 0.13, 0.12, 0.08, 0.13, 0.07, 0.07])
    rays = _unit(seen)
    depth = np.linalg.norm(seen, axis=-1)
    for person in range(persons):
        for blocker, radius in zip(np.moveaxis(blockers[person], 1, 0), radii, strict=True):
            along = (rays * blocker[None, :, None]).sum(-1)
            off = np.linalg.norm(blocker[None, :, None] - along[..., None] * rays, axis=-1)
            hidden |= (off < radius) & (along < depth - 0.14)
    return hidden


def _drift(rng: np.random.Generator, shape: tuple[int, ...], keep: float) -> Floats:
    """(M, T, ...) noise of unit size in which a frame keeps that share of the one before."""
    noise = rng.normal(size=shape)
    for t in range(1, shape[1]):
        noise[:, t] = keep * noise[:, t - 1] + (1 - keep**2) ** 0.5 * noise[:, t]
    return noise


def observe(bodies: Floats, performance: Performance, camera: int, seed: int = 0) -> tuple[Floats, NDArray[np.bool_]]:
    """What the sensor reports of `bodies` (M, T, 25, 3): joints in its frame, metres, and (M, T, 25) which are only inferred."""
    rng = np.random.default_rng([seed, 5, performance.action, performance.take, camera])
    seen = _seen(bodies, performance, camera, seed)
    inferred = _occluded(seen)
    size = np.full(25, 0.007)
    size[_TRUNK], size[_ENDS] = 0.005, 0.012
    scale = size * (seen[..., 2] / 3) ** 1.5 * np.where(inferred, 2.5, 1.0)
    noise = 0.6 * _drift(rng, seen.shape, 0.3) + 0.8 * _drift(rng, seen.shape, 0.93)
    return seen + noise * scale[..., None], inferred


def record(bodies: Floats, performance: Performance, camera: int, seed: int = 0) -> str:
    """The `.skeleton` text of `bodies` (M, T, 25, 3) as one camera sees them, frames lost and strangers found included.

    Orientations are written as 0. Persons come in the sensor's order, not by role; one who is nearly hidden is missed.
    """
    rng = np.random.default_rng([seed, 6, performance.action, performance.take, camera])
    xyz, inferred = observe(bodies, performance, camera, seed)
    present = inferred.mean(-1) < 0.75
    if rng.random() < 0.05:
        xyz, inferred, present = _with_stranger(rng, xyz, inferred, present)
    if rng.random() < 0.15:
        gap = int(rng.integers(0, xyz.shape[1] - 5))
        present[:, gap : gap + int(rng.integers(1, 5))] = False
    order = [*rng.permutation(len(bodies)), *range(len(bodies), len(xyz))]
    first_id = 72057594037930000 + int(rng.integers(0, 9000))
    text = _body_lines(xyz, inferred, [first_id + int(person) for person in range(len(xyz))])
    lines = [f"{xyz.shape[1]}\n"]
    for t in range(xyz.shape[1]):
        shown = [text[person][t] for person in order if present[person, t]]
        lines += [f"{len(shown)}\n", *shown]
    return "".join(lines)


def _with_stranger(
    rng: np.random.Generator, xyz: Floats, inferred: NDArray[np.bool_], present: NDArray[np.bool_]
) -> tuple[Floats, NDArray[np.bool_], NDArray[np.bool_]]:
    """Add what Kinect takes for a person now and then: a heap of joints, somewhere behind, for a while, hardly moving."""
    frames = xyz.shape[1]
    place = [rng.choice([-1, 1]) * rng.uniform(0.7, 1.2), rng.uniform(-0.3, 0.3), rng.uniform(3.8, 4.3)]
    heap = xyz[0, 0] - xyz[0, 0, 0]
    heap = heap * [0.6, 0.5, 0.3] + place + rng.normal(0, 0.06, (25, 3)) + 0.004 * _drift(rng, (1, frames, 25, 3), 0.5)
    start = int(rng.integers(0, frames // 2))
    shown = (np.arange(frames) >= start) & (np.arange(frames) < start + int(rng.integers(8, frames // 2)))
    return (
        np.concatenate([xyz, heap]),
        np.concatenate([inferred, np.ones_like(inferred[:1])]),
        np.concatenate([present, shown[None]]),
    )


_BODY = "%d 0 1 1 1 1 0 %.4f %.4f 2\n25\n" + 25 * "%.4f %.4f %.4f %.2f %.2f %.2f %.2f 0 0 0 0 %d\n"


def _body_lines(xyz: Floats, inferred: NDArray[np.bool_], ids: list[int]) -> list[list[str]]:
    """Per person and frame the lines of that body."""
    x, y, z = np.moveaxis(xyz, -1, 0)
    pixels = [
        middle + sign * focal * value / z
        for focal, *centre in (_DEPTH, _COLOUR)
        for middle, sign, value in zip(centre, (1, -1), (x + _BASELINE * (focal == _COLOUR[0]), y), strict=True)
    ]
    columns = np.stack([x, y, z, *pixels, np.where(inferred, 1, 2)], -1).reshape(*xyz.shape[:2], -1)
    trunk = _unit(xyz[:, :, 20] - xyz[:, :, 0])
    rows = np.concatenate([trunk[..., [0]], -trunk[..., [2]], columns], -1)
    return [[_BODY % (body, *row) for row in person.tolist()] for body, person in zip(ids, rows, strict=True)]
