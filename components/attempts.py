"""The attempts of a step within its pod: a process each, begun again where it died, never where its user made a mistake.

KFP's launcher reports every end of a step as exit status 1, and whether Argo makes a failed pod again is a setting of the cluster:
neither can tell a mistake from a death. Here a mistake ends the step at once; a process that dies, of a bug, a server that is
away or a signal, is begun again and goes on from the states of its epochs. What ended a step for good is written to the parent
run in MLflow: a pod that Argo makes all the same finds it there and refuses at once. A pod that dies whole, deleted, evicted or
out of memory, leaves no such word, and its successor begins anew.
"""

import importlib
import inspect
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from components import LABEL, Mistake, cluster, say
from components.notify import notify
from ffn.errors import Fault, FFNError

ATTEMPTS = "FFN_ATTEMPTS"
"""Variable with the number of attempts; without it (on one machine) there is one, in this process."""

PAUSE_SECONDS = 10.0
"""Before the second attempt; three times as long before each further one."""

NAMES = ("preset", "protocol", "stream")


def attempt(step: str, given: Mapping[str, Any]) -> Any:
    """What `components.<step>.step.run` returns for what its component was `given` (`locals()`): artifacts are given as paths.

    What the step does not take names it: `train S4/ntu60-xsub/j`.
    Raises `Mistake` for what a person can mend, else the step's own error, or on a cluster SystemExit where no attempt is left.
    """
    inputs = {name: _plain(value) for name, value in given.items() if name != "attempt"}
    if ATTEMPTS not in os.environ:
        return _run(step, inputs, last=True)
    return _in_processes(step, inputs, attempts=int(os.environ[ATTEMPTS]))


def label(step: str, inputs: Mapping[str, Any]) -> str:
    """`train S4/ntu60-xsub/j`: which step, of what."""
    parts = [str(inputs[name]) for name in NAMES if name in inputs]
    seed = int(inputs.get("seed", 0))  # KFP makes 2.0 of 2
    return f"{step} {'/'.join([*parts, *([f'seed{seed}'] if seed else [])])}".strip()


def _plain(value: Any) -> Any:
    """An artifact as its path, the pipeline's final status as its state; everything else as it is."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if hasattr(value, "metadata") and hasattr(value, "path"):
        return Path(value.path)
    return value.state if hasattr(value, "pipeline_job_resource_name") else value


def _run(step: str, inputs: Mapping[str, Any], *, last: bool) -> Any:
    """The step in this process. An error that ends it for good is written down before it is raised."""
    os.environ[LABEL] = label(step, inputs)  # for what the step writes to MLflow
    try:
        run = importlib.import_module(f"components.{step}.step").run
        return run(**{name: inputs[name] for name in inspect.signature(run).parameters})
    except Mistake as mistake:
        _record(step, inputs, str(mistake))
        raise
    except Exception as error:
        if last:
            _record(step, inputs, str(error) if isinstance(error, Fault) else f"{type(error).__name__}: {error}")
        raise
    finally:
        del os.environ[LABEL]


def _record(step: str, inputs: Mapping[str, Any], said: str) -> None:
    cluster.leave_word(f"{label(step, inputs)}: {said}")
    if step == "finish":  # which would have told the others' failures
        notify(f"{inputs.get('job')}: its results could not be written, by finish: {said}")
    if step == "begin":
        return  # the run that it did not open is not its to mark
    from components import tracking

    try:
        if parent := inputs.get("parent") or tracking.present():
            tracking.record_failure(parent, label(step, inputs), said)
    except Exception as trouble:  # what ended the step is what matters
        say(f"not recorded in MLflow: {trouble}")


def _in_processes(step: str, inputs: Mapping[str, Any], *, attempts: int) -> Any:
    cluster.leave_word(label(step, inputs))  # what is left of a pod that is killed
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer"
        for number in range(1, attempts + 1):
            given = pickle.dumps((step, inputs, number, attempts, answer))
            done = subprocess.run([sys.executable, "-m", "components.attempts"], input=given, check=False)
            if done.returncode == 0:
                return pickle.loads(answer.read_bytes())
            if done.returncode == Mistake.STATUS:
                raise Mistake(answer.read_text())
            if number < attempts:
                pause = PAUSE_SECONDS * 3 ** (number - 1)
                say(f"attempt {number} of {attempts} {_ended(done.returncode)}; the next begins in {pause:.0f} s")
                time.sleep(pause)
    if done.returncode < 0:  # else it has recorded why itself
        _record(step, inputs, _ended(done.returncode))
    print(f"ffn: error: {label(step, inputs)} {_ended(done.returncode)}, attempt {attempts} of {attempts}", file=sys.stderr)
    raise SystemExit(1)


def _ended(status: int) -> str:
    if status == -signal.SIGKILL:
        return "was killed (SIGKILL), most often for want of memory"
    return f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"


def _one() -> None:
    """One attempt: what to do comes on stdin, what came of it goes to a file."""
    step, inputs, number, attempts, answer = pickle.load(sys.stdin.buffer)
    try:
        if number == 1:
            _require_first(step, inputs)
        answer.write_bytes(pickle.dumps(_run(step, inputs, last=number == attempts)))
    except Mistake as mistake:
        answer.write_text(str(mistake))
        raise
    except Fault:  # it has been said
        raise SystemExit(1) from None


def _require_first(step: str, inputs: Mapping[str, Any]) -> None:
    """Raise `Mistake` where an earlier pod of this run ended this step for good."""
    from components import tracking

    what = label(step, inputs)
    try:
        parent = inputs.get("parent") or tracking.present()
    except FFNError as error:
        say(f"whether {what} failed before in this run is not known: {error}")
        return
    if parent and (said := tracking.failure(parent, what)):
        text = f"{what} failed before in this run: {said}; `ffn cluster submit --retry` begins a new one that goes on from here"
        print(f"ffn: error: {text}", file=sys.stderr)
        cluster.leave_word(f"{what}: failed before in this run: {said}")
        raise Mistake(said)


if __name__ == "__main__":
    _one()
