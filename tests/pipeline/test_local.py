"""The whole pipeline under kfp.local on synthetic recordings: killed, taken up again, cached, interrupted."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient
from safetensors.numpy import load_file

from ffn import config
from ffn.data.store import SkeletonSet
from ffn.data.synth import write_ntu
from ffn.training import train

PROTOCOLS, STREAMS = ("ntu60-xsub", "ntu120-xset"), ("j", "b")
SETTINGS = (
    "training.epochs=4",
    "training.batch_size=4",
    "model.width=16",
    "model.depths=1,1",
    "clip.frames=32",
    "clip.test_clips=1",
)


class Laptop:
    """A folder with recordings and a workspace, and `ffn run` on them."""

    def __init__(self, root: Path) -> None:
        self.root, self.raw, self.workspace = root, root / "raw", root / "workspace"
        write_ntu(self.raw, repeats=2)

    def start(self, *arguments: str) -> "subprocess.Popen[str]":
        command = [
            sys.executable, "-m", "pipeline.cli", "run", "--data", str(self.raw), "--workspace", str(self.workspace),
            "--protocols", ",".join(PROTOCOLS), "--streams", ",".join(STREAMS),
            *(part for setting in SETTINGS for part in ("--set", setting)), *arguments,
        ]  # fmt: skip
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "FFN_"))}
        # One thread, as in this process: the weights below are compared to the bit.
        env = {**clean, "FFN_FLOOR": "0", "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            command, cwd=self.root, env=env, text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    @property
    def client(self) -> MlflowClient:
        return MlflowClient(f"sqlite:///{self.workspace / 'mlflow.db'}")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Laptop:
    return Laptop(tmp_path_factory.mktemp("local"))


def until(process: "subprocess.Popen[str]", wanted: str) -> list[str]:
    """The lines that `process` says up to the one that matches `wanted`."""
    lines = []
    assert process.stdout
    for line in process.stdout:
        lines.append(line)
        if re.search(wanted, line):
            return lines
    raise AssertionError("".join(lines) + (process.stderr.read() if process.stderr else ""))


def training(process: "subprocess.Popen[str]", stream: str) -> psutil.Process:
    """The process that trains `stream` below `process`."""
    for child in psutil.Process(process.pid).children(recursive=True):
        command = " ".join(child.cmdline())
        if child.name().startswith("python") and "--function_to_execute train" in command and f'"stream": "{stream}"' in command:
            return child
    raise AssertionError(f"no process trains {stream}")


def statuses(client: MlflowClient) -> dict[str, list[str]]:
    """Run name -> the states of the runs of that name."""
    (experiment,) = (found for found in client.search_experiments() if found.name == "ffn")
    found: dict[str, list[str]] = {}
    for run in client.search_runs([experiment.experiment_id]):
        found.setdefault(run.info.run_name, []).append(run.info.status)
    return found


@pytest.mark.slow
def test_killed_in_mid_epoch_then_taken_up_again(place: Laptop) -> None:
    first = place.start()
    until(first, r"^train \S+/j +epoch +1/4")
    training(first, "j").send_signal(signal.SIGKILL)
    out, err = first.communicate(timeout=500)
    assert first.returncode == 1
    assert re.search(r"^train \S+/j +failed after", out, re.MULTILINE)
    (line,) = err.splitlines()
    assert re.match(r"ffn: error: step train \S+/j failed \(exit status 137\): killed, by hand or for lack of memory; ", line)
    assert "Traceback" not in out
    states = statuses(place.client)
    (parent,) = (name for name in states if name.startswith("S4-"))
    assert states[parent] == ["FAILED"]

    second = place.start()
    out, err = second.communicate(timeout=500)
    assert (second.returncode, err) == (0, "")
    killed = re.search(r"ffn: error: step train (\S+)/j", line)
    assert killed
    (other,) = set(PROTOCOLS) - {killed[1]}
    assert set(re.findall(r"^(\S+(?: \S+)?) +cached$", out, re.MULTILINE)) == {
        "ingest", f"fuse {other}", f"train {killed[1]}/b", f"evaluate {killed[1]}/b",
        *(f"{step} {other}/{stream}" for step in ("train", "evaluate") for stream in STREAMS),
    }  # fmt: skip
    assert re.search(rf"^gate {other} +hold: it is the champion already$", out, re.MULTILINE)
    states = statuses(place.client)
    assert {name: len(of) for name, of in states.items()} == {
        parent: 1, "ingest": 1,
        **{f"S4/{protocol}/{work}": 1 for protocol in PROTOCOLS for work in (*STREAMS, "2s", "register")},
    }  # fmt: skip
    assert {state for of in states.values() for state in of} == {"FINISHED"}
    table = [row.split() for row in out.splitlines() if row.startswith("| ")]
    assert table[0][1::2] == ["protocol", *STREAMS, "2s"]
    assert [row[1] for row in table[2:]] == list(PROTOCOLS)
    assert f"mlflow ui --workers 1 --backend-store-uri sqlite:///{place.workspace}" in out

    # The killed stream's weights are those of a training that nobody disturbed.
    (data,) = place.workspace.glob("kfp/ffn-*/ingest/data")
    recipe = config.override(config.preset("S4"), SETTINGS)
    whole = train(
        SkeletonSet.open(data), protocol=killed[1], stream="j", config=recipe, out=place.root / "whole",
        state_dir=place.root / "states", progress=False,
    )  # fmt: skip
    experiment = place.client.get_experiment_by_name("ffn")
    (run,) = place.client.search_runs([experiment.experiment_id], f"attributes.run_name = 'S4/{killed[1]}/j'")
    resumed = load_file(place.client.download_artifacts(run.info.run_id, "checkpoint/model.safetensors", str(place.root)))
    undisturbed = load_file(whole / "model.safetensors")
    assert {name: tensor.tobytes() for name, tensor in resumed.items()} == {name: t.tobytes() for name, t in undisturbed.items()}
    assert [point.step for point in place.client.get_metric_history(run.info.run_id, "train_loss")] == [1, 2, 3, 4]


@pytest.mark.slow
def test_an_interrupt_ends_every_step_and_closes_the_run(tmp_path: Path, place: Laptop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(place, "workspace", tmp_path / "workspace")
    process = place.start()
    until(process, r"^train \S+/j +started")
    wait_for(lambda: len(trainings(process)) == len(STREAMS))
    steps = trainings(process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == "ffn: interrupted; the same command goes on where it stopped\n"
    _, alive = psutil.wait_procs(steps, timeout=10)
    assert not alive
    states = statuses(place.client)
    assert [of for name, of in states.items() if name.startswith("S4-")] == [["KILLED"]]


@pytest.mark.slow
def test_several_presets_are_compared_and_none_is_registered(
    tmp_path: Path, place: Laptop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(place, "workspace", tmp_path / "workspace")
    process = place.start(
        "--presets", "S4,S0-2", "--seeds", "0,1", "--protocols", "ntu60-xsub", "--streams", "j", "--set", "training.epochs=1"
    )  # fmt: skip
    out, err = process.communicate(timeout=500)
    assert (process.returncode, err) == (0, "")
    assert "train S4/ntu60-xsub/j/seed1 " in out
    states = statuses(place.client)
    assert {name for name in states if "/" in name} == {
        f"{preset}/ntu60-xsub/{stream}{seed}" for preset in ("S4", "S0-2") for stream in ("j",) for seed in ("", "/seed1")
    }  # fmt: skip
    assert not place.client.search_registered_models()
    table = [[cell.strip() for cell in row.split("|")[1:-1]] for row in out.splitlines() if row.startswith("| ")]
    assert table[0] == ["preset", "seeds", "j", "paper j"]
    assert [row[:2] for row in table[2:]] == [["S0-2", "2"], ["S4", "2"]]
    assert all("±" in row[2] for row in table[2:])
    assert [row[3] for row in table[2:]] == ["90.73 (2d)", "88.89 (3d)"]


def trainings(process: "subprocess.Popen[str]") -> list[psutil.Process]:
    children = psutil.Process(process.pid).children(recursive=True)
    return [child for child in children if child.name().startswith("python") and "train" in child.cmdline()]


def wait_for(condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)
