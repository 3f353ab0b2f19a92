"""What the verbs of all groups share: how one is added, and the options that several of them take."""

import argparse
import contextlib
import os
from collections.abc import Callable
from pathlib import Path

from ffn.config import PRESETS, STREAMS
from ffn.protocols import NTU_PROTOCOLS


class Verbs:
    """The verbs of a parser: functions of the parsed arguments, each called as it is named, its docstring the description."""

    def __init__(self, parser: argparse.ArgumentParser, share: Callable[[argparse.ArgumentParser], None] | None = None) -> None:
        self._verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB")
        self._share = share

    def add(self, function: Callable[[argparse.Namespace], int | None], help: str, *, name: str = "") -> argparse.ArgumentParser:
        added = self._verbs.add_parser(name or function.__name__, help=help, description=function.__doc__)
        added.set_defaults(verb=function)
        if self._share:
            self._share(added)
        return added

    def group(self, name: str, help: str, share: Callable[[argparse.ArgumentParser], None] | None = None) -> "Verbs":
        """A verb that has verbs of its own; `share` adds the options that all of them take."""
        return Verbs(self._verbs.add_parser(name, help=help, description=help), share)


def graph(added: argparse.ArgumentParser) -> None:
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


def recipe(added: argparse.ArgumentParser) -> None:
    added.add_argument("--preset", default="S4", help=f"one of {', '.join(PRESETS)}; default S4")
    settings(added)
    added.add_argument("--seed", type=int, default=0)


def settings(added: argparse.ArgumentParser) -> None:
    added.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE", help="change one setting of the preset")


def space(added: argparse.ArgumentParser) -> None:
    added.add_argument(
        "--space", choices=("3d", "2d"), default="3d", help="what to take from .skeleton files: metres or colour pixels"
    )


def model(added: argparse.ArgumentParser) -> None:
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


def workspace(added: argparse.ArgumentParser) -> None:
    added.add_argument("--workspace", type=Path, help="where runs, models and states are kept; default FFN_WORKSPACE or .ffn")


def cluster(added: argparse.ArgumentParser) -> None:
    added.add_argument(
        "--cluster", type=Path, metavar="FILE",
        help="its addresses and settings (cluster/example.yaml); default FFN_CLUSTER, or else the environment alone",
    )  # fmt: skip


def cluster_models(added: argparse.ArgumentParser) -> None:
    added.add_argument(
        "--cluster",
        type=Path,
        metavar="FILE",
        help="where MLflow is, and its settings; default FFN_CLUSTER, or else the environment",
    )
    added.set_defaults(from_here=True)


def applied(given: argparse.Namespace) -> contextlib.AbstractContextManager[None]:
    """Inside the block the environment says what the cluster's file does, of a verb that takes one."""
    named = getattr(given, "cluster", None) or ("cluster" in given and os.environ.get("FFN_CLUSTER"))
    if not named:
        return contextlib.nullcontext()
    from pipeline import clusterfile

    return clusterfile.applied(Path(named), from_here=getattr(given, "from_here", False))


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
