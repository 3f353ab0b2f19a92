"""Streams, normalisation and sampled frames against the slow reference."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ffn.config import STREAMS, ClipConfig
from ffn.data.persons import canonical_persons
from ffn.data.sampler import TEST_SEED, Sampler, augmentation, even_frames, frame_numbers, random_frames
from ffn.layouts import COCO17, NTU25
from ffn.streams import rotation_to_axis, write_clips
from tests import reference
from tests.conftest import recordings, write_set

LAYOUT = {"3d": NTU25, "2d": COCO17}
PARENTS = {"3d": reference.NTU_PARENTS, "2d": reference.COCO_PARENTS}


def expected_clip(x, space, stream, numbers):
    """The reference's clip of one stored recording."""
    normal = reference.normalize_3d(x) if space == "3d" else reference.normalize_2d(x, 1280, 720)
    return reference.clip(reference.stream(normal, stream, PARENTS[space], space), numbers, 2)


@pytest.mark.parametrize("space", ["2d", "3d"])
@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("length", [16, 40])
def test_test_clips_agree_with_reference(tmp_path, space, stream, length):
    arrays = recordings(space)
    data = write_set(tmp_path / "set.arrow", arrays, space)
    clip = ClipConfig(frames=length, test_clips=3)
    sampler = Sampler.of(data, stream, clip)
    table = torch.rand(3, 2 * length + 1, generator=torch.Generator().manual_seed(TEST_SEED)).numpy()
    for number in range(3):
        got = sampler.test_batch(torch.arange(len(arrays)), number).numpy()
        assert got.dtype == np.float32
        for x, ours in zip(arrays, got, strict=True):
            frames = x.shape[1]
            numbers = reference.frame_numbers(frames, length, number * frames // 3, table[number])
            np.testing.assert_allclose(ours, expected_clip(x, space, stream, numbers), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("space", ["2d", "3d"])
@pytest.mark.parametrize("stream", STREAMS)
def test_training_clips_agree_with_reference(tmp_path, space, stream):
    arrays = recordings(space, seed=1)
    sampler = Sampler.of(write_set(tmp_path / "set.arrow", arrays, space), stream, ClipConfig(frames=24))
    got = sampler.train_batch(torch.arange(len(arrays)), torch.Generator().manual_seed(3)).numpy()
    draws = torch.rand(len(arrays), 56, generator=torch.Generator().manual_seed(3)).numpy()
    for x, ours, u in zip(arrays, got, draws, strict=True):
        frames = x.shape[1]
        numbers = reference.frame_numbers(frames, 24, int(np.float32(u[0]) * np.float32(frames)), u[7:])
        np.testing.assert_allclose(ours, expected_clip(x, space, stream, numbers), atol=1e-5, rtol=1e-5)


def test_a_clip_does_not_depend_on_its_batch(tmp_path):
    data = write_set(tmp_path / "set.arrow", recordings("3d"), "3d")
    sampler = Sampler.of(data, "bm", ClipConfig(frames=20))
    together = sampler.test_batch(torch.arange(12), 4)
    alone = torch.cat([sampler.test_batch(torch.tensor([row]), 4) for row in range(12)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize("stream", STREAMS)
def test_joints_that_are_missing_stay_so(stream):
    """A joint at zero, minus zero included, is zero in a joint clip and as if at the origin in the others."""
    x = np.random.default_rng(0).normal(size=(2, 9, 25, 3)).astype(np.float16) + np.float16(3)
    x[:, 3:5, 7] = 0
    x[:, 4, 8] = -0.0
    x[1, 6:] = 0
    sampler = Sampler.of_arrays([x], layout=NTU25, space="3d", stream=stream, clip=ClipConfig(frames=9, test_clips=1))
    got = sampler.test_batch(torch.tensor([0]), 0)[0].numpy()
    np.testing.assert_allclose(got, expected_clip(x, "3d", stream, range(9)), atol=2e-5)
    if stream == "j":
        assert not got[:, 3:5, 7].any()
        assert not got[1, 6:].any()


def test_arrays_and_sets_give_the_same_clips(tmp_path):
    arrays = recordings("2d")
    data = write_set(tmp_path / "set.arrow", arrays, "2d")
    clip = ClipConfig(frames=20)
    of_arrays = Sampler.of_arrays(arrays, layout=COCO17, space="2d", stream="jm", clip=clip, image_size=(1280, 720))
    index = torch.arange(len(arrays))
    assert torch.equal(of_arrays.test_batch(index, 1), Sampler.of(data, "jm", clip).test_batch(index, 1))


@settings(max_examples=60, deadline=None)
@given(frames=st.integers(1, 300), length=st.integers(2, 100), seed=st.integers(0, 2**31))
def test_frame_numbers_are_those_of_the_reference(frames, length, seed):
    draws = torch.rand(1, 2 * length + 1, generator=torch.Generator().manual_seed(seed))
    start = seed % frames
    got = frame_numbers(torch.tensor([frames]), torch.tensor([start]), draws)[0].tolist()
    assert got == reference.frame_numbers(frames, length, start, draws[0].numpy())
    assert all(0 <= number < frames for number in got)
    if frames >= length:
        assert all(a < b for a, b in itertools.pairwise(got)), "frames in order, none twice"


@given(frames=st.integers(1, 400), length=st.integers(2, 120), seed=st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_random_frames_are_in_order_and_spread_over_the_recording(frames, length, seed):
    draws = torch.rand(3, length, generator=torch.Generator().manual_seed(seed))
    draws[0], draws[1] = 0, 1 - 2**-24
    number = random_frames(torch.full((3,), frames), draws)
    assert (number.diff(dim=1) >= 0).all()
    assert (number[0].unique().tolist(), number[1].unique().tolist()) == ([0], [frames - 1])
    for place in (0.0, 0.125, 0.5, 0.99):
        (even,) = even_frames(torch.tensor([frames]), length, place)
        assert even.tolist() == [int((step + place) / length * frames) for step in range(length)]


def test_clips_of_random_frames_show_their_recording(tmp_path):
    data = write_set(tmp_path / "set.arrow", recordings("3d", 4), "3d")
    clip = ClipConfig(frames=30, persons=2, test_clips=2, sampling="random")
    sampler, index = Sampler.of(data, "j", clip), torch.tensor([0, 3])
    drawn = [sampler.train_batch(index, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    number = torch.stack([even_frames(data_frames, 30, 0.75)[0] for data_frames in sampler.frames[index][:, None]])
    assert torch.equal(sampler.test_batch(index, 1), sampler._clips(index, number))


def test_canonical_persons_and_alignment_are_prenormalize3d():
    """The frame dropping at ingestion followed by the batched alignment is the whole of PreNormalize3D."""
    rng = np.random.default_rng(5)
    raw = rng.normal(size=(2, 30, 25, 3)) + np.array([0, 0, 3])
    raw[0, ::3] = 0
    raw[1, :4] = 0
    raw = raw.astype(np.float16)
    stored = canonical_persons(raw.astype(np.float32))
    sampler = Sampler.of_arrays([stored], layout=NTU25, space="3d", stream="j", clip=ClipConfig(frames=8, test_clips=1))
    draws = torch.rand(1, 17, generator=torch.Generator().manual_seed(TEST_SEED))[0].numpy()
    normal = reference.normalize_3d(raw.astype(np.float32))
    numbers = reference.frame_numbers(normal.shape[1], 8, 0, draws)
    np.testing.assert_allclose(sampler.test_batch(torch.tensor([0]), 0)[0], reference.clip(normal, numbers, 2), atol=1e-5)


@pytest.mark.parametrize("vector", [[0, 0, 0], [0, 0, 1], [0, 0, -2], [1, 0, 0], [0.3, -2, 0.1], [1e-9, 0, 1]])
def test_rotation_to_axis(vector):
    vector = np.array(vector, np.float64)
    target = np.array([0, 0, 1.0])
    expected = reference.rotation_about(np.cross(vector, target), reference.angle_between(vector, target))
    got = rotation_to_axis(torch.tensor(vector)[None], 2)[0]
    np.testing.assert_allclose(got, expected, atol=1e-7)


def test_augmentation_is_a_rotation_and_a_scale():
    draws = torch.rand(50, 6, generator=torch.Generator().manual_seed(0))
    turn = augmentation(draws, space="3d", rotate=0.5, scale=0.0)
    torch.testing.assert_close(turn @ turn.transpose(1, 2), torch.eye(3).expand(50, 3, 3), atol=1e-5, rtol=0)
    assert (torch.linalg.det(turn) > 0.99).all()
    flat = augmentation(draws, space="2d", rotate=0.5, scale=0.2)
    assert torch.equal(flat[:, 2], torch.tensor([0.0, 0, 1]).expand(50, 3)), "the score is left alone"
    assert torch.equal(flat[:, :2, 2], torch.zeros(50, 2))
    assert flat[:, 0, 0].std() > 0.01
    nothing = augmentation(draws, space="3d", rotate=0.0, scale=0.0)
    assert torch.equal(nothing, torch.eye(3).expand(50, 3, 3))


def test_every_float16_keeps_its_value():
    """Subnormal, negative, minus zero: all that are finite, through the loop that decodes their bits."""
    every = np.arange(2**16, dtype=np.uint16).view(np.float16)
    finite = every[np.isfinite(every)]
    x = np.resize(finite, (-(-len(finite) // 51), 17, 3))
    out = np.empty((1, 1, len(x), 17, 3), np.float32)
    one, frames, numbers = np.ones(1, np.int64), np.array([len(x)]), np.arange(len(x))[None]
    origin, matrix = np.zeros((1, 3), np.float32), np.eye(3, dtype=np.float32)[None]
    write_clips(out, x, 0 * one, frames, one, numbers, origin, matrix, layout=COCO17, space="2d", stream="j")
    np.testing.assert_array_equal(out[0, 0], x.astype(np.float32))


@pytest.mark.parametrize(("number", "rows"), [(-1, 20), (20, 20), (3, 19)])
def test_frames_that_are_not_there_are_never_read(number, rows):
    """Compiled loops look at whatever lies at a place: what is wrong ends before them."""
    out, x = np.empty((1, 1, 1, 17, 3), np.float32), np.zeros((rows, 17, 3), np.float16)
    one, origin, matrix = np.ones(1, np.int64), np.zeros((1, 3), np.float32), np.eye(3, dtype=np.float32)[None]
    with pytest.raises(IndexError, match="frames"):
        write_clips(out, x, 0 * one, 20 * one, one, np.array([[number]]), origin, matrix, layout=COCO17, space="2d", stream="j")
