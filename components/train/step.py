"""Train: one stream of one protocol, resumed where an earlier attempt stopped."""

import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np

from components import say, skeletons, step, storage, tracking
from ffn import config as configuration
from ffn.checkpoint import read_history, read_meta
from ffn.data.store import SkeletonSet
from ffn.inference import write_fused
from ffn.plots import learning_curves
from ffn.training import STATE, Epoch, train, train_key

LOGGED = ("loss", "top1", "lr", "seconds", "clips_per_second")
"""Fields of an epoch's record that become the metrics `train_<field>`."""


@step
def run(
    *,
    data: Path,
    preset: str,
    protocol: str,
    stream: str,
    seed: int,
    overrides: list[str],
    checkpoints: Path | str,
    parent: str,
    checkpoint: Path,
) -> dict[str, str]:
    """Publish the checkpoint in the folder `checkpoint`; the state of every epoch is kept under `checkpoints`.

    That is a folder, or `s3://BUCKET/PREFIX`: then every epoch's state goes there as `storage.mirrored` says, no lock keeps
    the same training from going on twice, and twice it gives the same weights.

    One process for every GPU, or as many as FFN_PROCESSES says.

    Returns what names the checkpoint: preset, protocol, stream, seed.
    """
    config = configuration.recipe(preset, overrides, seed)
    names = tracking.names(preset, protocol, stream, seed)
    with (
        skeletons.opened(data, skeletons.training(protocol)) as used,
        tracking.child(parent, key=(key := train_key(used.digest, config, protocol, stream)), kind="train", names=names) as track,
        storage.mirrored(checkpoints, f"{key}/{STATE}") as (states, keep),
    ):
        tracking.note(parent, {tracking.LINEAGE["data_digest"]: used.digest})
        track.tag(tracking.LINEAGE["data_digest"], used.digest)
        split = used.split(protocol)
        track.params({**names, **flat(config)})
        track.dataset(used, "training", part=f"{protocol}/train", used=len(split.train))
        logged = track.steps("train_loss")

        def log(record: Mapping[str, float]) -> None:
            if record["epoch"] not in logged:
                logged.add(int(record["epoch"]))
                track.metrics({f"train_{name}": record[name] for name in LOGGED}, step=int(record["epoch"]))

        def on_epoch(epoch: Epoch) -> None:
            keep()
            log(asdict(epoch))
            say(
                f"epoch {epoch.epoch:3d}/{epoch.epochs}  loss {epoch.loss:.4f}  top1 {100 * epoch.top1:5.1f} %  "
                f"{epoch.clips_per_second:.0f} clips/s"
            )

        train(
            used,
            protocol=protocol,
            stream=stream,
            config=config,
            out=checkpoint,
            progress=False,
            state_dir=states,
            on_epoch=on_epoch,
        )
        history = read_history(checkpoint)
        for record in history:  # epochs that ran under another parent, or whose logging a kill cut off
            log(record)
        track.figure(learning_curves(history), "figures/learning_curves.png")
        track.folder(checkpoint, "checkpoint")
        with tempfile.TemporaryDirectory() as folder:
            fused = write_fused(Path(folder) / "fused", {stream: checkpoint}, {stream: 1.0})
            track.model(fused, read_meta(checkpoint), example(used, int(split.test[0])))
    return names


def flat(config: configuration.Config) -> dict[str, object]:
    """`section.field` -> value."""
    sections = configuration.to_dict(config)
    return {f"{name}.{key}": value for name, section in sections.items() if name != "preset" for key, value in section.items()}


def example(data: SkeletonSet, row: int) -> np.ndarray:
    """One recording as the registered model takes it, (1, M, T, V, 3) float32."""
    return data.sample(row)[None].astype(np.float32)
