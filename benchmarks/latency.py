"""Inference: the exported model against plain eager ST-GCN, and the latency of one window on one core, raw keypoints to class.

Weights are random; the time does not depend on them. The reference gets normalised clips, ours raw keypoints.
"""

import dataclasses
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.harness import REPEATS, Row, Scale, compare, measured, require_close, threads
from benchmarks.network import NTU, PAIRS
from benchmarks.reference.network import Skeleton, take
from ffn.checkpoint import Checkpoint
from ffn.config import FUSIONS, Config, override, preset
from ffn.data.sampler import Sampler
from ffn.export import export
from ffn.inference import FusedModel, with_clips
from ffn.layouts import COCO17
from ffn.model.graph import spatial_adjacency
from ffn.model.network import build
from ffn.recogniser import Recogniser

SIZE = (1920, 1080)
CLASSES = 60
BATCH = 8
TOY = ("model.width=8", "model.depths=1,1", "clip.frames=12")
WINDOWS: dict[Scale, int] = {"toy": 3, "quick": 100, "full": 500}
"""Windows a percentile is taken from."""


def run(scale: Scale) -> Iterator[Row]:
    """Two cores and a batch, then one core and one window."""
    with tempfile.TemporaryDirectory() as scratch:
        yield from _batch(scale, Path(scratch))
        yield from _windows(scale, Path(scratch))


def _batch(scale: Scale, scratch: Path) -> Iterator[Row]:
    plain_model = _model("S0", scale)
    ((meta, network),) = plain_model.streams.values()
    plain = Skeleton(torch.from_numpy(spatial_adjacency(COCO17)), CLASSES, naive=False).eval()
    if scale != "toy":
        take(plain, network)
    pairs = _recordings(meta.config.clip.frames, 2, BATCH)
    ntu = [pair[: 1 + (number < PAIRS)] for number, pair in enumerate(_recordings(meta.config.clip.frames, 2, NTU[scale][0]))]
    cases = [("S0", pairs, None), ("S4", pairs, 2.0), ("S4", ntu, 2.0)]
    with threads(2):
        for name, recordings, target in cases[1:] if scale == "toy" else cases:
            clips = _clips(plain_model, recordings)
            model = _model(name, scale)
            recogniser = Recogniser(_exported(model, scratch), threads=2)
            require_close(
                f"{name} exported", recogniser.probabilities(recordings), model.predict(recordings, SIZE), rtol=0, atol=1e-4
            )
            if name == "S0" and scale != "toy":
                with torch.inference_mode():
                    expected = plain(clips).softmax(1)
                require_close("plain ST-GCN", recogniser.probabilities(recordings), expected, rtol=0, atol=1e-4)
            yield compare(
                f"{name} exported, ONNX Runtime, batch {len(recordings)}, two persons"
                f"{'' if recordings is pairs else ' in a fifth of them'}",
                partial(recogniser.probabilities, recordings),
                partial(_forward, plain, clips),
                reference="plain ST-GCN, torch eager",
                repeats=REPEATS[scale],
                target=target,
            )


def _windows(scale: Scale, scratch: Path) -> Iterator[Row]:
    rows: list[tuple[str, int, tuple[str, ...]]] = [
        ("S4", 100, ("j",)),
        ("S0", 100, ("j",)),
        ("S4", 48, ("j",)),
        ("S4", 32, ("j",)),
        ("S4-small", 32, ("j",)),
    ]
    rows += [("S4-small", 32, tuple(FUSIONS["4s"])), ("S4", 100, tuple(FUSIONS["4s"]))]
    for name, frames, streams in rows[:1] if scale == "toy" else rows:
        model = _model(name, scale, frames, streams)
        recogniser = Recogniser(_exported(model, scratch), threads=1)
        for persons in (1, 2):
            window = _recordings(model.meta.config.clip.frames, persons, 1)
            what = f"{name}, {'4s' if len(streams) > 1 else 'j'}, window of {frames}, {persons} person{'s' * (persons - 1)}"
            with threads(1):
                ours, theirs = latencies(
                    partial(recogniser.probabilities, window), partial(model.predict, window, SIZE), WINDOWS[scale]
                )
                for percent in (50, 99):
                    mine, other = (float(np.percentile(x, percent)) for x in (ours, theirs))
                    yield measured(
                        f"{what}, p{percent}", [mine], "ms",
                        repeats=len(ours), reference="torch eager", reference_value=other,
                    )  # fmt: skip


def _exported(model: FusedModel, scratch: Path) -> Path:
    """The export of `model`, made once."""
    folder = scratch / f"{model.meta.config.preset} {model.meta.config.clip.frames} {len(model.weights)}"
    return folder if folder.exists() else export(model, folder)


def latencies(
    ours: Callable[[], object], theirs: Callable[[], object], windows: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Milliseconds of `windows` calls of ours and a fifth as many of theirs, in turn, after three to warm up."""
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(-3, windows):
        for call, kept in zip((ours, theirs), times, strict=True):
            if call is theirs and number % 5:
                continue
            began = time.perf_counter()
            call()
            if number >= 0:
                kept.append(1e3 * (time.perf_counter() - began))
    return np.array(times[0]), np.array(times[1])


def workloads(scale: Scale) -> Mapping[str, Callable[[], object]]:
    """What `--profile` looks into: the eager model."""
    model = _model("S4", scale)
    window = _recordings(model.meta.config.clip.frames, 2, 1)
    return {"S4 eager, one window": lambda: model.predict(window, SIZE)}


def _model(name: str, scale: Scale, frames: int = 100, streams: tuple[str, ...] = ("j",)) -> FusedModel:
    config: Config = override(preset(name), [f"clip.frames={frames}", *(TOY if scale == "toy" else ())])
    meta = Checkpoint(
        config=config, layout=COCO17, space="2d", classes=tuple(f"class {k}" for k in range(CLASSES)), protocol="p",
        stream="j", data_digest="", key="", image_size=SIZE,
    )  # fmt: skip
    torch.manual_seed(0)
    nets = {stream: build(config.model, COCO17, CLASSES).eval() for stream in streams}
    fused = FUSIONS["4s"] if len(streams) > 1 else dict.fromkeys(streams, 1.0)
    return with_clips(
        FusedModel(streams={s: (dataclasses.replace(meta, stream=s), net) for s, net in nets.items()}, weights=fused), 1
    )


def _recordings(frames: int, persons: int, count: int) -> list[NDArray[np.float32]]:
    x = np.random.default_rng(0).uniform(0, 1, (count, persons, frames, len(COCO17.joints), 3))
    return list((x * [*SIZE, 1]).astype(np.float16).astype(np.float32))


def _clips(model: FusedModel, recordings: list[NDArray[np.float32]]) -> torch.Tensor:
    meta = model.meta
    sampler = Sampler.of_arrays(recordings, layout=meta.layout, space="2d", stream="j", clip=meta.config.clip, image_size=SIZE)
    return sampler.test_batch(torch.arange(len(recordings)), 0)


@torch.inference_mode()
def _forward(network: torch.nn.Module, clips: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = network(clips)
    return logits
