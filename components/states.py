"""The states of trainings as they lie in a folder or an object store: of which training, how large, how old; and their removal."""

import contextlib
import fcntl
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from components import storage
from ffn.errors import FFNError

KEY = re.compile(r"[0-9a-f]{16}")
"""What a training's folder is called (`ffn.training.train_key`). What is called otherwise is not ours."""


@dataclass(frozen=True, kw_only=True)
class Kept:
    """All that is kept of one training."""

    place: str
    """The folder, or `s3://BUCKET/PREFIX/KEY`."""
    size: int
    """Bytes."""
    written: datetime
    """When anything of it was last written."""

    @property
    def key(self) -> str:
        return self.place.rpartition("/")[2]


def kept(checkpoints: str) -> list[Kept]:
    """What lies in the folder or under `s3://BUCKET/PREFIX`. Raises `FFNError` where it is not there, or not to be reached."""
    found: dict[str, list[tuple[int, datetime]]] = {}
    for key, size, written in _stored(checkpoints) if storage.remote(checkpoints) else _filed(Path(checkpoints)):
        found.setdefault(key, []).append((size, written))
    root = checkpoints.rstrip("/")
    return [
        Kept(place=f"{root}/{key}", size=sum(size for size, _ in of), written=max(written for _, written in of))
        for key, of in sorted(found.items())
    ]


def remove(kept: Kept) -> None:
    """Remove what is kept of the training. Raises `FFNError` where it has been written to since, or is being."""
    root, _, key = kept.place.rpartition("/")
    if storage.remote(kept.place):
        with storage._store(kept.place) as (client, bucket, prefix):
            objects = list(_listed(client, bucket, f"{prefix}/"))
            _require_unchanged(kept, max((item["LastModified"] for item in objects), default=kept.written))
            for item in objects:
                client.delete_object(Bucket=bucket, Key=item["Key"])
        return
    _require_unchanged(kept, max((at for name, _, at in _filed(Path(root)) if name == key), default=kept.written))
    with contextlib.ExitStack() as held:
        for lock in Path(kept.place).glob("lock"):
            try:
                fcntl.flock(held.enter_context(lock.open()), fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise FFNError(f"{kept.place}: a training holds it") from None
        shutil.rmtree(kept.place)


def _require_unchanged(kept: Kept, written: datetime) -> None:
    if written > kept.written:
        raise FFNError(f"{kept.place}: was written to a moment ago, and stays")


def _stored(checkpoints: str) -> Iterator[tuple[str, int, datetime]]:
    with storage._store(checkpoints) as (client, bucket, prefix):
        below = f"{prefix}/" if prefix else ""
        for item in _listed(client, bucket, below):
            key, slash, _ = item["Key"].removeprefix(below).partition("/")
            if slash and KEY.fullmatch(key):
                yield key, item["Size"], item["LastModified"]


def _filed(folder: Path) -> Iterator[tuple[str, int, datetime]]:
    if not folder.is_dir():
        raise FFNError(f"{folder}: no such folder here; where it is a volume, call this where that is mounted")
    for path in folder.glob("*/*"):
        if KEY.fullmatch(path.parent.name) and path.is_file():
            about = path.stat()
            yield path.parent.name, about.st_size, datetime.fromtimestamp(about.st_mtime, UTC)


def _listed(client: Any, bucket: str, prefix: str) -> Iterator[Any]:
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
        yield from page.get("Contents", [])
