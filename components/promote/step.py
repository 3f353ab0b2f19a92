"""Promote: the aliases `champion` and `previous` move; the same code serves the pipeline and a person."""

from datetime import UTC, datetime

from components import registry, say, step
from components.registry import Version
from ffn.errors import FFNError


@step
def run(*, model: str) -> None:
    """Make the version `model` (`models:/NAME/NUMBER`) champion."""
    version = registry.at(model)
    say(promote(version, version.tags.get("gate_reason", "")))


def promote(version: Version, reason: str) -> str:
    """`version` becomes `champion`, the one before it `previous`; done twice it is done once. Returns what happened.

    The alias `champion` moves last: what a kill cuts off before, the next attempt does.
    """
    champion = registry.version(version.name, alias="champion")
    if champion and champion.number == version.number:
        return f"{version.name} version {version.number} is champion already"
    registry.mark(version, {"promoted": _now(), "promoted_because": reason, "rolled_back": ""})
    if champion:
        registry.point(champion, "previous")
    registry.point(version, "champion")
    return f"{version.name} version {version.number} is champion" + (f", version {champion.number} previous" if champion else "")


def rollback(name: str) -> str:
    """`champion` goes back to `previous`, and `previous` names the one rolled back. Raises `FFNError` where there is none.

    Two aliases cannot move at once: the tag `instead_of` tells the next attempt which version a kill kept from `previous`.
    """
    champion, previous = (registry.version(name, alias=alias) for alias in ("champion", "previous"))
    if not champion:
        raise FFNError(f"{name}: no champion; registered models: {', '.join(registry.registered()) or '(none)'}")
    if previous and previous.number == champion.number and (number := champion.tags.get("instead_of")):
        champion = registry.version(name, number=number) or champion
    if not previous or previous.number == champion.number:
        raise FFNError(f"{name}: champion is version {champion.number} and there is no previous one to go back to")
    registry.mark(champion, {"rolled_back": _now()})
    registry.mark(previous, {"rolled_back": "", "instead_of": champion.number})
    registry.point(previous, "champion")
    registry.point(champion, "previous")
    return f"{name} version {previous.number} is champion again, version {champion.number} previous"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
