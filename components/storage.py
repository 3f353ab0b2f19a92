"""Object storage: any store that speaks S3, through boto3. The only place that touches it; MLflow handles its artifacts itself.

Keys, region and authority are the standard `AWS_*` variables, the endpoint is `AWS_ENDPOINT_URL_S3`, `AWS_ENDPOINT_URL` or
`MLFLOW_S3_ENDPOINT_URL`; where one is given, addresses have the bucket in their path. A published file is an object under a
name of its own and a pointer, `<uri>.json`, that names it with its SHA-256: what is pointed to is whole.
"""

import contextlib
import functools
import hashlib
import json
import os
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Self, TypeVar

import boto3
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    FlexibleChecksumError,
    HTTPClientError,
    IncompleteReadError,
    InvalidConfigError,
    NoCredentialsError,
    PartialCredentialsError,
    ProfileNotFound,
    ReadTimeoutError,
    ResponseStreamingError,
    SSLError,
)
from s3transfer.exceptions import RetriesExceededError

from components import say
from ffn.data.store import publishing
from ffn.errors import Fault, FFNError

T = TypeVar("T")

SCHEME = "s3://"
ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "MLFLOW_S3_ENDPOINT_URL")
PART = 8 * 2**20
"""Bytes of a part: what is larger goes in several, at once and each retried on its own."""
AT_ONCE = 8
"""Parts of a file, and files of a folder, on their way at once."""
ATTEMPTS = 4
"""How often a request is made, and how often a whole transfer; pauses between them double."""
PAUSE_SECONDS = 1.0
UPLOAD_SECONDS = 30.0
"""A mirrored file is published at most this often, and at the end."""
STALE_SECONDS = 3600.0
"""An object of this age that no pointer names is what a kill left of an upload."""

_CUT = (HTTPClientError, IncompleteReadError, ReadTimeoutError, ResponseStreamingError, RetriesExceededError, FlexibleChecksumError)
_KEYS = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "AccessDenied", "ExpiredToken", "InvalidToken", "403", "401"}
_ABSENT = {"NoSuchKey", "404", "NotFound"}


@dataclass(frozen=True, kw_only=True)
class Place:
    """What `s3://BUCKET/KEY` names."""

    bucket: str
    key: str
    """An object's name, or the beginning of several; without a slash at its end."""

    @classmethod
    def parse(cls, uri: str) -> Self:
        """Raises `FFNError` where `uri` names no bucket."""
        bucket, _, key = uri.removeprefix(SCHEME).partition("/")
        if not remote(uri) or not bucket:
            raise FFNError(f"{uri}: expected {SCHEME}BUCKET/NAME")
        return cls(bucket=bucket, key=key.strip("/"))

    def __str__(self) -> str:
        return f"{SCHEME}{self.bucket}/{self.key}"


def remote(path: str | Path) -> bool:
    """Whether `path` is in an object store."""
    return str(path).startswith(SCHEME)


def publish(file: Path, uri: str) -> None:
    """Publish `file` as `uri`: written under a new name, read back, then pointed to. What was there before is removed after.

    A reader sees the file before or this one, whole, whatever is cut off. A transfer that breaks is begun anew, with growing
    pauses. Of two that publish at once the last to point wins. Raises `FFNError` where the store refuses or stays away.
    """
    place, client = Place.parse(uri), _client()
    with _clear(place):
        _persist(lambda: _publish(client, place, file))


def fetch(uri: str, file: Path) -> bool:
    """Write what was published as `uri` to `file`, whole or not at all; False where nothing was.

    Raises `FFNError` where the store refuses or stays away, and where the content is not what was published.
    """
    place, client = Place.parse(uri), _client()

    def attempt() -> bool:
        pointer = _pointer(client, place, looks=2)
        if pointer is None:
            return False
        with publishing(file) as partial:
            _download(client, place.bucket, pointer["object"], partial)
            with partial.open("rb") as content:
                found = hashlib.file_digest(content, "sha256").hexdigest()
            if found != pointer["sha256"]:
                raise _Damaged(f"{place.bucket}/{pointer['object']}: SHA-256 {found}, published as {pointer['sha256']}")
        return True

    with _clear(place):
        return _persist(attempt, moved=True)


def version(uri: str) -> str:
    """Sixteen hex digits that name the state of the object `uri`, or of all below it, by names, sizes and entity tags.

    Raises `FFNError` where there is none.
    """
    place = Place.parse(uri)
    marks = hashlib.sha256(PurePosixPath(place.key).name.encode())
    with _clear(place):
        for name, found in sorted(_below(_client(), place).items()):
            marks.update(f"{name}\0{found['Size']}\0{found['ETag']}\n".encode())
    return marks.hexdigest()[:16]


def reach(uri: str) -> None:
    """Raises `FFNError` where the store refuses or stays away."""
    place = Place.parse(uri)
    with _clear(place):
        _client().list_objects_v2(Bucket=place.bucket, Prefix=place.key, MaxKeys=1)


@contextlib.contextmanager
def at_hand(source: str | Path) -> Iterator[Path]:
    """Yield `source` if it is a path, else a copy of that object, or of all below it, which is removed after the block.

    Raises `FFNError` where there is none, and where the store refuses or stays away.
    """
    if not remote(source):
        yield Path(source)
        return
    place, client = Place.parse(str(source)), _client(checked=True)
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch) / (PurePosixPath(place.key).name or place.bucket)
        with _clear(place):
            found = _below(client, place)

            def download(name: str) -> None:
                path = target / name if name else target
                path.parent.mkdir(parents=True, exist_ok=True)
                _persist(lambda: _download(client, place.bucket, found[name]["Key"], path))
                if path.stat().st_size != found[name]["Size"]:
                    raise FFNError(f"s3://{place.bucket}/{found[name]['Key']}: changed while it was read; begin again")

            with ThreadPoolExecutor(AT_ONCE) as pool:
                list(pool.map(download, found))
        yield target


@contextlib.contextmanager
def mirrored(folder: str | Path, name: str) -> Iterator[tuple[Path, Callable[[], None]]]:
    """Yield a local folder that holds the file `name` if `folder` does, and what is to be called when the file has changed.

    A `folder` in a store is fetched from at first and published to at most every `UPLOAD_SECONDS` and after the block, however
    that ends. Later trouble with the store is said and does not end the block: the file before stays published. No lock is
    held: two that mirror one file at once do not hinder one another, and the file is the last one's. Raises `FFNError` where
    the store refuses or stays away at first.
    """
    if not remote(folder):
        yield Path(folder), lambda: None
        return
    uri = f"{str(folder).rstrip('/')}/{name}"
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if fetch(uri, file):
            say(f"fetched {uri}")
        published, state = time.monotonic(), _state(file)

        def keep(*, now: bool = False) -> None:
            nonlocal published, state
            if _state(file) == state or (not now and time.monotonic() - published < UPLOAD_SECONDS):
                return
            seen = _state(file)
            try:
                publish(file, uri)
            except FFNError as error:
                say(f"not published: {error}")
            else:
                published, state = time.monotonic(), seen

        try:
            yield Path(scratch), keep
        finally:
            keep(now=True)


@contextlib.contextmanager
def _store(uri: str) -> Iterator[tuple[Any, str, str]]:
    """Yield a client, and the bucket and the key that `uri` names. What boto3 raises in the block is an `FFNError` after it."""
    place = Place.parse(uri)
    with _clear(place):
        yield _client(), place.bucket, place.key


class _Damaged(Exception):
    """What came back is not what was sent."""


def _client(*, checked: bool = False) -> Any:
    """`checked` asks the store for checksums of its own: what is published has one already."""
    given = {name: value for name, value in os.environ.items() if name.startswith("AWS_") or name in ENDPOINTS}
    return _client_of(tuple(sorted(given.items())), checked)


@functools.lru_cache
def _client_of(environment: tuple[tuple[str, str], ...], checked: bool) -> Any:
    session = boto3.Session()
    endpoint = next((os.environ[name] for name in ENDPOINTS if os.environ.get(name)), None)
    return session.client(
        "s3",
        endpoint_url=endpoint,
        region_name=session.region_name or "us-east-1",
        config=Config(
            connect_timeout=10,
            read_timeout=60,
            max_pool_connections=AT_ONCE * AT_ONCE,
            retries={"mode": "standard", "total_max_attempts": ATTEMPTS},
            # Else uploads over TLS are chunked without a length, which many stores refuse.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_supported" if checked else "when_required",
            s3={"addressing_style": "path" if endpoint else "auto"},
        ),
    )


def _publish(client: Any, place: Place, file: Path) -> None:
    before = _pointer(client, place)
    name = f"{place.key}.{uuid.uuid4().hex}"
    with file.open("rb") as content:
        said = {"object": name, "size": file.stat().st_size, "sha256": hashlib.file_digest(content, "sha256").hexdigest()}
        content.seek(0)
        client.upload_fileobj(content, place.bucket, name, Config=_transfer())
    arrived = hashlib.sha256()
    for block in client.get_object(Bucket=place.bucket, Key=name)["Body"].iter_chunks(2**20):
        arrived.update(block)
    if arrived.hexdigest() != said["sha256"]:
        client.delete_object(Bucket=place.bucket, Key=name)
        raise _Damaged(f"{place.bucket}/{name}: SHA-256 {arrived.hexdigest()} came back, {said['sha256']} was sent")
    client.put_object(Bucket=place.bucket, Key=f"{place.key}.json", Body=json.dumps(said).encode(), ContentType="application/json")
    # A pointer never goes back to an object, so whatever another writer points to meanwhile is not among these.
    others = {found["Key"]: found["LastModified"] for found in _listed(client, place.bucket, f"{place.key}.")}
    now = others.get(name)
    for other, modified in others.items():
        left = now and len(other) == len(name) and other != name and (now - modified).total_seconds() > STALE_SECONDS
        if left or (before and other == before["object"]):
            client.delete_object(Bucket=place.bucket, Key=other)


def _pointer(client: Any, place: Place, *, looks: int = 1) -> dict[str, Any] | None:
    """The pointer; None where `looks` find none: stores over plain files (rclone) lose it for a moment while it is written anew."""
    try:
        text = client.get_object(Bucket=place.bucket, Key=f"{place.key}.json")["Body"].read()
        said = json.loads(text)
        return {name: said[name] for name in ("object", "size", "sha256")}
    except ClientError as error:
        if error.response["Error"]["Code"] not in _ABSENT:
            raise
        if looks == 1:
            return None
    except (ValueError, KeyError, TypeError):
        if looks == 1:
            raise FFNError(f"{place}.json: not a pointer to a published file; remove it, or name another folder") from None
    time.sleep(PAUSE_SECONDS / 4)
    return _pointer(client, place, looks=looks - 1)


def _download(client: Any, bucket: str, key: str, file: Path) -> None:
    with file.open("wb") as target:
        client.download_fileobj(bucket, key, target, Config=_transfer())


def _transfer() -> TransferConfig:
    return TransferConfig(
        multipart_threshold=PART, multipart_chunksize=PART, max_concurrency=AT_ONCE, num_download_attempts=ATTEMPTS
    )


def _listed(client: Any, bucket: str, prefix: str) -> Iterator[dict[str, Any]]:
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
        yield from page.get("Contents", [])


def _below(client: Any, place: Place) -> dict[str, dict[str, Any]]:
    """Name below `place` -> object; the name of an object at `place` itself is empty. Raises `FFNError` where there is none."""
    found = {}
    for item in _listed(client, place.bucket, place.key):
        name = item["Key"].removeprefix(place.key)
        if item["Key"].endswith("/") or (place.key and name and not name.startswith("/")):
            continue  # a folder's marker; another name that begins alike
        if ".." in PurePosixPath(name).parts:
            raise FFNError(f"s3://{place.bucket}/{item['Key']}: a name with '..' in it; rename the object")
        found[name.lstrip("/")] = item
    if not found:
        raise FFNError(f"{place}: no such object, and none below it; look at the names with `aws s3 ls {place}`")
    return {"": found[""]} if "" in found else found


def _state(file: Path) -> tuple[int, int] | None:
    return (file.stat().st_mtime_ns, file.stat().st_ino) if file.exists() else None


def _persist(transfer: Callable[[], T], *, moved: bool = False) -> T:
    """`transfer()`, begun anew where it was cut off or damaged, the store was unwell, or (`moved`) its object went meanwhile."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return transfer()
        except (*_CUT, _Damaged):
            if attempt == ATTEMPTS:
                raise
        except ClientError as error:
            unwell = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0) >= 500
            gone = moved and error.response["Error"]["Code"] in _ABSENT
            if attempt == ATTEMPTS or not (unwell or gone):
                raise
        time.sleep(PAUSE_SECONDS * 2 ** (attempt - 1))
    raise AssertionError


@contextlib.contextmanager
def _clear(place: Place) -> Iterator[None]:
    """What goes wrong inside the block as one `FFNError` that says what to do."""
    where = next((os.environ[name] for name in ENDPOINTS if os.environ.get(name)), "AWS S3 (no endpoint is set)")
    try:
        yield
    except (NoCredentialsError, PartialCredentialsError, ProfileNotFound, InvalidConfigError) as error:
        raise FFNError(f"{place}: no keys ({error}); set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY") from None
    except ClientError as error:
        code, said = error.response["Error"].get("Code", "?"), error.response["Error"].get("Message", "")
        if code in _KEYS:
            text = f"{where} refused the keys ({code}); check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and what they may do"
        elif code == "NoSuchBucket":
            text = f"no bucket {place.bucket} at {where}; make it, or name another"
        elif code in _ABSENT:
            text = f"no such object at {where}"
        else:
            raise Fault(f"{place}: {where} answered {code} to {error.operation_name}: {said}") from None
        raise FFNError(f"{place}: {text}") from None
    except SSLError as error:
        raise FFNError(f"{place}: {where} is not trusted ({error}); name its authority's file in AWS_CA_BUNDLE") from None
    except _Damaged as error:
        raise FFNError(f"{error}; wrong checksum, {ATTEMPTS} times: the store or the way to it damages data") from None
    except FlexibleChecksumError as error:
        raise FFNError(f"{place}: wrong checksum ({error}); the object is damaged, upload it again") from None
    except (*_CUT, BotoCoreError) as error:
        raise Fault(f"{place}: no connection with {where} ({error}); check AWS_ENDPOINT_URL and whether the store is up") from None
