"""`ffn model`: registered models, looked at and moved by a person."""

import argparse
from pathlib import Path

from pipeline.cli import options
from pipeline.cli.options import Verbs


def add(verbs: Verbs) -> None:
    """Add the verbs."""
    added = verbs.add(promote, "a version becomes champion, by hand, where the gate lets it")
    added.add_argument("--model", required=True, metavar="ffn-PROTOCOL")
    which = added.add_mutually_exclusive_group()
    which.add_argument("--version", default="")
    which.add_argument("--alias", default="challenger")
    added.add_argument("--to", default="champion", metavar="ALIAS", help="default champion; any other alias passes no gate")
    added.add_argument("--reason", default="by hand", help="kept as the version's tag promoted_because")
    added.add_argument("--data", type=Path, metavar="SET.arrow", help="recordings to measure a champion again on")
    added.add_argument("--force", action="store_true", help="do not ask the gate")
    added.add_argument("--dry-run", action="store_true", help="say what would happen, and change nothing")
    options.workspace(added)

    added = verbs.add(rollback, "the champion before becomes champion again")
    added.add_argument("--model", required=True, metavar="ffn-PROTOCOL")
    options.workspace(added)


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
