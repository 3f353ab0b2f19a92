"""The seam between a component and its step, and what a step's process does with an error."""

import importlib
import inspect
import os
import signal
from pathlib import Path

import pytest

import components
from components import wiring
from ffn.errors import FFNError

STEPS = sorted(path.parent.name for path in Path(components.__file__).parent.glob("*/step.py"))


@pytest.mark.parametrize("name", STEPS)
def test_a_component_gives_its_step_every_argument(name: str) -> None:
    given = inspect.signature(getattr(wiring, name).python_func).parameters
    wanted = inspect.signature(importlib.import_module(f"components.{name}.step").run).parameters
    assert set(wanted) <= set(given)
    assert set(given) - set(wanted) <= {"preset", "protocol", "stream", "seed", "parent"}  # what names it
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
