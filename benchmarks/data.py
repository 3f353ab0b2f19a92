"""The data path: clips per second of the sampler, opening and ingesting a set of NTU60's size, memory."""

import multiprocessing
import pickle
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.harness import REPEATS, Row, Scale, compare, measured, require_close, threads, timed
from benchmarks.reference import pipeline
from ffn.config import STREAMS, ClipConfig
from ffn.data.ingest import ingest
from ffn.data.readers import ntu
from ffn.data.sampler import Sampler
from ffn.data.store import SkeletonSet, Space
from ffn.data.synth import perform, performances, record
from ffn.layouts import COCO17, NTU25
from ffn.machine import cores

SAMPLES: dict[Scale, int] = {"toy": 60, "quick": 8_000, "full": 56_880}
BATCH: dict[Scale, int] = {"toy": 8, "quick": 256, "full": 256}
FILES: dict[Scale, int] = {"toy": 6, "quick": 2_000, "full": 56_880}
ROUND = 8
"""Batches between two looks at the clock."""
CLIP = ClipConfig(frames=100)
IMAGE = (1920, 1080)
ASKED: dict[Space, float] = {"2d": 30.0, "3d": 60.0}
"""How many times the reference's rate the sampler is to reach."""
PEERS: dict[Space, dict[str, float]] = {
    "2d": {"j": 464, "b": 604, "jm": 534, "bm": 626},
    "3d": {"j": 2719, "b": 2698, "jm": 2843, "bm": 2931},
}
"""Microseconds a clip took in MMAction2's own code on one core of an AMD EPYC: what the reference is to be compared with."""


def run(scale: Scale) -> Iterator[Row]:
    """All rows of the data path."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        yield from _pickle_rows(folder, scale)
        data = SkeletonSet.open(folder / "set.arrow")
        with threads(1):
            for space in ("2d", "3d"):
                made = sampler(space, "j", scale, data)
                for stream in STREAMS:
                    yield _clips_row(replace(made, stream=stream), scale)
                yield _copy_row(space, scale)
        yield from _text_rows(folder, scale)


def workloads(scale: Scale) -> Mapping[str, Callable[[], object]]:
    """A batch of every space and stream."""
    generator = torch.Generator().manual_seed(0)
    torch.set_num_threads(1)

    def batch(made: Sampler) -> Callable[[], object]:
        index = torch.randperm(len(made.frames))[: BATCH[scale]]
        return lambda: made.train_batch(index, generator)

    made = [sampler(space, stream, "quick") for space in ASKED for stream in STREAMS]
    return {f"{one.space} {one.stream}": batch(one) for one in made}


def lengths(samples: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Frames and persons of as many samples as NTU60 has them: 30 to 300 frames, 84 in the mean, a fifth with two persons."""
    rng = np.random.default_rng(0)
    frames = np.clip(30 + rng.gamma(6, 9, samples), 30, 300).astype(np.int64)
    return frames, 1 + (rng.random(samples) < 0.2).astype(np.int64)


def values(space: Space, rows: int) -> NDArray[np.float16]:
    """Keypoints (rows, V, 3) of no meaning, a hundredth of the 3D joints missing, drawn once and repeated."""
    rng, joints = np.random.default_rng(1), 17 if space == "2d" else 25
    x = rng.uniform(0.1, 1, (min(rows, 100_003), joints, 3)) * ((*IMAGE, 1) if space == "2d" else (3, 3, 3))
    if space == "3d":
        x[rng.random(x.shape[:2]) < 0.01] = 0
    return np.resize(x.astype(np.float16), (rows, joints, 3))


def sampler(space: Space, stream: str, scale: Scale, data: SkeletonSet | None = None) -> Sampler:
    """A sampler over `data`, or over synthetic keypoints in memory."""
    if data is not None and data.space == space:
        return Sampler.of(data, stream, CLIP)
    frames, persons = (torch.from_numpy(x) for x in lengths(SAMPLES[scale]))
    rows = frames * persons
    keypoints = values(space, int(rows.sum()))
    starts = rows.cumsum(0) - rows
    keypoints[starts] = np.abs(keypoints[starts]) + np.float16(0.1)  # the joints that alignment needs are seen
    return Sampler(
        keypoints=keypoints, starts=starts, frames=frames, persons=persons,
        image_sizes=torch.tensor(IMAGE).expand(len(rows), 2),
        layout=COCO17 if space == "2d" else NTU25, space=space, stream=stream, clip=CLIP, device=torch.device("cpu"),
    )  # fmt: skip


def plain(made: Sampler, index: Tensor, draws: Tensor) -> list[NDArray[Any]]:
    """The clips of `made.train_clips(index, draws)` by the reference pipeline."""
    keypoints, clips = made.keypoints, []
    columns = (made.starts[index], made.frames[index], made.persons[index])
    for start, frames, persons, row in zip(*(column.tolist() for column in columns), draws.numpy(), strict=True):
        x = keypoints[start : start + persons * frames].reshape(persons, frames, *keypoints.shape[1:])
        clips.append(
            pipeline.clip(
                x, row, stream=made.stream, length=made.clip.frames, persons=made.clip.persons,
                layout=made.layout, space=made.space, size=IMAGE,
            )
        )  # fmt: skip
    return clips


def _clips_row(made: Sampler, scale: Scale) -> Row:
    count, generator = BATCH[scale], torch.Generator().manual_seed(0)
    batches = torch.randperm(len(made.frames), generator=generator)[: len(made.frames) // count * count].view(-1, count)
    name = f"clips {made.space} {made.stream}"
    index, draws = batches[0], made.draws(count, generator)
    require_close(name, made.train_clips(index, draws), np.stack(plain(made, index, draws)), rtol=1e-5, atol=1e-5)
    turn = iter(batches.repeat(10_000 // len(batches) + 1, 1))
    few = index[: count // 4]

    def ours() -> None:
        for _ in range(ROUND):
            made.train_batch(next(turn), generator)

    return compare(
        name,
        ours,
        lambda: plain(made, few, draws[: len(few)]),
        reference=f"per-sample pipeline (MMAction2's own: {1e6 / PEERS[made.space][made.stream]:,.0f})",
        unit="clips/s", work=ROUND * count, their_work=len(few), repeats=REPEATS[scale], target=ASKED[made.space],
        clock=time.thread_time,
    )  # fmt: skip


def _copy_row(space: Space, scale: Scale) -> Row:
    """The limit: a batch's bytes written once, read from memory once."""
    batch = torch.rand(BATCH[scale], 2, CLIP.frames, 17 if space == "2d" else 25, 3)
    out = torch.empty_like(batch)
    seconds = [timed(lambda: out.copy_(batch), time.thread_time) for _ in range(REPEATS[scale])]
    return measured(f"clips {space}: finished ones copied, the limit", [len(batch) / s for s in seconds], "clips/s")


def write_pickle(path: Path, samples: int) -> None:
    """A pickle as MMAction2 keeps NTU60's 2D keypoints."""
    frames, persons = lengths(samples)
    rows = frames * persons
    x, ends = values("2d", int(rows.sum())), rows.cumsum()
    called = names(samples)
    annotations = []
    for name, t, m, end, count in zip(called, frames.tolist(), persons.tolist(), ends.tolist(), rows.tolist(), strict=True):
        sample = x[end - count : end].reshape(m, t, 17, 3)
        keypoint, score = np.ascontiguousarray(sample[..., :2]), np.ascontiguousarray(sample[..., 2])
        annotations.append(
            {"frame_dir": name, "label": int(name[-3:]) - 1, "img_shape": IMAGE[::-1], "original_shape": IMAGE[::-1],
             "total_frames": t, "keypoint": keypoint, "keypoint_score": score}
        )  # fmt: skip
    split = {"xsub_train": called[: samples * 7 // 10], "xsub_val": called[samples * 7 // 10 :]}
    with path.open("wb") as file:
        pickle.dump({"split": split, "annotations": annotations}, file, protocol=4)


def _pickle_rows(folder: Path, scale: Scale) -> Iterator[Row]:
    source, out = folder / "set.pkl", folder / "set.arrow"
    write_pickle(source, SAMPLES[scale])
    seconds, peak = alone(ingest_pickle, source, out)
    yield measured("ingest of the pickle", [seconds], "s", limit=60.0)
    yield measured("ingest of the pickle, peak memory", [peak], "MB", limit=2000.0)
    repeats = min(REPEATS[scale], 5)
    opened = [alone(open_set, out) for _ in range(repeats)]
    loaded = [alone(load_pickle, source) for _ in range(min(repeats, 3))]
    load, cost = (float(np.median(column)) for column in zip(*loaded, strict=True))
    yield measured("opening the set", [ms for ms, _ in opened], "ms", limit=50.0, reference="pickle.load", reference_value=load)
    held = _together(_sample_all, out)
    yield measured(
        "private memory of a process, every sample drawn", held, "MB", limit=100.0, reference="pickle.load", reference_value=cost
    )


def ingest_pickle(source: Path, out: Path) -> tuple[float, float]:
    """Seconds, and the most memory this process had, MB."""
    report = ingest(source, out)
    # Not getrusage's: that starts from the memory of the process this one was started by.
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return report.seconds, int(peak[1]) / 1024 if peak else float("nan")


def open_set(path: Path) -> tuple[float, float]:
    """Milliseconds of opening, and the private memory it costs, MB."""
    before, began = _private(), time.perf_counter()
    data = SkeletonSet.open(path)
    return 1e3 * (time.perf_counter() - began), _holding(data) - before


def load_pickle(path: Path) -> tuple[float, float]:
    before, began = _private(), time.perf_counter()
    with path.open("rb") as file:
        data = pickle.load(file)
    return 1e3 * (time.perf_counter() - began), _holding(data) - before


def _sample_all(path: Path) -> float:
    """Private memory, MB, that opening the set and drawing a clip of every sample has cost, while another process does the same."""
    torch.set_num_threads(1)
    before = _private()
    made = Sampler.of(SkeletonSet.open(path), "bm", CLIP)
    generator = torch.Generator()
    for first in range(0, len(made.frames), 256):
        made.train_batch(torch.arange(first, min(first + 256, len(made.frames))), generator)
    _met.wait(timeout=600)
    cost = _private() - before
    _met.wait(timeout=600)
    return cost


def _holding(data: Any) -> float:
    """Private memory while `data` is held."""
    assert len(data)
    return _private()


def _private() -> float:
    """Memory that no other process shares, MB."""
    return float(psutil.Process().memory_full_info().uss) / 2**20


def alone(work: Callable[..., Any], *arguments: Any) -> Any:
    """The result of `work` in a process of its own, whose memory and allocator are fresh."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def _together(work: Callable[..., float], *arguments: Any) -> list[float]:
    """The results of `work` in two processes at once."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, context, _meet, (context.Barrier(2),)) as pool:
        return [future.result() for future in [pool.submit(work, *arguments) for _ in range(2)]]


_met: Any


def _meet(barrier: Any) -> None:
    global _met
    _met = barrier


def _text_rows(folder: Path, scale: Scale) -> Iterator[Row]:
    """Raw `.skeleton` text: ingested on all cores, beside what the parser alone could do on as many."""
    raw, processes = folder / "raw", cores()
    raw.mkdir()
    takes = [take for action in (10, 23, 27, 50) for take in performances(action, 3)]
    texts = [record(perform(take), take, 1) for take in takes]
    for number, name in enumerate(names(FILES[scale])):
        file, first = raw / f"{name}.skeleton", raw / f"{names(len(texts))[number % len(texts)]}.skeleton"
        if number < len(texts):
            file.write_text(texts[number])
        else:
            file.hardlink_to(first)
    encoded = [text.encode() for text in texts]
    took = [timed(lambda: [ntu.keypoints(text, "3d", "made") for text in encoded]) for _ in range(REPEATS[scale])]
    alone = len(texts) / float(np.median(took))
    seconds = ingest(raw, folder / "raw.arrow").seconds
    yield measured(
        "ingest of .skeleton text", [FILES[scale] / seconds], "files/s",
        threads=processes, reference=f"parsing alone, {processes} x one core", reference_value=processes * alone,
    )  # fmt: skip


def names(count: int) -> list[str]:
    """Names of NTU60's form, all different."""
    return [
        f"S{i // 14400 + 1:03}C{i % 3 + 1:03}P{i // 180 % 40 + 1:03}R{i // 7200 % 2 + 1:03}A{i // 3 % 60 + 1:03}"
        for i in range(count)
    ]
