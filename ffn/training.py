"""Training one stream: an epoch loop that can be killed at any moment and goes on where it was, bit for bit.

On several GPUs one process drives each, and all together one network (`ffn.parallel`).
"""

import contextlib
import fcntl
import functools
import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file
from torch import Tensor, nn

from ffn import checkpoint, parallel
from ffn.checkpoint import Checkpoint
from ffn.config import STREAMS, Config, TrainingConfig, digest, from_dict, require_trainable, to_dict
from ffn.data.sampler import Sampler
from ffn.data.store import SkeletonSet, publishing
from ffn.errors import Fault, FFNError
from ffn.losses import loss
from ffn.machine import keep_memory
from ffn.model.network import build
from ffn.parallel import Team


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


STATE = "state.safetensors"
"""Name of the file with a training's state, in the folder of its key."""

CODE = ("layouts.py", "losses.py", "machine.py", "parallel.py", "streams.py", "training.py", "data/sampler.py", "model/**/*.py")
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
    processes: int | None = None,
    on_epoch: Callable[[Epoch], None] | None = None,
    progress: bool = True,
) -> Path:
    """Train `stream` of `protocol` and publish the last epoch's checkpoint in the folder `out`.

    The state after every epoch is kept in `state_dir` under `train_key`; a training that finds one goes on from there, with
    as many threads, and on the same kind of device ends with the weights of an undisturbed one. `on_epoch` hears of every
    epoch that runs now. The held-out samples are not looked at. fp32 on a CPU, bfloat16 autocast on a GPU.

    `processes` of this machine share every batch, by default one for every GPU (or as many as FFN_PROCESSES says); the
    weights are those of one process to rounding, so a state may be gone on from by another number of them. Where torchrun
    started this process and others, those are the processes, and only the first has files, prints, and calls `on_epoch`.

    Raises `FFNError` for a stream, protocol or setting that does not fit, where `out` holds other files or the same training
    is going on elsewhere, when the loss is no longer finite, and when a process was killed.
    """
    if stream not in STREAMS:
        raise FFNError(f"unknown stream {stream!r}: expected one of {', '.join(STREAMS)}")
    split, recipe = data.split(protocol), config.training
    require_trainable(config)
    if len(split.train) < 2:
        raise FFNError(f"{data.path}: protocol {protocol} has one training sample; expected two at least")
    checkpoint.require_replaceable(out)
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    title = f"{config.preset}/{protocol}/{stream}"

    def finished(record: Epoch) -> None:
        if progress:
            print(
                f"{title}  epoch {record.epoch:3d}/{recipe.epochs}  loss {record.loss:.4f}  "
                f"top1 {100 * record.top1:5.1f} %  lr {record.lr:.4f}  {record.clips_per_second:.0f} clips/s",
                flush=True,
            )
        if on_epoch:
            on_epoch(record)

    count = process_count(processes, where, min(map(len, batches(split.train, recipe))))
    if count > 1 and not parallel.world():
        said = {
            "data": str(data.path), "protocol": protocol, "stream": stream, "config": to_dict(config), "out": str(out),
            "state_dir": str(state_dir), "device": where.type,
        }  # fmt: skip
        parallel.launch("ffn.training", json.dumps(said), count, lambda record: finished(Epoch(**record)))
        return out
    key = train_key(data.digest, config, protocol, stream)
    state = state_dir / key / STATE
    if where.type == "cpu":
        keep_memory()
    with parallel.team(where) as team, deterministic(recipe.seed):
        first = team.rank == 0
        with locked(state.with_name("lock")) if first else contextlib.nullcontext():
            network = build(config.model, data.layout, len(split.classes)).to(team.device)
            optimizer = sgd(network, recipe)
            history = restore(state, network, optimizer, team) if first and state.exists() else []
            history = share(history, network, optimizer, team)
            sampler = Sampler.of(data, stream, config.clip, team.device)
            sizes = {len(batch[team.part(len(batch))]) for batch in batches(split.train, recipe)}
            shape = (config.clip.persons, config.clip.frames, len(data.layout.joints), 3)
            forward = compiled(team.wrap(network), [(size, *shape) for size in sizes], team)
            labels = torch.from_numpy(split.labels)
            for number in range(len(history) + 1, recipe.epochs + 1):
                record = run_epoch(
                    forward, optimizer, sampler, split.train, labels, config, number, team=team, progress=progress and first
                )
                history.append(asdict(record))
                if first:
                    preserve(state, network, optimizer, history, team)
                    finished(record)
        if not first:
            return out
    images = data.image_sizes[split.train]
    made = Checkpoint(
        config=config,
        layout=data.layout,
        space=data.space,
        classes=split.classes,
        protocol=protocol,
        stream=stream,
        data_digest=data.digest,
        key=key,
        image_size=(int(np.median(images[:, 0])), int(np.median(images[:, 1]))),
    )
    return checkpoint.write(out, made, save(_cpu(network.state_dict())), history)


def batches(rows: np.ndarray[Any, np.dtype[np.int64]], recipe: TrainingConfig) -> list[np.ndarray[Any, np.dtype[np.int64]]]:
    """`rows` cut into the batches of an epoch, whose sizes differ by one at most."""
    return np.array_split(rows, math.ceil(len(rows) / recipe.batch_size))


def process_count(asked: int | None, device: torch.device, smallest: int) -> int:
    """Processes to train with: those torchrun started, else as `asked`, else FFN_PROCESSES, else one for every GPU.

    Every process needs a sample of the `smallest` batch: of GPUs no more are taken, a larger number raises `FFNError`, as
    does one larger than there are GPUs.
    """
    gpus = torch.cuda.device_count() if device.type == "cuda" and device.index is None else 0
    count, name = parallel.world() or asked, "processes"
    if count is None and (text := os.environ.get("FFN_PROCESSES")):
        if not text.isdigit():
            raise FFNError(f"FFN_PROCESSES={text!r}: expected a whole number")
        count, name = int(text), "FFN_PROCESSES"
    if count is None:
        return max(1, min(gpus, smallest))
    if count < 1:
        raise FFNError(f"{name}={count}: expected at least 1")
    if count > smallest:
        raise FFNError(f"{name}={count}: the smallest batch has {smallest} samples; use fewer, or raise training.batch_size")
    if gpus and not parallel.world() and count > gpus:
        raise FFNError(f"{name}={count}: this machine has {gpus} GPUs; use no more")
    return count


def sgd(network: nn.Module, recipe: TrainingConfig) -> torch.optim.SGD:
    """The optimiser of the recipe: every weight read and written once a step."""
    return torch.optim.SGD(
        network.parameters(), lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay, nesterov=True, fused=True
    )


def compiled(network: nn.Module, shapes: Sequence[tuple[int, ...]], team: Team) -> nn.Module:
    """`network` for clips of `shapes`: on a GPU as CUDA graphs of compiled kernels, as it is where torch cannot compile it.

    FFN_COMPILE=0 never compiles. FFN_COMPILE=1 does elsewhere too: on CPUs most networks lose by it, and of several
    processes the batch-norms talk in mid-pass, where no graph can be taken.
    """
    said, alone = os.environ.get("FFN_COMPILE", ""), team.size == 1
    if said == "0" or (said != "1" and (team.device.type != "cuda" or not alone)):
        return network
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    mode = "reduce-overhead" if team.device.type == "cuda" and alone else "default"
    made = cast(nn.Module, torch.compile(network, mode=mode, dynamic=False))
    try:
        for shape in shapes:
            with autocast(team.device):
                logits = made(torch.zeros(shape, device=team.device))
            torch.autograd.backward(logits.float().square().mean())
    except Exception as error:  # compilers fail in many ways
        print(f"training without torch.compile: {str(error).strip().splitlines()[0]}", file=sys.stderr, flush=True)
        made = network
    network.zero_grad(set_to_none=True)
    for name, buffer in network.named_buffers():
        buffer.copy_(before[name])
    return made


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 on a GPU, float32 on a CPU.

    What stays float32 on a GPU (alignment, augmentation, loss) is little, and keeps its digits: TF32 is left off for products.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def run_epoch(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    sampler: Sampler,
    rows: np.ndarray[Any, np.dtype[np.int64]],
    labels: Tensor,
    config: Config,
    number: int,
    *,
    team: Team | None = None,
    progress: bool = False,
) -> Epoch:
    """One pass over the samples `rows` in an order drawn from (seed, epoch), in batches of nearly equal size.

    Every process of `team` draws the same for all of a batch, and works on its part. Nothing waits for the device between
    the first step and the last.
    """
    recipe, device = config.training, sampler.device
    team = team or Team(device=device)
    began = time.perf_counter()
    generator = torch.Generator().manual_seed(int(digest("epoch", recipe.seed, number), 16) >> 1)
    torch.manual_seed(generator.initial_seed())  # dropout
    order = torch.from_numpy(rows)[torch.randperm(len(rows), generator=generator)]
    targets, draws = labels[order].to(device), sampler.draws(len(rows), generator)
    steps = batches(np.arange(len(rows)), recipe)
    total, hits = torch.zeros((), device=device), torch.zeros((), device=device)
    network.train()
    rate = recipe.lr
    with _bar(f"epoch {number}/{recipe.epochs}", len(steps), shown=progress) as advance:
        for step, batch in enumerate(steps):
            rate = learning_rate(recipe, step=(number - 1) * len(steps) + step, steps_per_epoch=len(steps))
            for group in optimizer.param_groups:
                group["lr"] = rate
            team.batch, part = len(batch), team.part(len(batch))
            mine = slice(batch[0] + part.start, batch[0] + part.stop)
            clips, target = sampler.train_clips(order[mine], draws[mine]), targets[mine]
            with autocast(device):
                logits = network(clips)
            share = len(target) / len(batch)
            value = loss(config.loss, logits, target, epoch=number, epochs=recipe.epochs) * share
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(value * team.size)  # of which the processes take the mean
            optimizer.step()
            total += value.detach() * len(batch)
            hits += (logits.detach().argmax(1) == target).sum()
            advance()
    sums = team.sum(torch.stack([total, hits])).tolist()
    mean, top1 = sums[0] / len(rows), sums[1] / len(rows)
    if not math.isfinite(mean):
        raise FFNError(
            f"{config.preset}/{sampler.stream}: the loss of epoch {number} is {mean}; "
            f"lower training.lr (now {recipe.lr}) or raise training.warmup_epochs (now {recipe.warmup_epochs})"
        )
    seconds = time.perf_counter() - began
    return Epoch(
        epoch=number, epochs=recipe.epochs, lr=rate, loss=mean, top1=top1,
        seconds=seconds, clips_per_second=len(rows) / seconds,
    )  # fmt: skip


def learning_rate(recipe: TrainingConfig, *, step: int, steps_per_epoch: int) -> float:
    """Learning rate of `step` (from 0): a linear rise over the warm-up epochs, then a cosine that is 0 after the last step."""
    warmup, total = recipe.warmup_epochs * steps_per_epoch, recipe.epochs * steps_per_epoch
    if step < warmup:
        return recipe.lr * (step + 1) / (warmup + 1)
    return recipe.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1)))


def preserve(path: Path, network: nn.Module, optimizer: torch.optim.Optimizer, history: list[dict[str, Any]], team: Team) -> None:
    """Write weights, momenta, history and the numbers of threads and processes to `path`, whole or not at all, under a seal."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {f"network.{name}": tensor for name, tensor in network.state_dict().items()}
    for name, parameter in network.named_parameters():
        tensors[f"momentum.{name}"] = optimizer.state[parameter]["momentum_buffer"]
    tensors = _cpu(tensors)
    said = {"history": json.dumps(history), "threads": str(torch.get_num_threads()), "processes": str(team.size)}
    with publishing(path) as partial:
        save_file(tensors, partial, metadata={**said, "seal": seal(tensors, said)})


def seal(tensors: dict[str, Tensor], said: dict[str, str]) -> str:
    """SHA-256 of a state, tensors on the CPU and metadata: safetensors sees that a file was cut off, not that a bit has changed."""
    found = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
    for name in sorted(tensors):
        found.update(name.encode())
        found.update(tensors[name].numpy().tobytes())
    return found.hexdigest()


def restore(path: Path, network: nn.Module, optimizer: torch.optim.Optimizer, team: Team) -> list[dict[str, Any]]:
    """Read what `preserve` wrote into `network` and `optimizer`; returns the history. Equal processes take as many threads."""
    try:
        with safe_open(path, framework="pt") as state:
            said = dict(state.metadata() or {})
            tensors = {name: state.get_tensor(name) for name in state.keys()}  # noqa: SIM118
        if said.pop("seal") != seal(tensors, said):
            raise ValueError("damaged: it is not what was written")
        history: list[dict[str, Any]] = json.loads(said["history"])
        if int(said["processes"]) == team.size:
            torch.set_num_threads(int(said["threads"]))  # sums are split by threads, and rounded so
        network.load_state_dict({name: tensors[f"network.{name}"] for name in network.state_dict()})
        for name, parameter in network.named_parameters():
            momentum = torch.empty_like(parameter, requires_grad=False).copy_(tensors[f"momentum.{name}"])
            optimizer.state[parameter]["momentum_buffer"] = momentum
    except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise FFNError(f"{path}: cannot go on from this state ({error}); remove the file to train from the start") from None
    return history


def share(history: list[dict[str, Any]], network: nn.Module, optimizer: torch.optim.Optimizer, team: Team) -> list[dict[str, Any]]:
    """Give every process what the first one restored, but the weights (see `Team.wrap`): momenta, threads; returns its history."""
    history, threads = team.said((history, torch.get_num_threads()))
    torch.set_num_threads(threads)
    for parameter in network.parameters() if history else ():
        state = optimizer.state[parameter]
        state["momentum_buffer"] = team.first(state.get("momentum_buffer", torch.empty_like(parameter, requires_grad=False)))
    return history


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file `path` inside the block. Raises `FFNError` where another process holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Fault(f"{path.parent}: this training is going on in another process; wait for it or stop it") from None
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


def _work(said: dict[str, Any]) -> None:
    """What a process that `train` launched does."""
    with parallel.launched():
        train(
            SkeletonSet.open(said["data"]), protocol=said["protocol"], stream=said["stream"], config=from_dict(said["config"]),
            out=Path(said["out"]), state_dir=Path(said["state_dir"]), device=said["device"], progress=False,
            on_epoch=lambda record: parallel.tell(asdict(record)),
        )  # fmt: skip


if __name__ == "__main__":
    _work(json.loads(sys.argv[1]))
