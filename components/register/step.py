"""Register: the fused model as a version of `ffn-<protocol>-candidates`, alias `challenger`."""

import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from components import registry, say, skeletons, step, tracking
from components.fuse.step import by_stream, read_fusion
from ffn.checkpoint import Checkpoint, read_meta
from ffn.config import digest
from ffn.data.store import SkeletonSet
from ffn.errors import FFNError


@step
def run(*, data: Path, checkpoints: list[Path], fused: Path, parent: str) -> str:
    """Returns the version's URI, `models:/ffn-<protocol>-candidates/<number>`; the same streams give the same version.

    `fused` is the folder that fusion wrote. Raises `FFNError` where data, checkpoints and fusion are not of one protocol, data set,
    set of classes and streams.
    """
    fusion = read_fusion(fused)
    streams = by_stream(checkpoints, read_meta)
    meta = next(iter(streams.values()))[1]
    key = digest("register", meta.data_digest, meta.protocol, fusion["weights"], {s: m.key for s, (_, m) in streams.items()})
    with skeletons.opened(data, skeletons.example(meta.protocol)) as known:
        require_fit(known, streams, fused, fusion)
        with tracking.child(parent, key=key, name=f"{meta.config.preset}/{meta.protocol}/register", kind="register") as track:
            split = known.split(meta.protocol)
            model = track.logged() or log(track, known, streams, fusion["weights"])
            version = registry.register(
                registry.candidates(f"ffn-{meta.protocol}"),
                model,
                key=key,
                run=track.id,
                tags={
                    **tracking.lineage(parent),
                    "protocol": meta.protocol,
                    "preset": meta.config.preset,
                    "data_digest": meta.data_digest,
                    "samples": str(len(known)),
                    "train_samples": str(len(split.train)),
                    "test_samples": str(len(split.test)),
                    "classes": str(len(meta.classes)),
                    "classes_digest": digest(meta.classes),
                    "layout": meta.layout.name,
                    "layout_digest": digest(asdict(meta.layout)),
                    "space": meta.space,
                    "fusion": fusion["name"],
                    "top1": repr(fusion["top1"]),
                    registry.DIGEST: sealed(model),
                },
            )
            registry.point(version, "challenger")
            track.params({"model": version.name, "fusion": fusion["name"]})
            track.metrics({"version": int(version.number)})
    say(f"{version.name} version {version.number}, alias challenger")
    return version.uri


def log(
    track: tracking.Child, data: SkeletonSet, streams: Mapping[str, tuple[Path, Checkpoint]], weights: Mapping[str, float]
) -> str:
    """Log the fusion of these checkpoints as a model; returns its URI."""
    # Imported here: a model that was logged before is found without torch.
    from components.train.step import example
    from ffn.inference import write_fused

    meta = next(iter(streams.values()))[1]
    with tempfile.TemporaryDirectory() as scratch:
        folder = write_fused(Path(scratch) / "fused", {stream: path for stream, (path, _) in streams.items()}, weights)
        return track.model(folder, meta, example(data, int(data.split(meta.protocol).test[0])))


def sealed(model: str) -> str:
    """The digest of the files of the logged model, as its store keeps them."""
    with tempfile.TemporaryDirectory() as scratch:
        return registry.sealed(model, Path(scratch))


def require_fit(data: SkeletonSet, streams: Mapping[str, tuple[Path, Checkpoint]], fused: Path, fusion: Mapping[str, Any]) -> None:
    """Raise `FFNError` naming the first two of data, checkpoints and fusion that do not belong together."""
    for folder, meta in streams.values():
        if meta.data_digest != data.digest:
            raise FFNError(
                f"{folder}: trained on data {meta.data_digest}, but {data.path} is {data.digest}; give the data it was trained on"
            )
        for what, ours, theirs in (
            ("protocol", meta.protocol, fusion["protocol"]),
            ("data", meta.data_digest, fusion["data_digest"]),
            ("classes", digest(meta.classes), digest(fusion["classes"])),
        ):
            if ours != theirs:
                raise FFNError(f"{folder} and {fused}: differ in {what}, {ours} and {theirs}; fuse the scores of these checkpoints")
    if set(streams) != set(fusion["weights"]):
        given, wanted = ", ".join(sorted(streams)), ", ".join(sorted(fusion["weights"]))
        raise FFNError(f"{fused}: fused from streams {wanted}, but the checkpoints are of {given}; give one checkpoint per stream")
