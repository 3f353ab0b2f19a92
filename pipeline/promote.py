"""Promotion and rollback by hand: the same code as the pipeline's step."""

import os

from pipeline.local import Workspace


def promote(model: str, *, version: str = "", alias: str = "challenger", reason: str = "by hand", workspace: Workspace) -> str:
    """Make a version of `model` champion, without asking the gate; returns what happened."""
    os.environ.update(workspace.environment())
    from components import tracking
    from components.promote.step import promote as move
    from ffn.errors import FFNError

    found = tracking.version(model, number=version) if version else tracking.version(model, alias=alias)
    if not found:
        asked = f"version {version}" if version else f"alias {alias}"
        raise FFNError(f"{model}: no {asked}; registered models: {', '.join(tracking.registered()) or '(none)'}")
    return move(found, reason)


def rollback(model: str, *, workspace: Workspace) -> str:
    """Make the version before the champion champion again; returns what happened."""
    os.environ.update(workspace.environment())
    from components.promote.step import rollback as back

    return back(model)
