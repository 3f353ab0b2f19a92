"""What steps keep in a folder or an object store, states of trainings, sets and scores: how large, how old; and their removal."""

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

OURS = re.compile(r"([0-9a-f]{16}(?=/)|(?:data|scores)/[0-9a-f]{16}(?=\.)).*")
"""What is called so is ours: a training's folder (`ffn.training.train_key`), a set and its note, scores."""


@dataclass(frozen=True, kw_only=True)
class Kept:
    """All that is kept of one training, one set, or one table of scores."""

    place: str
    """The folder, or `s3://BUCKET/PREFIX/KEY`; of a set and of scores without what follows the key."""
    size: int
    """Bytes."""
    written: datetime
    """When anything of it was last written."""
    kind: str = "state"
    """`state`, `set` or `scores`."""

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
        Kept(
            place=f"{root}/{name}",
            size=sum(size for size, _ in of),
            written=max(written for _, written in of),
            kind={"data": "set", "scores": "scores"}.get(name.partition("/")[0], "state"),
        )
        for name, of in sorted(found.items())
    ]


def remove(kept: Kept) -> None:
    """Remove it all. Raises `FFNError` where it has been written to since, or is being."""
    if storage.remote(kept.place):
        with storage._store(kept.place) as (client, bucket, prefix):
            objects = list(_listed(client, bucket, prefix))
            _require_unchanged(kept, max((item["LastModified"] for item in objects), default=kept.written))
            for item in objects:
                client.delete_object(Bucket=bucket, Key=item["Key"])
        return
    files = [path for path in Path(kept.place).parent.glob(f"{kept.key}*") if path.is_file()] or list(Path(kept.place).iterdir())
    _require_unchanged(kept, max((_written(path) for path in files), default=kept.written))
    if not Path(kept.place).is_dir():
        for path in files:
            path.unlink(missing_ok=True)
        return
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
            if ours := OURS.fullmatch(item["Key"].removeprefix(below)):
                yield ours[1], item["Size"], item["LastModified"]


def _filed(folder: Path) -> Iterator[tuple[str, int, datetime]]:
    if not folder.is_dir():
        raise FFNError(f"{folder}: no such folder here; where it is a volume, call this where that is mounted")
    for path in folder.glob("*/*"):
        if (ours := OURS.fullmatch(str(path.relative_to(folder)))) and path.is_file():
            yield ours[1], path.stat().st_size, _written(path)


def _written(path: Path) -> datetime:
    return datetime.fromtimestamp(path.stat().st_mtime, UTC)


def _listed(client: Any, bucket: str, prefix: str) -> Iterator[Any]:
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
        yield from page.get("Contents", [])
