"""Where a version comes from, and how a person names one."""

import mlflow
import pytest
from mlflow import MlflowClient

from components import registry, tracking
from ffn.errors import FFNError
from ffn.report import Result


def registered(store: MlflowClient, *names: str, parent: str = "") -> list[registry.Version]:
    """A version per name, in that order, made by a run of its own under `parent`."""
    experiment = store.get_run(parent).info.experiment_id if parent else store.create_experiment("models")
    tags = {"mlflow.parentRunId": parent} if parent else {}
    made = []
    for number, name in enumerate(names):
        run = store.create_run(experiment, tags=tags).info.run_id
        said = {"protocol": "p", "preset": "S4", **tracking.lineage(parent)}
        made.append(registry.register(name, f"runs:/{run}/model", key=f"{name} {number}", run=run, tags=said))
    return made


def test_a_version_says_which_run_code_and_data_it_comes_from(store: MlflowClient) -> None:
    parent = tracking.begin("demo", {})
    assert tracking.lineage(parent) == {"run": "demo", "mlflow_run": parent}
    said = {name: f"the {name}" for name in tracking.LINEAGE}
    for name, value in said.items():
        store.set_tag(parent, tracking.LINEAGE[name], value)
    (version,) = registered(store, "ffn-p", parent=parent)
    assert version.tags.items() >= {**said, "run": "demo", "mlflow_run": parent}.items()
    assert tracking.lineage("") == {}


def test_a_version_that_is_found_again_keeps_what_it_said(store: MlflowClient) -> None:
    (first,) = registered(store, "ffn-p")
    again = registry.register("ffn-p", "runs:/x/model", key="ffn-p 0", run=first.run, tags={"git_commit": "later"})
    assert (again.number, again.tags) == (first.number, first.tags)


@pytest.mark.parametrize("text", ["ffn-p/1", "models:/ffn-p/1", "ffn-p@champion", "models:/ffn-p@champion", "ffn-p/01"])
def test_a_version_has_several_names(store: MlflowClient, text: str) -> None:
    one, _ = registered(store, "ffn-p", "ffn-p")
    for alias in ("previous", "champion"):
        registry.point(one, alias)
    found = registry.find(text)
    assert (found.uri, found.aliases, found.run) == ("models:/ffn-p/1", ("champion", "previous"), one.run)
    assert found.registered


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("ffn-q/1", "no model 'ffn-q' registered in sqlite:.*did you mean ffn-p"),
        ("ffn-p/4", "ffn-p: no version 4: expected one of 2, 1$"),
        ("ffn-p@champ", "ffn-p: no alias 'champ': did you mean champion"),
        ("ffn-e@champion", "ffn-e: no alias 'champion': it has none"),
        ("ffn-e/1", "ffn-e: no version 1: it has none"),
        ("ffn-p", "ffn-p: expected a version, as ffn-PROTOCOL/NUMBER or ffn-PROTOCOL@ALIAS"),
        ("ffn-p/latest", "ffn-p/latest: expected a version"),
    ],
)
def test_what_names_no_version_is_said_with_what_is_near(store: MlflowClient, text: str, said: str) -> None:
    one, _ = registered(store, "ffn-p", "ffn-p")
    registry.point(one, "champion")
    store.create_registered_model("ffn-e")
    with pytest.raises(FFNError, match=said):
        registry.find(text)


def test_an_empty_registry_is_no_list_of_names(store: MlflowClient) -> None:
    with pytest.raises(FFNError, match="there are none; `ffn run` makes some"):
        registry.find("ffn-p/1")


def test_what_was_measured_is_found_by_the_run_that_registered(store: MlflowClient, monkeypatch: pytest.MonkeyPatch) -> None:
    parent = tracking.begin("demo", {})
    (version,) = registered(store, "ffn-p", parent=parent)
    given = [
        Result(preset="S4", protocol=protocol, stream=stream, seed=0, top1=top1)
        for protocol, stream, top1 in (("p", "2s", 0.9), ("p", "b", 0.7), ("p", "j", 0.8), ("q", "j", 0.1))
    ]
    asked: list[str] = []
    monkeypatch.setattr(registry, "results", lambda run: asked.append(run) or given)
    before = registry.Version(name="ffn-p", number="1", tags={"protocol": "p", "preset": "S4"}, run=version.run)
    for one in (version, before):
        assert list(registry.measured(one).items()) == [("j", 0.8), ("b", 0.7), ("2s", 0.9)]
    assert asked == [parent, parent]
    assert registry.measured(registry.Version(name="ffn-p", number="1", tags={}, run="0" * 32)) == {}


def test_names_of_candidates_and_champions_say_each_other() -> None:
    candidate = registry.Version(name="ffn-p-candidates", number="3", tags={})
    assert (candidate.called, candidate.champions, registry.candidates("ffn-p")) == ("ffn-p-candidates/3", "ffn-p", candidate.name)
    assert registry.candidates(candidate.name) == candidate.name


def test_an_mlflow_that_does_not_answer_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    monkeypatch.setenv(registry.RETRIES, "0")
    with pytest.raises(FFNError, match=r"^MLflow at http://127\.0\.0\.1:1: .*refused"), registry.asked_by_a_person():
        registry.models()
    monkeypatch.delenv(registry.RETRIES)
    with registry.asked_by_a_person():
        assert mlflow.environment_variables.MLFLOW_HTTP_REQUEST_MAX_RETRIES.get() == 2
    assert mlflow.environment_variables.MLFLOW_HTTP_REQUEST_MAX_RETRIES.get() > 2
