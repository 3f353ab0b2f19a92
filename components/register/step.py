"""Register: the fused model as a version of `ffn-<protocol>`, alias `challenger`."""

import tempfile
from pathlib import Path

import numpy as np

from components import say, step, tracking
from components.fuse.step import read_fusion
from ffn.checkpoint import read_meta
from ffn.config import digest, to_dict
from ffn.data.store import SkeletonSet
from ffn.inference import write_fused


@step
def run(*, data: Path, checkpoints: list[Path], fused: Path, name: str, parent: str) -> str:
    """Returns the version's URI, `models:/ffn-<protocol>/<number>`; the same streams give the same version.

    `fused` is the folder that fusion wrote, `name` that of the pipeline run.
    """
    fusion = read_fusion(fused)
    streams = {meta.stream: (folder, meta) for folder in checkpoints for meta in [read_meta(folder)]}
    meta = next(iter(streams.values()))[1]
    key = digest(
        "register", meta.data_digest, meta.protocol, fusion["weights"], {s: to_dict(m.config) for s, (_, m) in streams.items()}
    )
    skeletons = SkeletonSet.open(data)
    with (
        tracking.child(parent, key=key, name=f"{meta.config.preset}/{meta.protocol}/register", kind="register") as track,
        tempfile.TemporaryDirectory() as scratch,
    ):
        folder = write_fused(Path(scratch) / "fused", {s: path for s, (path, _) in streams.items()}, fusion["weights"])
        row = int(skeletons.split(meta.protocol).test[0])
        model = track.model(folder, meta, skeletons.sample(row)[None].astype(np.float32))
        version = tracking.register(
            f"ffn-{meta.protocol}",
            model,
            key=key,
            run=track.id,
            tags={
                "protocol": meta.protocol,
                "preset": meta.config.preset,
                "data_digest": meta.data_digest,
                "classes": str(len(meta.classes)),
                "classes_digest": digest(meta.classes),
                "layout": meta.layout.name,
                "space": meta.space,
                "fusion": fusion["name"],
                "top1": repr(fusion["top1"]),
                "run": name,
            },
        )
        tracking.point(version, "challenger")
        track.params({"model": version.name, "fusion": fusion["name"]})
        track.metrics({"version": int(version.number)})
    say(f"{version.name} version {version.number}, alias challenger")
    return version.uri
