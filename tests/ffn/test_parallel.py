"""Several processes are one: the same gradients, statistics and weights, every sample once, one clear end."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from ffn import parallel
from ffn.checkpoint import read_history
from ffn.config import override, preset
from ffn.data.store import SkeletonSet  # noqa: F401 (for the code that torchrun runs)
from ffn.errors import FFNError
from ffn.layouts import COCO17
from ffn.losses import loss
from ffn.model.network import build
from ffn.parallel import Team
from ffn.training import locked, process_count, train, train_key
from tests.conftest import toy_recordings, write_set

CPU = torch.device("cpu")
NETWORKS = ("S0", "S4", "S3-cvsta", "S3-drop", "ST-GCN++", "2s-AGCN", "AAGCN", "CTR-GCN", "MS-G3D")
SAMPLES = 7
"""Of which process 0 has four, process 1 three."""

CONFIG = override(
    preset("S4"),
    [
        "model.width=8", "model.depths=1,1", "model.dropout=0.3", "clip.frames=12", "clip.persons=1", "clip.rotate=0.2",
        "training.batch_size=7", "training.epochs=4", "training.lr=0.02",
    ],
)  # fmt: skip


def pass_of(name: str, team: Team) -> dict[str, torch.Tensor]:
    """Gradients and buffers of one pass over a joint batch, in float64."""
    config = override(preset(name), ["model.width=8", "model.dropout=0.4"])
    if config.model.network != "ffn":
        config = override(preset(name), ["model.width=8"])
    torch.manual_seed(1)
    network = build(config.model, COCO17, 5).double().train()
    clips, labels = torch.randn(SAMPLES, 2, 8, 17, 3, dtype=torch.double), torch.arange(SAMPLES) % 5
    clips[1:5, 1] = 0  # in process 0 one stands for three who are absent, in process 1 there is but one
    forward = team.wrap(network)
    torch.manual_seed(2)  # dropout
    team.batch, mine = SAMPLES, team.part(SAMPLES)
    value = loss(config.loss, forward(clips[mine]), labels[mine], epoch=3, epochs=4)
    torch.autograd.backward(value * len(labels[mine]) / SAMPLES * team.size)
    gradients = {name: parameter.grad for name, parameter in network.named_parameters() if parameter.grad is not None}
    return gradients | dict(network.named_buffers())


@pytest.mark.slow
def test_a_pass_of_two_processes_is_that_of_one(tmp_path):
    """Every kind of network, in parts of unequal size."""
    parallel.launch("tests.ffn.test_parallel", str(tmp_path), 2, print)
    for name in NETWORKS:
        expected = pass_of(name, Team(device=CPU))
        for rank in range(2):
            got = torch.load(tmp_path / f"{name}.{rank}")
            assert list(got) == list(expected)
            scale = max(float(tensor.abs().max()) for tensor in expected.values())
            for what, tensor in expected.items():
                torch.testing.assert_close(got[what], tensor, rtol=1e-7, atol=1e-9 * scale, msg=f"{name}: {what}")


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    arrays, labels = toy_recordings(37)
    return write_set(tmp_path_factory.mktemp("toys") / "set.arrow", arrays, "3d", labels=labels)


def run(data, folder: Path, **options) -> Path:
    """Batches of six and of seven samples, augmented; four epochs."""
    options = {"protocol": "p", "stream": "bm", "progress": False, "state_dir": folder / "state", **options}
    return train(data, config=CONFIG, out=folder / "out", device="cpu", **options)


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model.safetensors")


def assert_same_training(ours: Path, theirs: Path) -> None:
    """To rounding, which training makes larger step by step."""
    for name, tensor in weights(theirs).items():
        torch.testing.assert_close(weights(ours)[name], tensor, rtol=1e-3, atol=1e-3, msg=name)
    for one, two in zip(read_history(ours), read_history(theirs), strict=True):
        assert one["top1"] == two["top1"]
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-4)


class Interrupted(Exception):
    pass


@pytest.fixture(scope="module")
def alone(toys, tmp_path_factory) -> Path:
    return run(toys, tmp_path_factory.mktemp("alone"))


def agents():
    """The launched agents that are alive; other tests of this process may have left helpers of theirs."""
    return [child for child in psutil.Process().children() if "ffn.parallel" in child.cmdline()]


@pytest.mark.slow
def test_two_processes_train_as_one_and_one_goes_on(toys, alone, tmp_path):
    """Interrupted in mid-way, then gone on with by a single process."""
    heard = []

    def stop(epoch):
        heard.append(epoch.epoch)
        if epoch.epoch == 2:
            raise Interrupted

    with pytest.raises(Interrupted):
        run(toys, tmp_path, processes=2, on_epoch=stop)
    assert heard == [1, 2]
    assert agents() == []
    assert not (tmp_path / "out").exists()
    later = []
    assert_same_training(run(toys, tmp_path, on_epoch=lambda epoch: later.append(epoch.epoch)), alone)
    assert later in ([3, 4], [4])


@pytest.mark.slow
def test_a_killed_process_ends_all_and_two_go_on_from_one(toys, alone, tmp_path):
    def stop(epoch):
        if epoch.epoch == 1:
            raise Interrupted

    def kill(epoch):
        [agent] = agents()
        [second] = [child for child in agent.children() if child.environ()["RANK"] == "1"]
        second.kill()

    with pytest.raises(Interrupted):
        run(toys, tmp_path, on_epoch=stop)
    with pytest.raises(FFNError, match=r"process 1 of 2 was killed by SIGKILL; start again to go on from the last state"):
        run(toys, tmp_path, processes=2, on_epoch=kill)
    assert agents() == []
    heard = []
    out = run(toys, tmp_path, processes=2, on_epoch=lambda epoch: heard.append(epoch.epoch))
    assert heard[-1] == 4
    assert 1 not in heard
    assert_same_training(out, alone)


@pytest.mark.slow
def test_what_a_process_refuses_is_said_once(toys, tmp_path):
    lock = tmp_path / "state" / train_key(toys.digest, CONFIG, "p", "bm") / "lock"
    with locked(lock), pytest.raises(FFNError, match="going on in another process"):
        run(toys, tmp_path, processes=2)


@pytest.mark.slow
def test_processes_that_torchrun_started_work_together(toys, alone, tmp_path):
    """As on several nodes: nothing here launches them."""
    code = "import sys; from tests.ffn.test_parallel import *; run(SkeletonSet.open(sys.argv[1]), Path(sys.argv[2]))"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    subprocess.run(
        [*torchrun, sys.executable, "-c", code, str(toys.path), str(tmp_path)],
        check=True, capture_output=True, cwd=Path(__file__).parents[2], env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert_same_training(tmp_path / "out", alone)


@given(count=st.integers(0, 300), size=st.integers(1, 40))
def test_parts_are_all_samples_once(count, size):
    parts = [range(count)[Team(rank=rank, size=size, device=CPU).part(count)] for rank in range(size)]
    assert [row for part in parts for row in part] == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_how_many_processes(monkeypatch):
    gpu = torch.device("cuda")
    monkeypatch.delenv("FFN_PROCESSES", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert process_count(None, CPU, 50) == 1
    assert process_count(None, gpu, 50) == 4
    assert process_count(None, gpu, 3) == 3
    assert process_count(None, torch.device("cuda:1"), 50) == 1
    assert process_count(2, gpu, 50) == 2
    monkeypatch.setenv("FFN_PROCESSES", "3")
    assert process_count(None, CPU, 50) == 3
    assert process_count(1, CPU, 50) == 1
    for asked, device, text, message in (
        (0, CPU, "", "processes=0: expected at least 1"),
        (8, CPU, "", "processes=8: the smallest batch has 7 samples"),
        (5, gpu, "", "processes=5: this machine has 4 GPUs"),
        (None, CPU, "two", "FFN_PROCESSES='two': expected a whole number"),
    ):
        monkeypatch.setenv("FFN_PROCESSES", text)
        with pytest.raises(FFNError, match=message):
            process_count(asked, device, 7)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with parallel.launched(), parallel.team(CPU) as team:
        for name in NETWORKS:
            torch.save(pass_of(name, team), Path(sys.argv[1]) / f"{name}.{team.rank}")
