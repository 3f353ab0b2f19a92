"""The steps of the pipeline: each one's `step.py` is the work in plain Python, `wiring.py` what KFP sees of them."""

import functools
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import ParamSpec, TypeVar

from ffn.errors import Fault, FFNError

P = ParamSpec("P")
R = TypeVar("R")

LABEL = "FFN_STEP"
"""Variable with the label of the step that this process is: `attempts` sets it, `tracking` writes it to MLflow."""

IMAGE = "ffn-python:dev"
"""Image of every step; replaced by the one in the settings when the pipeline is compiled."""


def say(text: str) -> None:
    """One line for the person who watches the step."""
    print(f"ffn: {text}", flush=True)


class Mistake(SystemExit):
    """What a person can mend ended the step: it was said on stderr, and is this exception's text."""

    STATUS = 2

    def __init__(self, said: str) -> None:
        super().__init__(self.STATUS)
        self.said = said

    def __str__(self) -> str:
        return self.said


def step(run: Callable[P, R]) -> Callable[P, R]:
    """`run` as the main function of a process: what a person can mend is one line on stderr and a `Mistake`, exit status 2.

    A `Fault` is the line, and goes on.

    SIGTERM (an evicted pod, an interrupted local run) unwinds the step, so that its MLflow run is closed.
    """

    @functools.wraps(run)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
        in_main = threading.current_thread() is threading.main_thread()
        before = signal.signal(signal.SIGTERM, _terminated) if in_main else None
        try:
            return run(*args, **kwargs)
        except FFNError as error:
            print(f"ffn: error: {error}", file=sys.stderr, flush=True)
            if isinstance(error, Fault):
                raise
            raise Mistake(str(error)) from None
        finally:
            if in_main:
                signal.signal(signal.SIGTERM, before)

    return guarded


def _terminated(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)
