"""The whole training loop, data included: S4 as `ffn train` runs it against the usual loop; how near it comes to the machine.

The limit of a step is the larger of two times: its multiplications at the rate of a large matrix product, and the bytes it
cannot do without at the rate of a large copy, both measured here. Those bytes are: every spatial, temporal and attention
module reads its input and writes its output once, and backwards reads input and gradient and writes a gradient; every weight
is read twice, and its gradient, momentum and value are written and read once by the step.
"""

import functools
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from unittest import mock

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import harness
from benchmarks.harness import Row, Scale, compare, measured, require_close
from benchmarks.reference import network as plain
from benchmarks.reference import training as reference
from ffn.config import Config, override, preset
from ffn.data.sampler import Sampler
from ffn.data.store import Sample, SkeletonSet, SkeletonSetWriter
from ffn.layouts import COCO17
from ffn.machine import cores
from ffn.model import tiles
from ffn.model.graph import spatial_adjacency
from ffn.model.network import build
from ffn.parallel import Team
from ffn.training import autocast, compiled, run_epoch, sgd

CLASSES = 60
TRAINING_SAMPLES = {"NTU60 xsub": 40_091, "NTU120 xsub": 63_026}
EPOCHS = (80, 110)


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much is trained: clips of `frames` frames, `steps` batches of `batch`."""

    frames: int
    batch: int
    steps: int


CPU: dict[Scale, Size] = {
    "toy": Size(frames=16, batch=4, steps=2),
    "quick": Size(frames=100, batch=4, steps=2),
    "full": Size(frames=100, batch=8, steps=4),
}
GPU: dict[Scale, Size] = {
    "toy": CPU["toy"],
    "quick": Size(frames=100, batch=54, steps=20),
    "full": Size(frames=100, batch=54, steps=100),
}
REPEATS: dict[Scale, int] = {"toy": 1, "quick": 3, "full": 5}


def run(scale: Scale) -> Iterator[Row]:
    """Rows of the training loop; on the GPU where there is one."""
    with tempfile.TemporaryDirectory() as folder:
        both = _Both(scale, Path(folder))
        both.require_equal_clips()
        both.require_equal_step()
        loop = compare(
            f"S4 training loop, {both.what}", both.ours, both.theirs, reference="eager float32, per-sample loader",
            repeats=REPEATS[scale], unit="clips/s", work=both.clips, target=4.0 if both.device.type == "cuda" else None,
        )  # fmt: skip
        yield loop
        assert loop.reference_value
        for name, samples in TRAINING_SAMPLES.items() if scale != "toy" else ():
            for epochs in EPOCHS:
                hours = (samples * epochs / rate / 3600 for rate in (loop.value, loop.reference_value))
                yield measured(
                    f"{epochs} epochs of {name}, one stream, computed from that rate", [next(hours)], "h", repeats=0,
                    reference=loop.reference, reference_value=next(hours),
                )  # fmt: skip
        yield from both.limit(REPEATS[scale])


def workloads(scale: Scale) -> Mapping[str, Callable[[], object]]:
    """An epoch of either loop."""
    folder = tempfile.TemporaryDirectory()
    both = _Both(scale, Path(folder.name))
    return {"ours": both.ours, "reference": both.theirs, "the folder": folder.cleanup}


class _Both:
    """Our loop and the reference, ready to run epoch after epoch over one set."""

    def __init__(self, scale: Scale, folder: Path) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.size = (GPU if self.device.type == "cuda" else CPU)[scale]
        self.clips = self.size.batch * self.size.steps
        self.config: Config = override(
            preset("S4"),
            [
                f"training.batch_size={self.size.batch}",
                f"clip.frames={self.size.frames}",
                "loss.name=cross_entropy",
                "training.lr=0.01",
            ],
        )
        self.data = _set(folder / "set.arrow", self.clips)
        split = self.data.split("p")
        self.rows, self.labels = split.train, split.labels
        torch.manual_seed(0)
        network = build(self.config.model, COCO17, CLASSES)
        naive = plain.Skeleton(torch.from_numpy(spatial_adjacency(COCO17)), CLASSES, naive=True)
        plain.take(naive, network)
        self.network, self.naive = network.to(self.device), naive.to(self.device)
        self.optimizer = sgd(self.network, self.config.training)
        recipe = self.config.training
        self.their_optimizer = torch.optim.SGD(
            self.naive.parameters(), lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay, nesterov=True
        )
        self.sampler = Sampler.of(self.data, "j", self.config.clip, self.device)
        self.samples = reference.annotations(self.data, self.rows, self.labels)
        self.epochs = 0

    @property
    def what(self) -> str:
        kind = "bfloat16" if self.device.type == "cuda" else "float32"
        return f"{kind}, batch {self.size.batch}, T={self.size.frames}, V=17, M=2"

    @functools.cached_property
    def forward(self) -> nn.Module:
        clip = self.config.clip
        shape = (self.size.batch, clip.persons, clip.frames, len(COCO17.joints), 3)
        return compiled(self.network, [shape], Team(device=self.device))

    @functools.cached_property
    def loader(self) -> "torch.utils.data.DataLoader[tuple[torch.Tensor, int]]":
        workers = min(8, cores())
        return reference.loader(self.samples, self.size.frames, batch_size=self.size.batch, workers=workers)

    def require_equal_clips(self) -> None:
        """The same draws give the same clips."""
        draws = self.sampler.draws(len(self.rows), torch.Generator().manual_seed(0))
        ours = self.sampler.train_clips(torch.from_numpy(self.rows), draws).cpu()
        theirs = [reference.clip(s, self.size.frames, d) for s, d in zip(self.samples, draws.cpu().numpy(), strict=True)]
        require_close("training clips", ours.numpy(), np.stack(theirs), rtol=1e-5, atol=1e-5)

    def require_equal_step(self) -> None:
        """The same clips give the same loss, one step of each later too; bfloat16 to its three digits."""
        rows, labels = self.rows[: self.size.batch], torch.from_numpy(self.labels[self.rows[: self.size.batch]]).to(self.device)
        clips = self.sampler.test_batch(torch.from_numpy(rows), 0)
        for close in (1e-4, 0.02):  # a step makes rounding larger
            with autocast(self.device):
                logits = self.network(clips)
            value = nn.functional.cross_entropy(logits.float(), labels)
            self.optimizer.zero_grad()
            torch.autograd.backward(value)
            self.optimizer.step()
            theirs = reference.epoch(self.naive, self.their_optimizer, [(clips, labels)], self.device)
            require_close("loss of a step", value.item(), theirs, rtol=0.05 if self.device.type == "cuda" else close)

    def ours(self) -> None:
        """An epoch as `ffn train` runs it."""
        self.epochs = self.epochs % self.config.training.epochs + 1
        labels = torch.from_numpy(self.labels)
        run_epoch(self.forward, self.optimizer, self.sampler, self.rows, labels, self.config, self.epochs)
        harness.synchronize()

    def theirs(self) -> None:
        """An epoch of the usual loop, with TF32 on a GPU."""
        cudnn, matmul = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
        try:
            reference.epoch(self.naive, self.their_optimizer, self.loader, self.device)
        finally:
            torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = cudnn, matmul
        harness.synchronize()

    def limit(self, repeats: int) -> Iterator[Row]:
        """A step of ours beside the least time that its operations and bytes take on this device."""
        rows = torch.from_numpy(self.rows[: self.size.batch])
        clips = self.sampler.test_batch(rows, 0)

        def step() -> None:
            with autocast(self.device):
                logits = self.forward(clips)
            self.optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(logits.float().square().mean())
            self.optimizer.step()

        times = [_seconds(step) for _ in range(repeats + 2)][2:]
        kind = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        operations, moved = _least(self.network, clips, kind)
        rate, bandwidth = _peak(self.device, kind)
        computing, moving = 1e3 * operations / rate, 1e3 * moved / bandwidth
        what = "operations" if computing > moving else "bytes"
        yield measured(
            f"the least of a step, operations: {operations / 1e9:.1f} GFLOP at {rate / 1e9:.0f} GFLOP/s",
            [computing],
            "ms",
            repeats=0,
        )
        yield measured(f"the least of a step, bytes: {moved / 1e9:.2f} GB at {bandwidth / 1e9:.0f} GB/s", [moving], "ms", repeats=0)
        yield measured(
            "one step of S4", [1e3 * second for second in times], "ms",
            reference=f"its limit here ({what})", reference_value=max(computing, moving),
        )  # fmt: skip
        if self.device.type == "cuda":
            yield measured("time in which the GPU computes", [100 * _busy(step)], "%")


def _set(path: Path, count: int) -> SkeletonSet:
    """`count` recordings with NTU60's shapes in 2D, made by chance, all of them for training."""
    rng = np.random.default_rng(0)
    with SkeletonSetWriter(
        path, layout=COCO17, space="2d", classes=[f"class {k}" for k in range(CLASSES)], protocols=["p"],
        provenance={"source": "made for a benchmark"},
    ) as writer:  # fmt: skip
        for number in range(count + 1):  # and one to hold out
            shape = (1 + number % 3 // 2, int(rng.integers(40, 180)), 17)
            x = np.concatenate([rng.uniform(0, 1080, (*shape, 2)), rng.uniform(size=(*shape, 1))], -1).astype(np.float16)
            part: Literal["train", "test"] = "train" if number < count else "test"
            writer.write(
                Sample(id=f"{number}", label=number % count % CLASSES, keypoints=x, splits={"p": part}, image_size=(1920, 1080))
            )
    return SkeletonSet.open(path)


def _least(network: nn.Module, clips: torch.Tensor, kind: torch.dtype) -> tuple[float, float]:
    """(floating-point operations, bytes) of one training step on `clips`."""
    elements, hooks = 0, []

    def spatial(module: nn.Module, given: tuple[torch.Tensor, ...], y: torch.Tensor) -> None:
        nonlocal elements
        elements += 3 * given[0].numel() + (2 + 3 + 3) * y.numel()  # it is what the temporal module and attention read

    def block(module: nn.Module, given: tuple[torch.Tensor, ...], z: torch.Tensor) -> None:
        nonlocal elements
        elements += (2 + 3 + 2) * z.numel()

    for each in network.get_submodule("blocks").children():
        hooks += [each.get_submodule("spatial").register_forward_hook(spatial), each.register_forward_hook(block)]
    # Where no features fit the compiled products, modules are called, which the counter and the hooks see.
    with FlopCounterMode(display=False) as counter, mock.patch.object(tiles, "VECTOR", 2**20):
        torch.autograd.backward(network(clips).square().mean())
    for hook in hooks:
        hook.remove()
    network.zero_grad(set_to_none=True)
    weights = sum(parameter.numel() for parameter in network.parameters())
    return counter.get_total_flops(), elements * kind.itemsize + 8 * 4 * weights


def _peak(device: torch.device, kind: torch.dtype) -> tuple[float, float]:
    """(operations a second of a large matrix product, bytes a second of a large copy), the best of five."""
    side, length = (8192, 2**30) if device.type == "cuda" else (2048, 2**26)
    a, b = torch.rand(side, side, device=device).to(kind), torch.rand(side, side, device=device).to(kind)
    source = torch.zeros(length, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    product = min(_seconds(lambda: a @ b) for _ in range(6))
    copy = min(_seconds(lambda: target.copy_(source)) for _ in range(6))
    return 2 * side**3 / product, 2 * length / copy


def _seconds(work: Callable[[], object]) -> float:
    harness.synchronize()
    began = time.perf_counter()
    work()
    harness.synchronize()
    return time.perf_counter() - began


def _busy(step: Callable[[], None], steps: int = 20) -> float:
    """The part of the time in which a kernel runs on the GPU."""

    def several() -> None:
        for _ in range(steps):
            step()

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as recorded:
        seconds = _seconds(several)
    return float(sum(event.self_device_time_total for event in recorded.key_averages())) / 1e6 / seconds
