"""Object storage: any store that speaks S3, through boto3. The only place that touches it; MLflow handles its artifacts itself.

Keys, region and authority are the standard `AWS_*` variables, the endpoint is `AWS_ENDPOINT_URL_S3`, `AWS_ENDPOINT_URL` or
`MLFLOW_S3_ENDPOINT_URL`; where one is given, addresses have the bucket in their path. A file is one object under its own name,
which S3 replaces whole or not at all, whether it comes in one request or in parts. boto3 repeats what breaks, signs the SHA-256
of every body, and downloads all parts of one version to a file that takes its name at the end.
"""

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

import boto3
import botocore.exceptions as failed
from boto3.s3.transfer import TransferConfig, create_transfer_manager
from botocore.config import Config
from s3transfer.exceptions import RetriesExceededError, S3DownloadFailedError

from components import say
from ffn.config import digest
from ffn.errors import Fault, FFNError

SCHEME = "s3://"
ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "MLFLOW_S3_ENDPOINT_URL")
PART, AT_ONCE = 8 * 2**20, 8
"""Bytes of one request for a piece of an object, and how many are on their way at once."""
UPLOAD_SECONDS = 30.0
"""A mirrored file is published at most this often, and at the end."""

_NO_KEYS = (failed.NoCredentialsError, failed.PartialCredentialsError, failed.ProfileNotFound, failed.InvalidConfigError)
_REFUSED = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "AccessDenied", "ExpiredToken", "InvalidToken", "403", "401"}


def remote(path: str | Path) -> bool:
    """Whether `path` is in an object store."""
    return str(path).startswith(SCHEME)


def publish(file: Path, uri: str) -> None:
    """Make `file` the object `uri`. Raises `FFNError` where the store refuses or stays away: the object is whole, old or new."""
    with _store(uri) as (client, bucket, key), create_transfer_manager(client, TransferConfig()) as manager:
        manager.upload(str(file), bucket, key).result()


def fetch(uri: str, target: Path) -> bool:
    """Make `target` a copy of the object `uri`, or a folder of all below it; False where there is none.

    Raises `FFNError` where the store refuses or stays away; a file is there whole or not at all.
    """
    with _store(uri) as (client, bucket, key), create_transfer_manager(client, TransferConfig()) as manager:
        coming = []
        for name, found in _below(client, bucket, key).items():
            if ".." in name.parts:
                raise FFNError(f"{SCHEME}{bucket}/{found['Key']}: a name with '..' in it; rename the object")
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            coming.append(manager.download(bucket, found["Key"], str(target / name)))
        for one in coming:
            one.result()
    return bool(coming)


def version(uri: str) -> str:
    """Sixteen hex digits that name the state of the object `uri`, or of all below it, by names, sizes and entity tags.

    Raises `FFNError` where there is none, and where the store refuses or stays away.
    """
    with _store(uri) as (client, bucket, key):
        found = [(str(name), item["Size"], item["ETag"]) for name, item in _below(client, bucket, key).items()]
    if not found:
        raise _absent(uri)
    return digest(PurePosixPath(key).name, sorted(found))


def mark(uri: str) -> tuple[int, str] | None:
    """Size in bytes and entity tag of the object `uri`; None where there is none.

    Raises `FFNError` where the store refuses or stays away.
    """
    with _store(uri) as (client, bucket, key):
        try:
            found = client.head_object(Bucket=bucket, Key=key)
        except failed.ClientError as error:
            if error.response["Error"].get("Code") in ("404", "NoSuchKey"):
                return None
            raise
    return found["ContentLength"], found["ETag"]


def read(uri: str, pieces: Iterable[tuple[int, int]], file: Path, *, tag: str) -> None:
    """Copy the bytes of the object `uri` from and up to each of `pieces` to the same places of `file`.

    Raises `FFNError` where the store refuses or stays away, and where the object is not the one with the entity tag `tag`.
    """
    with _store(uri) as (client, bucket, key), ThreadPoolExecutor(AT_ONCE) as pool:

        def copy(begin: int, end: int) -> None:
            answer = client.get_object(Bucket=bucket, Key=key, Range=f"bytes={begin}-{end - 1}")
            with contextlib.closing(answer["Body"]) as body, file.open("r+b") as target:
                if answer["ETag"] != tag:
                    raise FFNError(f"{uri}: changed since it was written; begin again with `ffn cluster submit --retry`")
                target.seek(begin)
                target.write(body.read())

        parts = [(at, min(at + PART, end)) for begin, end in pieces for at in range(begin, end, PART)]
        for done in [pool.submit(copy, *part) for part in parts]:
            done.result()


def reach(uri: str) -> None:
    """Raises `FFNError` where the store refuses or stays away."""
    with _store(uri) as (client, bucket, key):
        client.list_objects_v2(Bucket=bucket, Prefix=key, MaxKeys=1)


@contextlib.contextmanager
def at_hand(source: str | Path) -> Iterator[Path]:
    """Yield `source` if it is a path, else a copy of that object, or of all below it, which is removed after the block.

    Raises `FFNError` where there is none, and where the store refuses or stays away; the block's own names the source.
    """
    if not remote(source):
        yield Path(source)
        return
    uri = str(source).rstrip("/")
    with tempfile.TemporaryDirectory() as scratch, _named(copy := Path(scratch) / PurePosixPath(uri).name, uri):
        if not fetch(uri, copy):
            raise _absent(uri)
        yield copy


@contextlib.contextmanager
def mirrored(folder: str | Path, name: str) -> Iterator[tuple[Path, Callable[[], None]]]:
    """Yield a local folder that holds the file `name` if `folder` does, and what is to be called when the file has changed.

    A `folder` in a store is fetched from at first and published to at most every `UPLOAD_SECONDS` and after the block, however
    that ends. Later trouble with the store is said and does not end the block: the file before stays published. No lock is
    held: two that mirror one file at once do not hinder one another, and the file is the last one's. Raises `FFNError` where
    the store refuses or stays away at first; the block's own names the object.
    """
    if not remote(folder):
        yield Path(folder), lambda: None
        return
    uri = f"{str(folder).rstrip('/')}/{name}"
    with tempfile.TemporaryDirectory() as scratch, _named(file := Path(scratch) / name, uri):
        file.parent.mkdir(parents=True, exist_ok=True)
        if fetch(uri, file):
            say(f"fetched {uri}")
        kept, tried = _written(file), time.monotonic()

        def keep(*, last: bool = False) -> None:
            nonlocal kept, tried
            now = _written(file)
            if now == kept or (time.monotonic() - tried < UPLOAD_SECONDS and not last):
                return
            tried = time.monotonic()
            try:
                publish(file, uri)
                kept = now
            except FFNError as error:
                say(f"not published: {error}")

        try:
            yield Path(scratch), keep
        finally:
            keep(last=True)


def _written(file: Path) -> int:
    return file.stat().st_mtime_ns if file.exists() else 0


def _absent(uri: str) -> FFNError:
    return FFNError(f"{uri}: no such object, and none below it; look at the names with `aws s3 ls {uri}`")


@contextlib.contextmanager
def _named(copy: Path, uri: str) -> Iterator[None]:
    """What an `FFNError` of the block says of `copy` it says of `uri`."""
    try:
        yield
    except FFNError as error:
        raise type(error)(str(error).replace(str(copy), uri)) from None


def _below(client: Any, bucket: str, key: str) -> dict[PurePosixPath, Any]:
    """Name below `key` -> what the store says of the object; only the object `key` itself, named `.`, where there is one."""
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=key)
    items = [item for item in pages.search("Contents[]") if item and not item["Key"].endswith("/")]  # which marks a folder
    alone, folder = [item for item in items if item["Key"] == key], f"{key}/" if key else ""
    found = alone or [item for item in items if item["Key"].startswith(folder)]
    return {PurePosixPath(item["Key"]).relative_to(key): item for item in found}


@contextlib.contextmanager
def _store(uri: str) -> Iterator[tuple[Any, str, str]]:
    """Yield a client, and the bucket and the key that `uri` names. What boto3 raises in the block is an `FFNError` after it."""
    bucket, _, key = uri.removeprefix(SCHEME).partition("/")
    if not remote(uri) or not bucket:
        raise FFNError(f"{uri}: expected {SCHEME}BUCKET/NAME")
    endpoint = next((os.environ[name] for name in ENDPOINTS if os.environ.get(name)), None)
    try:
        yield _client(endpoint), bucket, key.strip("/")
    except (failed.BotoCoreError, failed.ClientError, RetriesExceededError, S3DownloadFailedError, ValueError) as error:
        raise _clear(error, uri, endpoint or "AWS S3 (no endpoint is set)") from None


def _client(endpoint: str | None) -> Any:
    # Else a body over TLS is chunked, without a length, its SHA-256 not signed, and a checksum follows it (botocore 1.44.5:
    # httpchecksum.py:327, 458, auth.py:501), which many stores refuse, as rclone 1.75 does; and a part that comes back is compared
    # with the checksum of the whole object where a store sends that along, as rclone 1.75 does.
    plain = {"request_checksum_calculation": "when_required", "response_checksum_validation": "when_required"}
    addresses = {"addressing_style": "path" if endpoint else "auto"}
    config = Config(connect_timeout=10, retries={"mode": "standard"}, s3=addresses, **plain)
    session = boto3.Session()
    return session.client("s3", endpoint_url=endpoint, region_name=session.region_name or "us-east-1", config=config)


def _clear(error: Exception, uri: str, where: str) -> FFNError:
    """`error` as one line that says what to do; a `Fault` where another attempt may mend it."""
    said, keys = " ".join(str(error).split()), "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY"
    if isinstance(error, failed.ClientError):
        code = error.response["Error"].get("Code", "?")
        if code in _REFUSED:
            return FFNError(f"{uri}: {where} refused the keys ({code}); check {keys} and what they may do")
        if code == "NoSuchBucket":
            return FFNError(f"{uri}: no bucket {uri.split('/')[2]} at {where}; make it, or name another")
        return Fault(f"{uri}: {where} answered: {said}")
    if isinstance(error, _NO_KEYS):
        return FFNError(f"{uri}: no keys ({said}); set {keys}")
    if isinstance(error, failed.SSLError):
        return FFNError(f"{uri}: {where} is not trusted ({said}); name its authority's file in AWS_CA_BUNDLE")
    if isinstance(error, failed.ParamValidationError | ValueError):
        return FFNError(f"{uri}: {said}; expected {SCHEME}BUCKET/NAME, and in AWS_ENDPOINT_URL an address as http://HOST:PORT")
    return Fault(f"{uri}: no connection with {where} ({said}); check AWS_ENDPOINT_URL and whether the store is up")
