"""Checkpoint: a folder with all it takes to rebuild a model, nothing to guess.

`model.safetensors` weights; `config.json` configuration, layout, space, protocol, stream, data; `labels.json` class names;
`history.json` one record per epoch.
"""

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ffn import config
from ffn.data.store import Space
from ffn.errors import FFNError
from ffn.layouts import Layout

if TYPE_CHECKING:
    from torch import nn

FILES = ("config.json", "labels.json", "history.json", "model.safetensors")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What a checkpoint folder says of its model."""

    config: config.Config
    layout: Layout
    space: Space
    classes: tuple[str, ...]
    protocol: str
    stream: str
    data_digest: str
    key: str
    """`train_key` of the training that made it."""
    image_size: tuple[int, int] = (0, 0)
    """2D: (width, height) in pixels of the training recordings, for recordings that bring none."""


def read_meta(folder: Path | str) -> Checkpoint:
    """What the checkpoint in `folder` says of itself. Raises `FFNError` where it is not one. Needs no torch."""
    folder = Path(folder)
    try:
        said = json.loads((folder / "config.json").read_text())
        classes = json.loads((folder / "labels.json").read_text())
        return Checkpoint(
            config=config.from_dict(said["config"]),
            layout=Layout.from_dict(said["layout"]),
            space=said["space"],
            classes=tuple(classes),
            protocol=said["protocol"],
            stream=said["stream"],
            data_digest=said["data_digest"],
            key=said["key"],
            image_size=tuple(said["image_size"]),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FFNError(f"{folder}: not a checkpoint ({error}); expected config.json, labels.json and model.safetensors") from None


def read_history(folder: Path | str) -> list[dict[str, Any]]:
    """One record per epoch: epoch, lr, loss, top1, seconds, clips_per_second."""
    history: list[dict[str, Any]] = json.loads((Path(folder) / "history.json").read_text())
    return history


def write(folder: Path | str, checkpoint: Checkpoint, weights: bytes, history: list[dict[str, Any]]) -> Path:
    """Publish a checkpoint folder whole; one that stands there is replaced."""
    with publishing_folder(Path(folder)) as partial:
        said = {
            "config": config.to_dict(checkpoint.config),
            "layout": dataclasses.asdict(checkpoint.layout),
            **{name: getattr(checkpoint, name) for name in ("space", "protocol", "stream", "data_digest", "key", "image_size")},
        }
        (partial / "config.json").write_text(json.dumps(said, indent=1))
        (partial / "labels.json").write_text(json.dumps(checkpoint.classes, indent=1))
        (partial / "history.json").write_text(json.dumps(history, indent=1))
        (partial / "model.safetensors").write_bytes(weights)
    return Path(folder)


def load(folder: Path | str, device: str = "cpu") -> tuple[Checkpoint, "nn.Module"]:
    """The checkpoint's description and its network in evaluation mode. Raises `FFNError` where weights and config disagree."""
    # Imported here, so that steps which only read descriptions start without torch.
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from ffn.model.network import build

    checkpoint = read_meta(folder)
    network = build(checkpoint.config.model, checkpoint.layout, len(checkpoint.classes))
    path = Path(folder) / "model.safetensors"
    try:
        network.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise FFNError(f"{path}: weights do not fit config.json ({str(error).splitlines()[0]})") from None
    return checkpoint, network.to(device).eval()


def require_replaceable(folder: Path, names: Collection[str] = FILES) -> None:
    """Raise `FFNError` where `folder` is a file, or holds a file whose name is not among `names`."""
    if folder.exists() and not folder.is_dir():
        raise FFNError(f"{folder}: is a file; name a folder that is new")
    strangers = sorted(file.name for file in folder.iterdir() if file.name not in names) if folder.is_dir() else []
    if strangers:
        raise FFNError(f"{folder}: holds {strangers[0]}, which would be lost; name a folder that is new or empty")


@contextlib.contextmanager
def publishing_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder beside `folder`, and move it into its place when the block ends without an error.

    A folder that stands there is replaced only by its like: `FFNError` where it holds anything that the new one does not.
    """
    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
        require_replaceable(folder, {file.name for file in partial.iterdir()})
        if folder.exists():
            os.rename(folder, old)
        os.rename(partial, folder)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
