"""The pipeline against PostgreSQL, an S3 server and MLflow with accounts, broken in the middle, restored from a dump."""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from mlflow import MlflowClient, artifacts
from mlflow.exceptions import MlflowException, RestException

from components import IMAGE
from ffn.data.synth import write_ntu
from pipeline.serving import champion
from tests.integration.parts import ROOT, Parts, free_port, listens, parts, until_open
from tests.k8s.conftest import K8S, containers, env_file, named, pod, render

MODEL = "ffn-ntu60-xsub"
SETTINGS = (
    "training.epochs=1", "training.batch_size=4", "model.width=8", "model.depths=1", "clip.frames=8", "clip.test_clips=1",
)  # fmt: skip

STEPS = {"FFN_PROMOTE": "0", "FFN_FLOOR": "0"}
"""Of a run with the account of the steps, which makes no champions, and hardly trains."""

# Of one process, in this order: the parts are broken on purpose, and the first test makes the champion that the others need.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("platform")]
after_a_run = pytest.mark.usefixtures("promoted")


@pytest.fixture(scope="module")
def platform() -> Iterator[Parts]:
    """The parts, prepared by two pods at once, as two replicas do it, with MLflow's server."""
    with parts() as here:
        starting = [
            subprocess.Popen(
                here.command("prepare"), env=here.environment("prepare"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
            for _ in range(2)
        ]
        for process in starting:
            said = process.communicate(timeout=120)[0].decode()
            assert process.returncode == 0, said
            assert said.splitlines()[-1] == "prepared: tables migrated, accounts made"
        here.start("mlflow")
        yield here


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("platform")
    write_ntu(root / "raw", repeats=2)
    return root


def ffn(place: Path, platform: Parts, *, until: str = "", account: str = "pipeline") -> tuple[int, str, str]:
    """`ffn run` with the platform's MLflow: exit status, stdout, stderr. At the line `until` the S3 server is killed."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "FFN_"))}
    command = [
        sys.executable, "-m", "pipeline.cli", "run", "--data", str(place / "raw"), "--workspace", str(place / "workspace"),
        "--protocols", "ntu60-xsub", "--streams", "j", *(part for setting in SETTINGS for part in ("--set", setting)),
    ]  # fmt: skip
    process = subprocess.Popen(
        command, cwd=place, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**clean, **platform.client(account), **STEPS, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert process.stdout
    seen = []
    for line in process.stdout:
        seen.append(line)
        if until and re.search(until, line):
            platform.stop("s3")
            break
    out, err = process.communicate(timeout=300)
    return process.returncode, "".join(seen) + out, err


def promote(place: Path, platform: Parts) -> str:
    """What `ffn model promote` says to who has the account for it."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "FFN_"))}
    command = [sys.executable, "-m", "pipeline.cli", "model", "promote", MODEL, "--workspace", str(place / "workspace")]
    done = subprocess.run(command, cwd=place, env={**clean, **platform.client("promoter")}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def client(platform: Parts, monkeypatch: pytest.MonkeyPatch, account: str = "pipeline") -> MlflowClient:
    for name, value in platform.client(account).items():
        monkeypatch.setenv(name, value)
    return MlflowClient(platform.uri)


@pytest.fixture
def promoted(platform: Parts, recordings: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A champion, where a test runs without those before it."""
    client(platform, monkeypatch)
    if not champion(MODEL):
        status, out, err = ffn(recordings, platform)
        assert (status, err) == (0, ""), out
        promote(recordings, platform)


def test_a_store_that_breaks_in_mid_run_is_named_and_the_same_command_goes_on(
    platform: Parts, recordings: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    status, out, err = ffn(recordings, platform, until=r"^ingest +done")
    assert status == 1, out
    (line,) = err.splitlines()
    assert re.match(r"ffn: error: step \S+ ntu60-xsub\S* failed \(exit status 1\): .*mlflow-artifacts", line), line
    platform.start("s3")
    status, out, err = ffn(recordings, platform)
    assert (status, err) == (0, ""), f"{out}\n{err}\n{(platform.root / 'mlflow.log').read_text()[-3000:]}"
    assert re.search(r"^ingest +cached$", out, re.MULTILINE)
    mlflow = client(platform, monkeypatch)
    (parent,) = mlflow.search_runs([mlflow.get_experiment_by_name("ffn").experiment_id], "attributes.run_name LIKE 'S4-%'")
    assert parent.info.status == "FINISHED"
    assert f"next: `ffn model promote {MODEL}-candidates/1`" in out
    assert promote(recordings, platform).startswith(f"{MODEL} version 1 is champion: {MODEL}-candidates/1")
    assert mlflow.get_model_version_by_alias(MODEL, "champion").version == "1"
    assert {"model.safetensors", "MLmodel", "results.md"} <= {Path(key).name for key in stored(platform)}


def expanded(command: list[str], variables: dict[str, str]) -> list[str]:
    """The command as the kubelet reads it."""
    return [re.sub(r"\$\((\w+)\)", lambda name: variables[name[1]], word) for word in command]


@after_a_run
def test_the_served_champion_predicts(platform: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands of the serving pods: download with the account of theirs, serve without any, probe."""
    made = pod(named(render(K8S / "overlays" / "prod"), "Deployment", "serving"))
    assert made
    download, server = containers(made[1])
    folder, port = platform.root / "model", free_port()
    folder.mkdir()
    variables = {entry["name"]: entry["value"] for entry in server["env"] if "value" in entry} | {"MLFLOW_PORT": str(port)}

    def here(command: list[str]) -> list[str]:
        return [word.replace("/model", str(folder)).replace(":8080", f":{port}") for word in command]

    base = {"PATH": platform.environment("mlflow")["PATH"], "PYTHONPATH": str(ROOT), "TMPDIR": str(platform.root)}
    settings = base | env_file(K8S / "components/serving/serving.env") | platform.client("serving")
    command = here(download["command"])
    missing = subprocess.run(expanded(command, {**settings, "MODEL_VERSION": ""}), env=settings, capture_output=True, text=True)
    assert (missing.returncode, missing.stderr) == (2, f"ffn: error: no champion of {MODEL} is served yet: promote one\n")
    subprocess.run(expanded(command, {**settings, "MODEL_VERSION": "1"}), env=settings, check=True, capture_output=True)

    log = platform.root / "serving.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            here(server["command"]),
            env={**base, **variables, "HOME": str(platform.root)},
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    platform.running["serving"] = process
    probe = here(server["readinessProbe"]["exec"]["command"])
    assert subprocess.run(probe, env=base, capture_output=True).returncode == 2
    until_open(port, process, log)
    ready = subprocess.run(probe, env=base, capture_output=True, text=True)
    assert (ready.returncode, ready.stderr) == (0, ""), log.read_text()
    platform.stop("serving")


@after_a_run
def test_the_pods_run_in_their_image(platform: Parts) -> None:
    """As the manifests say: not root, nothing writable but /tmp and the model's volume, no capabilities."""
    image = os.environ.get("FFN_IMAGE", IMAGE)
    has = ["docker", "run", "--rm", "--network=none", "--pull=never", image, "python", "-c", "import pipeline.serving, psycopg"]
    if not shutil.which("docker") or subprocess.run(has, capture_output=True).returncode:
        pytest.skip(f"no container engine with a present image {image} (make images)")
    made = [pod(named(render(K8S / "overlays" / "prod"), "Deployment", name)) for name in ("mlflow", "serving")]
    (prepare, server), (download, serving) = (containers(one[1]) for one in made if one)
    user = made[0] and made[0][1]["securityContext"]["runAsUser"]
    files, model, port = platform.root / "files", platform.root / "contained", free_port()
    for folder in (files, model):
        folder.mkdir()
        folder.chmod(0o777)
    for name in ("prepare.py", "basic_auth.ini"):
        shutil.copy(K8S / "base" / name, files)

    def start(container: dict[str, Any], settings: dict[str, str], *mounts: str, wait: bool = True) -> str:
        name = f"{platform.root.name}-{container['name']}"
        command = expanded([word.replace(":8080", f":{port}") for word in container["command"]], settings)
        done = subprocess.run(
            [
                "docker", "run", "--rm", f"--name={name}", "--network=host", "--read-only", "--tmpfs=/tmp:mode=1777",
                f"--user={user}:{user}", "--cap-drop=ALL", "--security-opt=no-new-privileges", "--env=HOME=/tmp",
                *(f"--env={key}={value}" for key, value in settings.items()), *(f"--volume={mount}" for mount in mounts),
                *([] if wait else ["--detach"]), image, *command,
            ],
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return name

    def until(name: str, port: int) -> None:
        while not listens(port):
            alive = subprocess.run(["docker", "inspect", "--format", "{{.State.Running}}", name], capture_output=True, text=True)
            assert alive.stdout.strip() == "true", alive.stderr
            time.sleep(0.2)

    settings = platform.settings("mlflow") | {"MLFLOW_AUTH_CONFIG_PATH": "/etc/mlflow/basic_auth.ini"}
    client = platform.client("serving") | env_file(K8S / "components/serving/serving.env") | {"MLFLOW_TRACKING_URI": platform.uri}
    running = []
    platform.stop("mlflow")
    try:
        start(prepare, settings, f"{files}:/etc/mlflow:ro")
        running.append(start(server, settings, f"{files}:/etc/mlflow:ro", wait=False))
        until(running[-1], platform.ports["mlflow"])
        start(download, client | {"MODEL_VERSION": "1"}, f"{model}:/model")
        listening = {"MLFLOW_HOST": "127.0.0.1", "MLFLOW_PORT": str(port), "OMP_NUM_THREADS": "2"}
        running.append(start(serving, listening, f"{model}:/model:ro", wait=False))
        until(running[-1], port)
        probe = [word.replace(":8080", f":{port}") for word in serving["readinessProbe"]["exec"]["command"]]
        ready = subprocess.run(["docker", "exec", running[-1], *probe], capture_output=True, text=True)
        assert (ready.returncode, ready.stderr) == (0, "")
        for name, container in zip(running, (server, serving), strict=True):
            wait, told = container["lifecycle"]["preStop"]["exec"]["command"][-1].split("; ")
            assert re.fullmatch(r"sleep \d+", wait)
            subprocess.run(["docker", "exec", name, "sh", "-c", told], check=True)
            subprocess.run(["docker", "wait", name], capture_output=True, timeout=20)
    finally:
        for name in running:
            subprocess.run(["docker", "rm", "--force", name], capture_output=True)
    while listens(platform.ports["mlflow"]):
        time.sleep(0.05)
    platform.start("mlflow")


@after_a_run
def test_accounts_part_what_their_holders_may_do(platform: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = client(platform, monkeypatch, "serving")
    (run, *_) = mlflow.search_runs([mlflow.get_experiment_by_name("ffn").experiment_id])
    with pytest.raises((MlflowException, RestException), match=r"(?i)permission denied|403"):
        mlflow.set_tag(run.info.run_id, "mine", "now")
    with pytest.raises((MlflowException, RestException), match=r"(?i)permission denied|403"):
        mlflow.set_registered_model_alias(MODEL, "champion", "1")
    assert champion("of-nobody") == ""  # no refusal: who follows it waits for the first
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "another")
    with pytest.raises(MlflowException, match=r"(?i)401|not authenticated"):
        mlflow.search_experiments()


def test_pages_post_from_the_addresses_that_are_named(platform: Parts) -> None:
    """As a browser does: with the page's origin. Once with the settings of the manifests, once with those of docs/operations.md."""
    settings = platform.settings("mlflow")
    inside = settings["MLFLOW_SERVER_CORS_ALLOWED_ORIGINS"].split(",")
    assert [origin.removeprefix("http://") for origin in inside] == settings["MLFLOW_SERVER_ALLOWED_HOSTS"].split(",")[
        : len(inside)
    ]
    own = dict(re.findall(r"- (MLFLOW_SERVER_\w+)=(\S+)", (ROOT / "docs" / "operations.md").read_text()))
    (outside,), (host, *_) = (
        own[name].split(",") for name in ("MLFLOW_SERVER_CORS_ALLOWED_ORIGINS", "MLFLOW_SERVER_ALLOWED_HOSTS")
    )
    account = platform.client()
    signed_in = (account["MLFLOW_TRACKING_USERNAME"], account["MLFLOW_TRACKING_PASSWORD"])

    def posted(host: str, origin: str) -> int:
        search = f"{platform.uri}/ajax-api/2.0/mlflow/experiments/search"
        headers = {"Host": host} | ({"Origin": origin} if origin else {})
        return requests.post(search, json={"max_results": 1}, headers=headers, auth=signed_in, timeout=30).status_code

    for origin in (*inside, ""):
        assert posted(inside[0].removeprefix("http://"), origin) == 200, origin
    assert posted(inside[0].removeprefix("http://"), outside) == 403
    platform.stop("mlflow")
    platform.start("mlflow", **own)
    try:
        assert [posted(host, origin) for origin in (outside, "", "https://elsewhere.example", "http://mlflow.example")] == [
            200, 200, 403, 403,
        ]  # fmt: skip
        assert posted("elsewhere.example", "") == 403
    finally:
        platform.stop("mlflow")
        platform.start("mlflow")


@after_a_run
def test_a_database_that_breaks_is_named_and_taken_up_again(platform: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = client(platform, monkeypatch)
    run = mlflow.create_run(mlflow.get_experiment_by_name("ffn").experiment_id)
    platform.stop("postgres")
    with pytest.raises(MlflowException, match="503"):
        mlflow.log_param(run.info.run_id, "seed", 1)
    platform.start("postgres")
    mlflow.log_param(run.info.run_id, "seed", 1)
    assert mlflow.get_run(run.info.run_id).data.params == {"seed": "1"}


def test_a_server_waits_for_a_database_that_starts_with_it(platform: Parts) -> None:
    def preparing(**settings: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            platform.command("prepare"), env=platform.environment("prepare", PYTHONUNBUFFERED="1", **settings),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def waits(process: "subprocess.Popen[str]") -> str:
        assert process.stdout
        return next(line for line in process.stdout if line.startswith("waiting"))

    nowhere = preparing(PGHOST="database.invalid")
    line = waits(nowhere)
    nowhere.kill()
    nowhere.communicate()
    assert re.match(r"waiting for PostgreSQL at database\.invalid:\d+: .*database\.invalid", line)
    platform.stop("postgres")
    waiting = preparing()
    try:
        line = waits(waiting)
    finally:
        platform.start("postgres")
    assert line.startswith(f"waiting for PostgreSQL at 127.0.0.1:{platform.ports['postgres']}: ")
    assert waiting.communicate(timeout=120)[0].splitlines()[-1] == "prepared: tables migrated, accounts made"
    assert waiting.returncode == 0


@after_a_run
def test_keys_that_the_store_does_not_know_are_refused(platform: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = client(platform, monkeypatch)
    run = mlflow.create_run(mlflow.get_experiment_by_name("ffn").experiment_id)
    objects = stored(platform)
    platform.stop("s3")
    platform.start("s3", AWS_SECRET_ACCESS_KEY="another")
    with pytest.raises(MlflowException, match="mlflow-artifacts"):
        mlflow.log_text(run.info.run_id, "text", "text.txt")
    assert stored(platform) == objects
    assert re.search(r"SignatureDoesNotMatch|AccessDenied|403", (platform.root / "mlflow.log").read_text())
    platform.stop("s3")
    platform.start("s3")
    mlflow.log_text(run.info.run_id, "text", "text.txt")
    assert set(stored(platform)) - set(objects) == {f"1/{run.info.run_id}/artifacts/text.txt"}


@after_a_run
def test_deleted_runs_give_their_room_back(platform: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the command of docs/operations.md."""
    mlflow = client(platform, monkeypatch)
    run = mlflow.create_run(mlflow.get_experiment_by_name("ffn").experiment_id)
    mlflow.log_text(run.info.run_id, "text", "text.txt")
    objects = stored(platform)
    mlflow.delete_run(run.info.run_id)
    (command,) = re.findall(r"sh -c '(MLFLOW_TRACKING_URI=[^']*)'", (ROOT / "docs" / "operations.md").read_text())
    command = command.replace("http://127.0.0.1:5000", platform.uri).replace(" --older-than 30d", "")
    subprocess.run(["sh", "-c", command], env=platform.environment("mlflow"), cwd=platform.root, check=True, capture_output=True)
    assert set(objects) - set(stored(platform)) == {f"1/{run.info.run_id}/artifacts/text.txt"}
    assert mlflow.get_model_version_by_alias(MODEL, "champion").version == "1"


@after_a_run
def test_a_backup_is_restored_into_an_empty_server(platform: Parts, recordings: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = client(platform, monkeypatch).get_model_version_by_alias(MODEL, "champion")
    dump = platform.root / "mlflow.dump"
    platform.run("pg_dump", "--format=custom", f"--file={dump}")
    platform.stop("mlflow")
    platform.run("createdb", "restored", database="postgres")
    platform.run(*platform.command("prepare"), database="restored")  # as a fresh installation did
    platform.run("pg_restore", "--no-owner", "--clean", "--if-exists", "--exit-on-error", "--dbname=restored", str(dump))
    platform.run("dropdb", "--force", platform.settings("mlflow")["PGDATABASE"], database="postgres")

    platform.start("mlflow", PGDATABASE="restored")
    after = client(platform, monkeypatch).get_model_version_by_alias(MODEL, "champion")
    assert (after.version, after.source, after.tags) == (before.version, before.source, before.tags)
    assert champion(MODEL) == before.version
    monkeypatch.setenv("MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD", "false")  # as a client outside the cluster
    folder = Path(artifacts.download_artifacts(f"models:/{MODEL}@champion", dst_path=str(recordings / "restored")))
    assert {"MLmodel", "model.safetensors"} <= {path.name for path in folder.rglob("*")}


def stored(platform: Parts) -> dict[str, int]:
    """Every object of the store: its key and size."""
    root = platform.root / "s3" / "mlflow"
    return {str(path.relative_to(root)): path.stat().st_size for path in root.rglob("*") if path.is_file()}
