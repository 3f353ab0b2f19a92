import json
import re
from pathlib import Path

import numpy as np
import pytest

from ffn.data.animate import animation, contact_sheet
from ffn.data.readers.ntu import keypoints, parse_bodies
from ffn.data.synth import ACTIONS, PAIRED, Performance, perform, performances, record, subject, write_ntu
from ffn.errors import FFNError
from ffn.layouts import NTU25
from ffn.protocols import NTU_PROTOCOLS, ntu_missing, ntu_splits, parse_ntu


def names(repeats: int) -> list[str]:
    return [take.name(camera) for action in ACTIONS for take in performances(action, repeats) for camera in (1, 2, 3)]


def test_the_actions_cover_what_ntu_is_about():
    assert len(ACTIONS) >= 10
    assert len(PAIRED) >= 2
    assert min(ACTIONS) <= 60 < max(ACTIONS)
    parsed = [parse_ntu(name) for name in names(10)]
    assert {name.camera for name in parsed} == {1, 2, 3}
    assert {name.replication for name in parsed} == {1, 2}
    assert max(name.setup for name in parsed) > 17
    assert max(name.subject for name in parsed) > 40


@pytest.mark.parametrize("repeats", [2, 3, 10, 40])
def test_every_class_has_both_parts_in_each_of_its_protocols(repeats: int):
    made = names(repeats)
    assert len(set(made)) == len(made) == len(ACTIONS) * repeats * 3
    assert not set(made) & ntu_missing()
    parts: dict[tuple[str, int], set[str]] = {}
    for name in map(parse_ntu, made):
        for protocol, part in ntu_splits(name).items():
            parts.setdefault((protocol, name.action), set()).add(part)
    assert {protocol for protocol, _ in parts} == set(NTU_PROTOCOLS)
    assert all(part == {"train", "test"} for part in parts.values())


def test_a_performance_does_not_depend_on_how_many_there_are():
    assert performances(8, 3) == performances(8, 20)[:3]
    assert performances(8, 3) != performances(8, 3, seed=1)


def test_more_performances_than_names_are_refused():
    with pytest.raises(FFNError, match=r"repeats 5000: NTU has names for \d+ performances of A008"):
        performances(8, 5000)


@pytest.mark.parametrize("action", ACTIONS)
def test_bones_keep_their_length_and_stay_above_the_ground(action: int):
    bodies = perform(performances(action, 1)[0])
    assert bodies.shape[0] == (2 if action in PAIRED else 1)
    for parent, child in ((4, 5), (5, 6), (8, 9), (9, 10), (12, 13), (13, 14), (16, 17), (17, 18), (0, 1), (1, 20)):
        length = np.linalg.norm(bodies[:, :, child] - bodies[:, :, parent], axis=-1)
        assert np.ptp(length, axis=1).max() < 1e-6, NTU25.joints[child]
    assert bodies[..., 1].min() > -0.1
    assert np.abs(np.diff(bodies, axis=1)).max() < 0.3, "a joint jumps"


def test_standing_up_is_sitting_down_backwards():
    for action, sign in ((8, -1), (9, 1)):
        for take in performances(action, 4):
            height = perform(take)[0, :, 0, 1]
            assert sign * (height[-1] - height[0]) > 0.2


def test_two_persons_shake_the_same_hands():
    for take in performances(58, 5):
        one, other = perform(take)[:, :, 10]
        assert np.linalg.norm(one - other, axis=-1).min() < 0.2


def test_a_subject_is_the_same_in_every_performance_and_differs_from_others():
    assert subject(7).arm_length == subject(7).arm_length
    assert len({subject(number).leg_length for number in range(1, 41)}) == 40


def test_the_text_is_ntus(tmp_path: Path):
    take = performances(58, 1)[0]
    text = record(perform(take), take, 1)
    bodies = parse_bodies(text.encode(), "made")
    x, y, z, depth_x, depth_y, colour_x, colour_y = np.moveaxis(bodies.joints[..., :7], -1, 0)
    assert bodies.joints.shape[1:] == (25, 12)
    assert bodies.slot.max() == 1
    assert z.min() > 1
    np.testing.assert_allclose(depth_x, 256 + 365 * x / z, atol=0.05)
    np.testing.assert_allclose(depth_y, 212 - 365 * y / z, atol=0.05)
    np.testing.assert_allclose(colour_y, 540 - 1081 * y / z, atol=0.05)
    assert (colour_x > depth_x).all()
    assert set(np.unique(bodies.joints[..., 11])) == {1, 2}
    assert re.fullmatch(r"7\d{16} \d \d \d \d \d \d -?\d\.\d+ -?\d\.\d+ 2", text.splitlines()[2])


def test_the_left_hand_is_on_the_sensors_left_when_the_subject_faces_it():
    take = Performance(setup=1, subject=1, replication=1, action=9, take=0)
    joints = keypoints(record(perform(take), take, 2).encode(), "3d", "made")[0]
    assert (joints[:, 4, 0] < joints[:, 8, 0]).mean() > 0.9


def test_frames_are_lost_and_strangers_found_now_and_then():
    takes = [take for action in (8, 24) for take in performances(action, 20)]
    recorded = [parse_bodies(record(perform(take), take, camera).encode(), "made") for take in takes for camera in (1, 2)]
    lost = [len(np.unique(made.frame)) < made.frames for made in recorded]
    strangers = [made.slot.max() > 0 for made in recorded]
    assert 0 < np.mean(lost) < 0.4
    assert 0 < np.mean(strangers) < 0.2


def test_a_folder_is_made_whole_once_and_the_same(tmp_path: Path):
    one, other = tmp_path / "one", tmp_path / "other"
    assert write_ntu(one, repeats=2) == write_ntu(other, repeats=2) == len(list(one.glob("*.skeleton")))
    for path in one.iterdir():
        assert path.read_bytes() == (other / path.name).read_bytes()
    before = {path: path.stat().st_mtime_ns for path in one.iterdir()}
    assert write_ntu(one, repeats=2) == len(before) - 1
    assert before == {path: path.stat().st_mtime_ns for path in one.iterdir()}
    with pytest.raises(FFNError, match="made with other settings"):
        write_ntu(one, repeats=2, seed=1)
    assert sorted(tmp_path.iterdir()) == [one, other]


def test_an_empty_folder_is_used_and_a_full_one_refused(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    write_ntu(tmp_path / "empty", repeats=2)
    assert json.loads((tmp_path / "empty" / "synth.json").read_text())["repeats"] == 2
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(FFNError, match=r"full: is not empty and was not made by synth"):
        write_ntu(tmp_path / "full")
    with pytest.raises(FFNError, match="is a file"):
        write_ntu(tmp_path / "full" / "thesis.txt")
    with pytest.raises(FFNError, match="expected at least 2"):
        write_ntu(tmp_path / "new", repeats=1)
    assert not (tmp_path / "new").exists()


def test_nothing_stays_behind_when_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object) -> str:
        raise RuntimeError("disk on fire")

    monkeypatch.setattr("ffn.data.synth.record", fail)
    with pytest.raises(RuntimeError):
        write_ntu(tmp_path / "out", repeats=2)
    assert not list(tmp_path.iterdir())


def view_normalised(clip: np.ndarray) -> np.ndarray:
    """(2, 32, 25, 3): spine up, shoulders along x in the first frame, 32 frames evenly spaced."""
    first = clip[0, 0].astype(float)
    up = first[1] - first[0]
    up /= np.linalg.norm(up)
    across = first[8] - first[4]
    across -= up * (across @ up)
    across /= np.linalg.norm(across)
    turned = np.where(clip.any(-1, keepdims=True), clip - first[1], 0) @ np.stack([across, np.cross(up, across), up]).T
    out = np.zeros((2, 32, 25, 3))
    out[: len(clip)] = turned[:, np.linspace(0, clip.shape[1] - 1, 32).round().astype(int)]
    return out


def nearest_mean(features: np.ndarray, labels: np.ndarray, train: np.ndarray) -> float:
    classes = np.unique(labels[train])
    means = np.stack([features[train & (labels == label)].mean(0) for label in classes])
    distance = ((features[~train, None] - means) ** 2).sum(-1)
    return float((classes[distance.argmin(1)] == labels[~train]).mean())


def test_means_of_poses_do_not_solve_it():
    takes = [(take, camera) for action in ACTIONS for take in performances(action, 6) for camera in (1, 2, 3)]
    clips = [view_normalised(keypoints(record(perform(take), take, camera).encode(), "3d", "made")) for take, camera in takes]
    labels = np.array([take.action for take, _ in takes])
    parts = [ntu_splits(parse_ntu(take.name(camera))) for take, camera in takes]
    train = np.array([part["ntu120-xsub"] == "train" for part in parts])
    flat = np.stack([clip.ravel() for clip in clips])
    pose = np.stack([clip.mean(1).ravel() for clip in clips])
    old = labels <= 60
    for features in (flat, pose):
        assert 0.15 < nearest_mean(features, labels, train) < 0.65
        assert 0.15 < nearest_mean(features[old], labels[old], train[old]) < 0.7


def test_pictures_of_a_recording(tmp_path: Path):
    clip = perform(performances(58, 1)[0])[:, :12]
    sheet = contact_sheet({"a clip": clip}, tmp_path / "sheet.png", poses=3)
    moving = animation(clip, tmp_path / "clip.gif")
    assert sheet.read_bytes().startswith(b"\x89PNG")
    assert moving.read_bytes().startswith(b"GIF8")
    assert sorted(tmp_path.iterdir()) == [moving, sheet]
    with pytest.raises(FFNError, match=r"expected \(M, T, 25, 2 or 3\)"):
        contact_sheet({"a clip": clip[0]}, tmp_path / "sheet.png")
