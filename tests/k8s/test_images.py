"""The image, in a container as a pod of the steps has it: their user, a read-only root, nothing writable but /tmp, no network."""

import json
import os
import re
import subprocess

import pytest

from components import IMAGE
from tests.k8s.conftest import ROOT

pytestmark = pytest.mark.slow

NAMED = os.environ.get("FFN_IMAGE") or IMAGE
DIGEST = """
import hashlib, pathlib, sys
files = sorted((str(path.relative_to(root)), path.read_bytes())
    for root in map(pathlib.Path, sys.argv[1:]) for package in ("ffn", "components", "pipeline")
    for path in (root / package).rglob("*.py"))
print(hashlib.sha256(repr(files).encode()).hexdigest())
"""
"""Names the code below a folder."""

VERB = """
import json, sys
import numba
from numba.core.dispatcher import Dispatcher
from pipeline.cli import main

status = main(sys.argv[1:])
loops = {id(loop): loop for module in list(sys.modules.values()) if module.__name__.startswith("ffn.")
    for loop in vars(module).values() if isinstance(loop, Dispatcher)}.values()
compiled = {loop.py_func.__name__: sum(loop.stats.cache_misses.values()) for loop in loops if loop.stats.cache_misses}
try:
    layer = numba.threading_layer()
except ValueError:  # none was needed
    layer = None
print(json.dumps({"status": status, "found": sum(sum(loop.stats.cache_hits.values()) for loop in loops), "compiled": compiled,
    "layer": layer, "target": numba.config.CPU_NAME}))
"""
"""A verb of the command line, and what its loops did: how many were found compiled, how many had to be."""


def docker(*arguments: str, input: str | None = None) -> str:
    done = subprocess.run(["docker", *arguments], input=input, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def inside(*command: str) -> str:
    hardened = ("--read-only", "--tmpfs=/tmp:mode=1777", "--cap-drop=ALL", "--security-opt=no-new-privileges", "--network=none")
    return docker("run", "--rm", *hardened, NAMED, *command)


@pytest.fixture(scope="module")
def image() -> str:
    """The image of the code under test; skips where no engine answers or has it."""
    try:
        docker("image", "inspect", NAMED)
    except (OSError, AssertionError):
        pytest.skip(f"no container engine, or none with {NAMED}")
    where = inside("python3", "-c", "import pathlib, ffn; print(pathlib.Path(ffn.__file__).parents[1])").strip()
    here = subprocess.run(["python3", "-c", DIGEST, str(ROOT)], capture_output=True, text=True, check=True).stdout
    if inside("python3", "-c", DIGEST, where) != here:
        pytest.skip(f"{NAMED} was built from other code; make images")
    return NAMED


def test_what_is_in_the_image(image: str) -> None:
    assert re.fullmatch(r"ffn \d+\.\d+\.\d+, commit \S+\n", inside())
    said = json.loads(docker("image", "inspect", image))[0]["Config"]
    assert said["Labels"]["org.opencontainers.image.revision"] in inside()
    assert said["User"] == "65532:65532"
    assert inside("sh", "-c", "id -un; id -gn; echo ~ffn").split() == ["ffn", "ffn", "/tmp"]
    # A folder that the build left there would be root's, and torch could not keep its compiled kernels in it.
    assert docker("run", "--rm", image, "ls", "-A", "/tmp") == ""
    code = """
import importlib.util, json, pathlib, shutil
packages = pathlib.Path(importlib.util.find_spec("torch").origin).parents[1]
print(json.dumps({
    "tools": [name for name in ("gcc", "cc", "g++", "clang", "ld", "make") if shutil.which(name)],
    "uncompiled": [name for name in ("torch/nn/functional.py", "mlflow/client.py", "ffn/training.py", "kfp/dsl/executor.py")
        if not pathlib.Path(importlib.util.cache_from_source(packages / name)).exists()],
    "pip": (packages / "pip").exists(),
}))"""
    assert json.loads(inside("python3", "-c", code)) == {"tools": [], "uncompiled": [], "pip": False}
    assert [line.split()[:2] for line in inside("ffn", "health").splitlines()] == [
        ["torch", "ok"], ["scratch", "ok"], ["MLflow", "ok"], ["states", "ok"], ["data", "ok"]
    ]  # fmt: skip


def test_steps_train_on_openmp_and_compile_nothing(image: str) -> None:
    script = """
ffn synth /tmp/raw --repeats 2
verb() { python3 -c "$VERB" "$@"; }
verb ingest /tmp/raw --out /tmp/set.arrow
verb train --data /tmp/set.arrow --protocol ntu60-xsub --stream bm --preset S4-small --set training.epochs=1 \
    --workspace /tmp/workspace --out /tmp/checkpoint
verb evaluate --data /tmp/set.arrow --checkpoint /tmp/checkpoint --out /tmp/scores.arrow
"""
    said = [json.loads(line) for line in inside("sh", "-euc", f"VERB='{VERB}'\n{script}").splitlines() if line.startswith("{")]
    _, training, evaluation = said
    assert (training["status"], evaluation["status"]) == (0, 0)
    assert (training["layer"], training["compiled"], evaluation["compiled"]) == ("omp", {}, {})
    assert training["found"] > evaluation["found"] > 0


def test_the_whole_pipeline_runs_in_a_container(image: str) -> None:
    settings = ("training.epochs=1", "training.batch_size=4", "model.width=8", "model.depths=1", "clip.frames=8")
    said = inside(
        "sh", "-euc", "ffn synth /tmp/raw --repeats 2; export FFN_FLOOR=0; exec ffn run --data /tmp/raw --workspace /tmp/workspace "
        "--protocols ntu60-xsub --streams j " + " ".join(f"--set {setting}" for setting in settings),
    )  # fmt: skip
    assert re.search(r"^promote ntu60-xsub +ffn-ntu60-xsub version 1 is champion", said, re.MULTILINE), said
