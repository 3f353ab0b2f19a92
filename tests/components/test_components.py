"""The seam between a component and its step, and what a step's process does with an error."""

import ast
import importlib
import inspect
import os
import signal
import textwrap
from pathlib import Path

import pytest

import components
from ffn.errors import FFNError

STEPS = sorted(path.parent.name for path in Path(components.__file__).parent.glob("*/step.py"))


def test_every_step_has_its_component() -> None:
    assert STEPS == ["begin", "evaluate", "finish", "fuse", "gate", "ingest", "promote", "register", "train"]
    assert [path.parent.name for path in sorted(Path(components.__file__).parent.glob("*/component.py"))] == STEPS


@pytest.mark.parametrize("name", STEPS)
def test_a_component_is_one_call_of_its_step_with_exactly_its_arguments(name: str) -> None:
    component = getattr(importlib.import_module(f"components.{name}.component"), name)
    run = importlib.import_module(f"components.{name}.step").run
    body = ast.parse(textwrap.dedent(inspect.getsource(component.python_func)))
    calls = [
        node for node in ast.walk(body) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "run"
    ]
    assert len(calls) == 1
    assert not calls[0].args
    given, wanted = {keyword.arg for keyword in calls[0].keywords}, inspect.signature(run).parameters
    assert given == set(wanted)
    assert all(parameter.kind is parameter.KEYWORD_ONLY for parameter in wanted.values())


def test_a_mistake_is_one_line_and_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    @components.step
    def run() -> None:
        raise FFNError("set.arrow: no such skeleton set")

    with pytest.raises(SystemExit) as ended:
        run()
    assert ended.value.code == 2
    assert capsys.readouterr().err == "ffn: error: set.arrow: no such skeleton set\n"


def test_a_bug_keeps_its_traceback() -> None:
    @components.step
    def run() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run()


def test_a_step_that_is_asked_to_end_unwinds() -> None:
    unwound = []

    @components.step
    def run() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            signal.sigtimedwait([], 5)
        finally:
            unwound.append(True)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        run()
    assert ended.value.code == 128 + signal.SIGTERM
    assert unwound == [True]
    assert signal.getsignal(signal.SIGTERM) is before
