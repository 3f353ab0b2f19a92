"""The gate's judgement, against a slow reference and SciPy's binomial test."""

from itertools import product
from typing import Any

import numpy as np
import pytest

from ffn.config import Policy
from ffn.errors import FFNError
from ffn.gate import chance, judge, right
from ffn.scores import Scores


def scores(answers: str, truth: str, classes: str = "ab") -> Scores:
    """Of samples whose true classes are `truth` and whose most probable ones are `answers`."""
    return Scores(
        ids=tuple(map(str, range(len(truth)))), labels=np.array([classes.index(one) for one in truth]),
        probabilities=np.eye(len(classes), dtype=np.float32)[[classes.index(one) for one in answers]], classes=tuple(classes),
        protocol="p", stream="2s", preset="S4", data_digest="d",
    )  # fmt: skip


def pair(both: int, won: int, lost: int, neither: int) -> tuple[Scores, Scores]:
    """Challenger and champion: samples that both get right, one alone, neither. All are of class a."""
    truth = "a" * (both + won + lost + neither)
    return (
        scores("a" * both + "a" * won + "b" * lost + "b" * neither, truth),
        scores("a" * both + "b" * won + "a" * lost + "b" * neither, truth),
    )


def test_chance_is_the_share_of_all_throws() -> None:
    for throws in range(9):
        counts = [sum(coins) for coins in product((0, 1), repeat=throws)]
        for heads in range(throws + 1):
            assert chance(heads, throws) == sum(count >= heads for count in counts) / len(counts)


@pytest.mark.parametrize(("heads", "throws"), [(12, 19), (7, 19), (230, 400), (5100, 10000)])
def test_chance_is_scipys(heads: int, throws: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    assert chance(heads, throws) == pytest.approx(stats.binomtest(heads, throws, alternative="greater").pvalue, rel=1e-9)


def test_the_reason_is_a_sentence_with_every_figure() -> None:
    assert judge(Policy(), *pair(295, 12, 7, 16), "champion version 3") == (
        True,
        "top1 93.03 % against 91.52 % of champion version 3: right where it was wrong on 12, wrong where it was right on 7 of 330,"
        " p = 0.18",
    )


@pytest.mark.parametrize(
    ("policy", "counts", "why"),
    [
        ({}, (50, 0, 0, 0), ""),
        ({}, (50, 5, 5, 0), ""),
        ({}, (50, 4, 5, 0), "worse than the champion"),
        ({}, (20, 2, 0, 28), "below the floor of 50.00 %"),
        ({"floor": 0.44}, (20, 2, 0, 28), ""),  # as much as the floor
        ({"margin": 0.02}, (90, 5, 4, 1), "worse than the champion and 2 points"),
        ({"margin": 0.01}, (90, 5, 4, 1), ""),
        ({"margin": -0.02}, (90, 2, 4, 4), ""),
        ({"margin": -0.02}, (90, 1, 4, 5), "worse than the champion by more than 2 points"),
        ({"margin": -0.5}, (90, 0, 5, 5), "significantly worse"),  # p = 1/32
        ({"margin": -0.5}, (90, 0, 4, 6), ""),  # p = 1/16
        ({"margin": -0.5, "significance": 0.1}, (90, 0, 4, 6), "significantly worse"),
        ({"margin": -0.5, "significance": 0}, (50, 0, 50, 0), ""),  # nothing is ever significant
    ],
)  # fmt: skip
def test_a_challenger_is_held_for(policy: dict[str, Any], counts: tuple[int, ...], why: str) -> None:
    promote, said = judge(Policy(**policy), *pair(*counts))
    assert (promote, said.partition("; ")[2]) == (not why, why)


def test_a_class_that_falls_is_named() -> None:
    truth = "a" * 80 + "b" * 20 + "c" * 3
    challenger = scores("a" * 80 + "b" * 10 + "a" * 10 + "a" * 3, truth, "abc")
    champion = scores("a" * 65 + "b" * 15 + "b" * 18 + "a" * 2 + "c" * 3, truth, "abc")
    promote, said = judge(Policy(), challenger, champion)
    assert not promote
    assert said.split("; ")[1:] == ["class 'b' falls from 90.00 % to 50.00 %, p = 0.0039"]  # of c too few to tell
    assert judge(Policy(class_drop=0.4), challenger, champion)[0]


def test_a_first_version_needs_the_floor() -> None:
    challenger, _ = pair(3, 0, 0, 4)
    assert judge(Policy(), challenger, None) == (False, "top1 42.86 %, there is no champion yet; below the floor of 50.00 %")
    assert judge(Policy(floor=0), challenger, None) == (True, "top1 42.86 %, there is no champion yet")


def test_the_verdict_is_the_slow_references() -> None:
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(200):
        truth, ours, theirs = ("".join(rng.choice(list("abc"), 40, p=p)) for p in ([0.6, 0.3, 0.1],) * 3)
        keep = rng.random((2, 40)) < rng.uniform(0.3, 1, (2, 1))
        ours, theirs = ("".join(np.where(kept, list(truth), list(said))) for kept, said in zip(keep, (ours, theirs), strict=True))
        policy = Policy(floor=0.6, margin=float(rng.choice([-0.2, 0, 0.1])), class_drop=0.3)
        promote, _ = judge(policy, scores(ours, truth, "abc"), scores(theirs, truth, "abc"))
        assert promote == slow(policy, ours, theirs, truth)
        seen.add(promote)
    assert seen == {True, False}


def slow(policy: Policy, ours: str, theirs: str, truth: str) -> bool:
    """The same rule, said over lists."""

    def outcomes(of: str) -> tuple[int, int, int]:
        rows = [(a == t, b == t) for a, b, t in zip(ours, theirs, truth, strict=True) if t in of]
        return len(rows), rows.count((True, False)), rows.count((False, True))

    def p(won: int, lost: int) -> float:
        return float(np.mean([sum(coins) >= lost for coins in product((0, 1), repeat=won + lost)])) if won + lost < 15 else (
            chance(lost, won + lost)
        )  # fmt: skip

    samples, won, lost = outcomes("abc")
    held = sum(a == t for a, t in zip(ours, truth, strict=True)) / samples < policy.floor
    held |= (won - lost) / samples < policy.margin - 1e-9
    held |= p(won, lost) < policy.significance
    for name in "abc":
        samples, won, lost = outcomes(name)
        held |= bool(samples) and (lost - won) / samples > policy.class_drop and p(won, lost) < policy.significance
    return not held


def test_other_samples_cannot_be_compared() -> None:
    one, other = pair(5, 0, 0, 5)[0], pair(6, 0, 0, 5)[0]
    with pytest.raises(FFNError, match="measured on other samples"):
        judge(Policy(), one, other)


def test_a_tie_is_the_lower_classs() -> None:
    tied = Scores(
        ids=("1", "2"), labels=np.array([0, 1]), probabilities=np.full((2, 2), 0.5, np.float32), classes=("a", "b"), protocol="p",
        stream="j", preset="S4", data_digest="d",
    )  # fmt: skip
    assert right(tied).tolist() == [True, False]


@pytest.mark.parametrize(
    "wrong", [{"floor": 50.0}, {"margin": -2.0}, {"significance": 0.6}, {"class_drop": -0.1}, {"floor": float("nan")}]
)
def test_a_policy_is_of_fractions(wrong: dict[str, float]) -> None:
    with pytest.raises(FFNError, match=f"gate: {next(iter(wrong))} is .*, expected a fraction"):
        Policy(**wrong)
