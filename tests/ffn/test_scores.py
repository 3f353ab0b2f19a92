"""Scores on disk, measures and fusion."""

from dataclasses import replace

import numpy as np
import pytest

from ffn.errors import FFNError
from ffn.fusion import fuse, fusions
from ffn.scores import Scores, measure


def make(stream="j", *, count=40, classes=4, seed=0) -> Scores:
    rng = np.random.default_rng(seed)
    p = rng.dirichlet(np.ones(classes), count).astype(np.float32)
    return Scores(
        ids=tuple(f"s{n}" for n in range(count)),
        labels=np.random.default_rng(9).integers(0, classes, count),
        probabilities=p,
        classes=tuple("abcdefgh"[:classes]),
        protocol="p",
        stream=stream,
        preset="S4",
        data_digest="d",
    )


def rows(scores: Scores, order) -> Scores:
    order = list(order)
    return replace(
        scores,
        ids=tuple(scores.ids[n] for n in order),
        labels=scores.labels[order],
        probabilities=scores.probabilities[order],
    )


def test_scores_survive_the_disk(tmp_path):
    scores = make()
    read = Scores.read(scores.write(tmp_path / "deep" / "scores.arrow"))
    assert (read.ids, read.classes, read.stream, read.data_digest) == (scores.ids, scores.classes, "j", "d")
    np.testing.assert_array_equal(read.probabilities, scores.probabilities)
    np.testing.assert_array_equal(read.labels, scores.labels)
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["scores.arrow"]


@pytest.mark.parametrize("content", [b"", b"not arrow at all", None])
def test_broken_scores_name_the_file(tmp_path, content):
    path = tmp_path / "scores.arrow"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(FFNError, match=r"scores\.arrow"):
        Scores.read(path)


def test_cut_scores_name_the_file(tmp_path):
    path = make().write(tmp_path / "scores.arrow")
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(FFNError, match="cut short"):
        Scores.read(path)


def test_measures_agree_with_counting():
    scores = make(classes=8, count=300)
    metrics = measure(scores)
    best = scores.probabilities.argmax(1)
    assert metrics.top1 == pytest.approx(sum(int(a == b) for a, b in zip(best, scores.labels, strict=True)) / 300)
    ranks = [sorted(p, reverse=True).index(p[label]) for p, label in zip(scores.probabilities.tolist(), scores.labels, strict=True)]
    assert metrics.top5 == pytest.approx(np.mean([rank < 5 for rank in ranks]))
    recalls = [np.mean(best[scores.labels == k] == k) for k in range(8)]
    assert metrics.top1_mean_class == pytest.approx(np.mean(recalls))
    assert metrics.confusion.sum() == 300
    assert metrics.confusion[2, 5] == sum((scores.labels == 2) & (best == 5))
    worst = metrics.per_class[2].mistaken_for
    assert worst == "abcdefgh"[int(np.argmax([metrics.confusion[2, k] if k != 2 else -1 for k in range(8)]))]


def test_mean_class_accuracy_skips_absent_classes():
    scores = replace(make(classes=3), labels=np.zeros(40, np.int64))
    assert measure(scores).top1_mean_class == pytest.approx(measure(scores).top1)


def test_fusion_is_the_weighted_mean_by_id():
    j, b = make("j"), make("b", seed=1)
    fused = fuse({"j": j, "b": rows(b, reversed(range(40)))}, {"j": 1.0, "b": 0.5}, "jb")
    np.testing.assert_allclose(fused.probabilities, (j.probabilities + 0.5 * b.probabilities) / 1.5, rtol=1e-6)
    assert fused.ids == j.ids
    assert fused.stream == "jb"


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda b: rows(b, range(39)), r"missing s39"),
        (lambda b: replace(rows(b, [*range(40), 0]), ids=(*b.ids, "stranger")), "extra stranger"),
        (lambda b: rows(b, [*range(40), 7]), "duplicated sample ids: s7"),
        (lambda b: replace(b, labels=(b.labels + 1) % 4), "sample s0 different labels"),
        (lambda b: replace(b, data_digest="other"), "data_digest"),
        (lambda b: replace(b, classes=("a", "b", "c", "x")), "classes"),
    ],
)
def test_fusion_names_what_does_not_join(broken, message):
    with pytest.raises(FFNError, match=message):
        fuse({"j": make("j"), "b": broken(make("b", seed=1))}, {"j": 1.0, "b": 1.0}, "2s")


def test_fusion_names_the_absent_stream():
    with pytest.raises(FFNError, match="no scores of stream b"):
        fuse({"j": make()}, {"j": 1.0, "b": 1.0}, "2s")


def test_fusions_are_those_the_streams_allow():
    assert list(fusions({"j": 0, "b": 0})) == ["2s"]
    assert list(fusions({"j": 0, "b": 0, "jm": 0, "bm": 0})) == ["2s", "4s"]
    assert fusions({"j": 0}) == {}
