"""Training one stream: an epoch loop that can be killed at any moment and goes on where it was, bit for bit."""

import contextlib
import fcntl
import functools
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file
from torch import Tensor, nn

from ffn import checkpoint
from ffn.checkpoint import Checkpoint
from ffn.config import STREAMS, Config, TrainingConfig, digest, require_trainable, to_dict
from ffn.data.sampler import Sampler
from ffn.data.store import SkeletonSet, publishing
from ffn.errors import FFNError
from ffn.losses import loss
from ffn.model.network import build


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """What one epoch of training did, on the training samples as they were augmented."""

    epoch: int
    """From 1."""
    epochs: int
    lr: float
    """Learning rate of the last step."""
    loss: float
    top1: float
    seconds: float
    clips_per_second: float


CODE = ("layouts.py", "losses.py", "streams.py", "training.py", "data/sampler.py", "model/**/*.py")
"""The files of this package that decide the weights."""


@functools.cache
def code_digest() -> str:
    """Names the code that decides the weights, so that no training goes on from the state of another one."""
    here = Path(__file__).parent
    return digest([path.read_text(encoding="utf-8") for pattern in CODE for path in sorted(here.glob(pattern))])


def train_key(data_digest: str, config: Config, protocol: str, stream: str) -> str:
    """The name of a training: equal code, data, configuration (seed included), protocol and stream give the same weights."""
    return digest("train", code_digest(), data_digest, to_dict(config), protocol, stream)


def train(
    data: SkeletonSet,
    *,
    protocol: str,
    stream: str,
    config: Config,
    out: Path,
    state_dir: Path,
    device: str | None = None,
    on_epoch: Callable[[Epoch], None] | None = None,
    progress: bool = True,
) -> Path:
    """Train `stream` of `protocol` and publish the last epoch's checkpoint in the folder `out`.

    The state after every epoch is kept in `state_dir` under `train_key`; a training that finds one goes on from there, with
    as many threads, and on the same kind of device ends with the weights of an undisturbed one. `on_epoch` hears of every
    epoch that runs now. The held-out samples are not looked at. fp32 on a CPU, bfloat16 autocast on a GPU.
    Raises `FFNError` for a stream, protocol or setting that does not fit, where `out` holds other files or the same training
    is going on elsewhere, and when the loss is no longer finite.
    """
    if stream not in STREAMS:
        raise FFNError(f"unknown stream {stream!r}: expected one of {', '.join(STREAMS)}")
    split, recipe = data.split(protocol), config.training
    require_trainable(config)
    if len(split.train) < 2:
        raise FFNError(f"{data.path}: protocol {protocol} has one training sample; expected two at least")
    checkpoint.require_replaceable(out)
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    key = train_key(data.digest, config, protocol, stream)
    state = state_dir / key / "state.safetensors"
    with locked(state.with_name("lock")), deterministic(recipe.seed):
        network = build(config.model, data.layout, len(split.classes)).to(where)
        optimizer = torch.optim.SGD(
            network.parameters(), lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay, nesterov=True
        )
        history = restore(state, network, optimizer) if state.exists() else []
        sampler = Sampler.of(data, stream, config.clip, where)
        labels = torch.from_numpy(split.labels)
        for number in range(len(history) + 1, recipe.epochs + 1):
            record = run_epoch(network, optimizer, sampler, split.train, labels, config, number, progress=progress)
            history.append(asdict(record))
            preserve(state, network, optimizer, history)
            if progress:
                print(
                    f"{config.preset}/{protocol}/{stream}  epoch {number:3d}/{recipe.epochs}  loss {record.loss:.4f}  "
                    f"top1 {100 * record.top1:5.1f} %  lr {record.lr:.4f}  {record.clips_per_second:.0f} clips/s",
                    flush=True,
                )
            if on_epoch:
                on_epoch(record)
    sizes = data.image_sizes[split.train]
    made = Checkpoint(
        config=config,
        layout=data.layout,
        space=data.space,
        classes=split.classes,
        protocol=protocol,
        stream=stream,
        data_digest=data.digest,
        key=key,
        image_size=(int(np.median(sizes[:, 0])), int(np.median(sizes[:, 1]))),
    )
    return checkpoint.write(out, made, save(_cpu(network.state_dict())), history)


def run_epoch(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    sampler: Sampler,
    rows: np.ndarray[Any, np.dtype[np.int64]],
    labels: Tensor,
    config: Config,
    number: int,
    *,
    progress: bool = False,
) -> Epoch:
    """One pass over the samples `rows` in an order drawn from (seed, epoch), in batches of nearly equal size."""
    recipe, device = config.training, sampler.keypoints.device
    generator = torch.Generator().manual_seed(int(digest("epoch", recipe.seed, number), 16) >> 1)
    torch.manual_seed(generator.initial_seed())  # dropout
    order = torch.from_numpy(rows)[torch.randperm(len(rows), generator=generator)]
    batches = order.tensor_split(math.ceil(len(rows) / recipe.batch_size))
    total, hits, began = torch.zeros((), device=device), torch.zeros((), device=device), time.perf_counter()
    network.train()
    rate = recipe.lr
    with _bar(f"epoch {number}/{recipe.epochs}", len(batches), shown=progress) as advance:
        for step, batch in enumerate(batches):
            rate = learning_rate(recipe, step=(number - 1) * len(batches) + step, steps_per_epoch=len(batches))
            for group in optimizer.param_groups:
                group["lr"] = rate
            index, target = batch.to(device), labels[batch].to(device)
            clips = sampler.train_batch(index, generator)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                logits = network(clips)
            value = loss(config.loss, logits, target, epoch=number, epochs=recipe.epochs)
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(value)
            optimizer.step()
            total += value.detach() * len(batch)
            hits += (logits.detach().argmax(1) == target).sum()
            advance()
    mean = float(total) / len(rows)
    if not math.isfinite(mean):
        raise FFNError(
            f"{config.preset}/{sampler.stream}: the loss of epoch {number} is {mean}; "
            f"lower training.lr (now {recipe.lr}) or raise training.warmup_epochs (now {recipe.warmup_epochs})"
        )
    seconds = time.perf_counter() - began
    return Epoch(
        epoch=number, epochs=recipe.epochs, lr=rate, loss=mean, top1=float(hits) / len(rows),
        seconds=seconds, clips_per_second=len(rows) / seconds,
    )  # fmt: skip


def learning_rate(recipe: TrainingConfig, *, step: int, steps_per_epoch: int) -> float:
    """Learning rate of `step` (from 0): a linear rise over the warm-up epochs, then a cosine that is 0 after the last step."""
    warmup, total = recipe.warmup_epochs * steps_per_epoch, recipe.epochs * steps_per_epoch
    if step < warmup:
        return recipe.lr * (step + 1) / (warmup + 1)
    return recipe.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1)))


def preserve(path: Path, network: nn.Module, optimizer: torch.optim.Optimizer, history: list[dict[str, Any]]) -> None:
    """Write weights, momenta, history and the number of threads to `path`, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {f"network.{name}": tensor for name, tensor in network.state_dict().items()}
    for name, parameter in network.named_parameters():
        tensors[f"momentum.{name}"] = optimizer.state[parameter]["momentum_buffer"]
    with publishing(path) as partial:
        save_file(_cpu(tensors), partial, metadata={"history": json.dumps(history), "threads": str(torch.get_num_threads())})


def restore(path: Path, network: nn.Module, optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Read what `preserve` wrote into `network` and `optimizer`, and take as many threads; returns the history."""
    try:
        with safe_open(path, framework="pt") as state:
            said = state.metadata() or {}
            history: list[dict[str, Any]] = json.loads(said["history"])
            torch.set_num_threads(int(said["threads"]))  # sums are split by threads, and rounded so
            network.load_state_dict({name: state.get_tensor(f"network.{name}") for name in network.state_dict()})
            for name, parameter in network.named_parameters():
                momentum = torch.empty_like(parameter, requires_grad=False).copy_(state.get_tensor(f"momentum.{name}"))
                optimizer.state[parameter]["momentum_buffer"] = momentum
    except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise FFNError(f"{path}: cannot go on from this state ({error}); remove the file to train from the start") from None
    return history


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file `path` inside the block. Raises `FFNError` where another process holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FFNError(f"{path.parent}: this training is going on in another process; wait for it or stop it") from None
        yield


@contextlib.contextmanager
def deterministic(seed: int) -> Iterator[None]:
    """Seed torch and ask for reproducible kernels inside the block; the number of threads is put back after it.

    New memory is not filled with NaN first, as torch does by default where kernels are reproducible: that is an eighth of a
    step on a CPU, and no kernel here reads what it has not written.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before, threads = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    memory: Any = torch.utils.deterministic  # its one setting is typed nowhere
    filled = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    memory.fill_uninitialized_memory = False
    torch.manual_seed(seed)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        memory.fill_uninitialized_memory = filled
        torch.set_num_threads(threads)


def _cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


@contextlib.contextmanager
def _bar(text: str, total: int, *, shown: bool) -> Iterator[Callable[[], None]]:
    """A progress bar that vanishes when done, on a terminal; nothing elsewhere."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not (shown and console.is_terminal)) as bar:
        task = bar.add_task(text, total=total)
        yield lambda: bar.advance(task)
