"""Object storage against a real server: signatures checked, several parts, and a fault at every request."""

import contextlib
import datetime
import hashlib
import ipaddress
import itertools
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import boto3
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from mlflow import MlflowClient

from components import Mistake, storage
from components.ingest.step import run as ingest
from components.train import step as train_step
from ffn.checkpoint import read_meta
from ffn.config import recipe
from ffn.data.store import SkeletonSet
from ffn.data.synth import write_ntu
from ffn.errors import Fault, FFNError
from ffn.training import train as fit
from tests.components.conftest import TINY
from tests.components.test_tracking import begun

KEY, SECRET = "an-access-key", "a-secret-key"
RCLONE = shutil.which("rclone", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
SEVERAL_PARTS = 2 * 8 * 2**20 + 1_000_000
URI = "s3://bucket/states/file"


@contextlib.contextmanager
def serving(folder: Path, *options: str) -> Iterator[int]:
    """The port of a running S3 server that keeps `folder`: a folder per bucket, a file per object."""
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
    ]
    process = subprocess.Popen([*command, *options, str(folder)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 30
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield port
    finally:
        process.terminate()
        process.wait()


class Server(ThreadingHTTPServer):
    """A server and the way to it, where every request is noted and `fault` may befall it.

    "unwell": 503. "torn": half of it arrives. "unheard": all, but no answer comes back. "half": half an answer.
    """

    daemon_threads = True

    def __init__(self, folder: Path, port: int) -> None:
        super().__init__(("127.0.0.1", 0), Passage)
        self.folder, self.port, self.url = folder, port, f"http://127.0.0.1:{self.server_port}"
        self.asked: list[str] = []
        self.fault: Callable[[str], str] = lambda request: ""

    def handle_error(self, *_: object) -> None:
        """Whoever asked has hung up, or the server behind has: that is what is tested."""

    def objects(self, below: str) -> set[str]:
        """Names of the objects below a name; the server lists none of its own temporary files."""
        files = [path for path in (self.folder / "bucket" / below).rglob("*") if path.is_file()]
        return {path.name for path in files if not path.name.startswith(".rclone_temp_")}


class Passage(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        request = " ".join([self.command, self.path, self.headers.get("Range", "")])
        self.server.asked.append(request)
        fault = self.server.fault(request)
        self.close_connection = bool(fault)
        if fault == "unwell":
            self.send_error(503)
            return
        with contextlib.closing(HTTPConnection("127.0.0.1", self.server.port)) as far:
            far.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name != "Expect":  # answered already
                    far.putheader(name, value)
            far.endheaders(body[: len(body) // 2] if fault == "torn" else body)
            if fault == "torn":
                return
            answer = far.getresponse()
            content = answer.read()
        if fault == "unheard":
            return
        self.send_response_only(answer.status)
        for name, value in {"Content-Length": str(len(content)), **answer.headers}.items():
            if name != "Transfer-Encoding":
                self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if fault == "half" else content)

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """An empty server, and an environment that leads to it."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("MLFLOW_S3_ENDPOINT_URL", raising=False)
    folder = tmp_path_factory.mktemp("s3")
    with serving(folder) as port, Server(folder, port) as started:
        for name, value in {
            "AWS_EC2_METADATA_DISABLED": "true", "AWS_SHARED_CREDENTIALS_FILE": "/nowhere", "AWS_CONFIG_FILE": "/nowhere",
            "AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_ENDPOINT_URL": started.url,
        }.items():  # fmt: skip
            monkeypatch.setenv(name, value)
        thread = threading.Thread(target=started.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield started
        started.shutdown()
        thread.join()


def content(path: Path, size: int, *, seed: int = 0) -> Path:
    path.write_bytes(seed.to_bytes(1) + os.urandom(size - 1))
    return path


def once(fault: str) -> Callable[[str], str]:
    """Every request fails with `fault` when it is made first."""
    seen = set()

    def failing(request: str) -> str:
        again = request in seen
        seen.add(request)
        return "" if again else fault

    return failing


def after(requests: int, fault: str) -> Callable[[str], str]:
    """All fail with `fault` but the first `requests`."""
    numbers = itertools.count()
    return lambda _: fault if next(numbers) >= requests else ""


@pytest.mark.parametrize("fault", ["torn", "unwell"])
def test_a_file_of_several_parts_arrives_though_every_request_fails_once(server: Server, tmp_path: Path, fault: str) -> None:
    file, back = content(tmp_path / "file", SEVERAL_PARTS), tmp_path / "back"
    assert not storage.fetch(URI, back)
    server.fault = once(fault)
    storage.publish(file, URI)
    assert len({request for request in server.asked if "partNumber=" in request}) == 3
    server.asked.clear()
    server.fault = once("half" if fault == "torn" else fault)
    assert storage.fetch(URI, back)
    assert back.read_bytes() == file.read_bytes()
    assert len({request for request in server.asked if "bytes=" in request}) == 3
    assert len(server.asked) == 2 * len(set(server.asked))


@pytest.mark.parametrize("fault", ["torn", "unheard"])
@pytest.mark.parametrize(("size", "requests"), [(1000, ["put"]), (SEVERAL_PARTS, ["begin", "part", "part", "part", "complete"])])
def test_whichever_request_fails_for_good_the_object_is_whole(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, size: int, requests: list[str]
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    before, file = content(tmp_path / "before", 1000), content(tmp_path / "file", size)
    kept, back = server.folder / "bucket" / "states" / "file", tmp_path / "back"
    for number, request in enumerate(requests):
        server.fault = lambda _: ""
        storage.publish(before, URI)
        server.fault = after(number, fault)
        with pytest.raises(Fault, match=rf"^{URI}: .*{server.url}.*$"):
            storage.publish(file, URI)
        done = fault == "unheard" and request in ("put", "complete")
        assert kept.read_bytes() == (file if done else before).read_bytes()
        assert server.objects("states") == {"file"}
    shutil.copy(file, kept)
    for number in range(2):  # list, get
        server.fault = after(number, fault)
        with pytest.raises(Fault, match=rf"^{URI}: .*{server.url}.*$"):
            storage.fetch(URI, back)
        assert {path.name for path in tmp_path.iterdir()} == {"before", "file"}


def test_readers_see_something_whole_whoever_writes(server: Server, tmp_path: Path) -> None:
    files = [content(tmp_path / str(seed), 50_000, seed=seed) for seed in range(3)]
    whole, reads = {file.read_bytes() for file in files}, 0
    storage.publish(files[0], URI)

    def write(file: Path) -> None:
        for _ in range(4):
            storage.publish(file, URI)

    writers = [threading.Thread(target=write, args=[file]) for file in files[1:]]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        assert storage.fetch(URI, tmp_path / "back")
        assert (tmp_path / "back").read_bytes() in whole
        reads += 1
    assert reads > 1
    assert server.objects("states") == {"file"}


@pytest.mark.parametrize(
    ("name", "value", "uri", "said"),
    [
        ("AWS_SECRET_ACCESS_KEY", "wrong", "s3://bucket/file", "refused the keys (SignatureDoesNotMatch)"),
        ("AWS_ACCESS_KEY_ID", "another-key", "s3://bucket/file", "refused the keys (InvalidAccessKeyId)"),
        ("AWS_ACCESS_KEY_ID", "", "s3://bucket/file", "no keys"),
        ("AWS_ENDPOINT_URL", "http://127.0.0.1:1", "s3://bucket/file", "no connection with http://127.0.0.1:1"),
        ("AWS_ENDPOINT_URL", "127.0.0.1", "s3://bucket/file", "Invalid endpoint: 127.0.0.1; expected"),
        ("AWS_DEFAULT_REGION", "eu-west-1", "s3://another/file", "no bucket another at http://127.0.0.1"),
        ("AWS_DEFAULT_REGION", "eu-west-1", "s3://no bucket/file", 'Invalid bucket name "no bucket"'),
        ("AWS_DEFAULT_REGION", "eu-west-1", "s3:///file", "expected s3://BUCKET/NAME"),
    ],
)
def test_what_a_person_can_mend_is_one_clear_line(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str, uri: str, said: str
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setenv(name, value)
    file = content(tmp_path / "file", 10)
    for act in (
        lambda: storage.publish(file, uri),
        lambda: storage.fetch(uri, file),
        lambda: storage.version(uri),
        lambda: storage.reach(uri),
    ):
        with pytest.raises(FFNError) as raised:
            act()
        (line,) = str(raised.value).splitlines()
        assert line.startswith(f"{uri}: ")
        assert said in line
        assert isinstance(raised.value, Fault) == ("no connection" in said)


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
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    signed, made = set(), storage._client

    def noting(endpoint: str | None) -> Any:
        client = made(endpoint)
        client.meta.events.register("before-send.s3", lambda request, **_: signed.add(request.headers["X-Amz-Content-SHA256"]))
        return client

    monkeypatch.setattr(storage, "_client", noting)
    file = content(tmp_path / "file", 10)
    with serving(tmp_path / "tls", "--cert", str(crt), "--key", str(key)) as port:
        url = f"https://127.0.0.1:{port}"
        monkeypatch.delenv("AWS_ENDPOINT_URL")
        monkeypatch.setenv("MLFLOW_S3_ENDPOINT_URL", url)
        with pytest.raises(FFNError, match=rf"{url} is not trusted .*; name its authority's file in AWS_CA_BUNDLE"):
            storage.publish(file, URI)
        monkeypatch.setenv("AWS_CA_BUNDLE", str(crt))
        storage.publish(file, URI)
        assert signed == {hashlib.sha256(file.read_bytes()).hexdigest().encode()}
        assert storage.fetch(URI, tmp_path / "back")


def test_recordings_in_a_store_are_at_hand_as_files(server: Server, tmp_path: Path) -> None:
    raw = server.folder / "bucket" / "raw"
    files = {"a.json": content(tmp_path / "a", SEVERAL_PARTS).read_bytes(), "below/b.json": b"b", "below/empty.json": b""}
    client = boto3.client("s3", endpoint_url=server.url, region_name="us-east-1")
    for name, body in {**files, "../raw2/other": b"another name that begins alike"}.items():
        client.put_object(
            Bucket="bucket", Key=str(Path("raw", name)).replace("raw/../", ""), Body=body
        )  # in one piece, with a checksum
    with storage.at_hand("s3://bucket/raw/") as folder:
        assert folder.name == "raw"
        assert {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()} == files
    assert not folder.exists()
    with storage.at_hand("s3://bucket/raw/a.json") as file:
        assert (file.name, file.read_bytes()) == ("a.json", files["a.json"])
    with storage.at_hand("s3://bucket") as everything:
        assert (everything / "raw2" / "other").is_file()
    with storage.at_hand(raw) as itself:
        assert itself == raw
    with pytest.raises(FFNError, match=r"^s3://bucket/ra: no such object, and none below it"), storage.at_hand("s3://bucket/ra"):
        pass
    with pytest.raises(Fault, match=r"^s3://bucket/raw/below/b\.json: bad$"), storage.at_hand("s3://bucket/raw") as folder:
        raise Fault(f"{folder / 'below' / 'b.json'}: bad")


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
    with pytest.raises(FFNError, match=r"^s3://bucket/ra: no such object, and none below it"):
        storage.version("s3://bucket/ra")


def test_a_mirrored_file_is_published_seldom_and_at_the_end(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = server.folder / "bucket" / "states" / "key" / "file"

    def interrupted() -> None:
        with storage.mirrored("s3://bucket/states/", "key/file") as (folder, keep):
            content(folder / "key" / "file", 10, seed=1)
            keep()
            assert not kept.exists()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    first = kept.read_bytes()
    monkeypatch.setattr(storage, "UPLOAD_SECONDS", 0)
    with storage.mirrored("s3://bucket/states", "key/file") as (folder, keep):
        assert (folder / "key" / "file").read_bytes() == first
        server.asked.clear()
        keep()
        assert not server.asked  # nothing new
        content(folder / "key" / "file", 10, seed=2)
        keep()
        assert kept.read_bytes()[0] == 2
        server.asked.clear()
    assert not server.asked
    assert not folder.exists()
    assert capsys.readouterr().out == "ffn: fetched s3://bucket/states/key/file\n"


def test_a_store_that_goes_away_does_not_end_the_training(
    server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(storage, "UPLOAD_SECONDS", 0)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with storage.mirrored("s3://bucket/states", "file") as (folder, keep):
        server.fault = lambda _: "torn"
        content(folder / "file", 10)
        keep()
        server.fault = lambda _: ""
    assert "ffn: not published: s3://bucket/states/file: no connection" in capsys.readouterr().out
    assert server.objects("states") == {"file"}
    server.fault = lambda _: "unwell"
    with pytest.raises(Fault, match=f"{server.url} answered: .*503"), storage.mirrored("s3://bucket/states", "file"):
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
    (state,) = (server.folder / "bucket" / "states").rglob("state.safetensors")
    whole = state.read_bytes()
    for damaged in (whole[:-1], whole[:-1] + bytes([whole[-1] ^ 1])):
        state.write_bytes(damaged)
        with pytest.raises(Mistake, match=r"^s3://bucket/states/\w+/state\.safetensors: cannot go on from this state"):
            train(tmp_path / "out")
    state.write_bytes(whole)
    train(tmp_path / "out")
    assert [line.split()[1] for line in said if line.startswith("epoch")] == ["2/2"]
    undisturbed = fit(
        toy, protocol="p", stream="j", config=recipe("S4", TINY, 0), out=tmp_path / "whole", state_dir=tmp_path, progress=False
    )
    weights = [(folder / "model.safetensors").read_bytes() for folder in (tmp_path / "out", undisturbed)]
    assert weights[0] == weights[1]
    assert server.objects(f"states/{read_meta(tmp_path / 'out').key}") == {"state.safetensors"}


def test_recordings_are_ingested_from_a_store(server: Server, store: MlflowClient, tmp_path: Path) -> None:
    write_ntu(tmp_path / "raw", repeats=2)
    with zipfile.ZipFile(server.folder / "bucket" / "raw.zip", "w") as archive:
        for file in (tmp_path / "raw").iterdir():
            archive.write(file, file.name)
    digests: list[str] = []
    for source in (tmp_path / "raw", "s3://bucket/raw.zip"):
        out = tmp_path / f"{len(digests)}.arrow"
        made = ingest(source=source, source_version=str(source), space="3d", store="", data=out, report=tmp_path / "report.md")
        digests.append(made["digest"])
    assert digests[0] == digests[1]
    assert SkeletonSet.open(out).provenance["source"] == "raw.zip"
