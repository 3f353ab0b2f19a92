"""Submitting, watching and scheduling against a KFP API that answers, fails, hangs up and forgets."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from ffn.errors import FFNError
from pipeline import submit as kfp
from pipeline import watch as watching
from pipeline.cli import main
from pipeline.server import Endpoint, Refused, Server, Unreachable
from pipeline.submit import Pipeline
from pipeline.watch import Status
from tests.components.test_storage import certificate
from tests.pipeline.kfp_server import FakeKFP, Fault, serving

OPTIONAL = ("name", "source_version", "space", "resumes")
IMAGE = "registry.example/ffn@sha256:" + "0" * 64


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kfp, "WAIT_SECONDS", 0.0)


@pytest.fixture
def fake() -> FakeKFP:
    return FakeKFP()


@pytest.fixture
def url(fake: FakeKFP) -> Iterator[str]:
    with serving(fake) as address:
        yield address


@pytest.fixture
def server(url: str) -> Server:
    return quick(Endpoint(url=url, ui="https://kfp.example"))


def quick(endpoint: Endpoint, patience: float = 5.0) -> Server:
    return Server(endpoint=endpoint, patience=patience, pause=0.01, longest_pause=0.02, timeout=(2.0, 0.5))


@pytest.fixture
def compiled(tmp_path: Path) -> Path:
    """A pipeline as small as one can be: a step, and two of another in a loop within a pipeline of its own."""
    step = {"componentRef": {"name": "comp-begin"}, "taskInfo": {"name": "begin"}}
    loop = {
        "componentRef": {"name": "comp-loop"},
        "taskInfo": {"name": "streams"},
        "parameterIterator": {"items": {"raw": '["j", "b"]'}},
    }
    train = {"componentRef": {"name": "comp-train"}, "taskInfo": {"name": "train"}}
    spec = {
        "components": {
            "comp-begin": {"executorLabel": "exec-begin"},
            "comp-train": {"executorLabel": "exec-train"},
            "comp-loop": {"dag": {"tasks": {"train": train}}},
        },
        "deploymentSpec": {"executors": {name: {"container": {"image": IMAGE}} for name in ("exec-begin", "exec-train")}},
        "root": {
            "dag": {"tasks": {"begin": step, "for-loop-1": loop}},
            "inputDefinitions": {
                "parameters": {
                    "source": {"parameterType": "STRING"},
                    **{name: {"defaultValue": "", "parameterType": "STRING"} for name in OPTIONAL},
                    "overrides": {"defaultValue": [], "parameterType": "LIST"},
                }
            },
        },
    }
    path = tmp_path / "pipeline.yaml"
    path.write_text(yaml.safe_dump_all([spec, {"platforms": {"kubernetes": {}}}]))
    return path


@pytest.fixture
def pipeline(compiled: Path) -> Pipeline:
    return kfp.load(compiled, {"source": "/mnt/data/a"})


def submitted(server: Server, pipeline: Pipeline, **more: Any) -> tuple[str, str]:
    run, done = kfp.submit(server, pipeline, name="demo", experiment="ffn", **more)
    return run["run_id"], done


def posts(fake: FakeKFP) -> list[str]:
    return [asked for asked in fake.asked if asked.startswith("POST")]


# --- submitting


def test_a_run_is_made_once_and_then_found(server: Server, fake: FakeKFP, pipeline: Pipeline) -> None:
    first, done = submitted(server, pipeline, account="ffn-pipeline")
    assert done == "made"
    (run,) = fake.runs
    assert run["runtime_config"] == {"parameters": {"source": "/mnt/data/a"}}
    assert run["service_account"] == "ffn-pipeline"
    assert run["plugins_input"] == {"mlflow": {"disabled": True}}
    assert submitted(server, pipeline) == (first, "found")
    assert posts(fake) == ["POST experiments", "POST pipelines", "POST pipelines/upload_version", "POST runs"]


def test_runs_are_of_an_uploaded_version_named_by_image_and_graph(
    server: Server, fake: FakeKFP, pipeline: Pipeline, compiled: Path
) -> None:
    submitted(server, pipeline)
    (owner,), (version,), (run,) = fake.pipelines, fake.versions, fake.runs
    assert owner["display_name"] == "ffn"
    image, graph = version["display_name"].split("-")
    assert (image, len(graph)) == ("0" * 12, 12)
    assert run["pipeline_version_reference"]["pipeline_version_id"] == version["pipeline_version_id"]
    kfp.submit(server, kfp.load(compiled, {"source": "/mnt/data/b"}), name="other", experiment="ffn")
    assert len(fake.versions) == 1  # the same graph on other data
    compiled.write_text(compiled.read_text().replace("begin", "start"))
    kfp.submit(server, kfp.load(compiled, {"source": "/mnt/data/a"}), name="third", experiment="ffn")
    assert len(fake.versions) == 2


@pytest.mark.parametrize("request_", ["POST pipelines", "POST pipelines/upload_version"])
@pytest.mark.parametrize("applied", [False, True], ids=["lost", "done"])
def test_a_broken_upload_never_makes_two_versions(
    server: Server, fake: FakeKFP, pipeline: Pipeline, request_: str, applied: bool
) -> None:
    fake.faults = [Fault(request_, "reset", applied=applied)]
    submitted(server, pipeline)
    assert (len(fake.pipelines), len(fake.versions)) == (1, 1)


def test_a_name_is_not_given_to_other_inputs(server: Server, fake: FakeKFP, pipeline: Pipeline, compiled: Path) -> None:
    submitted(server, pipeline)
    with pytest.raises(FFNError, match="run demo of experiment ffn was made from other inputs; choose another --name"):
        submitted(server, kfp.load(compiled, {"source": "/mnt/data/b"}))
    assert len(fake.runs) == 1


@pytest.mark.parametrize("kind", ["reset", 500, 502, 503, 504, 429])
@pytest.mark.parametrize("applied", [False, True], ids=["lost", "done"])
def test_a_broken_submission_never_makes_two_runs(
    server: Server, fake: FakeKFP, pipeline: Pipeline, kind: str | int, applied: bool
) -> None:
    fake.faults = [Fault("POST runs", kind, applied=applied)]
    run, done = submitted(server, pipeline)
    assert [entry["run_id"] for entry in fake.runs] == [run]
    assert done == ("found" if applied else "made")
    assert posts(fake).count("POST runs") == (1 if applied else 2)


def test_an_answer_that_never_comes_is_looked_after(server: Server, fake: FakeKFP, pipeline: Pipeline) -> None:
    fake.faults = [Fault("POST runs", "silent", applied=True)]
    assert submitted(server, pipeline) == (fake.runs[0]["run_id"], "found")
    assert len(fake.runs) == 1


def test_trouble_while_looking_is_no_reason_to_make_another(server: Server, fake: FakeKFP, pipeline: Pipeline) -> None:
    first, _ = submitted(server, pipeline)
    fake.faults = [Fault("GET runs", 503, times=2), Fault("GET experiments", "reset")]
    assert submitted(server, pipeline) == (first, "found")


def test_of_two_jobs_at_one_moment_the_first_run_stays_and_is_the_run(
    server: Server, fake: FakeKFP, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Late(Server):
        """Does not see the run that another job is making."""

        def create(self, find: Any, call: Any, *given: Any, **more: Any) -> Any:
            return super().create((lambda: None) if call.__name__ == "run_service_create_run" else find, call, *given, **more)

    late = Late(**{name: getattr(server, name) for name in Server.__dataclass_fields__})
    first, _ = submitted(late, pipeline)
    list_ = FakeKFP._list

    def unseen(self: FakeKFP, kind: str, store: list[Any], query: dict[str, str]) -> Any:
        """The first look at the runs comes before the other job's run is there."""
        if kind == "runs":
            monkeypatch.setattr(FakeKFP, "_list", list_)
            return 200, {"runs": []}
        return list_(self, kind, store, query)

    monkeypatch.setattr(FakeKFP, "_list", unseen)
    assert submitted(late, pipeline)[0] == first
    assert [(run["state"], run.get("storage_state")) for run in fake.runs] == [("PENDING", None), ("FAILED", "ARCHIVED")]
    fake.runs[0]["state"] = "RUNNING"
    assert submitted(server, pipeline) == (first, "found")
    assert kfp.run_id(server, "demo", "ffn") == first


def test_a_run_beyond_the_first_page_is_found(server: Server, fake: FakeKFP, pipeline: Pipeline) -> None:
    first, _ = submitted(server, pipeline)
    (run,) = fake.runs
    archived = [{**run, "run_id": str(number), "created_at": "2025", "storage_state": "ARCHIVED"} for number in range(4)]
    fake.runs = [*archived, run]
    assert submitted(server, pipeline) == (first, "found")


@pytest.mark.parametrize("applied", [False, True], ids=["lost", "done"])
def test_a_retry_is_a_new_run_of_that_name_which_goes_on_with_the_old_one(
    server: Server, fake: FakeKFP, pipeline: Pipeline, applied: bool
) -> None:
    first, _ = submitted(server, pipeline)
    fake.runs[0]["state"] = "FAILED"
    assert submitted(server, pipeline) == (first, "found")
    fake.faults = [Fault("POST runs", "reset", applied=applied)]
    second, done = submitted(server, pipeline, retry=True)
    assert (done, [run["run_id"] for run in fake.runs]) == ("retried", [first, second])
    assert fake.runs[1]["runtime_config"]["parameters"] == {"source": "/mnt/data/a", "resumes": first}
    assert submitted(server, pipeline, retry=True) == (second, "found")  # it goes on
    fake.runs[1]["state"] = "FAILED"
    third, _ = submitted(server, pipeline, retry=True)  # the second may never have begun
    assert fake.runs[2]["runtime_config"]["parameters"]["resumes"] == f"{second} {first}"
    second = third
    del fake.runs[1]
    fake.runs[1]["state"] = "SUCCEEDED"
    assert submitted(server, pipeline, retry=True) == (second, "found")


def test_a_retry_waits_for_a_cancelled_run_to_end(
    server: Server, fake: FakeKFP, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _ = submitted(server, pipeline)
    fake.runs[0]["state"] = "CANCELING"
    monkeypatch.setattr(kfp, "SETTLE_SECONDS", 0.0)
    with pytest.raises(FFNError, match="is still being cancelled; the same command in a minute"):
        submitted(server, pipeline, retry=True)
    monkeypatch.setattr(kfp, "SETTLE_SECONDS", 10.0)
    fake.states = [look("FAILED")]  # type: ignore[assignment]
    second, done = submitted(server, pipeline, retry=True)
    assert (done, second == first) == ("retried", False)


@pytest.mark.parametrize(
    ("states", "best"),
    [
        (["FAILED", "RUNNING"], 1), (["RUNNING", "FAILED"], 0), (["SUCCEEDED", "FAILED"], 0), (["FAILED", "FAILED"], 1),
        (["PENDING", "RUNNING"], 0), (["SUCCEEDED", "RUNNING"], 1),
    ],
)  # fmt: skip
def test_of_several_runs_of_a_name_the_one_that_counts(states: list[str], best: int) -> None:
    assert kfp.best([{"run_id": str(number), "state": state} for number, state in enumerate(states)]) == {
        "run_id": str(best), "state": states[best],
    }  # fmt: skip


def test_what_the_server_says_of_a_wrong_body_is_passed_on(server: Server, fake: FakeKFP, pipeline: Pipeline) -> None:
    fake.faults = [Fault("POST runs", 400)]
    with pytest.raises(FFNError, match="refuses to create run: 400 trouble"):
        submitted(server, pipeline)


# --- who we are


def test_a_token_file_is_read_for_every_request(url: str, fake: FakeKFP, pipeline: Pipeline, tmp_path: Path) -> None:
    file = tmp_path / "token"
    server = quick(Endpoint(url=url, ui=url, token_file=str(file)))
    file.write_text("one\n")
    fake.token = "one"
    submitted(server, pipeline)
    fake.token = "two"
    with pytest.raises(Refused, match="answers 401 who are you"):
        submitted(server, pipeline)
    file.write_text("two\n")
    assert submitted(server, pipeline)[1] == "found"


def test_a_cookie_is_sent_as_it_is(url: str, fake: FakeKFP, pipeline: Pipeline) -> None:
    submitted(quick(Endpoint(url=url, ui=url, cookie="authservice_session=abc")), pipeline)
    assert {headers["Cookie"] for headers in fake.headers} == {"authservice_session=abc"}


def test_a_login_of_netrc_does_not_replace_our_token(
    url: str, fake: FakeKFP, pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login a password b\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    fake.token = "ours"
    assert submitted(quick(Endpoint(url=url, ui=url, token="ours")), pipeline)[1] == "made"


def test_an_authority_of_ones_own(fake: FakeKFP, pipeline: Pipeline, tmp_path: Path) -> None:
    crt, key = certificate(tmp_path)
    with serving(fake, (crt, key)) as url:
        with pytest.raises(FFNError, match=rf"{url}: certificate not trusted .*; FFN_KFP_CA names the authority's file"):
            submitted(quick(Endpoint(url=url, ui="")), pipeline)
        assert submitted(quick(Endpoint(url=url, ui="", ca=str(crt))), pipeline)[1] == "made"


def test_a_proxy_of_the_environment_is_used(url: str, fake: FakeKFP, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", url)
    assert submitted(quick(Endpoint(url="http://kfp.invalid", ui="")), pipeline)[1] == "made"
    monkeypatch.setenv("no_proxy", "kfp.invalid")
    with pytest.raises(Unreachable, match=r"kfp\.invalid"):
        submitted(quick(Endpoint(url="http://kfp.invalid", ui=""), patience=0.01), pipeline)


@pytest.mark.parametrize(("kind", "location"), [(302, "https://login.example/"), (401, ""), (403, ""), ("html", "")])
def test_a_page_to_log_in_is_a_refusal(server: Server, fake: FakeKFP, pipeline: Pipeline, kind: str | int, location: str) -> None:
    fake.faults = [Fault("GET experiments", kind, location=location)]
    with pytest.raises(Refused, match=location or "answers"):
        submitted(server, pipeline)
    assert fake.asked == ["GET experiments"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "FFN_KFP_URL='': expected the address"),
        ({"FFN_KFP_URL": "kfp.example"}, "FFN_KFP_URL='kfp.example'"),
        ({"FFN_KFP_URL": "http://k:port"}, "FFN_KFP_URL='http://k:port'"),
        ({"FFN_KFP_URL": "https://k", "FFN_KFP_CA": "/nowhere"}, "FFN_KFP_CA=/nowhere: no such file"),
        ({"FFN_KFP_URL": "http://k", "FFN_KFP_TOKEN": "a", "FFN_KFP_COOKIE": "b"}, "FFN_KFP_TOKEN and FFN_KFP_COOKIE are set"),
    ],
)
def test_an_endpoint_of_the_wrong_form_is_named(given: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    at(monkeypatch, **given)
    with pytest.raises(FFNError, match=said):
        Endpoint.from_environment()


def at(monkeypatch: pytest.MonkeyPatch, **given: str) -> None:
    monkeypatch.setenv("KUBECONFIG", os.devnull)
    for name in [name for name in os.environ if name.startswith(("FFN_KFP_", "MLFLOW_"))]:
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)


# --- watching


def task(number: int, name: str, state: str, **more: Any) -> dict[str, Any]:
    return {"task_id": str(number), "display_name": name, "state": state, **more}


def look(state: str, *tasks: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"state": state, "run_details": {"task_details": list(tasks)}, **more}


def watched(server: Server, run: str, hours: float = 1.0) -> tuple[Status, list[str]]:
    said: list[str] = []
    status = watching.watch(server, run, hours=hours, poll=0.01, say=said.append)
    return status, [" ".join(line.split()) for line in said]


def test_what_steps_do_is_said_once(server: Server, fake: FakeKFP, pipeline: Pipeline) -> None:
    run, _ = submitted(server, pipeline)
    noise = task(9, "begin-driver", "SUCCEEDED")
    begun = [noise, task(1, "begin", "SUCCEEDED")]
    fake.states = [
        look("PENDING"),
        look("RUNNING", noise, task(1, "begin", "RUNNING")),
        look("RUNNING", *begun, task(2, "train", "RUNNING"), task(3, "train", "RUNNING")),
        look("RUNNING", *begun, task(2, "train", "RUNNING"), task(3, "train", "RUNNING")),
        look("RUNNING", *begun, task(2, "train", "SUCCEEDED"), task(3, "train", "RUNNING")),
        look("SUCCEEDED", *begun, task(2, "train", "SUCCEEDED"), task(3, "train", "SUCCEEDED")),
    ]  # type: ignore[assignment]
    assert watched(server, run) == (
        Status.SUCCEEDED,
        [
            "run pending", "begin running", "run running", "begin succeeded", "train 2 running of 2",
            "train 1 running, 1 succeeded of 2", "train 2 succeeded of 2", "run succeeded",
        ],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("state", "status"),
    [("SUCCEEDED", Status.SUCCEEDED), ("SKIPPED", Status.SUCCEEDED), ("FAILED", Status.FAILED), ("CANCELED", Status.CANCELLED)],
)
def test_every_end_has_its_status(server: Server, fake: FakeKFP, pipeline: Pipeline, state: str, status: Status) -> None:
    run, _ = submitted(server, pipeline)
    fake.states = [look("RUNNING"), look("A_STATE_OF_TOMORROW"), look(state)]  # type: ignore[assignment]
    assert watched(server, run)[0] == status


def test_a_cancelled_run_is_not_called_failed_though_kfp_does(server: Server, fake: FakeKFP, pipeline: Pipeline) -> None:
    run, _ = submitted(server, pipeline)
    fake.states = [look("RUNNING"), look("FAILED", state_history=[{"state": "CANCELING"}, {"state": "FAILED"}])]  # type: ignore[assignment]
    assert watched(server, run)[0] == Status.CANCELLED


def test_a_failed_step_says_why(server: Server, fake: FakeKFP, pipeline: Pipeline) -> None:
    run, _ = submitted(server, pipeline)
    failed = task(2, "train", "FAILED", error={"code": 13, "message": "OOMKilled"})
    fake.states = [look("FAILED", failed, error={"message": "1 task failed"})]  # type: ignore[assignment]
    assert watched(server, run) == (
        Status.FAILED,
        ["train OOMKilled", "train 1 failed of 2", "run failed", "run: 1 task failed"],
    )


def test_trouble_in_mid_watch_is_sat_out(server: Server, fake: FakeKFP, pipeline: Pipeline) -> None:
    run, _ = submitted(server, pipeline)
    fake.states = [look("RUNNING"), look("SUCCEEDED")]  # type: ignore[assignment]
    fake.faults = [Fault("GET runs/.*", kind, times=2) for kind in (500, "reset", "silent", 503)]
    assert watched(server, run)[0] == Status.SUCCEEDED


def test_a_server_that_stays_away_is_unreachable(url: str, fake: FakeKFP, server: Server, pipeline: Pipeline) -> None:
    run, _ = submitted(server, pipeline)
    fake.faults = [Fault("GET runs/.*", 503, times=10_000)]
    with pytest.raises(Unreachable, match="503 trouble"):
        watching.watch(quick(server.endpoint, patience=0.2), run, hours=1, poll=0.01)


def test_the_deadline_holds_in_trouble_too(server: Server, fake: FakeKFP, pipeline: Pipeline) -> None:
    run, _ = submitted(server, pipeline)
    fake.states = [look("RUNNING")]  # type: ignore[assignment]
    assert watched(server, run, hours=0.1 / 3600)[0] == Status.TIMED_OUT
    fake.faults = [Fault("GET runs/.*", 503, times=10_000)]
    assert watched(server, run, hours=0.1 / 3600)[0] == Status.TIMED_OUT


# --- schedules


def put(server: Server, pipeline: Pipeline, cron: str = "0 2 * * 0") -> tuple[str, str]:
    made, done = kfp.schedule(server, pipeline, name="weekly", cron=cron, experiment="ffn")
    return made["recurring_run_id"], done


def test_a_schedule_is_made_kept_and_replaced(server: Server, fake: FakeKFP, pipeline: Pipeline) -> None:
    first, done = put(server, pipeline)
    assert done == "made"
    (entry,) = fake.recurringruns
    assert entry["trigger"] == {"cron_schedule": {"cron": "0 0 2 * * 0"}}
    assert (entry["mode"], entry["max_concurrency"], entry["no_catchup"]) == ("ENABLE", "1", True)
    entry["status"] = "DISABLED"
    assert put(server, pipeline) == (first, "found")
    assert entry["status"] == "ENABLED"
    second, done = put(server, pipeline, "0 3 * * 0")
    assert (done, [entry["recurring_run_id"] for entry in fake.recurringruns]) == ("replaced", [second])


def test_a_replacement_cut_off_is_ended_by_the_same_command(server: Server, fake: FakeKFP, pipeline: Pipeline) -> None:
    put(server, pipeline)
    fake.faults = [Fault("DELETE recurringruns/.*", 400)]
    with pytest.raises(FFNError):
        put(server, pipeline, "0 3 * * 0")
    assert len(fake.recurringruns) == 2
    assert put(server, pipeline, "0 3 * * 0")[1] == "replaced"
    assert [entry["trigger"]["cron_schedule"]["cron"] for entry in fake.recurringruns] == ["0 0 3 * * 0"]
    assert [going for _, going in kfp.unschedule(server, "weekly", "ffn")] == [None]
    assert kfp.schedules(server, "ffn") == []


@pytest.mark.parametrize("replaced", [False, True])
def test_a_schedule_whose_run_goes_on_is_disabled_and_deleted_when_that_has_ended(
    server: Server, fake: FakeKFP, pipeline: Pipeline, replaced: bool
) -> None:
    """KFP deletes the workflow of the run with the schedule: seen on a real server."""
    first, _ = put(server, pipeline)
    submitted(server, pipeline)
    fake.runs[0] |= {"state": "RUNNING", "recurring_run_id": first}

    def end() -> None:
        if replaced:
            put(server, pipeline, "0 3 * * 0")
        else:
            kfp.unschedule(server, "weekly", "ffn")

    end()
    assert [entry["status"] for entry in fake.recurringruns if entry["recurring_run_id"] == first] == ["DISABLED"]
    fake.runs[0]["state"] = "SUCCEEDED"
    end()
    assert first not in [entry["recurring_run_id"] for entry in fake.recurringruns]


@pytest.mark.parametrize("cron", ["", "daily", "0 2 * *", "0 2 * * 0 1 2", "a;b 2 * * 0"])
def test_a_cron_expression_of_the_wrong_form_is_named(cron: str) -> None:
    with pytest.raises(FFNError, match="expected five fields"):
        kfp.six_fields(cron)


# --- the compiled file


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({}, "parameter source is missing"),
        ({"source": "/a", "seed": 1}, "no parameter seed; it has name, "),
    ],
)
def test_parameters_must_be_the_pipelines(compiled: Path, parameters: dict[str, object], said: str) -> None:
    with pytest.raises(FFNError, match=said):
        kfp.load(compiled, parameters)


def test_a_tag_is_submitted_only_if_allowed(compiled: Path) -> None:
    compiled.write_text(compiled.read_text().replace(IMAGE, "ffn:latest"))
    with pytest.raises(FFNError, match=r"image ffn:latest is a tag; compile with FFN_IMAGE"):
        kfp.load(compiled, {"source": "/a"})
    assert kfp.load(compiled, {"source": "/a"}, allow_tag=True).digest


@pytest.mark.parametrize("text", ["", "a: [", "- 1", "a: 1", "\0"])
def test_a_file_that_is_no_pipeline_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(FFNError, match=r"x\.yaml: not a compiled pipeline"):
        kfp.load(tmp_path / "x.yaml", {})


# --- the command line


def test_submit_and_watch_in_one_command(
    url: str, fake: FakeKFP, compiled: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    at(monkeypatch, FFN_KFP_URL=url + "/", FFN_KFP_UI="https://kfp.example", MLFLOW_TRACKING_URI="http://mlflow")
    fake.states = [look("SUCCEEDED", task(1, "begin", "SUCCEEDED"))]  # type: ignore[assignment]
    command = ["cluster", "submit", str(compiled), "--data", "/mnt/data/a", "--set", "training.epochs=3", "--watch"]
    assert main(command) == 0
    out, err = capsys.readouterr()
    (run,) = fake.runs
    assert out.splitlines()[0] == run["run_id"]
    assert f"https://kfp.example/#/runs/details/{run['run_id']}" in err
    assert run["display_name"].startswith("ffn-")
    assert run["runtime_config"]["parameters"] == {
        "source": "/mnt/data/a", "source_version": "", "space": "3d", "overrides": ["training.epochs=3"],
    }  # fmt: skip
    assert main([*command, "--data-version", "2"]) == 0
    assert len(fake.runs) == 2
    assert main(["cluster", "watch", run["display_name"]]) == 0
    fake.states = [look("FAILED")]  # type: ignore[assignment]
    assert main(["cluster", "watch", run["run_id"]]) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["cluster", "submit", "PIPELINE", "--data", "recordings"], "--data recordings: expected an absolute path in the pod"),
        (["cluster", "submit", "PIPELINE", "--data", "/a", "--set", "training.epoch=1"], "did you mean training.epochs"),
        (["cluster", "submit", "PIPELINE", "--data", "/a", "--name", "a/b"], "--name 'a/b'"),
        (["cluster", "submit", "nowhere.yaml", "--data", "/a"], "nowhere.yaml: No such file"),
        (["cluster", "watch", "nobody"], "no run nobody in experiment ffn"),
        (["cluster", "watch", "8d0d3d54-5a14-4c0c-b6c0-3f3f0e3b9f3a"], "runs 8d0d3d54-5a14-4c0c-b6c0-3f3f0e3b9f3a not found"),
        (["cluster", "schedule", "PIPELINE", "--data", "/a", "--name", "n", "--cron", "x"], "--cron 'x'"),
        (["cluster", "unschedule", "nothing"], "no schedule nothing"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(
    arguments: list[str], said: str, url: str, compiled: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    at(monkeypatch, FFN_KFP_URL=url)
    assert main([str(compiled) if part == "PIPELINE" else part for part in arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("ffn: error: ")
    assert said in line


def test_a_refusal_and_an_absent_server_have_their_statuses(
    url: str, fake: FakeKFP, compiled: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    at(monkeypatch, FFN_KFP_URL=url, FFN_KFP_TOKEN="wrong")
    fake.token = "right"
    assert main(["cluster", "submit", str(compiled), "--data", "/a"]) == Status.REFUSED == 6
    assert "see FFN_KFP_TOKEN" in capsys.readouterr().err
    monkeypatch.setattr(Server, "from_environment", lambda: quick(Endpoint(url="http://127.0.0.1:9", ui=""), patience=0.05))
    assert main(["cluster", "watch", "demo"]) == Status.UNREACHABLE == 5
    assert "ffn: error: unreachable: http://127.0.0.1:9: list experiments: " in capsys.readouterr().err


def test_schedules_are_listed(
    url: str, fake: FakeKFP, compiled: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    at(monkeypatch, FFN_KFP_URL=url)
    assert main(["cluster", "schedule", str(compiled), "--data", "/mnt/a", "--name", "weekly", "--cron", "0 2 * * 0"]) == 0
    assert "name" not in fake.recurringruns[0]["runtime_config"]["parameters"]
    assert main(["cluster", "schedules"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split() == [
        "weekly", "0", "0", "2", "*", "*", "0", "enabled", fake.recurringruns[0]["recurring_run_id"],
    ]  # fmt: skip
    assert main(["cluster", "unschedule", "weekly"]) == 0
    assert fake.recurringruns == []


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("option", ["", "--cancel-on-exit"])
def test_leaving_detaches_or_cancels(
    url: str, fake: FakeKFP, server: Server, pipeline: Pipeline, number: int, status: int, option: str
) -> None:
    run, _ = submitted(server, pipeline)
    fake.runs[0]["state"] = "RUNNING"
    env = {name: value for name, value in os.environ.items() if not name.startswith(("FFN_", "MLFLOW_"))}
    env |= {"FFN_KFP_URL": url, "KUBECONFIG": os.devnull}
    command = [sys.executable, "-m", "pipeline.cli", "cluster", "watch", run, *filter(None, [option])]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # what is begun in a shell's background ignores it
    process = subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    signal.signal(signal.SIGINT, before)
    assert process.stdout
    for line in process.stdout:
        if line.split() == ["run", "running"]:
            break
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == status
    assert fake.runs[0]["state"] == ("FAILED" if option else "RUNNING")
    assert ("if MLflow calls the run RUNNING, the next one closes it" in err) == bool(option)
    assert (f"run {run} is asked to end" if option else f"`ffn cluster watch {run}` follows it again") in err
