import zipfile

import numpy as np
import pytest

from ffn.data.readers import ntu, source
from ffn.data.readers.source import Dropped, Unusable
from ffn.errors import FFNError
from ffn.protocols import NTU_PROTOCOLS

NAME = "S001C002P003R002A013.skeleton"


def plain(text: bytes) -> list[list[list[list[float]]]]:
    """The format, line by line: frames of bodies of joints of 12 numbers."""
    lines = iter(text.decode().splitlines())
    frames = []
    for _ in range(int(next(lines))):
        bodies = []
        for _ in range(int(next(lines))):
            assert len(next(lines).split()) == 10
            bodies.append([[float(value) for value in next(lines).split()] for _ in range(int(next(lines)))])
        frames.append(bodies)
    assert next(lines, None) is None
    return frames


def plain_keypoints(text: bytes) -> np.ndarray:
    """What MMAction2's generator keeps, up to four bodies and then the two of most energy, as (2, T, 25, 3)."""
    frames = plain(text)
    data = np.zeros((4, len(frames), 25, 3))
    for t, bodies in enumerate(frames):
        for m, joints in enumerate(bodies[:4]):
            data[m, t] = np.array(joints)[:, :3]
    energy = []
    for person in data:
        present = np.array([frame for frame in person if frame.sum() != 0])
        energy.append(sum(present[..., c].std() for c in range(3)) if len(present) else 0)
    return data[sorted(range(4), key=lambda m: -energy[m])[:2]]


def test_numbers_agree_with_a_line_by_line_reading(skeleton, body):
    first, second, third = (body(seed, 6) for seed in range(3))
    text = skeleton([[first[0]], [], [first[2], second[2]], [second[3]], [third[4], first[4], second[4]], [first[5]]])
    parsed, frames = ntu.parse_bodies(text, NAME), plain(text)
    assert parsed.frames == len(frames)
    np.testing.assert_array_equal(parsed.joints, [joints for bodies in frames for joints in bodies])
    assert parsed.frame.tolist() == [0, 2, 2, 3, 4, 4, 4, 5]
    assert parsed.slot.tolist() == [0, 0, 1, 0, 0, 1, 2, 0]


@pytest.mark.parametrize("motions", [(0.1, 0.5), (0.5, 0.1), (0.01, 0.3, 0.6), (0.1, 0.2, 0.3, 0.4, 5.0)])
def test_the_two_bodies_that_move_most(skeleton, body, motions):
    bodies = [body(seed, 9, motion) for seed, motion in enumerate(motions)]
    text = skeleton([list(frame) for frame in zip(*bodies, strict=True)])
    np.testing.assert_array_equal(ntu.keypoints(text, "3d", NAME), plain_keypoints(text).astype(np.float32))


def test_slots_are_places_in_the_frame(skeleton, body):
    """As in the generator: a body moves up when the one before it is lost."""
    first, second = body(0, 4), body(1, 4)
    kept = ntu.keypoints(skeleton([[first[0], second[0]], [second[1]], [second[2]], [first[3], second[3]]]), "3d", NAME)
    slot = [first[0], second[1], second[2], first[3]]
    assert any(np.array_equal(person[:, :, 0], np.array(slot)[:, :, 0].astype(np.float32)) for person in kept)


def test_lost_frames_are_left_out(skeleton, body):
    frames = body(0, 5)
    kept = ntu.keypoints(skeleton([[], [frames[1]], [], [frames[3]], []]), "3d", NAME)
    np.testing.assert_array_equal(kept, np.array([[frames[1][:, :3], frames[3][:, :3]]], np.float32))


def test_2d_is_the_colour_image_with_a_score(skeleton, body):
    quiet, lively = body(0, 5, 0.01), body(1, 5, 1)
    for joint, state in enumerate((0, 1, 2)):
        lively[2][joint, 11] = state
    kept = ntu.keypoints(skeleton([[a, b] for a, b in zip(quiet, lively, strict=True)]), "2d", NAME)
    np.testing.assert_array_equal(kept[0, :, :, :2], np.array(lively)[:, :, 5:7].astype(np.float32))
    assert kept[0, 2, :4, 2].tolist() == [0, 0.5, 1, 1]
    np.testing.assert_array_equal(kept[1, :, :, :2], np.array(quiet)[:, :, 5:7].astype(np.float32))


def test_sample(ntu_folder):
    opened = ntu.read(ntu_folder, space="2d")
    items = list(opened.items)
    assert (opened.total, opened.layout.name, opened.space, opened.protocols) == (8, "ntu25", "2d", NTU_PROTOCOLS)
    assert [item.id for item in items] == sorted(path.stem for path in ntu_folder.iterdir())
    assert items[0].label == 0
    assert items[-1].label == 60
    assert items[0].image_size == (1920, 1080)
    assert items[0].splits["ntu60-xsub"] == "test"
    assert next(iter(ntu.read(ntu_folder).items)).image_size is None


def lines_of(skeleton, body, frames=3) -> list[bytes]:
    return skeleton([[a, b] for a, b in zip(body(0, frames), body(1, frames), strict=True)]).split(b"\r\n")[:-1]


def fault(lines: list[bytes]) -> str:
    with pytest.raises(Unusable) as caught:
        ntu.keypoints(b"\r\n".join(lines), "3d", NAME)
    return str(caught.value)


def test_cut_short_between_lines(skeleton, body):
    message = fault(lines_of(skeleton, body)[:40])
    assert message == f"{NAME}:40: cut short: the file ends where right elbow of body 2 of the 2 announced in frame 0 should follow"


def test_cut_short_within_a_line(skeleton, body):
    lines = lines_of(skeleton, body)[:50]
    assert fault([*lines[:-1], lines[-1][:30]]).startswith(f"{NAME}:50: cut short: expected 12 numbers")


def test_cut_short_after_the_number_of_frames():
    assert fault([b"7"]) == f"{NAME}:1: cut short: the file ends where the number of bodies in frame 0 should follow"


def test_more_bodies_announced_than_follow(skeleton, body):
    lines = lines_of(skeleton, body)
    lines[1] = b"3"
    message = fault(lines)
    assert message == f"{NAME}:57: malformed: expected 10 numbers (body 3 of the 3 announced in frame 0), found 1"


def test_fewer_bodies_announced_than_follow(skeleton, body):
    lines = lines_of(skeleton, body)
    lines[1] = b"1"
    assert fault(lines).startswith(f"{NAME}:30: malformed: expected 1 numbers (the number of bodies in frame 1), found 10")


def test_more_frames_than_announced(skeleton, body):
    lines = lines_of(skeleton, body)
    lines[0] = b"2"
    assert fault(lines) == f"{NAME}:112: malformed: the file goes on after the last frame announced"


@pytest.mark.parametrize(
    ("line", "text", "expected"),
    [
        (1, b"-1", "expected the number of frames, found -1"),
        (1, b"1.5", "expected the number of frames, found 1.5"),
        (2, b"nan", "expected the number of bodies in frame 0, found nan"),
        (4, b"24", "expected 25 joints in body 1"),
        (7, b"1 2 3", "expected 12 numbers (neck of body 1"),
        (7, b"1 2 x 4 5 6 7 8 9 10 11 2", "neck of body 1 of the 2 announced in frame 0: could not convert"),
        (7, b"1 2 3 4 5 6 7 8 9 10 11 12 2", "expected 12 numbers (neck of body 1"),
        (3, b"\xff\x00", "expected 10 numbers (body 1"),
    ],
)
def test_malformed(skeleton, body, line, text, expected):
    lines = lines_of(skeleton, body)
    lines[line - 1] = text
    assert fault(lines).startswith(f"{NAME}:{line}: malformed: {expected}")


def test_a_huge_count_costs_nothing(skeleton, body):
    lines = lines_of(skeleton, body)
    lines[0] = b"1e300"
    assert "cut short" in fault(lines)
    lines[1] = b"1000000000000"
    assert "malformed" in fault(lines)


@pytest.mark.parametrize("number", ["nan", "-inf", "1e9"])
def test_joint_that_is_not_finite(skeleton, body, number):
    lines = lines_of(skeleton, body)
    at = 1 + 55 + 1 + 27 + 2 + 5  # frame 1, body 2, left elbow; counted from 0
    fields = lines[at].split()
    lines[at] = b" ".join([number.encode(), *fields[1:]])
    assert fault(lines) == f"{NAME}:{at + 1}: {source.NOT_FINITE}: left elbow of body 2 in frame 1"


def test_colour_that_is_not_finite_matters_in_2d_only(skeleton, body):
    frames = body(0, 3)
    frames[1][3, 5] = np.nan
    text = skeleton([[frame] for frame in frames])
    assert ntu.keypoints(text, "3d", NAME).shape == (1, 3, 25, 3)
    with pytest.raises(Unusable, match=f"{NAME}:36: {source.NOT_FINITE}: head of body 1 in frame 1"):
        ntu.keypoints(text, "2d", NAME)


@pytest.mark.parametrize(
    "text",
    [
        b"1 2\r\n3  4\t\n\n5 ",
        b"+1 1_0 .5 5. 1e5 -0",
        b"nan inf -Infinity",
        b"1e400 1e-400",
        b"72057594037932171 0.1",
        b"1\x0b2\x0c3",
    ],
)
def test_numbers_are_pythons(text):
    assert np.array_equal(ntu._numbers(text), [float(part) for part in text.split()], equal_nan=True)


@pytest.mark.parametrize("text", [b"x", b"1,5", b"1\x002", b"1\xa02", b"\xef\xbb\xbf1 2", b"1\xc3\xa42"])
def test_what_is_no_number(text):
    with pytest.raises(ValueError, match="could not convert"):
        ntu._numbers(text)


@pytest.mark.parametrize("text", [b"", b" \r\n"])
def test_empty_file(text):
    with pytest.raises(Unusable, match=f"{NAME}: empty file: {len(text)} bytes"):
        ntu.keypoints(text, "3d", NAME)


def test_nobody(skeleton):
    for text in (skeleton([[], []]), skeleton([[np.zeros((25, 12))]]), b"0"):
        with pytest.raises(Unusable, match=f"{NAME}: nobody visible"):
            ntu.keypoints(text, "3d", NAME)


def test_names_and_the_missing_list(ntu_folder):
    text = (ntu_folder / "S001C001P003R001A001.skeleton").read_bytes()
    for name in ("clip", "S001C002P005R002A008", "S001C001P003R001A200"):
        (ntu_folder / f"{name}.skeleton").write_bytes(text)
    dropped = {item.where: item.reason for item in ntu.read(ntu_folder).items if isinstance(item, Dropped)}
    assert dropped == {
        "clip.skeleton": "not an NTU name",
        "S001C001P003R001A200.skeleton": "not an NTU name",
        "S001C002P005R002A008.skeleton": "on the published list of missing skeletons",
    }


def test_zip_and_folders_hold_the_same(ntu_folder, tmp_path):
    archive = tmp_path / "ntu.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as made:
        for path in ntu_folder.iterdir():
            made.write(path, f"deep/er/{path.name}")
            made.writestr(f"__MACOSX/deep/._{path.name}", b"junk")
    zipped = list(ntu.read(archive).items)
    for a, b in zip(zipped, ntu.read(ntu_folder).items, strict=True):
        assert (a.id, a.label, a.splits) == (b.id, b.label, b.splits)
        np.testing.assert_array_equal(a.keypoints, b.keypoints)


def test_a_damaged_entry_of_a_zip_is_left_out(ntu_folder, tmp_path):
    archive = tmp_path / "ntu.zip"
    names = sorted(path.name for path in ntu_folder.iterdir())
    with zipfile.ZipFile(archive, "w") as made:
        for name in names:
            made.write(ntu_folder / name, name)
        middle = made.getinfo(names[1]).header_offset + 500
    data = bytearray(archive.read_bytes())
    data[middle] ^= 1
    archive.write_bytes(data)
    items = list(ntu.read(archive).items)
    assert [item.where for item in items if isinstance(item, Dropped)] == [names[1]]
    assert len(items) == len(names)


def test_workers_change_nothing(ntu_folder, monkeypatch, skeleton, body):
    for number in range(30):
        (ntu_folder / f"S003C001P003R{number + 1:03}A005.skeleton").write_bytes(skeleton([[frame] for frame in body(number, 2)]))
    (ntu_folder / "S003C001P003R100A005.skeleton").write_bytes(b"")
    monkeypatch.setattr(source, "_FILES_PER_WORKER", 1)
    alone, together = ntu.read(ntu_folder, workers=1), ntu.read(ntu_folder, workers=2)
    for a, b in zip(alone.items, together.items, strict=True):
        assert type(a) is type(b)
        if isinstance(a, Dropped):
            assert a == b
        else:
            assert a.id == b.id
            np.testing.assert_array_equal(a.keypoints, b.keypoints)
    assert alone.content.digest() == together.content.digest()


def test_read_file(ntu_folder, tmp_path):
    path = tmp_path / "any name.skeleton"
    path.write_bytes((ntu_folder / "S001C001P003R001A001.skeleton").read_bytes())
    kept = ntu.read_file(path)
    assert kept.shape == (1, 4, 25, 3)
    assert kept.dtype == np.float32
    path.write_bytes(b"3\n1\n")
    with pytest.raises(FFNError, match=f"{path}:2: cut short"):
        ntu.read_file(path)
    with pytest.raises(FFNError, match=r"nothing.skeleton: cannot be read"):
        ntu.read_file(tmp_path / "nothing.skeleton")
