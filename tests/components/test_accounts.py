"""Who may make a champion: against MLflow's own server with its accounts, as an attacker who has the steps' account sees it."""

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import requests
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from components import registry
from components.gate.step import Verdict, identity
from components.gate.step import run as gate
from components.promote.step import approve
from components.promote.step import run as promote_step
from components.registry import Version
from ffn.config import Policy
from ffn.data.store import SkeletonSet
from ffn.errors import FFNError
from pipeline import models, serving
from pipeline.local import Workspace
from pipeline.predict import load
from tests.components.test_steps import Pipeline
from tests.integration.parts import BIN, ROOT, free_port, until_open
from tests.k8s.conftest import env_file

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("accounts")]

CLIENTS = {name: f"the password of {name}" for name in ("pipeline", "promoter", "serving")}
ANY = asdict(Policy(floor=0, significance=0))
PREPARE = "import os, runpy; runpy.run_path(os.environ['PREPARE'])['prepare'](os.environ['MLFLOW_BACKEND_STORE_URI'])"


@dataclass(frozen=True)
class Server:
    """MLflow, prepared and configured as k8s/base does it, with SQLite and a folder in place of PostgreSQL and S3."""

    uri: str
    artifacts: Path

    def become(self, account: str) -> None:
        """From now on this process is that account."""
        os.environ.update(MLFLOW_TRACKING_USERNAME=account, MLFLOW_TRACKING_PASSWORD=CLIENTS[account])

    def files(self, version: Version) -> Path:
        """Where the version's files are."""
        where = MlflowClient().get_model_version_download_uri(version.name, version.number)
        return self.artifacts / where.removeprefix("mlflow-artifacts:/")

    def overwrite(self, version: Version, path: str, text: str) -> None:
        """As whoever has the steps' account can, with any client of HTTP."""
        where = self.files(version).relative_to(self.artifacts) / path
        url = f"{self.uri}/api/2.0/mlflow-artifacts/artifacts/{where}"
        answer = requests.put(url, data=text.encode(), auth=("pipeline", CLIENTS["pipeline"]), timeout=30)
        assert answer.status_code == 200, answer.text


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    pytest.importorskip("psycopg")
    pytest.importorskip("flask_wtf")
    root, port = tmp_path_factory.mktemp("accounts"), free_port()
    uri = f"sqlite:///{root / 'mlflow.db'}"
    base = ROOT / "k8s" / "base"
    (root / "basic_auth.ini").write_text((base / "basic_auth.ini").read_text().replace("postgresql://", uri))
    environment = {
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "HOME": str(root), **env_file(base / "mlflow.env"),
        "MLFLOW_BACKEND_STORE_URI": uri, "MLFLOW_ARTIFACTS_DESTINATION": str(root / "store"), "MLFLOW_HOST": "127.0.0.1",
        "MLFLOW_PORT": str(port), "MLFLOW_AUTH_CONFIG_PATH": str(root / "basic_auth.ini"), "MLFLOW_AUTH_ADMIN_USERNAME": "admin",
        "MLFLOW_AUTH_ADMIN_PASSWORD": "of the administrator", "MLFLOW_FLASK_SERVER_SECRET_KEY": "of the sessions",
        "MLFLOW_CLIENTS": ",".join(f"{name}:{password}" for name, password in CLIENTS.items()),
        "MLFLOW_CHAMPIONS": "ffn-p,ffn-q", "PREPARE": str(base / "prepare.py"),
    }  # fmt: skip
    for _ in range(2):  # a second pod finds all made
        done = subprocess.run([sys.executable, "-c", PREPARE], env=environment, cwd=root, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    log = root / "server.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            ["mlflow", "server", "--app-name", "basic-auth"],
            env=environment,
            cwd=root,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    try:
        until_open(port, process, log, seconds=180)
        yield Server(f"http://127.0.0.1:{port}", root / "store")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 9)
        process.wait()


@pytest.fixture
def server(started: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    """The server, for a process that has the account of the steps."""
    for name in [name for name in os.environ if name.startswith(("MLFLOW_", "FFN_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", started.uri)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, "")
    started.become("pipeline")
    return started


@pytest.fixture(scope="module")
def trained() -> dict[str, str]:
    """Name of a candidate -> its URI, once it is registered."""
    return {}


@pytest.fixture
def candidate(server: Server, toy: SkeletonSet, tmp_path: Path, trained: dict[str, str]) -> Callable[[str], Version]:
    """By a name, a candidate that the steps' account trained, registered and let through, against the present champion."""

    def make(name: str) -> Version:
        server.become("pipeline")
        if name not in trained:
            seed = f"clip.rotate=0.{1 + len(trained)}"
            trained[name] = Pipeline(toy.path, tmp_path / name, name=name).register("training.epochs=1", seed)
        version = registry.at(trained[name])
        champion = registry.champion("ffn-p")
        verdict = Verdict(promote=True, reason="better", digest=version.tags["digest"], champion=identity(champion))
        registry.mark(version, verdict.tags)
        return registry.at(trained[name])

    return make


def by_hand(named: str, tmp_path: Path, **how: Any) -> str:
    done, said = models.promote(named, workspace=Workspace(root=tmp_path), **how)
    assert done, said
    return said


def test_the_steps_account_makes_candidates_and_no_champions(
    server: Server, toy: SkeletonSet, candidate: Callable[[str], Version], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = candidate("one")
    assert gate(model=one.uri, data=toy.path, **ANY) == "promote"
    assert registry.version("ffn-p-candidates", alias="challenger")
    with pytest.raises(SystemExit):
        promote_step(model=one.uri)
    assert capsys.readouterr().err.splitlines()[-1] == (
        "ffn: error: ffn-p: MLflow does not let this account make champions; the account `promoter` may"
    )
    server.become("promoter")
    assert by_hand("ffn-p", tmp_path).startswith("ffn-p version 1 is champion: ffn-p-candidates/1")

    server.become("pipeline")
    client, source = MlflowClient(), store(one)
    for forbidden in (
        lambda: client.set_registered_model_alias("ffn-p", "champion", "1"),
        lambda: client.delete_registered_model_alias("ffn-p", "champion"),
        lambda: client.set_registered_model_alias("ffn-q", "champion", "1"),
        lambda: client.copy_model_version(f"models:/{one.called}", "ffn-p"),
        lambda: client.create_model_version("ffn-q", source, run_id=one.run),
        lambda: client.set_model_version_tag("ffn-p", "1", "digest", "sha256:of mine"),
        lambda: client.delete_model_version_tag("ffn-p", "1", "digest"),
        lambda: client.set_registered_model_tag("ffn-p", "mine", "now"),
        lambda: client.update_model_version("ffn-p", "1", "mine"),
        lambda: client.delete_model_version("ffn-p", "1"),
        lambda: client.rename_registered_model("ffn-p", "ffn-mine"),
        lambda: client.delete_registered_model("ffn-q"),
    ):
        with pytest.raises(MlflowException, match=r"(?i)permission denied|PERMISSION_DENIED|403"):
            forbidden()
    for first in (
        lambda: client.create_registered_model("ffn-q"),
        lambda: client.rename_registered_model(client.create_registered_model("ffn-mine").name, "ffn-q"),
    ):
        with pytest.raises(MlflowException, match="already exist"):
            first()
    mine = {"username": "pipeline", "resource_type": "registered_model", "resource_id": "ffn-p", "permission": "MANAGE"}
    for call, given in (
        ("3.0/mlflow/users/permissions/grant", mine),
        ("2.0/mlflow/users/update-admin", {"username": "pipeline", "is_admin": True}),
        ("2.0/mlflow/users/update-password", {"username": "promoter", "password": "of mine, of twelve"}),
        ("2.0/mlflow/users/create", {"username": "another", "password": "of mine, of twelve"}),
    ):
        method = requests.patch if "update" in call else requests.post
        answer = method(f"{server.uri}/api/{call}", json=given, auth=("pipeline", CLIENTS["pipeline"]), timeout=30)
        assert answer.status_code == 403, (call, answer.status_code, answer.text)
    champion = registry.champion("ffn-p")
    assert champion
    assert (champion.number, champion.tags["digest"]) == ("1", one.tags["digest"])


def store(version: Version) -> str:
    """Where a version says that its files are."""
    return str(MlflowClient().get_model_version(version.name, version.number).source)


def test_a_model_that_is_overwritten_after_the_gate_is_not_promoted(
    server: Server, candidate: Callable[[str], Version], tmp_path: Path
) -> None:
    two = candidate("two")
    weights = server.files(two) / "code" / "ffn" / "inference.py"
    whole = weights.read_text()
    server.overwrite(two, "code/ffn/inference.py", f"{whole}\nprint('mine')")
    server.become("promoter")
    before = registry.champion("ffn-p")
    with pytest.raises(FFNError, match=r"ffn-p-candidates/\d: its files have changed since it was registered: digest sha256:"):
        by_hand(two.called, tmp_path)
    server.become("pipeline")  # who forges the candidate's own tag too
    MlflowClient().set_model_version_tag(two.name, two.number, "digest", registry.sealed(two.uri, tmp_path / "forged"))
    server.become("promoter")
    with pytest.raises(FFNError, match=r"ffn-p-candidates/\d: its files have changed since the gate measured them: digest sha256:"):
        by_hand(two.called, tmp_path)
    assert registry.champion("ffn-p") == before
    server.overwrite(two, "code/ffn/inference.py", whole)
    server.become("pipeline")
    MlflowClient().set_model_version_tag(two.name, two.number, "digest", two.tags["digest"])


def test_a_model_that_is_overwritten_after_its_approval_is_not_loaded(
    server: Server, candidate: Callable[[str], Version], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    three = candidate("three")
    server.become("promoter")
    by_hand(three.called, tmp_path)
    champion = registry.champion("ffn-p")
    assert champion
    served, workspace = tmp_path / "model", Workspace(root=tmp_path)
    served.mkdir()
    server.become("serving")
    download = ["download", "ffn-p", champion.number, str(served)]
    assert serving.main(download) == 0
    assert f"ffn-p: version {champion.number}, digest {three.tags['digest']}" in capsys.readouterr().out
    assert (served / "MLmodel").is_file()
    assert load("ffn-p", [], workspace)

    for path in ("code/ffn/inference.py", "code/ffn/added.py", "artifacts/fused/fusion.json", "MLmodel"):
        where = server.files(champion) / path
        before = where.read_text() if where.exists() else None
        server.overwrite(champion, path, f"{before or ''}\n")
        assert serving.main(download) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("ffn: error")]
        assert f"ffn-p/{champion.number}: its files have changed since it was approved: digest sha256:" in line
        assert not list(served.iterdir()) if served.exists() else True
        served.mkdir(exist_ok=True)
        with pytest.raises(FFNError, match="its files have changed since it was approved"):
            load("ffn-p", [], workspace)
        if before is None:
            where.unlink()
        else:
            server.overwrite(champion, path, before)
    assert serving.main(download) == 0


def test_of_two_promotions_at_once_one_is_made(server: Server, candidate: Callable[[str], Version], tmp_path: Path) -> None:
    tried = [candidate("four"), candidate("five")]
    server.become("promoter")
    before = identity(registry.champion("ffn-p"))
    ready, said = threading.Barrier(2), list[str]()

    def work(version: Version) -> None:
        verdict = Verdict.of(version)
        assert verdict
        ready.wait()
        try:
            said.append(approve(version, verdict, "better"))
        except FFNError as error:
            said.append(f"refused: {error}")

    threads = [threading.Thread(target=work, args=(version,)) for version in tried]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(text.startswith("refused: ") for text in said) == [False, True], said
    (standing,) = registry.rivals("ffn-p", before.partition(" ")[0])
    champion = registry.champion("ffn-p")
    assert champion
    assert champion.number == standing.number

    loser = next(version for version in tried if version.called != champion.tags["candidate"])
    with pytest.raises(FFNError, match=rf"ffn-p: champion is version {champion.number} now, when the gate compared"):
        by_hand(loser.called, tmp_path)
    assert by_hand(loser.called, tmp_path, force=True).endswith("the gate was not asked")


def test_recordings_let_a_person_measure_with_an_account_that_writes_no_candidate(
    server: Server, toy: SkeletonSet, candidate: Callable[[str], Version], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("FFN_FLOOR", "FFN_SIGNIFICANCE"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("FFN_MARGIN", "-1")
    six = candidate("six")
    server.become("promoter")
    with pytest.raises(MlflowException, match=r"(?i)permission|403"):
        registry.mark(six, {"mine": "now"})
    assert " of 8, p = " in by_hand(six.called, tmp_path, data=toy.path)
    champion = registry.champion("ffn-p")
    assert champion
    assert champion.tags["gate_reason"].startswith("top1 ")
    assert "is champion again" in models.rollback("ffn-p", workspace=Workspace(root=tmp_path))
