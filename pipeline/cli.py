"""The command line: `ffn run` for the whole pipeline, one verb per step for one step on paths.

Imports stay inside the verbs, so that `ffn --help` is instant and `ffn compile` never loads torch.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import ffn
from ffn.config import PRESETS, STREAMS, override, preset, recipe
from ffn.errors import FFNError
from ffn.protocols import NTU_PROTOCOLS, require_name

if TYPE_CHECKING:
    from ffn.scores import Scores


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 1 a failed step, 2 a mistake to mend, 130 interrupted, 141 unread."""
    given = parser().parse_args(arguments)
    try:
        status = int(given.verb(given) or 0)
        sys.stdout.flush()
        return status
    except FFNError as error:
        print(f"ffn: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("ffn: interrupted; the same command goes on where it stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # who read our output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def parser() -> argparse.ArgumentParser:
    """The verbs and their options."""
    root = argparse.ArgumentParser(prog="ffn", description="From raw skeletons to a promoted action-recognition model.")
    verbs = root.add_subparsers(title="verbs", required=True, metavar="VERB")

    def verb(function: Callable[[argparse.Namespace], int | None], help: str) -> argparse.ArgumentParser:
        added = verbs.add_parser(function.__name__, help=help, description=function.__doc__)
        added.set_defaults(verb=function)
        return added

    added = verb(run, "the whole pipeline on this machine")
    _graph(added)
    added.add_argument(
        "--data", required=True, metavar="SOURCE", help="raw recordings: a folder, zip or pickle, or s3://BUCKET/NAME of one"
    )
    _settings(added)
    _space(added)
    added.add_argument(
        "--runner", choices=("process", "docker"), default="process",
        help="what every step is: a process, or a container of the image that FFN_IMAGE names; default process",
    )  # fmt: skip
    added.add_argument(
        "--name", default="", help="name of the run; by default derived from its inputs, so that it is taken up again"
    )
    _workspace(added)

    added = verb(compile, "the pipeline as YAML for a cluster")
    _graph(added)
    added.add_argument("--out", type=Path, default=Path("pipeline.yaml"))
    added.add_argument("--picture", type=Path, metavar="SVG", help="draw the compiled pipeline too (needs graphviz)")

    added = verb(submit, "run a compiled pipeline on Kubeflow Pipelines")
    _submission(added)
    added.add_argument(
        "--name", default="", help="by default derived from the inputs; a run of that name is taken up, not made again"
    )
    added.add_argument(
        "--retry", action="store_true", help="if the run of that name failed or was cancelled, go on where it stopped"
    )
    added.add_argument("--watch", action="store_true", help="and follow it to its end, as `ffn watch` does")
    _watching(added)

    added = verb(watch, "follow a run on Kubeflow Pipelines to its end")
    added.add_argument("run", metavar="RUN", help="its id or name")
    _experiment(added)
    _watching(added)

    added = verb(schedule, "run a compiled pipeline again and again")
    _submission(added)
    added.add_argument("--name", required=True, help="of the schedule; one of that name is replaced")
    added.add_argument("--cron", required=True, help="minute hour day month weekday, in the server's time zone: '0 2 * * 0'")

    added = verb(schedules, "list the schedules")
    _experiment(added)

    added = verb(unschedule, "delete a schedule")
    added.add_argument("name", metavar="NAME")
    _experiment(added)

    added = verb(paper, "the paper's rows: parameters and operations, ours beside the paper's")
    added.add_argument("--markdown", type=Path, metavar="FILE", help="write the whole page, docs/paper.md, instead")

    added = verb(synth, "write synthetic NTU recordings")
    added.add_argument("folder", type=Path)
    added.add_argument("--repeats", type=int, default=10, help="performances of each action; three files each")
    added.add_argument("--seed", type=int, default=0)

    added = verb(ingest, "raw recordings -> one skeleton set")
    added.add_argument("source", help="a folder, zip or pickle, or s3://BUCKET/NAME of one")
    added.add_argument("--out", type=Path, required=True, metavar="SET.arrow")
    _space(added)

    added = verb(train, "one stream of one protocol -> a checkpoint folder")
    added.add_argument("--data", type=Path, required=True, metavar="SET.arrow")
    added.add_argument("--protocol", required=True)
    added.add_argument("--stream", choices=list(STREAMS), required=True)
    _recipe(added)
    added.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    added.add_argument("--processes", type=int, help="share every batch among so many; default FFN_PROCESSES or one for every GPU")
    _workspace(added)

    added = verb(evaluate, "a checkpoint's scores of the held-out samples")
    added.add_argument("--data", type=Path, required=True, metavar="SET.arrow")
    added.add_argument("--checkpoint", type=Path, required=True, metavar="FOLDER")
    added.add_argument("--out", type=Path, required=True, metavar="SCORES.arrow")

    added = verb(fuse, "scores of several streams -> fused scores")
    added.add_argument("scores", type=Path, nargs="+", metavar="SCORES.arrow")
    added.add_argument("--out", type=Path, required=True, metavar="FOLDER")

    added = verb(register, "checkpoints and their fused scores -> a version in MLflow, alias challenger")
    added.add_argument("checkpoints", type=Path, nargs="+", metavar="CHECKPOINT")
    added.add_argument("--fused", type=Path, required=True, metavar="FOLDER", help="what `ffn fuse` wrote")
    added.add_argument("--data", type=Path, required=True, metavar="SET.arrow")
    _workspace(added)

    added = verb(promote, "a version becomes champion, by hand, where the gate lets it")
    added.add_argument("--model", required=True, metavar="ffn-PROTOCOL")
    which = added.add_mutually_exclusive_group()
    which.add_argument("--version", default="")
    which.add_argument("--alias", default="challenger")
    added.add_argument("--to", default="champion", metavar="ALIAS", help="default champion; any other alias passes no gate")
    added.add_argument("--reason", default="by hand", help="kept as the version's tag promoted_because")
    added.add_argument("--data", type=Path, metavar="SET.arrow", help="recordings to measure a champion again on")
    added.add_argument("--force", action="store_true", help="do not ask the gate")
    added.add_argument("--dry-run", action="store_true", help="say what would happen, and change nothing")
    _workspace(added)

    added = verb(rollback, "the champion before becomes champion again")
    added.add_argument("--model", required=True, metavar="ffn-PROTOCOL")
    _workspace(added)

    added = verb(predict, "the top classes of one .skeleton file")
    added.add_argument("file", type=Path, metavar="FILE.skeleton")
    _model(added)
    which = added.add_mutually_exclusive_group()
    which.add_argument("--top", type=int, default=5)
    which.add_argument("--every", type=int, metavar="FRAMES", help="the top class of every window, one begun every so many frames")
    _workspace(added)

    added = verb(export, "a model as one file: ONNX, or a program of torch.export")
    _model(added)
    added.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    added.add_argument("--format", choices=("onnx", "torch"), default="onnx")
    added.add_argument("--clips", type=int, default=1, help="clips per recording that are averaged; default 1, evaluation takes 10")
    _workspace(added)

    verb(version, "which ffn this is")
    verb(health, "whether a step would find what it needs: device, scratch, MLflow, object store")
    return root


def run(given: argparse.Namespace) -> int:
    """Run the whole pipeline on this machine. What was done before with the same inputs is not done again."""
    from components import IMAGE
    from pipeline import local

    here = local.workspace(given.workspace)
    image = (os.environ.get("FFN_IMAGE") or IMAGE) if given.runner == "docker" else ""
    try:
        name, table = local.run(
            source=given.data, protocols=given.protocols, streams=given.streams, presets=given.presets,
            seeds=given.seeds, overrides=given.set, space=given.space, name=given.name, image=image,
            workspace=here,
        )  # fmt: skip
    except local.StepFailed as failure:
        print(f"ffn: error: {failure}", file=sys.stderr)
        return 2 if failure.status == 2 else 1
    print(f"\ntop1 in percent, run {name}\n\n{table}")
    if here.ui():
        print(f"which this command serves:\n\n    {here.ui()}\n")
    return 0


def compile(given: argparse.Namespace) -> None:
    """Write the pipeline as YAML for a cluster; FFN_IMAGE, FFN_GPUS and the like say how (see docs/pipeline.md)."""
    from kfp import compiler

    from pipeline.dag import build
    from pipeline.settings import Settings

    for protocol in given.protocols:
        require_name("protocol", protocol)
    for name in given.presets:
        preset(name)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    settings = Settings.from_environment()
    if not settings.pinned:
        print(
            f"ffn: warning: image {settings.image} is a tag: KFP's cache does not see it move; name it by digest",
            file=sys.stderr,
        )
    pipeline = build(given.protocols, given.streams, settings, presets=given.presets, seeds=given.seeds)
    compiler.Compiler().compile(pipeline, str(given.out))
    print(given.out)
    if given.picture:
        from pipeline.picture import draw

        draw(given.out, given.picture)
        print(given.picture)


def submit(given: argparse.Namespace) -> int:
    """Submit a compiled pipeline to Kubeflow Pipelines, once: the same command finds the run it made.

    Prints the run's id; FFN_KFP_URL and the like say where (see docs/cluster.md).
    """
    from pipeline import submit as kfp
    from pipeline.server import Server

    server = Server.from_environment()
    inputs = _inputs(given)
    name = given.name or f"ffn-{kfp.load(given.pipeline, inputs, allow_tag=True).digest[:8]}"
    require_name("--name", name)
    pipeline = kfp.load(given.pipeline, {**inputs, "name": name}, allow_tag=given.allow_tag)

    def work() -> int:
        run, done = kfp.submit(
            server, pipeline, name=name, experiment=given.experiment, account=_account(), retry=given.retry
        )  # fmt: skip
        print(run["run_id"], flush=True)
        print(f"ffn: run {name} is {done}", file=sys.stderr)
        for what, link in kfp.links(server, run):
            print(f"ffn: {what:<7} {link}", file=sys.stderr)
        if not given.watch:
            return 0
        return kfp.follow(server, run["run_id"], hours=given.hours, cancel_on_exit=given.cancel_on_exit)

    return kfp.told(work)


def watch(given: argparse.Namespace) -> int:
    """Follow a run to its end: 0 it succeeded, 1 failed, 3 cancelled, 4 not done in time, 5 unreachable, 6 we are refused.

    Ctrl-C leaves it running.
    """
    from pipeline import submit as kfp
    from pipeline.server import Server

    server = Server.from_environment()

    def work() -> int:
        run = kfp.run_id(server, given.run, given.experiment)
        for what, link in kfp.links(server, server.get(f"runs/{run}")):
            print(f"ffn: {what:<7} {link}", file=sys.stderr)
        return kfp.follow(server, run, hours=given.hours, cancel_on_exit=given.cancel_on_exit)

    return kfp.told(work)


def schedule(given: argparse.Namespace) -> int:
    """Put a compiled pipeline on a schedule; the same command again changes nothing, another one replaces it."""
    from pipeline import submit as kfp
    from pipeline.server import Server

    server = Server.from_environment()
    pipeline = kfp.load(given.pipeline, _inputs(given), allow_tag=given.allow_tag)

    def work() -> int:
        made, done = kfp.schedule(
            server, pipeline, name=given.name, cron=given.cron, experiment=given.experiment, account=_account()
        )
        print(made["recurring_run_id"], flush=True)
        print(f"ffn: schedule {given.name} is {done}", file=sys.stderr)
        return 0

    return kfp.told(work)


def schedules(given: argparse.Namespace) -> int:
    """List the schedules of an experiment: name, cron expression (seconds first), state, id."""
    from pipeline import submit as kfp
    from pipeline.server import Server

    server = Server.from_environment()

    def work() -> int:
        for entry in kfp.schedules(server, given.experiment):
            cron = entry.get("trigger", {}).get("cron_schedule", {}).get("cron", "")
            print(f"{entry['display_name']:<24} {cron:<20} {entry.get('status', '').lower():<9} {entry['recurring_run_id']}")
        return 0

    return kfp.told(work)


def unschedule(given: argparse.Namespace) -> int:
    """Delete a schedule; the runs it made stay."""
    from pipeline import submit as kfp
    from pipeline.server import Server

    server = Server.from_environment()

    def work() -> int:
        if not kfp.unschedule(server, given.name, given.experiment):
            raise FFNError(f"no schedule {given.name} in experiment {given.experiment}")
        return 0

    return kfp.told(work)


def paper(given: argparse.Namespace) -> None:
    """Count the network of every row of the paper's tables, and print what the paper says beside it."""
    from ffn.paper import counts, markdown

    if not given.markdown:
        print(counts())
        return
    from ffn.data.store import publishing

    page = markdown()
    given.markdown.parent.mkdir(parents=True, exist_ok=True)
    with publishing(given.markdown) as partial:
        partial.write_text(page)
    print(given.markdown)


def synth(given: argparse.Namespace) -> None:
    """Write synthetic recordings in NTU's .skeleton format, with names that populate all four protocols."""
    from ffn.data.synth import write_ntu

    print(f"{given.folder}: {write_ntu(given.folder, repeats=given.repeats, seed=given.seed)} files")


def ingest(given: argparse.Namespace) -> None:
    """Read raw recordings (a folder or zip of .skeleton files, an MMAction2 pickle, NW-UCLA JSON, a table) into one set."""
    from components.storage import at_hand
    from ffn.data.ingest import ingest as read

    with at_hand(given.source) as source:
        print(read(source, given.out, space=given.space, progress=True).to_markdown())


def train(given: argparse.Namespace) -> None:
    """Train one stream of one protocol; interrupted, the same command goes on after the last complete epoch."""
    from ffn.data.store import SkeletonSet
    from ffn.training import train as fit
    from pipeline.local import workspace

    states = workspace(given.workspace).root / "checkpoints"
    out = fit(
        SkeletonSet.open(given.data), protocol=given.protocol, stream=given.stream,
        config=recipe(given.preset, given.set, given.seed), out=given.out, state_dir=states, processes=given.processes,
    )  # fmt: skip
    print(out)


def evaluate(given: argparse.Namespace) -> None:
    """Write a checkpoint's class probabilities of the held-out samples, and print the measures."""
    from ffn.data.store import SkeletonSet
    from ffn.evaluation import evaluate as score

    scores = score(SkeletonSet.open(given.data), given.checkpoint)
    scores.write(given.out)
    _measured(scores)


def fuse(given: argparse.Namespace) -> None:
    """Join scores by sample id into every fusion that the streams allow, and print the measures."""
    from components.fuse.step import fuse_all

    for scores in fuse_all(given.scores, given.out).values():
        _measured(scores)


def register(given: argparse.Namespace) -> None:
    """Register the fused model of these checkpoints in MLflow."""
    from pipeline.local import workspace

    os.environ.update(workspace(given.workspace).environment())
    from components.register.step import run as do

    do(data=given.data, checkpoints=given.checkpoints, fused=given.fused, name="", parent="")


def promote(given: argparse.Namespace) -> int:
    """Make a version champion if it is not worse; the champion before becomes `previous`. Exit status 1 where the gate holds it."""
    from pipeline.local import workspace
    from pipeline.promote import promote as move

    done, said = move(
        given.model, version=given.version, alias=given.alias, to=given.to, reason=given.reason, data=given.data,
        force=given.force, dry_run=given.dry_run, workspace=workspace(given.workspace),
    )  # fmt: skip
    print(said)
    return 0 if done else 1


def rollback(given: argparse.Namespace) -> None:
    """Swap `champion` and `previous`."""
    from pipeline.local import workspace
    from pipeline.promote import rollback as back

    print(back(given.model, workspace=workspace(given.workspace)))


def predict(given: argparse.Namespace) -> None:
    """Print the most probable classes of one recording, or of every window of a long one, by the champion or by checkpoints."""
    from pipeline import predict as model
    from pipeline.local import workspace

    if given.every is not None and given.every < 1:
        raise FFNError(f"--every {given.every}: expected at least 1 frame")
    fused = model.load(given.model, given.checkpoint, workspace(given.workspace))
    recording = model.read(given.file, fused)
    if given.every:
        for start, stop, name, probability in model.over_time(fused, recording, given.every):
            print(f"{start:6d} {stop:6d}  {100 * probability:5.1f} %  {name}")
        return
    for name, probability in model.top(fused, recording, given.top):
        print(f"{100 * probability:5.1f} %  {name}")


def export(given: argparse.Namespace) -> None:
    """Write a model as one file, preprocessing and fusion inside, that runs without this package (see docs/export.md)."""
    from ffn.export import export as write
    from pipeline.local import workspace
    from pipeline.predict import load

    fused = load(given.model, given.checkpoint, workspace(given.workspace))
    print(write(fused, given.out, format=given.format, clips=given.clips))


def version(given: argparse.Namespace) -> None:
    """Print the version, and in an image the commit that it was built from."""
    commit = os.environ.get("FFN_COMMIT")
    print(f"ffn {ffn.__version__}" + (f", commit {commit}" if commit else ""))


def health(given: argparse.Namespace) -> int:
    """Try what a step needs, one line each; exit status 1 where something fails."""
    from pipeline.health import examine

    found = examine()
    for name, works, said in found:
        print(f"{name:<8} {'ok' if works else 'FAILED':<6}  {said}")
    return 0 if all(works for _, works, _ in found) else 1


def _graph(added: argparse.ArgumentParser) -> None:
    added.add_argument(
        "--protocols", type=_names, default=NTU_PROTOCOLS, help=f"with commas between; default {','.join(NTU_PROTOCOLS)}"
    )
    added.add_argument("--streams", type=_streams, default=tuple(STREAMS), help=f"with commas between; default {','.join(STREAMS)}")
    added.add_argument(
        "--presets", "--preset", type=_names, default=("S4",), metavar="PRESETS",
        help=f"one, or several with commas between to compare them; of {', '.join(PRESETS)}; default S4",
    )  # fmt: skip
    added.add_argument(
        "--seeds", "--seed", type=_seeds, default=(0,), metavar="SEEDS", help="one, or several to compare; default 0"
    )


def _recipe(added: argparse.ArgumentParser) -> None:
    added.add_argument("--preset", default="S4", help=f"one of {', '.join(PRESETS)}; default S4")
    _settings(added)
    added.add_argument("--seed", type=int, default=0)


def _settings(added: argparse.ArgumentParser) -> None:
    added.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE", help="change one setting of the preset")


def _space(added: argparse.ArgumentParser) -> None:
    added.add_argument(
        "--space", choices=("3d", "2d"), default="3d", help="what to take from .skeleton files: metres or colour pixels"
    )


def _model(added: argparse.ArgumentParser) -> None:
    which = added.add_mutually_exclusive_group()
    which.add_argument("--model", default="", metavar="ffn-PROTOCOL", help="its champion; not needed where there is one model only")
    which.add_argument(
        "--checkpoint",
        type=Path,
        nargs="+",
        default=(),
        metavar="FOLDER",
        help="instead: a stream's checkpoint, or several to be fused",
    )


def _workspace(added: argparse.ArgumentParser) -> None:
    added.add_argument("--workspace", type=Path, help="where runs, models and states are kept; default FFN_WORKSPACE or .ffn")


def _submission(added: argparse.ArgumentParser) -> None:
    added.add_argument("pipeline", type=Path, metavar="PIPELINE.yaml", help="what `ffn compile` wrote")
    added.add_argument("--data", required=True, metavar="SOURCE", help="raw recordings, as the pod of ingest finds them")
    added.add_argument("--data-version", default="", help="names what lies there now: a date, a digest; another one is read anew")
    _space(added)
    _settings(added)
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


def _account() -> str:
    return os.environ.get("FFN_SERVICE_ACCOUNT", "ffn-pipeline")


def _names(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names:
        raise argparse.ArgumentTypeError("expected names with commas between")
    return names


def _streams(text: str) -> tuple[str, ...]:
    names = _names(text)
    unknown = [name for name in names if name not in STREAMS]
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown stream {', '.join(unknown)}; expected some of {', '.join(STREAMS)}")
    return names


def _seeds(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(name) for name in _names(text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected whole numbers with commas between") from None


def _measured(scores: "Scores") -> None:
    from ffn.scores import measure

    print(
        f"{scores.protocol}/{scores.stream}: "
        + "  ".join(f"{name} {value:.4f}" for name, value in measure(scores).to_dict().items())
    )


if __name__ == "__main__":
    sys.exit(main())
