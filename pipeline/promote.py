"""Promotion and rollback by hand: the same gate and the same moves as the pipeline's steps."""

import os
from pathlib import Path

from pipeline.local import Workspace


def promote(
    model: str,
    *,
    version: str = "",
    alias: str = "challenger",
    to: str = "champion",
    reason: str = "by hand",
    data: Path | None = None,
    force: bool = False,
    dry_run: bool = False,
    workspace: Workspace,
) -> tuple[bool, str]:
    """Make `version` of `model`, or the one that `alias` names, what `to` names; whether it was done, and what happened.

    On the way to `champion` the gate decides unless `force` says no; where the champion was measured on other recordings it
    is measured again on `data`. Any other alias just moves. A `dry_run` says what would happen and changes nothing.
    """
    os.environ.update(workspace.environment())
    from components import tracking
    from components.gate.step import decide
    from components.promote.step import promote as move
    from ffn.errors import FFNError

    found = tracking.version(model, number=version) if version else tracking.version(model, alias=alias)
    if not found:
        asked = f"version {version}" if version else f"alias {alias}"
        raise FFNError(f"{model}: no {asked}; registered models: {', '.join(tracking.registered()) or '(none)'}")
    what = f"{model} version {found.number}"
    if to != "champion":
        if not dry_run:
            tracking.point(found, to)
        return True, f"{what} {'would be' if dry_run else 'is'} {to}"
    champion = tracking.version(model, alias="champion")
    if champion and champion.number == found.number:
        return True, f"{what} is champion already"
    verdict, why = ("promote", "the gate was not asked") if force else decide(found, champion, data)
    if verdict != "promote":
        return False, f"{what} is held: {why}; --force promotes it all the same"
    if dry_run:
        return True, f"{what} would be champion: {why}"
    tracking.mark(found, {"gate": verdict, "gate_reason": why})
    return True, f"{move(found, reason)}: {why}"


def rollback(model: str, *, workspace: Workspace) -> str:
    """Make the version before the champion champion again; returns what happened."""
    os.environ.update(workspace.environment())
    from components.promote.step import rollback as back

    return back(model)
