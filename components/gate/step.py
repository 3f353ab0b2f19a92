"""Gate: may the challenger become champion? Both are measured here, on the held-out samples of the same data."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from components import registry, say, skeletons, step
from components.registry import Version
from ffn.config import Policy
from ffn.data.store import SkeletonSet
from ffn.gate import judge
from ffn.scores import Scores

NONE = "none"
"""In place of a champion where there is none."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a gate said, of which files and against which champion."""

    promote: bool
    reason: str
    digest: str
    """Of the challenger's files, as they were measured."""
    champion: str
    """`identity` of the champion that it was compared with."""

    @classmethod
    def of(cls, version: Version) -> Self | None:
        """The verdict that is written on a version, None where none is."""
        said = [version.tags.get(name, "") for name in ("gate", "gate_reason", "gate_digest", "gate_champion")]
        if not (said[0] and said[2] and said[3]):
            return None
        return cls(promote=said[0] == "promote", reason=said[1], digest=said[2], champion=said[3])

    @property
    def word(self) -> str:
        return "promote" if self.promote else "hold"

    @property
    def tags(self) -> Mapping[str, str]:
        return {"gate": self.word, "gate_reason": self.reason, "gate_digest": self.digest, "gate_champion": self.champion}


@step
def run(*, model: str, data: Path, floor: float, margin: float, significance: float, class_drop: float) -> str:
    """`promote` or `hold` for the version `model`, by the `Policy` of these fractions; all that was found becomes its tags."""
    policy = Policy(floor=floor, margin=margin, significance=significance, class_drop=class_drop)
    challenger = registry.at(model)
    champion = registry.champion(challenger.champions)
    if champion and champion.tags.get(registry.CANDIDATE) == challenger.called:
        say("hold: it is the champion already")
        return "hold"
    verdict = decide(challenger, champion, data, policy)
    registry.mark(challenger, verdict.tags)
    say(f"{verdict.word}: {verdict.reason}")
    return verdict.word


def decide(challenger: Version, champion: Version | None, data: Path, policy: Policy) -> Verdict:
    """The verdict on the challenger; both are measured on `data`, unless they cannot be compared."""
    asked = {"digest": challenger.tags.get(registry.DIGEST, ""), "champion": identity(champion)}
    if why := objection(challenger, champion):
        return Verdict(promote=False, reason=why, **asked)
    called = f"champion version {champion.number}" if champion else ""
    with skeletons.opened(data, skeletons.held_out(challenger.tags["protocol"])) as held:
        promote, reason = judge(policy, scores(challenger, held), scores(champion, held) if champion else None, called)
    return Verdict(promote=promote, reason=reason, **asked)


def objection(challenger: Version, champion: Version | None) -> str:
    """Why the challenger is held without being measured; empty where there is no such reason."""
    back = [tag for copy in registry.copies(challenger) if (tag := copy.tags.get(registry.ROLLED_BACK))]
    if back:
        return f"it was rolled back by hand ({back[-1]}); promote it by hand, with --force"
    if champion and not champion.tags.get(registry.DIGEST):
        return f"champion version {champion.number} is of earlier days and carries no digest; promote by hand, with --force"
    if champion:
        for what in ("protocol", "layout", "layout_digest", "space", "classes_digest"):
            ours, theirs = challenger.tags.get(what), champion.tags.get(what)
            if ours != theirs:
                return f"not comparable with champion version {champion.number}: {what} {ours} against {theirs}"
    return ""


def identity(champion: Version | None) -> str:
    """`3 sha256:...`: a champion's number and the digest of its files; `none`."""
    return f"{champion.number} {champion.tags.get(registry.DIGEST, '')}".strip() if champion else NONE


def scores(version: Version, data: SkeletonSet) -> Scores:
    """A registered version on the held-out samples, streams fused as it was registered."""
    # Imported here: a version that is held unmeasured needs no torch.
    from ffn.evaluation import evaluate
    from ffn.fusion import fuse
    from ffn.inference import read_weights

    with registry.fused(version) as folder:
        weights = read_weights(folder)
        return fuse({stream: evaluate(data, folder / stream) for stream in weights}, weights, version.tags["fusion"])
