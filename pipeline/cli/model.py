"""`ffn model`: registered models, looked at and moved by a person."""

import argparse
import json
from pathlib import Path

from pipeline.cli import options
from pipeline.cli.options import Verbs

VERSION = "ffn-PROTOCOL[-candidates]/NUMBER or ...@ALIAS"


def add(verbs: Verbs) -> None:
    """Add the verbs."""
    added = verbs.add(list_, "every version: aliases, accuracy, where it comes from", name="list")
    added.add_argument("model", nargs="?", default="", metavar="ffn-PROTOCOL", help="of this model alone")
    added.add_argument("--json", action="store_true", help="the same for programs, as a list of objects")
    options.workspace(added)

    added = verbs.add(diff, "what changed between two versions: code, data, settings, accuracy, classes, packages")
    for name in ("A", "B"):
        added.add_argument(name.lower(), metavar=name, help=VERSION)
    options.workspace(added)

    added = verbs.add(promote, "a candidate becomes champion, by hand, where the gate lets it")
    added.add_argument("version", metavar="VERSION", help="ffn-PROTOCOL-candidates/NUMBER; ffn-PROTOCOL alone is its challenger")
    added.add_argument("--to", default="champion", metavar="ALIAS", help="default champion; any other alias passes no gate")
    added.add_argument("--reason", default="by hand", help="kept as the version's tag promoted_because")
    added.add_argument("--data", type=Path, metavar="SET.arrow", help="recordings to measure challenger and champion on, now")
    added.add_argument("--force", action="store_true", help="do not ask the gate")
    added.add_argument("--dry-run", action="store_true", help="say what would happen, and change nothing")
    options.workspace(added)

    added = verbs.add(rollback, "the champion before becomes champion again")
    added.add_argument("model", metavar="ffn-PROTOCOL")
    options.workspace(added)


def list_(given: argparse.Namespace) -> None:
    """List the versions of the registered models, newest first."""
    from pipeline import models
    from pipeline.local import workspace

    here = workspace(given.workspace)
    found = models.versions(given.model, workspace=here)
    if given.json:
        print(json.dumps(models.records(found), indent=1))
    else:
        print(models.table(found) or f"no models registered in {here.tracking_uri}; `ffn run` makes some")


def diff(given: argparse.Namespace) -> None:
    """Show what differs between two versions, and name what is the same."""
    from pipeline.difference import diff as compare
    from pipeline.local import workspace

    print(compare(given.a, given.b, workspace=workspace(given.workspace)))


def promote(given: argparse.Namespace) -> int:
    """Make a candidate champion if the gate lets it; the champion before becomes `previous`. Exit status 1 where it is held."""
    from pipeline.local import workspace
    from pipeline.models import promote as move

    done, said = move(
        given.version, to=given.to, reason=given.reason, data=given.data,
        force=given.force, dry_run=given.dry_run, workspace=workspace(given.workspace),
    )  # fmt: skip
    print(said)
    return 0 if done else 1


def rollback(given: argparse.Namespace) -> None:
    """Swap `champion` and `previous`."""
    from pipeline.local import workspace
    from pipeline.models import rollback as back

    print(back(given.model, workspace=workspace(given.workspace)))
