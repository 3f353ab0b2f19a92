"""Begin: open the parent run of the pipeline run, or take up the one that is there; close what dead runs left open."""

import fcntl
import hashlib
import os
import socket
import subprocess
from pathlib import Path

from components import cluster, say, step, storage, tracking
from ffn.errors import FFNError


@step
def run(
    *,
    job: str,
    name: str,
    called: str,
    resource: str,
    resumes: str,
    version: str,
    source: str,
    source_version: str,
    space: str,
    presets: list[str],
    seeds: list[int],
    overrides: list[str],
) -> tuple[str, str]:
    """Returns the id of the MLflow run that is the parent of every other step's, and the version of the recordings.

    What is given as `source_version` is it; else what a store says of them; else this pipeline run's own, for what lies behind a
    path may have changed since the last.

    `job` is KFP's id of the pipeline run, on one machine its name. People read its `name`, or else what KFP `called` it, or where
    that is nothing, as for a schedule's runs, the `resource` it is. `resumes` is the id of a run of KFP's that did not finish and
    whose parent is taken up, `version` that of the pipeline.

    Raises `FFNError` where the run was begun with other inputs; recordings of one version may have moved.
    """
    inputs = {
        "source_version": source_version or source,
        "space": space,
        "presets": " ".join(presets),
        "seeds": " ".join(str(int(seed)) for seed in seeds),  # KFP makes 0.0 of 0
        "overrides": " ".join(overrides),
    }
    where = machine() or cluster.where()
    parent = tracking.begin(
        job, inputs, {"source": source}, name=name or called or resource, where=where, resumes=resumes,
        tags={**origin(job if on_kfp() else ""), tracking.LINEAGE["pipeline_version"]: version}, once=on_kfp(),
    )  # fmt: skip
    for dead in tracking.close_dead(where, state):
        say(f"closed run {dead}, which ended without closing itself")
    say(f"MLflow: {tracking.Child.of(parent).page()}")
    return parent, source_version or (storage.version(source) if storage.remote(source) else job)


def on_kfp() -> bool:
    """Whether KFP runs this step: a pod in which somebody calls `ffn run` is a machine like any other."""
    return cluster.inside() and not machine()


def machine() -> str:
    """What tells this workspace of this machine from every other; empty where runs are not locked in one."""
    locks = os.environ.get("FFN_LOCKS", "")
    return f"{socket.gethostname()}@{hashlib.sha256(locks.encode()).hexdigest()[:12]}" if locks else ""


def state(run: str) -> str:
    """What MLflow should say of another pipeline run at this place; RUNNING where nobody can tell."""
    if not on_kfp():
        return "RUNNING" if held(Path(os.environ["FFN_LOCKS"]) / run / "lock") else "KILLED"
    try:
        return cluster.state(run)
    except FFNError as error:
        say(f"no word of run {run}: {error}")
        return "RUNNING"


def held(lock: Path) -> bool:
    """Whether a process holds the lock of a run."""
    try:
        with lock.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no such file: the folder of logs was cleared
        return False
    return False


def origin(run: str) -> dict[str, str]:
    """Run tag -> commit, image, and KFP's id and page of the pipeline `run`, as far as they are known."""
    found = {
        tracking.COMMIT: os.environ.get("FFN_COMMIT") or commit(),
        tracking.LINEAGE["image"]: os.environ.get("FFN_IMAGE", ""),
        tracking.LINEAGE["kfp_run"]: run,
        tracking.LINEAGE["kfp_url"]: page(run),
    }
    return {tag: value for tag, value in found.items() if value}


def page(run: str) -> str:
    """Where a person's browser finds KFP's run; empty where that is not known."""
    ui = os.environ.get("FFN_KFP_UI", "").rstrip("/")
    return f"{ui}/#/runs/details/{run}" if ui and run else ""


def commit() -> str:
    """The commit of the checkout that this code is, with `-dirty` where it was changed since; empty where it is none."""
    asked = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
