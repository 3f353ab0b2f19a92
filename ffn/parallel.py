"""Data parallel training: many processes, one GPU each, train one network as one process would, to rounding.

torchrun's engine starts and watches the processes, `DistributedDataParallel` joins their gradients. What it leaves apart is
joined here: the statistics of batch-norms, and the draws of dropout.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import uuid
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from signal import Signals
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from ffn.errors import Fault, FFNError
from ffn.model.persons import Counting

T = TypeVar("T")


@dataclass(kw_only=True)
class Team:
    """The processes that train one network together, as one of them sees it."""

    rank: int = 0
    size: int = 1
    device: torch.device
    batch: int = 0
    """Samples of the joint batch that is being worked on."""

    def part(self, count: int) -> slice:
        """Which of `count` samples are this process's: all parts together are all samples, sizes differ by one at most."""
        least, more = divmod(count, self.size)
        start = self.rank * least + min(self.rank, more)
        return slice(start, start + least + (self.rank < more))

    def wrap(self, network: nn.Module) -> nn.Module:
        """`network` as it is to be called in training: weights as in process 0, gradients and statistics of the joint batch."""
        if self.size == 1:
            return network
        join_batches_(network, self)
        wrapped = DistributedDataParallel(network, device_ids=[self.device.index] if self.device.type == "cuda" else None)
        wrapped.broadcast_buffers = False  # equal they stay
        return wrapped

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of the processes' `tensor`, in place."""
        if self.size > 1:
            distributed.all_reduce(tensor)
        return tensor

    def first(self, tensor: Tensor) -> Tensor:
        """Process 0's `tensor`, in place."""
        if self.size > 1:
            distributed.broadcast(tensor, 0)
        return tensor

    def said(self, value: T) -> T:
        """Process 0's `value`."""
        if self.size == 1:
            return value
        box = [value]
        distributed.broadcast_object_list(box, 0, device=self.device)
        return box[0]


def world() -> int:
    """How many processes torchrun says there are, on all nodes; 0 outside torchrun."""
    return int(os.environ.get("WORLD_SIZE", "0")) if "RANK" in os.environ else 0


def follower() -> bool:
    """Whether torchrun started this process, and not as the first."""
    return world() > 1 and os.environ["RANK"] != "0"


@contextlib.contextmanager
def team(device: torch.device) -> Iterator[Team]:
    """Inside the block the processes that torchrun started work together; without torchrun, or with one process, one does."""
    if world() < 2:
        yield Team(device=device)
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    # Of weights with one row or column, whose order in memory has two names.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", device_id=device if device.type == "cuda" else None)
    try:
        yield Team(rank=distributed.get_rank(), size=distributed.get_world_size(), device=device)
    finally:
        distributed.destroy_process_group()


def join_batches_(network: nn.Module, team: Team) -> None:
    """Make the modules of `network` that mix or number samples those of the joint batch; torch has a batch-norm for GPUs."""
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Dropout):
                setattr(module, name, JointDropout(child.p, team))
            elif isinstance(child, Counting):
                child.joint = True
    if team.device.type == "cuda":
        synchronous: Callable[[nn.Module], nn.Module] = nn.SyncBatchNorm.convert_sync_batchnorm
        synchronous(network)


class JointDropout(nn.Dropout):
    """Dropout that draws for the joint batch and takes its rows; rows come in the order of the samples."""

    def __init__(self, p: float, team: Team) -> None:
        super().__init__(p)
        self.team = team

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.p:
            return x
        part = self.team.part(self.team.batch)
        each = len(x) // (part.stop - part.start)
        kept = torch.empty(self.team.batch * each, *x.shape[1:], dtype=x.dtype, device=x.device).bernoulli_(1 - self.p)
        return x * kept[part.start * each : part.stop * each] / (1 - self.p)


def launch(module: str, argument: str, processes: int, heard: Callable[[Any], None]) -> None:
    """Run `python -m module argument` in `processes` processes of this machine and wait for their end.

    `heard` gets every line that process 0 prints through `tell`. The processes live no longer than this one.
    Raises `FFNError` with the words of a process that raised one, or where one failed or was killed.
    """
    threads = str(max(1, torch.get_num_threads() // processes))
    command = [sys.executable, "-m", "ffn.parallel", str(processes), module, argument]
    agent = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": threads}
    )
    assert agent.stdin
    assert agent.stdout
    refused, failed = "", ""
    try:
        for line in agent.stdout:
            kind, _, text = line.partition(" ")
            if kind == "ffn-tell":
                heard(json.loads(text))
            elif kind == "ffn-error":
                refused = refused or json.loads(text)
            elif kind == "ffn-failed":
                failed = json.loads(text)
            else:
                print(line, end="", flush=True)
    finally:
        agent.stdin.close()  # ends them where they are still at work
        agent.stdout.close()
        status = agent.wait()
    if refused:
        raise FFNError(refused)
    if status:
        raise Fault(
            f"{failed or f'the {processes} processes ended with status {status}'}; start again to go on from the last state"
        )


def tell(value: Any, kind: str = "ffn-tell") -> None:
    """Say `value` to the process that launched this one."""
    print(kind, json.dumps(value), flush=True)


@contextlib.contextmanager
def launched() -> Iterator[None]:
    """The work of a process that `launch` began: it ends with its launcher, and tells it what a person can mend."""
    _end_with_launcher(lambda: os._exit(1))
    try:
        yield
    except FFNError as error:
        tell(str(error), "ffn-error")
        raise SystemExit(2) from None


def _end_with_launcher(end: Callable[[], None]) -> None:
    def wait() -> None:
        os.read(0, 1)  # of standard input, which ends when the launcher closes it, or dies
        end()

    threading.Thread(target=wait, daemon=True).start()


def _agent(processes: int, module: str, argument: str) -> int:
    """torchrun's agent: starts the processes, and ends all when one fails."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    _end_with_launcher(lambda: os.kill(os.getpid(), Signals.SIGTERM))
    with tempfile.TemporaryDirectory() as logs:
        config = LaunchConfig(
            min_nodes=1, max_nodes=1, nproc_per_node=processes, max_restarts=0, local_addr="localhost",
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d", rdzv_endpoint="localhost:0", logs_specs=DefaultLogsSpecs(logs),
        )  # fmt: skip
        try:
            elastic_launch(config, sys.executable)("-m", module, argument)
        except ChildFailedError as error:
            # The others lose their partner, and fail too: who was killed is the one to name.
            rank, failure = min(error.failures.items(), key=lambda item: (item[1].exitcode >= 0, item[1].timestamp))
            how = (
                f"was killed by {Signals(-failure.exitcode).name}"
                if failure.exitcode < 0
                else f"failed (exit status {failure.exitcode})"
            )
            tell(f"process {rank} of {processes} {how}", "ffn-failed")
            return 1
        except SignalException as signal:
            return 128 + int(signal.sigval)
    return 0


if __name__ == "__main__":
    sys.exit(_agent(int(sys.argv[1]), sys.argv[2], sys.argv[3]))
