"""Fusion of streams: a weighted mean of probabilities, joined by sample id."""

from collections.abc import Mapping

import numpy as np

from ffn.config import FUSIONS
from ffn.errors import FFNError
from ffn.scores import Scores, listed, require_unique


def fuse(scores: Mapping[str, Scores], weights: Mapping[str, float], name: str) -> Scores:
    """The weighted mean of `scores` (stream -> scores), called `name`, in the order of the first stream's samples.

    Raises `FFNError` naming the ids that are missing, extra or duplicated in a stream, and where protocol, data, classes
    or labels differ. Source: section 4 of the paper (weights), MMAction2 (probabilities are what is added).
    """
    absent = [stream for stream in weights if stream not in scores]
    if absent:
        raise FFNError(f"fusion {name}: no scores of stream {', '.join(absent)}; it needs {', '.join(weights)}")
    first_stream = next(iter(weights))
    first = scores[first_stream]
    require_unique(first.ids, f"scores of stream {first_stream}")
    total = np.zeros_like(first.probabilities, np.float64)
    for stream, weight in weights.items():
        table = scores[stream]
        require_unique(table.ids, f"scores of stream {stream}")
        for what in ("protocol", "data_digest", "classes"):
            ours, theirs = getattr(first, what), getattr(table, what)
            if ours != theirs:
                raise FFNError(f"fusion {name}: streams {first_stream} and {stream} differ in {what}: {ours!r} and {theirs!r}")
        place = {sample: row for row, sample in enumerate(table.ids)}
        missing = [sample for sample in first.ids if sample not in place]
        extra = sorted(set(table.ids) - set(first.ids))
        if missing or extra:
            said = [f"{kind} {listed(names)}" for kind, names in (("missing", missing), ("extra", extra)) if names]
            raise FFNError(f"fusion {name}: samples of stream {stream} against {first_stream}: {'; '.join(said)}")
        rows = np.array([place[sample] for sample in first.ids])
        if (table.labels[rows] != first.labels).any():
            sample = first.ids[int((table.labels[rows] != first.labels).argmax())]
            raise FFNError(f"fusion {name}: streams {first_stream} and {stream} give sample {sample} different labels")
        total += weight * table.probabilities[rows]
    return Scores(
        ids=first.ids,
        labels=first.labels,
        probabilities=(total / sum(weights.values())).astype(np.float32),
        classes=first.classes,
        protocol=first.protocol,
        stream=name,
        preset=first.preset,
        data_digest=first.data_digest,
        seed=first.seed,
    )


def fusions(streams: Mapping[str, object]) -> dict[str, dict[str, float]]:
    """The paper's fusions that the given streams allow: name -> weights."""
    return {name: weights for name, weights in FUSIONS.items() if set(weights) <= set(streams)}
