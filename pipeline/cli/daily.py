"""The verbs for this machine: the whole pipeline, one verb per step on paths, and what a trained model is for."""

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import ffn
from ffn.config import STREAMS, recipe
from ffn.errors import FFNError
from pipeline.cli import options
from pipeline.cli.options import Verbs

if TYPE_CHECKING:
    from ffn.scores import Scores


def add(verbs: Verbs) -> None:
    """Add them."""
    added = verbs.add(run, "the whole pipeline on this machine")
    options.graph(added)
    added.add_argument(
        "--data", required=True, metavar="SOURCE", help="raw recordings: a folder, zip or pickle, or s3://BUCKET/NAME of one"
    )
    options.settings(added)
    options.space(added)
    added.add_argument(
        "--name", default="", help="name of the run; by default derived from its inputs, so that it is taken up again"
    )
    options.workspace(added)

    added = verbs.add(paper, "the paper's rows: parameters and operations, ours beside the paper's")
    added.add_argument("--markdown", type=Path, metavar="FILE", help="write the whole page, docs/paper.md, instead")

    added = verbs.add(synth, "write synthetic NTU recordings")
    added.add_argument("folder", type=Path)
    added.add_argument("--repeats", type=int, default=10, help="performances of each action; three files each")
    added.add_argument("--seed", type=int, default=0)

    added = verbs.add(ingest, "raw recordings -> one skeleton set")
    added.add_argument("source", help="a folder, zip or pickle, or s3://BUCKET/NAME of one")
    added.add_argument("--out", type=Path, required=True, metavar="SET.arrow")
    options.space(added)

    added = verbs.add(train, "one stream of one protocol -> a checkpoint folder")
    added.add_argument("--data", type=Path, required=True, metavar="SET.arrow")
    added.add_argument("--protocol", required=True)
    added.add_argument("--stream", choices=list(STREAMS), required=True)
    options.recipe(added)
    added.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    added.add_argument("--processes", type=int, help="share every batch among so many; default FFN_PROCESSES or one for every GPU")
    options.workspace(added)

    added = verbs.add(evaluate, "a checkpoint's scores of the held-out samples")
    added.add_argument("--data", type=Path, required=True, metavar="SET.arrow")
    added.add_argument("--checkpoint", type=Path, required=True, metavar="FOLDER")
    added.add_argument("--out", type=Path, required=True, metavar="SCORES.arrow")

    added = verbs.add(fuse, "scores of several streams -> fused scores")
    added.add_argument("scores", type=Path, nargs="+", metavar="SCORES.arrow")
    added.add_argument("--out", type=Path, required=True, metavar="FOLDER")

    added = verbs.add(register, "checkpoints and their fused scores -> a candidate in MLflow, alias challenger")
    added.add_argument("checkpoints", type=Path, nargs="+", metavar="CHECKPOINT")
    added.add_argument("--fused", type=Path, required=True, metavar="FOLDER", help="what `ffn fuse` wrote")
    added.add_argument("--data", type=Path, required=True, metavar="SET.arrow")
    options.workspace(added)

    added = verbs.add(predict, "the top classes of one .skeleton file")
    added.add_argument("file", type=Path, metavar="FILE.skeleton")
    options.model(added)
    which = added.add_mutually_exclusive_group()
    which.add_argument("--top", type=int, default=5)
    which.add_argument("--every", type=int, metavar="FRAMES", help="the top class of every window, one begun every so many frames")
    options.workspace(added)

    added = verbs.add(export, "a model as one file: ONNX, or a program of torch.export")
    options.model(added)
    added.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    added.add_argument("--format", choices=("onnx", "torch"), default="onnx")
    added.add_argument("--clips", type=int, default=1, help="clips per recording that are averaged; default 1, evaluation takes 10")
    options.workspace(added)

    verbs.add(version, "which ffn this is")
    verbs.add(health, "whether a step would find what it needs: device, scratch, MLflow, object store")


def run(given: argparse.Namespace) -> int:
    """Run the whole pipeline on this machine. What was done before with the same inputs is not done again."""
    from pipeline import local

    here = local.workspace(given.workspace)
    try:
        table = local.run(
            source=given.data, protocols=given.protocols, streams=given.streams, presets=given.presets,
            seeds=given.seeds, overrides=given.set, space=given.space, name=given.name, workspace=here,
        )  # fmt: skip
    except local.StepFailed as failure:
        print(f"ffn: error: {failure}", file=sys.stderr)
        return 2 if failure.status == 2 else 1
    print(f"\n{table}")
    if here.ui():
        print(f"which this command serves:\n\n    {here.ui()}\n")
    return 0


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

    do(data=given.data, checkpoints=given.checkpoints, fused=given.fused, parent="")


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


def _measured(scores: "Scores") -> None:
    from ffn.scores import measure

    print(
        f"{scores.protocol}/{scores.stream}: "
        + "  ".join(f"{name} {value:.4f}" for name, value in measure(scores).to_dict().items())
    )
