"""Object storage against a real server: signatures checked, several parts, connections that break, content that is damaged."""

import contextlib
import datetime
import ipaddress
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from mlflow import MlflowClient

from components import storage
from components.ingest.step import run as ingest
from components.train import step as train_step
from ffn.checkpoint import read_meta
from ffn.config import recipe
from ffn.data.store import SkeletonSet
from ffn.data.synth import write_ntu
from ffn.errors import FFNError
from ffn.training import train as fit
from tests.components.conftest import TINY
from tests.components.test_tracking import begun

KEY, SECRET = "an-access-key", "a-secret-key"
RCLONE = shutil.which("rclone", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
SEVERAL_PARTS = 2 * storage.PART + 1_000_000


@dataclass(frozen=True, kw_only=True)
class Server:
    """A running S3 server; `folder` is what it keeps: a folder per bucket, a file per object."""

    folder: Path
    port: int
    scheme: str = "http"

    @property
    def url(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.port}"

    def objects(self, below: str) -> set[str]:
        return {path.name for path in (self.folder / "bucket" / below).rglob("*") if path.is_file()}


@contextlib.contextmanager
def serving(folder: Path, *options: str, scheme: str = "http") -> Iterator[Server]:
    if RCLONE is None:
        pytest.skip("rclone is not installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (folder / "bucket").mkdir(parents=True)
    command = [
        RCLONE,
        "serve",
        "s3",
        "--config=",
        "--dir-cache-time=0s",
        "--addr",
        f"127.0.0.1:{port}",
        "--auth-key",
        f"{KEY},{SECRET}",
        *options,
    ]
    process = subprocess.Popen([*command, str(folder)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 30
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield Server(folder=folder, port=port, scheme=scheme)
    finally:
        process.terminate()
        process.wait()


@pytest.fixture
def server(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """An empty server, and an environment that leads to it; pauses between attempts are short."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("MLFLOW_S3_ENDPOINT_URL", raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nowhere")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setattr(storage, "PAUSE_SECONDS", 0.01)
    with serving(tmp_path_factory.mktemp("s3")) as started:
        monkeypatch.setenv("AWS_ENDPOINT_URL", started.url)
        yield started


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The operations that the store was asked for."""
    made, operations = storage._client, []

    def client(**how: bool) -> Any:
        client = made(**how)
        client.meta.events.register("before-call.s3", lambda model, **_: operations.append(model.name), unique_id="asked")
        return client

    monkeypatch.setattr(storage, "_client", client)
    return operations


@dataclass(kw_only=True)
class Cutter:
    """A proxy that cuts the first `cuts` connections off after `after` bytes in one direction."""

    target: int
    upward: bool = True
    after: int = 0
    cuts: int = 0
    done: int = 0
    port: int = 0
    on_cut: Callable[[], None] = lambda: None
    _open: list[socket.socket] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @contextlib.contextmanager
    def running(self) -> Iterator[str]:
        with socket.create_server(("127.0.0.1", 0)) as listening:
            self.port = listening.getsockname()[1]
            accepting = threading.Thread(target=self._accept, args=[listening], daemon=True)
            accepting.start()
            try:
                yield f"http://127.0.0.1:{self.port}"
            finally:
                listening.shutdown(socket.SHUT_RDWR)
        accepting.join(5)
        for end in self._open:
            end.close()

    def _accept(self, listening: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                near = listening.accept()[0]
                far = socket.create_connection(("127.0.0.1", self.target))
                self._open += [near, far]
                for source, sink, counted in ((near, far, self.upward), (far, near, not self.upward)):
                    threading.Thread(target=self._pump, args=[source, sink, counted], daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, counted: bool) -> None:
        passed = 0
        with contextlib.suppress(OSError):
            while block := source.recv(65536):
                passed += len(block)
                if counted and passed > self.after and self._cut():
                    break
                sink.sendall(block)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _cut(self) -> bool:
        with self._lock:
            if self.done >= self.cuts:
                return False
            self.done += 1
            self.on_cut()
            return True


def content(path: Path, size: int, *, seed: int = 0) -> Path:
    path.write_bytes(seed.to_bytes(1) + os.urandom(size - 1))
    return path


def test_a_file_of_several_parts_is_published_and_fetched(server: Server, tmp_path: Path, asked: list[str]) -> None:
    file, back = content(tmp_path / "file", SEVERAL_PARTS), tmp_path / "back"
    assert not storage.fetch("s3://bucket/states/file", back)
    storage.publish(file, "s3://bucket/states/file")
    assert asked.count("UploadPart") == 3
    assert storage.fetch("s3://bucket/states/file", back)
    assert back.read_bytes() == file.read_bytes()


def test_what_is_published_again_replaces_what_was(server: Server, tmp_path: Path) -> None:
    for seed in range(3):
        storage.publish(content(tmp_path / "file", 1000, seed=seed), "s3://bucket/states/file")
    assert storage.fetch("s3://bucket/states/file", tmp_path / "back")
    assert (tmp_path / "back").read_bytes()[0] == 2
    assert len(server.objects("states")) == 2  # the pointer, and what it points to


def test_what_a_kill_left_is_removed_when_it_is_old(server: Server, tmp_path: Path) -> None:
    folder = server.folder / "bucket" / "states"
    folder.mkdir()
    for name in (f"file.{'a' * 32}", f"file.{'b' * 32}", "file.txt", f"file2.{'c' * 32}"):
        content(folder / name, 10)
    for name in (f"file.{'a' * 32}", "file.txt", f"file2.{'c' * 32}"):
        os.utime(folder / name, (time.time() - 2 * storage.STALE_SECONDS,) * 2)
    storage.publish(content(tmp_path / "file", 1000), "s3://bucket/states/file")
    left = server.objects("states")
    assert f"file.{'a' * 32}" not in left
    assert {f"file.{'b' * 32}", "file.txt", f"file2.{'c' * 32}"} < left


def test_readers_see_something_whole_whoever_writes(server: Server, tmp_path: Path) -> None:
    uri, wrong = "s3://bucket/states/file", []

    def write(seed: int) -> None:
        mine = content(tmp_path / f"file {seed}", 50_000, seed=seed)
        for _ in range(4):
            storage.publish(mine, uri)

    storage.publish(content(tmp_path / "first", 50_000), uri)
    writers = [threading.Thread(target=write, args=[seed]) for seed in (1, 2)]
    for writer in writers:
        writer.start()
    whole = {path.read_bytes() for path in [tmp_path / "first"]}
    reads = 0
    while any(writer.is_alive() for writer in writers):
        assert storage.fetch(uri, tmp_path / "back")
        whole |= {(tmp_path / f"file {seed}").read_bytes() for seed in (1, 2)}
        if (tmp_path / "back").read_bytes() not in whole:
            wrong.append(reads)
        reads += 1
    assert reads > 1
    assert not wrong
    assert storage.fetch(uri, tmp_path / "back")


@pytest.mark.parametrize("upward", [True, False], ids=["sent", "read back"])
def test_a_connection_that_breaks_is_made_again(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, upward: bool
) -> None:
    file, visible = content(tmp_path / "file", SEVERAL_PARTS), []
    pointer = server.folder / "bucket" / "states" / "file.json"
    cutter = Cutter(target=server.port, upward=upward, after=3_000_000, cuts=3, on_cut=lambda: visible.append(pointer.exists()))
    with cutter.running() as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        storage.publish(file, "s3://bucket/states/file")
        assert cutter.done == 3
        assert visible == [False] * 3
        cutter.done, cutter.upward = 0, False
        assert storage.fetch("s3://bucket/states/file", tmp_path / "back")
        assert cutter.done == 3
    assert (tmp_path / "back").read_bytes() == file.read_bytes()


def test_an_upload_that_never_ends_well_leaves_the_one_before(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = content(tmp_path / "before", 1000)
    storage.publish(before, "s3://bucket/states/file")
    monkeypatch.setattr(storage, "ATTEMPTS", 1)
    cutter = Cutter(target=server.port, after=3_000_000, cuts=10**6)
    with cutter.running() as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        with pytest.raises(FFNError, match=rf"^s3://bucket/states/file: no connection with {url} \(.*; check AWS_ENDPOINT_URL"):
            storage.publish(content(tmp_path / "file", SEVERAL_PARTS), "s3://bucket/states/file")
    assert cutter.done
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    assert storage.fetch("s3://bucket/states/file", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == before.read_bytes()
    assert len(server.objects("states")) == 2


def stored(server: Server) -> Path:
    """The one published object of the bucket, as the server keeps it."""
    (found,) = (path for path in (server.folder / "bucket").rglob("file.*") if path.suffix != ".json")
    return found


def test_an_object_damaged_on_its_way_is_sent_again(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, damaged = storage._client, []

    def damage(**_: object) -> None:
        if not damaged:
            damaged.append(stored(server))
            damaged[0].write_bytes(b"x" * 1000)

    def client(**how: bool) -> Any:
        client = made(**how)
        client.meta.events.register("after-call.s3.PutObject", damage)
        return client

    monkeypatch.setattr(storage, "_client", client)
    file = content(tmp_path / "file", 1000)
    storage.publish(file, "s3://bucket/states/file")
    assert damaged
    assert damaged[0].name not in server.objects("states")
    assert storage.fetch("s3://bucket/states/file", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == file.read_bytes()


def test_an_object_damaged_in_the_store_is_not_fetched(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.publish(content(tmp_path / "file", 1000), "s3://bucket/states/file")
    stored(server).write_bytes(b"x" * 1000)
    with pytest.raises(FFNError, match=r"^bucket/states/file\.\w+: SHA-256 \w+, published as \w+; wrong checksum"):
        storage.fetch("s3://bucket/states/file", tmp_path / "back")
    assert {path.name for path in tmp_path.iterdir()} == {"file"}
    (server.folder / "bucket" / "states" / "file.json").write_text("[]")
    with pytest.raises(FFNError, match=r"^s3://bucket/states/file\.json: not a pointer to a published file"):
        storage.fetch("s3://bucket/states/file", tmp_path / "back")


@pytest.mark.parametrize(
    ("name", "value", "uri", "said"),
    [
        ("AWS_SECRET_ACCESS_KEY", "wrong", "s3://bucket/file", "refused the keys (SignatureDoesNotMatch)"),
        ("AWS_ACCESS_KEY_ID", "another-key", "s3://bucket/file", "refused the keys (InvalidAccessKeyId)"),
        ("AWS_ACCESS_KEY_ID", "", "s3://bucket/file", "no keys"),
        ("AWS_ENDPOINT_URL", "http://127.0.0.1:1", "s3://bucket/file", "no connection with http://127.0.0.1:1"),
        ("AWS_DEFAULT_REGION", "eu-west-1", "s3://another/file", "no bucket another at http://127.0.0.1"),
        ("AWS_DEFAULT_REGION", "eu-west-1", "s3:///file", "expected s3://BUCKET/NAME"),
    ],
)
def test_what_a_person_can_mend_is_one_clear_line(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str, uri: str, said: str
) -> None:
    monkeypatch.setattr(storage, "ATTEMPTS", 2)
    monkeypatch.setenv(name, value)
    file = content(tmp_path / "file", 10)
    for act in (storage.publish, lambda path, uri: storage.fetch(uri, path), lambda _, uri: storage.version(uri)):
        with pytest.raises(FFNError) as raised:
            act(file, uri)
        (line,) = str(raised.value).splitlines()
        assert line.startswith(f"{uri}: ")
        assert said in line


def certificate(folder: Path) -> tuple[Path, Path]:
    """A certificate of 127.0.0.1 that nobody trusts, and its key."""
    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "store")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    paths = folder / "store.crt", folder / "store.key"
    paths[0].write_bytes(made.public_bytes(serialization.Encoding.PEM))
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    paths[1].write_bytes(key.private_bytes(*form))
    return paths


def test_an_authority_of_ones_own(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    crt, key = certificate(tmp_path)
    monkeypatch.setattr(storage, "ATTEMPTS", 1)
    with serving(tmp_path / "tls", "--cert", str(crt), "--key", str(key), scheme="https") as other:
        monkeypatch.delenv("AWS_ENDPOINT_URL")
        monkeypatch.setenv("MLFLOW_S3_ENDPOINT_URL", other.url)
        with pytest.raises(FFNError, match=rf"{other.url} is not trusted .*; name its authority's file in AWS_CA_BUNDLE"):
            storage.publish(content(tmp_path / "file", 10), "s3://bucket/file")
        monkeypatch.setenv("AWS_CA_BUNDLE", str(crt))
        storage.publish(tmp_path / "file", "s3://bucket/file")
        assert storage.fetch("s3://bucket/file", tmp_path / "back")


def test_recordings_in_a_store_are_at_hand_as_files(server: Server, tmp_path: Path) -> None:
    raw = server.folder / "bucket" / "raw"
    (raw / "below").mkdir(parents=True)
    (server.folder / "bucket" / "raw2").mkdir()
    content(server.folder / "bucket" / "raw2" / "other", 10)
    files = {
        "a.json": content(raw / "a.json", SEVERAL_PARTS).read_bytes(),
        "b.json": content(raw / "below" / "b.json", 9).read_bytes(),
    }
    with storage.at_hand("s3://bucket/raw/") as folder:
        assert folder.name == "raw"
        assert {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == files
        assert (folder / "below" / "b.json").is_file()
    assert not folder.exists()
    with storage.at_hand("s3://bucket/raw/a.json") as file:
        assert (file.name, file.read_bytes()) == ("a.json", files["a.json"])
    with storage.at_hand(raw) as itself:
        assert itself == raw
    with pytest.raises(FFNError, match=r"^s3://bucket/ra: no such object, and none below it"), storage.at_hand("s3://bucket/ra"):
        pass


def test_a_source_has_another_version_when_its_content_is_another(server: Server) -> None:
    raw = server.folder / "bucket" / "raw"
    raw.mkdir()
    content(raw / "a", 100, seed=1)
    first = storage.version("s3://bucket/raw")
    assert first == storage.version("s3://bucket/raw/")
    content(raw / "a", 100, seed=2)
    second = storage.version("s3://bucket/raw")
    content(raw / "b", 100)
    assert len({first, second, storage.version("s3://bucket/raw")}) == 3


def test_a_mirrored_file_is_published_seldom_and_at_the_end(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: list[str]
) -> None:
    back = tmp_path / "back"

    def interrupted() -> None:
        with storage.mirrored("s3://bucket/states/", "key/file") as (folder, keep):
            content(folder / "key" / "file", 10, seed=1)
            keep()
            assert not storage.fetch("s3://bucket/states/key/file", back)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert storage.fetch("s3://bucket/states/key/file", back)
    monkeypatch.setattr(storage, "UPLOAD_SECONDS", 0)
    with storage.mirrored("s3://bucket/states", "key/file") as (folder, keep):
        assert (folder / "key" / "file").read_bytes() == back.read_bytes()
        asked.clear()
        keep()
        assert not asked  # nothing new
        content(folder / "key" / "file", 10, seed=2)
        keep()
        assert storage.fetch("s3://bucket/states/key/file", back)
        assert back.read_bytes()[0] == 2
        asked.clear()
    assert not asked
    assert not folder.exists()


def test_a_store_that_goes_away_does_not_end_the_training(
    server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(storage, "UPLOAD_SECONDS", 0)
    monkeypatch.setattr(storage, "ATTEMPTS", 1)
    with storage.mirrored("s3://bucket/states", "file") as (folder, keep):
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
        content(folder / "file", 10)
        keep()
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    assert "ffn: not published: s3://bucket/states/file: no connection" in capsys.readouterr().out
    assert len(server.objects("states")) == 2
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(FFNError, match="no connection"), storage.mirrored("s3://bucket/states", "file"):
        pass


def test_a_training_goes_on_from_a_state_in_a_store(
    server: Server, store: MlflowClient, toy: SkeletonSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = begun(source_version="1", overrides=TINY)
    said: list[str] = []

    def train(out: Path) -> None:
        train_step.run(
            data=toy.path, protocol="p", stream="j", preset="S4", seed=0, overrides=TINY, checkpoints="s3://bucket/states",
            parent=parent, checkpoint=out,
        )  # fmt: skip

    def killed(text: str) -> None:
        raise SystemExit(143)

    monkeypatch.setattr(train_step, "say", killed)  # it speaks after the first epoch
    with pytest.raises(SystemExit):
        train(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(train_step, "say", said.append)
    train(tmp_path / "out")
    assert [line.split()[1] for line in said if line.startswith("epoch")] == ["2/2"]
    undisturbed = fit(
        toy, protocol="p", stream="j", config=recipe("S4", TINY, 0), out=tmp_path / "whole", state_dir=tmp_path, progress=False
    )
    weights = [(folder / "model.safetensors").read_bytes() for folder in (tmp_path / "out", undisturbed)]
    assert weights[0] == weights[1]
    assert server.objects(f"states/{read_meta(tmp_path / 'out').key}") > {"state.safetensors.json"}


def test_recordings_are_ingested_from_a_store(server: Server, store: MlflowClient, tmp_path: Path) -> None:
    write_ntu(tmp_path / "raw", repeats=2)
    with zipfile.ZipFile(server.folder / "bucket" / "raw.zip", "w") as archive:
        for file in (tmp_path / "raw").iterdir():
            archive.write(file, file.name)
    digests = []
    for source in (tmp_path / "raw", "s3://bucket/raw.zip"):
        out = tmp_path / f"{len(digests)}.arrow"
        made = ingest(source=source, source_version=str(source), space="3d", data=out, report=tmp_path / "report.md")
        digests.append(made["digest"])
    assert digests[0] == digests[1]
    assert SkeletonSet.open(out).provenance["source"] == "raw.zip"
