"""Registered models, looked at and moved by a person: with the same gate and the same moves as the pipeline's steps.

A version is named as MLflow names it: `ffn-ntu60-xsub/3`, `ffn-ntu60-xsub@champion`, either with `models:/` before it.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from components import registry, tracking
from components.gate.step import decide
from components.promote.step import promote as move
from components.promote.step import rollback as back
from components.registry import Version
from pipeline.local import Workspace

OURS = "ffn-"
"""How the names of the pipeline's models begin; others may share the registry."""

COLUMNS = ("version", "aliases", "protocol", "preset", "top1", "data", "run", "commit", "registered (UTC)")
COMMIT_DIGITS = 7
UNKNOWN = "-"


@registry.asked_by_a_person()
def versions(model: str = "", *, workspace: Workspace) -> dict[str, list[Version]]:
    """Model -> its versions, newest first: those of `model`, or of every model of the pipeline's.

    Raises `FFNError` where no model is called `model`.
    """
    os.environ.update(workspace.environment())
    known = registry.models()
    if model:
        registry.require_model(model, known)
    names = [model] if model else sorted(name for name in known if name.startswith(OURS))
    return {name: registry.history(name, known[name]) for name in names}


def table(models: Mapping[str, Sequence[Version]]) -> str:
    """A line per version below the name of its model; all models' columns line up."""
    lines = columns([COLUMNS, *(_line(version) for found in models.values() for version in found)], right={0, 4})
    heading, rest = lines[0], iter(lines[1:])
    return "\n\n".join("\n".join([name, f"  {heading}", *(f"  {next(rest)}" for _ in found)]) for name, found in models.items())


def records(models: Mapping[str, Iterable[Version]]) -> list[dict[str, object]]:
    """A JSON object per version: what `table` says, whole, and all that is known of where the version comes from."""
    return [
        {
            "model": version.name,
            "version": int(version.number),
            "uri": version.uri,
            "aliases": list(version.aliases),
            **{name: version.tags.get(name) for name in ("protocol", "preset", "data_digest", "run")},
            "top1": float(version.tags["top1"]) if "top1" in version.tags else None,
            "registered": version.registered.isoformat(timespec="seconds") if version.registered else None,
            **{name: version.tags.get(name) for name in (*tracking.LINEAGE, "mlflow_run") if name != "data_digest"},
        }
        for found in models.values()
        for version in found
    ]


@registry.asked_by_a_person()
def promote(
    named: str,
    *,
    to: str = "champion",
    reason: str = "by hand",
    data: Path | None = None,
    force: bool = False,
    dry_run: bool = False,
    workspace: Workspace,
) -> tuple[bool, str]:
    """Make the version `named`, of a model alone its challenger, what `to` names; whether it was done, and what happened.

    On the way to `champion` the gate decides unless `force` says no; where the champion was measured on other recordings it
    is measured again on `data`. Any other alias just moves. A `dry_run` says what would happen and changes nothing.
    Raises `FFNError` where there is no such version.
    """
    os.environ.update(workspace.environment())
    found = registry.find(named, alias="challenger")
    what = f"{found.name} version {found.number}"
    if to != "champion":
        if not dry_run:
            registry.point(found, to)
        return True, f"{what} {'would be' if dry_run else 'is'} {to}"
    champion = registry.version(found.name, alias="champion")
    if champion and champion.number == found.number:
        return True, f"{what} is champion already"
    verdict, why = ("promote", "the gate was not asked") if force else decide(found, champion, data)
    if verdict != "promote":
        return False, f"{what} is held: {why}; --force promotes it all the same"
    if dry_run:
        return True, f"{what} would be champion: {why}"
    registry.mark(found, {"gate": verdict, "gate_reason": why})
    return True, f"{move(found, reason)}: {why}"


@registry.asked_by_a_person()
def rollback(model: str, *, workspace: Workspace) -> str:
    """Make the version before the champion champion again; returns what happened. Raises `FFNError` where there is none."""
    os.environ.update(workspace.environment())
    registry.require_model(model, registry.models())
    return back(model)


def commit(text: str) -> str:
    """A commit as people write it: seven digits, and `-dirty` where the code was changed since."""
    digits, dash, changed = text.partition("-")
    return digits[:COMMIT_DIGITS] + dash + changed


def columns(rows: Sequence[Sequence[str]], right: Iterable[int] = ()) -> list[str]:
    """Each row as a line, its cells as wide as the widest of their column, those of `right` to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligns = [str.rjust if number in set(right) else str.ljust for number in range(len(widths))]
    return ["  ".join(align(cell, width) for align, cell, width in zip(aligns, row, widths, strict=True)).rstrip() for row in rows]


def _line(version: Version) -> Sequence[str]:
    tags = version.tags
    return (
        version.number,
        " ".join(version.aliases) or UNKNOWN,
        tags.get("protocol") or UNKNOWN,
        tags.get("preset") or UNKNOWN,
        f"{100 * float(tags['top1']):.2f} %" if "top1" in tags else UNKNOWN,
        tags.get("data_digest") or UNKNOWN,
        tags.get("run") or UNKNOWN,
        commit(tags.get("git_commit", "")) or UNKNOWN,
        f"{version.registered:%Y-%m-%d %H:%M}" if version.registered else UNKNOWN,
    )
