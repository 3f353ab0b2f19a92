"""Promote: a candidate becomes champion; the same code serves the pipeline and a person.

A champion is a version of a model that steps may not write, made by whoever promotes. Of several that are made at the same time to
take one champion's place the one with the lowest number does: MLflow gives each number once, in the order in which versions are
made, so all of them see the same first. The alias `champion` moves last: what a kill cuts off before, the next attempt does.
"""

import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path

from components import registry, say, step
from components.gate.step import NONE, Verdict, identity
from components.notify import notify
from components.registry import CANDIDATE, DIGEST, REPLACES, ROLLED_BACK, Version
from ffn.errors import FFNError

PATIENCE = timedelta(minutes=10)
"""A promotion that has not moved the alias after this died on its way, and is not waited for."""

INSTEAD_OF = "instead_of"
"""Tag of a champion that came back: the version that was rolled back for it."""


@step
def run(*, model: str) -> None:
    """Make the version `model` (`models:/NAME/NUMBER`) champion, as its gate said."""
    candidate = registry.at(model)
    verdict = Verdict.of(candidate)
    if not (verdict and verdict.promote):
        raise FFNError(f"{candidate.called}: no gate let it through; a new run asks the gate")
    said = promote(candidate, verdict, verdict.reason)
    say(said)
    notify(said)


def promote(candidate: Version, verdict: Verdict, reason: str) -> str:
    """`candidate` takes the place of the champion that `verdict` names, which becomes `previous`. Returns what happened.

    Done twice it is done once. Raises `FFNError`, and leaves everything as it was, where there is another champion by now, where
    another candidate is being promoted, or where the candidate's files are not those of the verdict.
    """
    if (champion := registry.champion(candidate.champions)) and _is(candidate, champion):
        return f"{candidate.champions} version {champion.number} is champion already: {candidate.called}"
    require_unmoved(candidate, verdict, champion)
    with tempfile.TemporaryDirectory() as scratch:
        found = registry.fetch(candidate, Path(scratch))
    if found != verdict.digest:
        raise FFNError(
            f"{candidate.called}: its files have changed since the gate measured them: digest {found}, expected {verdict.digest}"
        )
    return approve(candidate, verdict, reason)


def approve(candidate: Version, verdict: Verdict, reason: str) -> str:
    """What `promote` does once the candidate's files have been looked at."""
    place = verdict.champion.partition(" ")[0]
    ours = _unfinished(candidate, verdict, place) or registry.copy(
        candidate,
        {
            DIGEST: verdict.digest, CANDIDATE: candidate.called, REPLACES: place, ROLLED_BACK: "", INSTEAD_OF: "",
            "promoted": _now(), "promoted_because": reason, **verdict.tags,
        },
    )  # fmt: skip
    first = next((one for one in registry.rivals(ours.name, place) if _age(one, ours) < PATIENCE), ours)
    champion = registry.champion(ours.name)
    done = champion is not None and _is(candidate, champion)
    if first.number != ours.number or not (done or identity(champion) == verdict.champion):
        registry.withdraw(ours)
    if champion and done:
        return f"{ours.name} version {champion.number} is champion already: {candidate.called}"
    require_unmoved(candidate, verdict, champion)
    if not _of(verdict, candidate, first):
        raise FFNError(
            f"{ours.name}: {first.tags[CANDIDATE]} is being promoted at this moment, as version {first.number}; {_again(candidate)}"
        )
    if champion:
        registry.point(champion, "previous")
    registry.point(first, "champion")
    before = f", version {champion.number} previous" if champion else ""
    return f"{ours.name} version {first.number} is champion: {candidate.called}{before}"


def rollback(name: str) -> str:
    """`champion` goes back to `previous`, and `previous` names the one rolled back. Raises `FFNError` where there is none.

    Two aliases cannot move at once: the tag `instead_of` tells the next attempt which version a kill kept from `previous`.
    """
    champion, previous = (registry.version(name, alias=alias) for alias in ("champion", "previous"))
    if not champion:
        raise FFNError(f"{name}: no champion; registered models: {', '.join(registry.registered()) or '(none)'}")
    if previous and previous.number == champion.number and (number := champion.tags.get(INSTEAD_OF)):
        champion = registry.version(name, number=number) or champion
    if not previous or previous.number == champion.number:
        raise FFNError(f"{name}: champion is version {champion.number} and there is no previous one to go back to")
    registry.mark(champion, {ROLLED_BACK: _now()})
    registry.mark(previous, {ROLLED_BACK: "", INSTEAD_OF: champion.number})
    registry.point(previous, "champion")
    registry.point(champion, "previous")
    return f"{name} version {previous.number} is champion again, version {champion.number} previous"


def _unfinished(candidate: Version, verdict: Verdict, place: str) -> Version | None:
    """What an attempt a moment ago left of this very promotion."""
    found = [one for one in registry.rivals(candidate.champions, place) if _of(verdict, candidate, one)]
    return next((one for one in found if one.registered and datetime.now(UTC) - one.registered < PATIENCE), None)


def require_unmoved(candidate: Version, verdict: Verdict, champion: Version | None) -> None:
    """Raise `FFNError` where the champion is not the one that the verdict compared with."""
    if identity(champion) == verdict.champion:
        return
    now = f"champion is version {champion.number} now" if champion else "there is no champion now"
    place = verdict.champion.partition(" ")[0]
    if champion and place == champion.number:
        now = f"champion version {place} has another digest now"
    then = "there was none" if place == NONE else f"it was version {place}"
    raise FFNError(f"{candidate.champions}: {now}, when the gate compared {then}; {_again(candidate)}")


def _again(candidate: Version) -> str:
    return f"ask the gate again with `ffn model promote {candidate.called} --data SET.arrow`, or by a new run"


def _is(candidate: Version, version: Version) -> bool:
    return version.tags.get(CANDIDATE) == candidate.called


def _of(verdict: Verdict, candidate: Version, version: Version) -> bool:
    """Whether the version is the candidate as it was judged."""
    return _is(candidate, version) and version.tags.get(DIGEST) == verdict.digest


def _age(version: Version, beside: Version) -> timedelta:
    """How much older than the other one it is, by the server's clock."""
    return (beside.registered - version.registered) if version.registered and beside.registered else timedelta()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
