"""The gate's judgement: may a challenger take the champion's place? Both measured on the same held-out samples, sample by sample.

No torch. Whether two models can be compared at all (protocol, classes, joints) is the registry's to know: components/gate.
"""

import numpy as np
from numpy.typing import NDArray

from ffn.config import Policy
from ffn.errors import FFNError
from ffn.scores import Scores


def judge(policy: Policy, challenger: Scores, champion: Scores | None, called: str = "the champion") -> tuple[bool, str]:
    """Whether the challenger may become champion, and why (not). `called` names the champion in the words.

    The paired test is McNemar's, exact and one-sided: of the samples that only one of the two got right, as many or more lost by
    chance, if each were won or lost by a coin. Source: McNemar 1947.
    Raises `FFNError` where the two were not measured on the same samples.
    """
    ours = right(challenger)
    top1 = float(ours.mean())
    low = [f"below the floor of {_percent(policy.floor)}"] if top1 < policy.floor else []
    if champion is None:
        return not low, "; ".join([f"top1 {_percent(top1)}, there is no champion yet", *low])
    if (challenger.ids, challenger.classes) != (champion.ids, champion.classes) or (challenger.labels != champion.labels).any():
        raise FFNError("gate: challenger and champion were measured on other samples; measure both on one set")
    theirs = right(champion)
    won, lost = ours & ~theirs, theirs & ~ours
    more, less, count = int(won.sum()), int(lost.sum()), len(ours)
    said = (
        f"top1 {_percent(top1)} against {_percent(float(theirs.mean()))} of {called}: right where it was wrong on {more}, wrong"
        f" where it was right on {less} of {count}, p = {chance(max(more, less), more + less):.2g}"
    )
    against = list(low)
    if more - less < policy.margin * count - 1e-9:
        against.append("worse than the champion" + (f" {_points(policy.margin)}" if policy.margin else ""))
    if chance(less, more + less) < policy.significance:
        against.append("significantly worse")
    for number, name in enumerate(challenger.classes):
        of = challenger.labels == number
        gained, fell, samples = int((won & of).sum()), int((lost & of).sum()), int(of.sum())
        p = chance(fell, gained + fell)
        if samples and (fell - gained) / samples > policy.class_drop and p < policy.significance:
            before, after = (_percent(float(one[of].mean())) for one in (theirs, ours))
            against.append(f"class {name!r} falls from {before} to {after}, p = {p:.2g}")
    return not against, "; ".join([said, *against])


def right(scores: Scores) -> NDArray[np.bool_]:
    """(N,) whether the most probable class is the true one; of a tie the lower class number."""
    return np.asarray(scores.probabilities.argmax(1) == scores.labels)


def chance(heads: int, throws: int) -> float:
    """How probable `heads` or more are in so many throws of a coin, exactly: 1 without a throw."""
    term, total = 1, 0  # of k heads from the top: `throws` over k
    for k in range(throws, heads - 1, -1):
        total += term
        term = term * k // (throws - k + 1)
    return float(total / 2**throws)


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.2f} %"


def _points(margin: float) -> str:
    return f"and {100 * margin:g} points" if margin > 0 else f"by more than {-100 * margin:g} points"
