"""The command line: `ffn run` for the whole pipeline, one verb per step for one step on paths.

Imports stay inside the verbs, so that `ffn --help` is instant and `ffn compile` never loads torch.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ffn.config import PRESETS, STREAMS, preset, recipe
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
    added.add_argument("--data", type=Path, required=True, metavar="SOURCE", help="raw recordings: a folder, zip or pickle")
    _settings(added)
    _space(added)
    added.add_argument(
        "--name", default="", help="name of the run; by default derived from its inputs, so that it is taken up again"
    )
    _workspace(added)

    added = verb(compile, "the pipeline as YAML for a cluster")
    _graph(added)
    added.add_argument("--out", type=Path, default=Path("pipeline.yaml"))
    added.add_argument("--picture", type=Path, metavar="SVG", help="draw the compiled pipeline too (needs graphviz)")

    added = verb(paper, "the paper's rows: parameters and operations, ours beside the paper's")
    added.add_argument("--markdown", type=Path, metavar="FILE", help="write the whole page, docs/paper.md, instead")

    added = verb(synth, "write synthetic NTU recordings")
    added.add_argument("folder", type=Path)
    added.add_argument("--repeats", type=int, default=10, help="performances of each action; three files each")
    added.add_argument("--seed", type=int, default=0)

    added = verb(ingest, "raw recordings -> one skeleton set")
    added.add_argument("source", type=Path)
    added.add_argument("--out", type=Path, required=True, metavar="SET.arrow")
    _space(added)

    added = verb(train, "one stream of one protocol -> a checkpoint folder")
    added.add_argument("--data", type=Path, required=True, metavar="SET.arrow")
    added.add_argument("--protocol", required=True)
    added.add_argument("--stream", choices=list(STREAMS), required=True)
    _recipe(added)
    added.add_argument("--out", type=Path, required=True, metavar="FOLDER")
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

    added = verb(promote, "a version becomes champion, by hand")
    added.add_argument("--model", required=True, metavar="ffn-PROTOCOL")
    which = added.add_mutually_exclusive_group()
    which.add_argument("--version", default="")
    which.add_argument("--alias", default="challenger")
    added.add_argument("--reason", default="by hand")
    _workspace(added)

    added = verb(rollback, "the champion before becomes champion again")
    added.add_argument("--model", required=True, metavar="ffn-PROTOCOL")
    _workspace(added)

    added = verb(predict, "the top classes of one .skeleton file")
    added.add_argument("file", type=Path, metavar="FILE.skeleton")
    which = added.add_mutually_exclusive_group()
    which.add_argument("--model", default="", metavar="ffn-PROTOCOL", help="its champion; not needed where there is one model only")
    which.add_argument("--checkpoint", type=Path, metavar="FOLDER", help="one stream's checkpoint instead of a champion")
    added.add_argument("--top", type=int, default=5)
    _workspace(added)
    return root


def run(given: argparse.Namespace) -> int:
    """Run the whole pipeline on this machine. What was done before with the same inputs is not done again."""
    from pipeline import local

    here = local.workspace(given.workspace)
    try:
        name, table = local.run(
            source=given.data, protocols=given.protocols, streams=given.streams, presets=given.presets,
            seeds=given.seeds, overrides=given.set, space=given.space, name=given.name, workspace=here,
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
    from ffn.data.ingest import ingest as read

    print(read(given.source, given.out, space=given.space, progress=True).to_markdown())


def train(given: argparse.Namespace) -> None:
    """Train one stream of one protocol; interrupted, the same command goes on after the last complete epoch."""
    from ffn.data.store import SkeletonSet
    from ffn.training import train as fit
    from pipeline.local import workspace

    states = workspace(given.workspace).root / "checkpoints"
    out = fit(
        SkeletonSet.open(given.data), protocol=given.protocol, stream=given.stream,
        config=recipe(given.preset, given.set, given.seed), out=given.out, state_dir=states,
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


def promote(given: argparse.Namespace) -> None:
    """Make a version champion without asking the gate; the champion before becomes `previous`."""
    from pipeline.local import workspace
    from pipeline.promote import promote as move

    print(move(given.model, version=given.version, alias=given.alias, reason=given.reason, workspace=workspace(given.workspace)))


def rollback(given: argparse.Namespace) -> None:
    """Swap `champion` and `previous`."""
    from pipeline.local import workspace
    from pipeline.promote import rollback as back

    print(back(given.model, workspace=workspace(given.workspace)))


def predict(given: argparse.Namespace) -> None:
    """Print the most probable classes of one recording, by the champion or a checkpoint."""
    from pipeline.local import workspace
    from pipeline.predict import top

    for name, probability in top(
        given.file, model=given.model, checkpoint=given.checkpoint, count=given.top, workspace=workspace(given.workspace)
    ):
        print(f"{100 * probability:5.1f} %  {name}")


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


def _workspace(added: argparse.ArgumentParser) -> None:
    added.add_argument("--workspace", type=Path, help="where runs, models and states are kept; default FFN_WORKSPACE or .ffn")


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
