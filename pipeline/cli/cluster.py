"""`ffn cluster`: the pipeline on Kubeflow Pipelines.

Where that is, and what runs ask of it, comes from the environment, which a file of the cluster fills in (pipeline/clusterfile.py).
"""

import argparse
import os
import re
import sys
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from ffn.config import override, preset
from ffn.errors import FFNError
from ffn.protocols import require_name
from pipeline.cli import options
from pipeline.cli.options import Verbs

if TYPE_CHECKING:
    from pipeline.server import Server
    from pipeline.workflow import Workflows


MOST_BOXES = 15
"""One with four streams is 139 nodes of a workflow, 68 KB of its compressed status."""


def add(verbs: Verbs) -> None:
    """Add the verbs."""
    verbs.add(check, "whether the cluster gives what a run needs, and what to do where it does not")

    added = verbs.add(compile, "the pipeline as YAML for a cluster")
    options.graph(added)
    added.add_argument("--out", type=Path, default=Path("pipeline.yaml"))

    added = verbs.add(submit, "run a compiled pipeline on Kubeflow Pipelines")
    _submission(added)
    added.add_argument(
        "--name", default="", help="by default derived from the inputs; a run of that name is taken up, not made again"
    )
    added.add_argument(
        "--retry", action="store_true", help="if the run of that name failed or was cancelled, go on where it stopped"
    )
    added.add_argument("--watch", action="store_true", help="and follow it to its end, as `ffn cluster watch` does")
    _watching(added)

    added = verbs.add(watch, "follow a run on Kubeflow Pipelines to its end")
    added.add_argument("run", metavar="RUN", help="its id or name")
    _experiment(added)
    _watching(added)

    added = verbs.add(cancel, "end a run, and have MLflow say so")
    added.add_argument("run", metavar="RUN", help="its id or name")
    _experiment(added)

    added = verbs.add(schedule, "run a compiled pipeline again and again")
    _submission(added)
    added.add_argument("--name", required=True, help="of the schedule; one of that name is replaced")
    added.add_argument("--cron", required=True, help="minute hour day month weekday, in the server's time zone: '0 2 * * 0'")

    added = verbs.add(gc, "what runs left behind and nobody needs; with --delete it goes")
    added.add_argument("--older-than", type=_age, default="30d", metavar="AGE", help="since its last use: 30d, 12h; default 30d")
    added.add_argument("--delete", action="store_true", help="do it; else nothing changes")
    _experiment(added)

    added = verbs.add(schedules, "list the schedules")
    _experiment(added)

    added = verbs.add(unschedule, "delete a schedule")
    added.add_argument("name", metavar="NAME")
    _experiment(added)


def check(given: argparse.Namespace) -> int:
    """Look whether the cluster gives what a run needs, one line each, and say the remedy where it does not.

    Reads the same file and variables as compile and submit, and the kubeconfig; makes one pod as a step's is, and deletes it. Exit
    status 1 where something fails; a warning is none.
    """
    from components.kube import connect
    from pipeline.check import examine
    from pipeline.check.finding import State
    from pipeline.server import Server
    from pipeline.settings import Settings

    settings, api = Settings.from_environment(), connect()
    namespace = os.environ.get("FFN_KFP_NAMESPACE", "")
    well = True
    for finding in examine(api, Server.from_environment, settings, namespace=namespace, account=_account()):
        print(finding.line, flush=True)
        well &= finding.state is not State.FAILED
    return 0 if well else 1


def compile(given: argparse.Namespace) -> None:
    """Write the pipeline as YAML for a cluster; its file, or FFN_IMAGE, FFN_GPUS and the like, say how (see docs/cluster.md)."""
    import tempfile

    from kfp import compiler

    from pipeline import submit as kfp
    from pipeline.dag import build
    from pipeline.settings import Settings

    for protocol in given.protocols:
        require_name("protocol", protocol)
    for name in given.presets:
        preset(name)
    if given.out.suffix not in (".yaml", ".yml"):
        raise FFNError(f"--out {given.out}: expected a name that ends with .yaml")
    settings = Settings.from_environment()
    given.out.parent.mkdir(parents=True, exist_ok=True)
    if not settings.pinned:
        print(
            f"ffn: warning: image {settings.image} is a tag: KFP's cache does not see it move; name it by digest",
            file=sys.stderr,
        )
    if (boxes := len(given.protocols) * len(given.presets) * len(given.seeds)) > MOST_BOXES:
        print(
            f"ffn: warning: {boxes} boxes of protocol, preset and seed: Argo keeps the state of a run in 1 MB, enough for some "
            f"{MOST_BOXES}; compile several pipelines, or let Argo offload node status to a database",
            file=sys.stderr,
        )

    def write(path: Path, version: str = "") -> Path:
        graph = build(given.protocols, given.streams, settings, presets=given.presets, seeds=given.seeds, version=version)
        compiler.Compiler().compile(graph, str(path))
        return path

    with tempfile.TemporaryDirectory() as folder:  # what a version is named by is the graph without that name
        version = kfp.load(write(Path(folder) / given.out.name), {"source": ""}, allow_tag=True).version
    print(write(given.out, version))


def submit(given: argparse.Namespace) -> int:
    """Submit a compiled pipeline to Kubeflow Pipelines, once: the same command finds the run it made.

    Prints the run's id; the cluster's file, or FFN_KFP_URL and the like, say where (see docs/cluster.md).
    """
    from pipeline import submit as kfp
    from pipeline.server import Server
    from pipeline.watch import follow, page, told

    server = Server.from_environment()
    pipeline = kfp.load(given.pipeline, _inputs(given), allow_tag=given.allow_tag)
    name = given.name or f"ffn-{pipeline.digest[:8]}"
    require_name("--name", name)

    def work() -> int:
        run, done = kfp.submit(
            server, pipeline, name=name, experiment=given.experiment, account=_account(), retry=given.retry
        )  # fmt: skip
        print(run["run_id"], flush=True)
        print(f"ffn: run {name} is {done}", file=sys.stderr)
        print(f"ffn: KFP     {page(server, run['run_id'])}", file=sys.stderr)
        if not given.watch:
            return 0
        return follow(server, run["run_id"], hours=given.hours, cancel_on_exit=given.cancel_on_exit, workflows=_workflows(server))

    return told(work)


def watch(given: argparse.Namespace) -> int:
    """Follow a run to its end: 0 it succeeded, 1 failed, 3 cancelled, 4 not done in time, 5 unreachable, 6 we are refused.

    Why a step failed, or waits, is read from its pod, with the rights that kubectl has. Ctrl-C leaves the run going on.
    """
    from pipeline import submit as kfp
    from pipeline.server import Server
    from pipeline.watch import follow, page, told

    server = Server.from_environment()

    def work() -> int:
        run = kfp.run_id(server, given.run, given.experiment)
        server.ask(server.runs.run_service_get_run, run)  # it may not be there
        print(f"ffn: KFP     {page(server, run)}", file=sys.stderr)
        return follow(server, run, hours=given.hours, cancel_on_exit=given.cancel_on_exit, workflows=_workflows(server))

    return told(work)


def cancel(given: argparse.Namespace) -> int:
    """End a run of Kubeflow Pipelines: its trainings keep their states, MLflow says KILLED, `submit --retry` goes on from there.

    Nothing of the run can tell anybody any more: FFN_WEBHOOK is told from here, if it is set.
    """
    from components.notify import notify
    from pipeline import submit as kfp
    from pipeline.server import Server
    from pipeline.watch import Status, close, ended, page, told
    from pipeline.watch import cancel as end

    server = Server.from_environment()

    def work() -> int:
        run = kfp.run_id(server, given.run, given.experiment)
        if (status := ended(server.ask(server.runs.run_service_get_run, run))) is not None:
            raise FFNError(f"run {given.run} has ended already: {status.name.lower()}")
        end(server, run)
        print(f"ffn: run {given.run} is asked to end", file=sys.stderr)
        close(run, Status.CANCELLED)
        notify(f"{given.run}: cancelled\nKFP: {page(server, run)}")
        return 0

    return told(work)


def schedule(given: argparse.Namespace) -> int:
    """Put a compiled pipeline on a schedule; the same command again changes nothing, another one replaces it."""
    from pipeline import submit as kfp
    from pipeline.server import Server
    from pipeline.watch import told

    server = Server.from_environment()
    pipeline = kfp.load(given.pipeline, _inputs(given), allow_tag=given.allow_tag)

    def work() -> int:
        made, done = kfp.schedule(
            server, pipeline, name=given.name, cron=given.cron, experiment=given.experiment, account=_account()
        )
        print(made["recurring_run_id"], flush=True)
        print(f"ffn: schedule {given.name} is {done}", file=sys.stderr)
        return 0

    return told(work)


def schedules(given: argparse.Namespace) -> int:
    """List the schedules of an experiment: name, cron expression (seconds first), state, id."""
    from pipeline import submit as kfp
    from pipeline.server import Server
    from pipeline.watch import told

    server = Server.from_environment()

    def work() -> int:
        for entry in kfp.schedules(server, given.experiment):
            cron = entry.get("trigger", {}).get("cron_schedule", {}).get("cron", "")
            print(f"{entry['display_name']:<24} {cron:<20} {entry.get('status', '').lower():<9} {entry['recurring_run_id']}")
        return 0

    return told(work)


def unschedule(given: argparse.Namespace) -> int:
    """End a schedule; the runs it made stay. One that goes on keeps the schedule, disabled, until it has ended."""
    from pipeline import submit as kfp
    from pipeline.server import Server
    from pipeline.watch import told

    server = Server.from_environment()

    def work() -> int:
        ended = kfp.unschedule(server, given.name, given.experiment)
        if not ended:
            raise FFNError(f"no schedule {given.name} in experiment {given.experiment}")
        for entry, going in ended:
            if going:
                text = f"is disabled; its run {going['run_id']} goes on, and when that has ended the same command deletes it"
            else:
                text = "is deleted"
            print(f"ffn: schedule {entry['display_name']} {text}", file=sys.stderr)
        return 0

    return told(work)


def gc(given: argparse.Namespace) -> int:
    """Tell what runs left behind and nobody needs: runs that are open or failed in MLflow, states of trainings, archived runs.

    What a registered model is from, and what goes on, is none of it. Exit status 1 where something was not looked at, or stays.
    """
    uri = os.environ.get("FFN_MLFLOW_UI") or os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        raise FFNError("where is MLflow? name the cluster's file in --cluster, or set FFN_MLFLOW_UI")
    os.environ["MLFLOW_TRACKING_URI"] = uri
    from pipeline import gc
    from pipeline.server import Server
    from pipeline.settings import Settings
    from pipeline.watch import told

    server, settings = Server.from_environment(), Settings.from_environment()

    def work() -> int:
        well = gc.sweep(
            server, checkpoints=settings.checkpoints, experiment=given.experiment, older=given.older_than, delete=given.delete
        )  # fmt: skip
        print(f"\n{gc.by_hand(max(1, given.older_than.days))}", file=sys.stderr)
        return 0 if well else 1

    return told(work)


def _age(text: str) -> timedelta:
    units = {"d": "days", "h": "hours", "m": "minutes"}
    if not (said := re.fullmatch(r"(\d+)([dhm])", text)):
        raise argparse.ArgumentTypeError(f"{text!r}: expected days, hours or minutes, such as 30d")
    return timedelta(**{units[said[2]]: int(said[1])})


def _submission(added: argparse.ArgumentParser) -> None:
    added.add_argument("pipeline", type=Path, metavar="PIPELINE.yaml", help="what `ffn cluster compile` wrote")
    added.add_argument("--data", required=True, metavar="SOURCE", help="raw recordings, as the pod of ingest finds them")
    added.add_argument("--data-version", default="", help="names what lies there now: a date, a digest; another one is read anew")
    options.space(added)
    options.settings(added)
    added.add_argument("--allow-tag", action="store_true", help="submit an image that is not named by digest")
    _experiment(added)


def _experiment(added: argparse.ArgumentParser) -> None:
    added.add_argument("--experiment", default="ffn", help="of Kubeflow Pipelines; default ffn")


def _watching(added: argparse.ArgumentParser) -> None:
    added.add_argument("--hours", type=float, default=96.0, help="how long to watch; default 96")
    added.add_argument(
        "--cancel-on-exit", action="store_true", help="leaving before the end (Ctrl-C, SIGTERM, too late) cancels the run"
    )


def _inputs(given: argparse.Namespace) -> dict[str, object]:
    """The pipeline's parameters."""
    override(preset("S4"), given.set)  # the names of settings are those of every preset
    if not given.data.startswith("/") and "://" not in given.data:
        raise FFNError(f"--data {given.data}: expected an absolute path in the pod of ingest, such as /mnt/data/x, or a URI")
    return {"source": given.data, "source_version": given.data_version, "space": given.space, "overrides": given.set}


def _workflows(server: "Server") -> "Workflows | None":
    """The runs' workflows; None, and a line, where kubectl has no cluster to speak to."""
    from pipeline.workflow import Workflows

    found = Workflows.reach(server.endpoint.namespace or "kubeflow")
    if not found:
        print("ffn: no kubeconfig: why a step fails or waits is not told", file=sys.stderr)
    return found


def _account() -> str:
    return os.environ.get("FFN_SERVICE_ACCOUNT", "ffn-pipeline")
