"""CI files: pinned actions, least permissions, and commands that the command line knows."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.cli import parser
from tests.k8s.conftest import ROOT

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def read(path: Path) -> dict[str, Any]:
    return dict(yaml.safe_load(path.read_text()))


def steps(workflow: dict[str, Any]) -> list[dict[str, Any]]:
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_actions_are_pinned_and_rights_are_least(path: Path) -> None:
    workflow = read(path)
    for line in re.findall(r"uses: .*", path.read_text()):
        assert re.fullmatch(r"uses: [\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", line), line
    assert workflow["permissions"] == {}
    assert "group" in workflow["concurrency"]
    for name, job in workflow["jobs"].items():
        assert job["timeout-minutes"] <= 360, name
        rights = job["permissions"]
        assert {what for what, right in rights.items() if right == "write"} <= {"packages", "id-token", "pull-requests"}, name
        # What may write to a pull request runs none of its code.
        assert not ("pull-requests" in rights and any("checkout" in step.get("uses", "") for step in job["steps"])), name
    for step in steps(workflow):
        assert "${{" not in step.get("run", ""), "expressions in scripts are injected code"
        if "actions/checkout@" in step.get("uses", ""):
            assert step["with"]["persist-credentials"] is False


def test_who_changes_production_is_asked() -> None:
    jobs = {job["environment"] for path in WORKFLOWS for job in read(path)["jobs"].values() if "environment" in job}
    assert jobs == {"training", "production"}
    (job,) = read(ROOT / ".github/workflows/promote.yml")["jobs"].values()
    assert job["environment"] == "production"


def test_a_pull_request_trains_its_own_code_and_makes_no_champion() -> None:
    jobs = read(ROOT / ".github/workflows/pipeline.yml")["jobs"]
    (compiling,) = [step["env"] for step in jobs["run"]["steps"] if "ffn cluster compile" in step.get("run", "")]
    assert compiling["FFN_IMAGE"] == "${{ needs.image.outputs.image }}"
    assert compiling["FFN_PROMOTE"] == "0"
    head = "${{ github.event.pull_request.head.sha || github.sha }}"
    (built,) = [step["with"] for step in jobs["image"]["steps"] if "actions/checkout@" in step.get("uses", "")]
    (compiled,) = [step["with"] for step in jobs["run"]["steps"] if "actions/checkout@" in step.get("uses", "")]
    assert (jobs["image"]["env"]["COMMIT"], jobs["run"]["env"]["NAME"]) == (head, f"ci-{head}")
    assert built["ref"] == "${{ env.COMMIT }}"
    assert compiled["ref"].startswith("${{ github.event.pull_request.base.sha || github.sha }}")


def test_no_code_of_a_pull_request_runs_beside_secrets() -> None:
    """A job that has one is of a workflow that the base branch says, and checks out what the repository has already."""
    guarded = []
    for path in WORKFLOWS:
        workflow: dict[Any, Any] = read(path)
        triggers = workflow[True]  # YAML 1.1 reads `on` so
        for name, job in workflow["jobs"].items():
            if "secrets." in str(job) or "environment" in job:
                guarded.append(name)
                assert "pull_request" not in triggers, (path.name, name)
                for step in job["steps"]:
                    if "actions/checkout@" in step.get("uses", "") and "pull_request_target" in triggers:
                        assert ".head." not in step["with"].get("ref", ".head."), (path.name, name)
    assert guarded == ["run", "promote"]


def test_workflows_and_docs_give_commands_that_exist(capsys: pytest.CaptureFixture[str]) -> None:
    """Every `ffn ...` of the workflows and the pages, as the command line reads it."""
    scripts = "\n".join(step["run"] for path in WORKFLOWS for step in steps(read(path)) if "run" in step)
    pages = [page.read_text() for page in sorted((ROOT / "docs").glob("*.md"))]
    indented = [line[4:] for page in pages for line in page.splitlines() if line.startswith("    ")]
    text = "\n".join([scripts, *indented]).replace('"${again[@]}"', "--retry").replace("\\\n", " ")
    commands = [shlex.split(line, comments=True) for line in re.findall(r"^\s*(ffn .*)$", text, re.MULTILINE)]
    verbs = {words[2] if words[1] in ("cluster", "model") else words[1] for words in commands}
    assert verbs >= {"compile", "diff", "list", "promote", "rollback", "submit"}
    for words in commands:
        parser().parse_args(words[1:])


def test_the_operations_page_names_files_that_are_there() -> None:
    page = (ROOT / "docs/operations.md").read_text()
    named = set(re.findall(r"(?<![\w/])((?:k8s|\.github)/[\w./-]*\w)", page))
    assert len(named) > 10
    assert [path for path in sorted(named) if not any((ROOT / f"{path}{end}").exists() for end in ("", ".example"))] == []
