"""The images, and the pipeline with every step in its container: killed, left behind, taken up again, interrupted."""

import itertools
import json
import os
import re
import signal
import stat
import subprocess
from pathlib import Path

import pytest

from components import IMAGE
from ffn.errors import FFNError
from pipeline.cli import main
from pipeline.docker import Containers, variables
from pipeline.local import code_digest, contained, workspace
from tests.pipeline.test_local import Laptop, statuses, until, wait_for

PROTOCOL = "ntu60-xsub"
NAMED = os.environ.get("FFN_IMAGE") or IMAGE


def docker(*arguments: str) -> str:
    done = subprocess.run(["docker", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def inside(*command: str) -> str:
    hardened = ("--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--network", "none")
    return docker("run", "--rm", *hardened, NAMED, *command)


@pytest.fixture(scope="module")
def image() -> str:
    """The image of the code under test; skips where no engine answers or has it."""
    try:
        docker("image", "inspect", NAMED)
    except (OSError, AssertionError):
        pytest.skip(f"no container engine, or none with {NAMED}")
    if inside("python3", "-c", "from pipeline.local import code_digest; print(code_digest())").strip() != code_digest():
        pytest.skip(f"{NAMED} was built from other code; make images")
    return NAMED


@pytest.mark.slow
def test_what_is_in_the_image(image: str) -> None:
    assert re.fullmatch(r"ffn \d+\.\d+\.\d+, commit \S+\n", inside())
    said = json.loads(docker("image", "inspect", image))[0]["Config"]
    assert said["Labels"]["org.opencontainers.image.revision"] in inside()
    assert said["User"] == "65532:65532"
    code = """
import importlib.util, json, pathlib, shutil, sys
packages = pathlib.Path(importlib.util.find_spec("torch").origin).parents[1]
print(json.dumps({
    "tools": [name for name in ("gcc", "cc", "g++", "clang", "ld", "make") if shutil.which(name)],
    "of kfp": [name for name in ("kubernetes", "kfp_server_api", "docstring_parser") if importlib.util.find_spec(name)],
    "uncompiled": [name for name in ("torch/nn/functional.py", "mlflow/client.py", "ffn/training.py", "kfp/dsl/executor.py")
        if not pathlib.Path(importlib.util.cache_from_source(packages / name)).exists()],
    "pip": (packages / "pip").exists(),
}))"""
    assert json.loads(inside("python3", "-c", code)) == {"tools": [], "of kfp": [], "uncompiled": [], "pip": False}
    assert [line.split()[:2] for line in inside("ffn", "health").splitlines()] == [
        ["torch", "ok"], ["scratch", "ok"], ["MLflow", "ok"], ["store", "ok"]
    ]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Laptop:
    return Laptop(tmp_path_factory.mktemp("docker"))


def start(place: Laptop, *arguments: str) -> "subprocess.Popen[str]":
    return place.start("--runner", "docker", "--protocols", PROTOCOL, *arguments)


def running(of: Path, stream: str = "") -> list[str]:
    """Containers of the workspace `of`; of those the ones that train `stream`, if it is given."""
    names = docker("ps", "--quiet", "--filter", "label=ffn.run").split()
    found = [(name, json.loads(docker("inspect", name))[0]) for name in names]
    ours = [(name, said) for name, said in found if said["Config"]["Labels"]["ffn.run"].startswith(str(of))]
    return [name for name, said in ours if f'"stream": "{stream}"' in " ".join(said["Args"]) or not stream]


@pytest.mark.slow
def test_every_step_in_a_container_killed_then_taken_up_again(image: str, place: Laptop) -> None:
    first = start(place)
    until(first, r"^train \S+/j +epoch +1/4")
    docker("kill", *running(place.workspace, "j"))
    out, err = first.communicate(timeout=300)
    assert first.returncode == 1
    assert re.match(rf"ffn: error: step train {PROTOCOL}/j failed \(exit status 137\): killed, ", err)

    second = start(place)
    out, err = second.communicate(timeout=300)
    assert (second.returncode, err) == (0, "")
    assert re.search(r"^ingest +cached", out, re.MULTILINE)
    assert re.search(rf"^promote {PROTOCOL} +ffn-{PROTOCOL} version 1 is champion$", out, re.MULTILINE)
    assert not running(place.workspace)
    owners = {path.stat().st_uid for path in place.workspace.rglob("*")}
    assert owners == {os.getuid()}
    (run,) = (of for name, of in statuses(place.client).items() if name == f"S4/{PROTOCOL}/j")
    assert run == ["FINISHED"]


@pytest.mark.slow
def test_left_containers_are_swept_and_an_interrupt_ends_every_one(
    image: str,
    tmp_path: Path,
    place: Laptop,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(place, "workspace", tmp_path / "workspace")
    arguments = ("--streams", "j", "--set", "training.epochs=1000")
    killed = start(place, *arguments)
    until(killed, r"^train \S+/j +epoch +1/")
    left = running(place.workspace, "j")
    killed.kill()
    killed.communicate()
    assert running(place.workspace, "j") == left  # a container outlives who started it

    process = start(place, *arguments)
    until(process, r"^train \S+/j +epoch +")
    (trains,) = running(place.workspace, "j")
    assert trains not in left
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == "ffn: interrupted; the same command goes on where it stopped\n"
    wait_for(lambda: not running(place.workspace))
    states = statuses(place.client)
    assert [of for name, of in states.items() if name.startswith("S4-")] == [["KILLED"]]
    assert states[f"S4/{PROTOCOL}/j"] == ["KILLED"]  # the step itself had the time to close it


ENGINE = {"SecurityOptions": ["name=seccomp,profile=default"], "Runtimes": {"runc": {}}}
SAID = {"Id": "sha256:0123", "Config": {"Labels": {"org.opencontainers.image.revision": "abc"}}}


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A `docker` that answers with the files of a folder: `info`, `image`; without one it fails."""
    folder = tmp_path / "engine"
    folder.mkdir()
    (folder / "info").write_text(json.dumps(ENGINE))
    (folder / "image").write_text(json.dumps(SAID))
    script = folder / "docker"
    script.write_text(f"#!/bin/sh\ncat {folder}/$1 2>/dev/null || {{ cat {folder}/error >&2; exit 1; }}\n")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    for name in ("AWS_CA_BUNDLE", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    return folder


def test_a_container_may_do_little_and_sees_the_same_paths(engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, ca = tmp_path / "record,ings", tmp_path / "ca.crt"
    source.mkdir()
    ca.touch()
    monkeypatch.setenv("AWS_CA_BUNDLE", str(ca))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "do not tell")
    monkeypatch.setenv("EDITOR", "ed")
    containers = Containers.of("image", workspace=tmp_path, source=source, run="logs")
    assert containers.commit == "abc"
    command = containers.command("name", ["sh", "-c", "true"], variables({"TMPDIR": "there"}))
    assert command[-4:] == ["sha256:0123", "sh", "-c", "true"]
    options = set(itertools.pairwise(command))
    assert {
        ("--rm", "--name"), ("--label", "ffn.run=logs"), ("--cap-drop", "ALL"), ("--security-opt", "no-new-privileges"),
        ("--user", f"{os.getuid()}:{os.getgid()}"), ("--env", "TMPDIR"), ("--env", "AWS_SECRET_ACCESS_KEY"),
        ("--mount", f'"type=bind","source={tmp_path}","target={tmp_path}"'),
        ("--mount", f'"type=bind","source={source}","target={source}","readonly"'),
        ("--mount", f'"type=bind","source={ca}","target={ca}","readonly"'),
    } <= options  # fmt: skip
    assert "--read-only" in command
    assert "--gpus" not in command
    assert "do not tell" not in " ".join(command)
    assert ("--env", "EDITOR") not in options


def test_an_engine_with_gpus_or_without_root_is_told_so(engine: Path, tmp_path: Path) -> None:
    (engine / "info").write_text(json.dumps({"SecurityOptions": ["name=rootless"], "Runtimes": {"nvidia": {}}}))
    options = Containers.of("image", workspace=tmp_path, source=None, run="logs").options
    assert options == ("--user", "0:0", "--gpus", "all")


@pytest.mark.parametrize(
    ("missing", "error", "said"),
    [
        ("info", "Cannot connect to the Docker daemon at unix:///nowhere.", "docker info: Cannot connect .*; start the engine"),
        ("image", "Error: No such image: image", "no image image on this machine; `make images` builds it"),
    ],
)
def test_no_engine_or_no_image_is_one_clear_line(engine: Path, tmp_path: Path, missing: str, error: str, said: str) -> None:
    (engine / missing).unlink()
    (engine / "error").write_text(error)
    with pytest.raises(FFNError, match=f"^{said}"):
        Containers.of("image", workspace=tmp_path, source=None, run="logs")


def test_a_database_that_containers_do_not_see_is_refused(engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = workspace(tmp_path / "workspace")
    assert contained("image", here, "s3://bucket/raw", here.root / "logs").readable == ()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    with pytest.raises(FFNError, match=r"mlflow\.db: containers see the workspace .* only"):
        contained("image", here, "/raw", here.root / "logs")


def test_version_and_health(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FFN_COMMIT", "abc")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("FFN_CHECKPOINTS", "s3://bucket/states")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    assert main(["version"]) == 0
    assert re.fullmatch(r"ffn \S+, commit abc\n", capsys.readouterr().out)
    assert main(["health"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [["torch", "ok"], ["scratch", "ok"], ["MLflow", "ok"], ["store", "FAILED"]]
    assert "no connection with http://127.0.0.1:1" in lines[-1]
