"""`ffn model`: what its list and its comparison say."""

import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from mlflow import MlflowClient

from components import registry, tracking
from components.gate.step import Verdict
from components.promote.step import promote
from components.registry import Version
from ffn.data.store import SkeletonSet
from pipeline import difference, models
from pipeline.cli import main
from pipeline.difference import Change, Facts, changes, class_changes, packages, report, settings
from tests.components.test_steps import Pipeline

WHEN = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def version(number: int, name: str = "ffn-p", aliases: tuple[str, ...] = (), **tags: str) -> Version:
    return Version(name=name, number=str(number), tags=tags, registered=WHEN, aliases=aliases)


def test_a_line_per_version_under_its_model() -> None:
    whole = {"protocol": "p", "preset": "S4", "top1": "0.5", "data_digest": "d" * 16, "run": "first", "git_commit": "c" * 40}
    champion = version(1, aliases=("champion",), candidate="ffn-p-candidates/10", gate="promote", **whole)
    candidates = [version(10, aliases=("challenger",), gate="promote", **whole), version(9)]
    listed = models.table({"ffn-p": [champion], "ffn-p-candidates": candidates})
    assert listed.splitlines() == [
        "ffn-p",
        "  version  aliases     gate          protocol  preset     top1  data              run    commit   registered (UTC)",
        "        1  champion    candidate 10  p         S4      50.00 %  dddddddddddddddd  first  ccccccc  2026-01-02 03:04",
        "",
        "ffn-p-candidates",
        "  version  aliases     gate          protocol  preset     top1  data              run    commit   registered (UTC)",
        "       10  challenger  promote       p         S4      50.00 %  dddddddddddddddd  first  ccccccc  2026-01-02 03:04",
        "        9  -           -             -         -             -  -                 -      -        2026-01-02 03:04",
    ]


def test_programs_read_the_same_list(store: MlflowClient, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = store.create_run(store.create_experiment("models")).info.run_id
    for name in ("ffn-p", "ffn-p", "ffn-q", "of others"):
        key = f"{name} {len(store.search_model_versions(''))}"
        made = registry.register(name, f"runs:/{run}/{len(key)}", key=key, run=run, tags={"top1": "0.25", "git_commit": "c" * 40})
    registry.point(made, "champion")
    place = ["--workspace", str(tmp_path)]
    assert main(["model", "list", "--json", *place]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(one["model"], one["version"]) for one in found] == [("ffn-p", 2), ("ffn-p", 1), ("ffn-q", 1)]
    assert (found[0]["top1"], found[0]["git_commit"], found[0]["data_digest"], found[0]["aliases"]) == (0.25, "c" * 40, None, [])
    assert main(["model", "list", "of others", *place]) == 0
    assert " champion " in capsys.readouterr().out
    assert main(["model", "list", "ffn-r", *place]) == 2
    assert "did you mean ffn-" in capsys.readouterr().err


def test_an_empty_registry_says_where_it_looked(store: MlflowClient, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model", "list"]) == 0
    assert capsys.readouterr().out == f"no models registered in sqlite:///{tmp_path}/mlflow.db; `ffn run` makes some\n"


@pytest.mark.parametrize(
    ("a", "b", "rows"),
    [
        ("wrs", "wrs", []),
        ("wrs", "wr", [("number", "3", "2"), ("removed", "s", "-")]),
        ("wr", "wsr", [("number", "2", "3"), ("added", "-", "s")]),
        ("wrs", "wsr", [("order", "2. r ...", "2. s ...")]),
        ("wrs", "swt", [("removed", "r", "-"), ("added", "-", "t"), ("order", "1. w ...", "1. s ...")]),
        ("a", "abcdefghi", [("number", "1", "9"), ("added", "-", "b, c, d, e, f, g and 2 more")]),
    ],
)
def test_classes_come_go_and_move(a: str, b: str, rows: list[tuple[str, str, str]]) -> None:
    found = class_changes(tuple(a), tuple(b))
    assert [(change.fact, change.a, change.b) for change in found] == rows


def test_settings_are_one_value_unless_the_streams_disagree() -> None:
    config = {"preset": "S4", "model": {"width": 8, "depths": [1, 2]}}
    assert settings({"j": config, "b": config}) == {"preset": "S4", "model.width": "8", "model.depths": "1,2"}
    other = {"preset": "S4", "model": {"width": 16, "depths": [1, 2]}}
    assert settings({"j": config, "b": other})["model.width"] == "j 8, b 16"


def test_packages_are_those_of_the_models_files() -> None:
    said = packages("python: 3.11.7\ndependencies:\n- -r requirements.txt\n", "torch==2.13.0\nmlflow[auth]==3.17.2\nnumpy\n")
    assert said == {"python": "3.11.7", "torch": "2.13.0", "mlflow[auth]": "3.17.2", "numpy": "any"}


def known(number: int, **parts: dict[str, str]) -> Facts:
    every = {"code": {}, "data": {}, "streams": {"weights": "j 1"}, "settings": {"preset": "S4"}, "accuracy": {}, "packages": {}}
    return Facts(version=version(number), parts={**every, **parts}, classes=("walk", "run"))


def test_what_only_one_version_has_is_absent_or_was_not_recorded() -> None:
    a = known(1, accuracy={"j": "50.00 %"}, packages={"numpy": "2.0", "numba": "0.61"})
    b = known(2, code={"image": "i"}, accuracy={"j": "50.00 %", "b": "25.00 %"}, packages={"numpy": "2.0"})
    assert changes(a, b) == [
        Change(part="code", fact="image", a="(not recorded)", b="i"),
        Change(part="accuracy", fact="b", a="-", b="25.00 %"),
        Change(part="packages", fact="numba", a="0.61", b="-"),
    ]
    (forgotten,) = changes(known(1), known(2, accuracy={"j": "50.00 %"}))
    assert forgotten.a == "(not recorded)"


def test_the_report_shows_what_differs_and_names_the_rest() -> None:
    image = "registry.example/ffn@sha256:" + "0" * 64
    a = known(1, code={"commit": "a" * 40, "image": image}, accuracy={"j": "50.00 %", "b": "25.00 %"})
    b = known(2, code={"commit": "b" * 40 + "-dirty", "image": image[:-64] + "1" * 64}, accuracy={"j": "62.50 %", "b": "25.00 %"})
    assert report(a, b).splitlines() == [
        "ffn-p/1    registered 2026-01-02 03:04 UTC  run (not recorded)",
        "ffn-p/2    registered 2026-01-02 03:04 UTC  run (not recorded)",
        "",
        "                  ffn-p/1                                   ffn-p/2",
        "code      commit  aaaaaaa                                   bbbbbbb-dirty",
        "          image   registry.example/ffn@sha256:000000000000  registry.example/ffn@sha256:111111111111",
        "accuracy  j       50.00 %                                   62.50 % (+12.50)",
        "",
        "code: git log --oneline aaaaaaaaaaaa..bbbbbbbbbbbb",
        "-dirty: the code had changes that are in no commit",
        "",
        "same: streams (weights), accuracy (b), 1 setting, 2 classes",
        "not recorded: code (pipeline version), data (samples, training samples, held-out samples)",
    ]


def test_changed_code_is_never_the_same_code() -> None:
    dirty = known(1, code={"commit": "a" * 40 + "-dirty"})
    (change,) = changes(dirty, replace(dirty, version=version(2)))
    assert change.a == change.b == "aaaaaaa-dirty"
    assert "nothing that is recorded differs" in report(known(1), known(2))
    assert "git log" not in report(dirty, replace(dirty, version=version(2)))


def test_two_versions_of_a_pipeline_compared_on_the_command_line(
    store: MlflowClient, toy: SkeletonSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = Pipeline(toy.path, tmp_path / "1")
    for name in ("git_commit", "pipeline_version"):  # as of a version that is older than these facts
        store.delete_tag(steps.parent, tracking.LINEAGE[name])
    first = registry.at(steps.register())
    promote(first, Verdict(promote=True, reason="the first", digest=first.tags["digest"], champion="none"), "the first")
    second = Pipeline(toy.path, tmp_path / "2", name="second")
    for name, value in {"git_commit": "c" * 40, "image": "ffn@sha256:1", "pipeline_version": "7"}.items():
        store.set_tag(second.parent, tracking.LINEAGE[name], value)
    second.register("training.epochs=1", "clip.rotate=0.5")
    capsys.readouterr()

    assert main(["model", "diff", "ffn-p@champion", "ffn-p-candidates/2", "--workspace", str(tmp_path)]) == 0
    said = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert [line.partition(" registered ")[0] for line in said[:2]] == ["ffn-p/1 champion", "ffn-p-candidates/2 challenger"]
    assert said[1].endswith("UTC run second")
    lines = {
        "code commit (not recorded) ccccccc",
        "image (not recorded) ffn@sha256:1",
        "pipeline version (not recorded) 7",
        "settings clip.rotate 0.0 0.5",
        "training.epochs 2 1",
    }
    assert lines <= set(said)
    facts = difference.facts(registry.find("ffn-p-candidates/2"))
    assert facts.parts["data"].items() >= {"samples": "24", "training samples": "16", "held-out samples": "8"}.items()
    assert (list(facts.parts["accuracy"]), facts.classes) == (["j", "b", "2s"], toy.classes)

    assert main(["model", "diff", "ffn-p/1", "ffn-p@champion", "--workspace", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "ffn-p/1 and ffn-p@champion are the same version: ffn-p/1\n"
    assert main(["model", "diff", "ffn-p/1", "ffn-p-candidates/7", "--workspace", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "ffn: error: ffn-p-candidates: no version 7: expected one of 2, 1\n"
    (tmp_path / "artifacts").rename(tmp_path / "gone")
    assert main(["model", "diff", "ffn-p/1", "ffn-p-candidates/2", "--workspace", str(tmp_path)]) == 2
    assert "models:/ffn-p/1: artifacts/fused/fusion.json cannot be read" in capsys.readouterr().err
