"""Registered models, looked at and moved by a person: with the same gate and the same moves as the pipeline's steps.

A version is named as MLflow names it: `ffn-ntu60-xsub/3`, `ffn-ntu60-xsub@champion`, either with `models:/` before it; a candidate
`ffn-ntu60-xsub-candidates/3`.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from components import registry, tracking
from components.gate.step import Verdict, decide, identity
from components.notify import notify
from components.promote.step import promote as move
from components.promote.step import require_unmoved
from components.promote.step import rollback as back
from components.registry import CANDIDATE, CANDIDATES, DIGEST, Version
from ffn.errors import FFNError
from pipeline.local import Workspace
from pipeline.settings import policy

OURS = "ffn-"
"""How the names of the pipeline's models begin; others may share the registry."""

COLUMNS = ("version", "aliases", "gate", "protocol", "preset", "top1", "data", "run", "commit", "registered (UTC)")
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
    found = {name: registry.history(name, known[name]) for name in names}
    return {name: versions for name, versions in found.items() if versions or model}


def table(models: Mapping[str, Sequence[Version]]) -> str:
    """A line per version below the name of its model; all models' columns line up."""
    lines = columns([COLUMNS, *(_line(version) for found in models.values() for version in found)], right={0, 5})
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
            **{name: version.tags.get(name) for name in ("protocol", "preset", "data_digest", "run", "gate", CANDIDATE, DIGEST)},
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
    """Make the candidate `named`, of a model alone its challenger, champion; whether it was done, and what happened.

    The gate decides unless `force` says no: as it did when a run asked it, or, given `data`, anew on these recordings. Any alias
    but `champion` just moves, of any version. A `dry_run` says what would happen and changes nothing.
    Raises `FFNError` where there is no such version, and where the champion is not the one that the gate compared with.
    """
    os.environ.update(workspace.environment())
    alone = "/" not in named.removeprefix("models:/") and "@" not in named
    found = registry.find(registry.candidates(named) if alone else named, alias="challenger")
    what = f"{found.name} version {found.number}"
    if to != "champion":
        if not dry_run:
            registry.point(found, to)
        return True, f"{what} {'would be' if dry_run else 'is'} {to}"
    if not found.name.endswith(CANDIDATES):
        raise FFNError(
            f"{found.called}: a version of {found.name} has been approved before; candidates are promoted"
            f" ({registry.candidates(found.name)}/NUMBER), and `ffn model rollback {found.name}` goes back"
        )
    champion = registry.champion(found.champions)
    if champion and champion.tags.get(CANDIDATE) == found.called:
        return True, f"{what} is champion already"
    if force:
        asked = {"digest": found.tags.get(DIGEST, ""), "champion": identity(champion)}
        verdict: Verdict | None = Verdict(promote=True, reason="the gate was not asked", **asked)
    else:
        verdict = decide(found, champion, data, policy()) if data else Verdict.of(found)
    if not verdict:
        raise FFNError(f"{found.called}: no gate has measured it yet; --data SET.arrow lets it, --force promotes it all the same")
    if not verdict.promote:
        return False, f"{what} is held: {verdict.reason}; --force promotes it all the same"
    require_unmoved(found, verdict, champion)
    if dry_run:
        return True, f"{what} would be champion: {verdict.reason}"
    said = f"{move(found, verdict, reason)}: {verdict.reason}"
    notify(said)
    return True, said


@registry.asked_by_a_person()
def rollback(model: str, *, workspace: Workspace) -> str:
    """Make the version before the champion champion again; returns what happened. Raises `FFNError` where there is none."""
    os.environ.update(workspace.environment())
    registry.require_model(model, registry.models())
    said = back(model)
    notify(said)
    return said


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
        f"candidate {tags[CANDIDATE].rpartition('/')[2]}" if tags.get(CANDIDATE) else tags.get("gate") or UNKNOWN,
        tags.get("protocol") or UNKNOWN,
        tags.get("preset") or UNKNOWN,
        f"{100 * float(tags['top1']):.2f} %" if "top1" in tags else UNKNOWN,
        tags.get("data_digest") or UNKNOWN,
        tags.get("run") or UNKNOWN,
        commit(tags.get("git_commit", "")) or UNKNOWN,
        f"{version.registered:%Y-%m-%d %H:%M}" if version.registered else UNKNOWN,
    )
