"""Scores: what evaluation writes and fusion joins by id, and the measures taken from them. No torch."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ffn.data.store import publishing
from ffn.errors import FFNError


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Class probabilities of the held-out samples of one protocol, from one stream or a fusion."""

    ids: tuple[str, ...]
    labels: NDArray[np.int64]
    """(N,) index into `classes`."""
    probabilities: NDArray[np.float32]
    """(N, K), each row sums to one."""
    classes: tuple[str, ...]
    protocol: str
    stream: str
    """A stream (`j`, `b`, `jm`, `bm`) or a fusion (`2s`, `4s`)."""
    preset: str
    data_digest: str
    seed: int = 0
    """Of the training."""

    def write(self, path: Path | str) -> Path:
        """Write an Arrow IPC table with columns `id`, `label`, `probabilities`, published whole or not at all."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        flat = pa.array(np.ascontiguousarray(self.probabilities, np.float32).reshape(-1))
        meta = {
            "classes": self.classes,
            "protocol": self.protocol,
            "stream": self.stream,
            "preset": self.preset,
            "data_digest": self.data_digest,
            "seed": self.seed,
        }
        table = pa.table(
            {
                "id": pa.array(self.ids, pa.string()),
                "label": pa.array(self.labels, pa.int64()),
                "probabilities": pa.FixedSizeListArray.from_arrays(flat, len(self.classes)),
            },
            metadata={"ffn": json.dumps(meta)},
        )
        with (
            publishing(path) as partial,
            pa.OSFile(str(partial), "wb") as sink,
            pa.ipc.new_file(sink, table.schema) as writer,
        ):
            writer.write_table(table)
        return path

    @classmethod
    def read(cls, path: Path | str) -> Self:
        """Read what `write` wrote. Raises `FFNError` for anything else, and for an id that comes twice."""
        path = Path(path)
        if not path.is_file():
            raise FFNError(f"{path}: no such scores; make them with `ffn evaluate`")
        try:
            with pa.OSFile(str(path), "rb") as source:
                table = pa.ipc.open_file(source).read_all().combine_chunks()
            meta = json.loads(table.schema.metadata[b"ffn"])
            probabilities = table["probabilities"].chunk(0).flatten().to_numpy().reshape(len(table), -1)
            scores = cls(
                ids=tuple(table["id"].to_pylist()),
                labels=table["label"].to_numpy(),
                probabilities=probabilities,
                classes=tuple(meta.pop("classes")),
                **meta,
            )
        except (pa.ArrowInvalid, KeyError, TypeError, ValueError, IndexError) as error:
            raise FFNError(f"{path}: not a table of scores, or cut short ({error}); evaluate again") from None
        require_unique(scores.ids, str(path))
        return scores


def require_unique(ids: tuple[str, ...], where: str) -> None:
    """Raise `FFNError` naming the ids that come more than once."""
    if len(set(ids)) < len(ids):
        names, counts = np.unique(np.array(ids), return_counts=True)
        raise FFNError(f"{where}: duplicated sample ids: {listed(names[counts > 1].tolist())}")


def listed(names: list[str], most: int = 5) -> str:
    """`a, b, c and 7 more`."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


@dataclass(frozen=True, kw_only=True)
class ClassMetrics:
    """One row of the per-class table."""

    name: str
    samples: int
    recall: float
    precision: float
    mistaken_for: str
    """The class its errors go to most often; empty where there are none."""


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """Measures of one table of scores, fractions in [0, 1]."""

    top1: float
    top5: float
    top1_mean_class: float
    """Mean of the recalls of the classes that have samples."""
    loss: float
    """Mean negative log-likelihood, nats."""
    confusion: NDArray[np.int64]
    """(K, K) counts, row the truth, column the prediction."""
    per_class: tuple[ClassMetrics, ...]

    def to_dict(self) -> dict[str, float]:
        """The scalars."""
        return {name: getattr(self, name) for name in ("top1", "top5", "top1_mean_class", "loss")}


def measure(scores: Scores) -> Metrics:
    """Take the measures of `scores`. A tie counts against the true class only where a lower class number wins it."""
    labels, p = scores.labels, scores.probabilities.astype(np.float64)
    count, rows = len(scores.classes), np.arange(len(labels))
    order = np.argsort(-p, 1, kind="stable")
    hits = order == labels[:, None]
    confusion = np.zeros((count, count), np.int64)
    np.add.at(confusion, (labels, order[:, 0]), 1)
    samples, predicted, right = confusion.sum(1), confusion.sum(0), np.diag(confusion)
    recall, precision = right / np.maximum(samples, 1), right / np.maximum(predicted, 1)
    errors = confusion - np.diag(right)
    rates: list[dict[str, Any]] = [
        {
            "name": name,
            "samples": int(samples[k]),
            "recall": float(recall[k]),
            "precision": float(precision[k]),
            "mistaken_for": scores.classes[int(errors[k].argmax())] if errors[k].any() else "",
        }
        for k, name in enumerate(scores.classes)
    ]
    return Metrics(
        top1=float(hits[:, 0].mean()),
        top5=float(hits[:, :5].any(1).mean()),
        top1_mean_class=float(recall[samples > 0].mean()),
        loss=float(-np.log(np.maximum(p[rows, labels], 1e-12)).mean()),
        confusion=confusion,
        per_class=tuple(ClassMetrics(**rate) for rate in rates),
    )
