"""A step's attempts in its pod: what is begun again, what is not, and what a second pod finds."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from mlflow import MlflowClient

import components
from components import Mistake, attempts, cluster, tracking
from components.attempts import ATTEMPTS, attempt, label
from ffn.errors import Fault
from tests.components.test_tracking import begun, inside

__all__ = ["inside"]

STEP = """
import os, signal, sys
from pathlib import Path
from components import step
from ffn.errors import Fault, FFNError

@step
def run(*, how: str, count: Path, parent: str) -> str:
    number = len(count.read_text()) if count.exists() else 0
    count.write_text("x" * (number + 1))
    match how:
        case "dies" | "dies once" if how == "dies" or number == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        case "breaks" | "breaks once" if how == "breaks" or number == 0:
            raise ZeroDivisionError("by a bug")
        case "mistake":
            raise FFNError("set.arrow: no such skeleton set")
        case "fault" | "fault once" if how == "fault" or number == 0:
            raise Fault("s3://states: no connection")
    return "done"
"""


@pytest.fixture
def counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A step `trial` that does as it is told, which also child processes find; the file counts its attempts."""
    package = tmp_path / "site" / "components" / "trial"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "step.py").write_text(STEP)
    (tmp_path / "site" / "sitecustomize.py").write_text(
        f"import components\ncomponents.__path__.append({str(tmp_path / 'site' / 'components')!r})\n"
    )
    root = str(Path(components.__file__).parents[1])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "site"), root]))
    monkeypatch.setattr(components, "__path__", [*components.__path__, str(tmp_path / "site" / "components")])
    monkeypatch.setattr(attempts, "PAUSE_SECONDS", 0.01)
    yield tmp_path / "count"
    for name in ("components.trial.step", "components.trial"):
        sys.modules.pop(name, None)


def given(how: str, count: Path, parent: str = "") -> dict[str, Any]:
    return {"how": how, "count": count, "parent": parent, "preset": "S4", "protocol": "p", "stream": "j", "seed": 0}


@pytest.mark.parametrize(
    ("how", "tries", "ends"),
    [
        ("well", 1, "done"), ("dies once", 2, "done"), ("breaks once", 2, "done"),
        ("dies", 3, 1), ("breaks", 3, 1), ("mistake", 1, 2), ("fault once", 2, "done"), ("fault", 3, 1),
    ],
)  # fmt: skip
def test_what_dies_is_begun_again_and_a_mistake_never(
    counted: Path, store: MlflowClient, monkeypatch: pytest.MonkeyPatch, how: str, tries: int, ends: str | int
) -> None:
    monkeypatch.setenv(ATTEMPTS, "3")
    parent = begun()
    if isinstance(ends, str):
        assert attempt("trial", given(how, counted, parent)) == ends
    else:
        with pytest.raises(SystemExit) as ended:
            attempt("trial", given(how, counted, parent))
        assert ended.value.code == ends
    assert len(counted.read_text()) == tries
    said = tracking.failure(parent, "trial S4/p/j")
    assert said == {
        "dies": "was killed (SIGKILL), most often for want of memory", "breaks": "ZeroDivisionError: by a bug",
        "mistake": "set.arrow: no such skeleton set", "fault": "s3://states: no connection",
    }.get(how, "")  # fmt: skip


@pytest.mark.parametrize("how", ["mistake", "breaks", "dies"])
def test_a_second_pod_of_a_step_that_has_ended_refuses_at_once(
    counted: Path, store: MlflowClient, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], how: str
) -> None:
    """A controller with the policy Always makes one; the same run retried by KFP makes one too."""
    monkeypatch.setenv(ATTEMPTS, "2")
    parent = begun()
    with pytest.raises(SystemExit):
        attempt("trial", given(how, counted, parent))
    before = len(counted.read_text())
    with pytest.raises(Mistake):
        attempt("trial", given("well", counted, parent))
    assert len(counted.read_text()) == before
    assert "trial S4/p/j failed before in this run: " in capfd.readouterr().err
    assert attempt("trial", given("well", counted, begun("another"))) == "done"


def test_a_pod_that_was_lost_left_no_word_and_its_successor_begins(
    counted: Path, store: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ATTEMPTS, "2")
    parent = begun()

    def lost(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt  # nothing after this runs, as after a SIGKILL of the whole pod

    with monkeypatch.context() as patched:
        patched.setattr(attempts.subprocess, "run", lost)
        with pytest.raises(KeyboardInterrupt):
            attempt("trial", given("well", counted, parent))
    assert attempt("trial", given("well", counted, parent)) == "done"


def test_on_one_machine_there_is_one_attempt_in_this_process(counted: Path, store: MlflowClient) -> None:
    parent = begun()
    with pytest.raises(ZeroDivisionError):
        attempt("trial", given("breaks", counted, parent))
    assert len(counted.read_text()) == 1
    assert tracking.failure(parent, "trial S4/p/j") == "ZeroDivisionError: by a bug"


def test_an_mlflow_that_is_away_does_not_hide_what_ended_the_step(
    counted: Path, store: MlflowClient, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def away(*_: str) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(tracking, "record_failure", away)
    with pytest.raises(Mistake, match=r"set\.arrow: no such skeleton set"):
        attempt("trial", given("mistake", counted, "parent"))
    assert "not recorded in MLflow: no route" in capsys.readouterr().out


def test_the_pods_last_words_name_the_step_and_what_it_said(
    counted: Path, store: MlflowClient, inside: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ATTEMPTS, "1")
    with pytest.raises(SystemExit):
        attempt("trial", given("dies", counted, begun()))
    assert cluster.TERMINATION.read_text().startswith("trial S4/p/j: was killed (SIGKILL)")
    cluster.leave_word("x" * 5000)
    assert len(cluster.TERMINATION.read_text()) == 4096


def test_artifacts_are_given_as_paths_and_the_rest_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    got: dict[str, Any] = {}
    step = ModuleType("components.trial.step")

    def run(*, data: Path, scores: list[Path], status: str, number: int) -> None:
        got.update(data=data, scores=scores, status=status, number=number)

    step.run = run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "components.trial.step", step)
    artifact: Callable[[str], Any] = lambda path: SimpleNamespace(path=path, metadata={})  # noqa: E731
    final = SimpleNamespace(state="FAILED", pipeline_job_resource_name="ffn-x")
    attempt("trial", {"data": artifact("/d"), "scores": [artifact("/s")], "status": final, "number": 1, "attempt": attempt})
    assert got == {"data": Path("/d"), "scores": [Path("/s")], "status": "FAILED", "number": 1}


def test_a_steps_label_is_what_its_inputs_say() -> None:
    assert label("begin", {"job": "x"}) == "begin"
    assert label("train", given("", Path())) == "train S4/p/j"
    assert label("fuse", {"preset": "S4", "protocol": "p", "seed": 2}) == "fuse S4/p/seed2"
    assert attempts._ended(-signal.SIGTERM) == "was ended by SIGTERM"


def test_what_nobody_can_tell_of_before_does_not_keep_a_step_from_beginning(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def away() -> str:
        raise Fault("Kubernetes at https://k does not answer: refused")

    monkeypatch.setattr("components.tracking.present", away)
    attempts._require_first("ingest", {})
    assert "whether ingest failed before in this run is not known: Kubernetes at https://k does not" in capsys.readouterr().out
