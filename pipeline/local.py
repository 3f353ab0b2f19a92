"""The pipeline on this machine: every step a process; MLflow in a file, nothing else to install.

`kfp.local` runs the graph; what of it has to be ours instead is in `pipeline/replaced.py`.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, Self

from ffn import config as configuration
from ffn.data.ingest import source_version
from ffn.errors import FFNError
from ffn.machine import cores
from ffn.protocols import require_name
from pipeline import replaced
from pipeline.settings import Settings, policy

ROOT = Path(__file__).resolve().parent.parent
GRACE_SECONDS = 10
"""Between asking the steps to end and killing them."""
AT_ONCE = 2
"""Streams that kfp.local trains at once."""
KILLED = "killed, by hand or for lack of memory"
"""What a step that got SIGKILL would say."""


@dataclass(frozen=True, kw_only=True)
class Workspace:
    """The folder in which a machine keeps everything: runs, models, states, outputs, logs."""

    root: Path

    @property
    def tracking_uri(self) -> str:
        """MLflow's store: the environment's, or a file in the workspace."""
        return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{self.root / 'mlflow.db'}"

    def environment(self) -> dict[str, str]:
        """What a process needs to use this workspace."""
        given = {"MLFLOW_TRACKING_URI": self.tracking_uri, "MLFLOW_DISABLE_TELEMETRY": "true"}
        if self.tracking_uri.startswith("sqlite:"):
            given["FFN_ARTIFACTS"] = (self.root / "mlartifacts").as_uri()
        return given

    def ui(self) -> str:
        """The command that serves the runs of a database in the workspace; nothing where a server does already."""
        if not self.tracking_uri.startswith("sqlite:"):
            return ""
        mlflow = str(Path(sys.executable).with_name("mlflow"))
        command = shlex.join([mlflow, "ui", "--workers", "1", "--backend-store-uri", self.tracking_uri])
        return f"MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false {command}"


def workspace(path: Path | str | None = None) -> Workspace:
    """The workspace at `path`, else at FFN_WORKSPACE, else `.ffn` where the command runs."""
    return Workspace(root=Path(path or os.environ.get("FFN_WORKSPACE", ".ffn")).resolve())


def run(
    *,
    source: Path | str,
    protocols: Sequence[str],
    streams: Sequence[str],
    presets: Sequence[str],
    seeds: Sequence[int] = (0,),
    overrides: Sequence[str] = (),
    space: str = "3d",
    name: str = "",
    workspace: Workspace,
) -> str:
    """Run the whole pipeline; returns how it ended and its results as Markdown.

    `source` is a path or `s3://BUCKET/NAME`.

    Raises `FFNError` for input that does not fit, `StepFailed` where a step failed, KeyboardInterrupt when interrupted.
    """
    for preset in presets:
        configuration.require_trainable(configuration.recipe(preset, overrides, seeds[0]))
    for protocol in protocols:
        require_name("protocol", protocol)
    if name:
        require_name("--name", name)
    source, version = located(source)
    for path in (workspace.root, source):
        replaced.require_untouched(path)
    compared = len(presets) * len(seeds) > 1
    inputs = [version, space, *map(list, (presets, seeds, overrides, protocols, streams))]
    name = name or f"{'comparison' if compared else presets[0]}-{configuration.digest(*inputs)[:8]}"

    from kfp import local

    from pipeline.dag import build

    logs = workspace.root / "logs" / name
    threads = max(1, cores() // min(AT_ONCE, len(streams)))
    settings = Settings(
        image="local-python",
        checkpoints=str(workspace.root / "checkpoints"),
        local=True,
        promote=os.environ.get("FFN_PROMOTE") != "0",
        **asdict(policy()),
        environment={
            "FFN_CODE": code_digest(),
            "FFN_LOCKS": str(workspace.root / "logs"),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(threads),
        },
    )
    pipeline = build(protocols, streams, settings, presets=presets, seeds=seeds)
    kfp_root = workspace.root / "kfp"
    # A step that is not told its run, so that others find what it made, looks here.
    told = {**workspace.environment(), "FFN_RUN": name}
    steps = Steps(logs=logs, cache=kfp_root / "cache", environment=told, compared=compared)
    with alone(steps.logs, name):
        trained = f"presets {', '.join(presets)} x seeds {', '.join(map(str, seeds))}" if compared else f"preset {presets[0]}"
        print(f"run {name}: {len(protocols)} protocols x {len(streams)} streams, {trained}; logs in {steps.logs}", flush=True)
        with steps.watching():
            local.init(
                runner=local.SubprocessRunner(use_venv=False),
                pipeline_root=str(kfp_root),
                enable_caching=True,
                cache_root=str(steps.cache),
            )
            try:
                pipeline(source=str(source), source_version=version, space=space, name=name, overrides=list(overrides))
            except KeyboardInterrupt:
                steps.close(name)
                raise
            except RuntimeError as error:
                if steps.failed:
                    raise steps.failed[0] from None
                raise FFNError(f"the pipeline failed outside its steps: {error}") from error
    return Path(steps.outputs["finish"]["table"]).read_text()


def located(source: Path | str) -> tuple[str, str]:
    """Where every step finds `source`, and the version that names its state. Raises `FFNError` where there is none."""
    from components import storage

    if storage.remote(source):
        return str(source), storage.version(str(source))
    return str(Path(source).resolve()), source_version(Path(source))


@contextlib.contextmanager
def alone(folder: Path, name: str) -> Iterator[None]:
    """Hold the run's lock inside the block. Raises `FFNError` where another process holds it; a killed one does not."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FFNError(f"run {name} is going on already in {folder}; wait for its end, or choose another --name") from None
        yield


class StepFailed(Exception):
    """A step ended with an error: which one, what it said last, its exit status."""

    def __init__(self, label: str, status: int, said: str, log: Path) -> None:
        super().__init__(f"step {label} failed (exit status {status}): {said}; everything it said: {log}")
        self.status, self.said = status, said


@dataclass(kw_only=True)
class Steps:
    """The steps' processes: starts them for kfp.local, speaks of them, ends them."""

    logs: Path
    cache: Path
    environment: Mapping[str, str]
    compared: bool = False
    """Whether several presets or seeds run, so that a step's label has to name its own."""
    outputs: dict[str, dict[str, str]] = field(default_factory=dict)
    """Step -> its output artifacts' paths, of those that ran."""
    failed: list[StepFailed] = field(default_factory=list)
    stopped: bool = False
    _processes: set["subprocess.Popen[str]"] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Inside the block kfp.local starts its processes here and is otherwise silent."""
        self.logs.mkdir(parents=True, exist_ok=True)
        self._scratch = self.logs / "tmp"
        self._scratch.mkdir(exist_ok=True)
        self._out = sys.stdout
        in_main = threading.current_thread() is threading.main_thread()
        handlers = {number: signal.signal(number, self._interrupt) for number in (signal.SIGINT, signal.SIGTERM) if in_main}
        try:
            with replaced.replaced(self._start, self._cached, lambda text: self.say("kfp", text)):
                yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            shutil.rmtree(self._scratch, ignore_errors=True)

    def close(self, name: str) -> None:
        """After an interrupt: wait for the steps to end, then close the parent run."""
        deadline = time.monotonic() + GRACE_SECONDS
        for process in list(self._processes):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
        self._signal(signal.SIGKILL)
        code = f"from components import tracking; tracking.end(tracking.parent({name!r}).id, 'KILLED')"
        subprocess.run([sys.executable, "-c", code], env=self._env(), capture_output=True, check=False)

    def _start(self, full_command: list[str], env_vars: Mapping[str, str] | None = None) -> int:
        """Stands in for kfp.local's `run_local_subprocess`: the step's exit status."""
        if self.stopped:
            return 128 + signal.SIGTERM
        step = _Task.of(full_command, compared=self.compared)
        log = self.logs / f"{step.label.replace(' ', '-').replace('/', '-')}.log"
        began = time.monotonic()
        self.say(step.label, "started")
        with log.open("w") as everything:
            process = subprocess.Popen(
                full_command, env={**self._env(), **(env_vars or {})}, start_new_session=True, text=True,
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=everything,
            )  # fmt: skip
            with self._lock:
                self._processes.add(process)
            if self.stopped:
                self._end(process, signal.SIGTERM)
            assert process.stdout
            for line in process.stdout:
                everything.write(line)
                everything.flush()
                if line.startswith("ffn: "):
                    self.say(step.label, line.removeprefix("ffn: ").rstrip())
            status = process.wait()
            with self._lock:
                self._processes.remove(process)
        if status:
            failure = StepFailed(
                step.label, status, KILLED if status in (128 + signal.SIGKILL, -signal.SIGKILL) else last_line(log), log
            )
            if not self.stopped:
                self.failed.append(failure)
                self.say(step.label, f"failed after {time.monotonic() - began:.1f} s: {failure.said}")
        else:
            self.outputs[step.name] = step.outputs
            self.say(step.label, f"done in {time.monotonic() - began:.1f} s")
        return status

    def say(self, label: str, text: str) -> None:
        with self._lock:
            self._out.write(f"{label:<26} {text}\n")
            self._out.flush()

    def _cached(self, task: str, key: str) -> None:
        self.say(_cached_label(task, self.cache, key, self.compared), "cached")

    def _interrupt(self, number: int, frame: FrameType | None) -> NoReturn:
        self.stopped = True
        self._signal(signal.SIGTERM)
        raise KeyboardInterrupt

    def _signal(self, number: int) -> None:
        for process in list(self._processes):
            self._end(process, number)

    @staticmethod
    def _end(process: "subprocess.Popen[str]", number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)

    def _env(self) -> dict[str, str]:
        return {**os.environ, **self.environment, "TMPDIR": str(self._scratch), "PYTHONUNBUFFERED": "1"}


@dataclass(frozen=True, kw_only=True)
class _Task:
    """What a step's command line says of it."""

    name: str
    label: str
    """`train ntu60-xsub/j`, as far as its inputs say."""
    outputs: dict[str, str]
    """Output artifact -> path."""

    @classmethod
    def of(cls, command: Sequence[str], *, compared: bool) -> Self:
        name = command[command.index("--function_to_execute") + 1]
        said = json.loads(command[command.index("--executor_input") + 1])
        facts: dict[str, Any] = {}
        for artifacts in said.get("inputs", {}).get("artifacts", {}).values():
            first, *others = [artifact.get("metadata", {}) for artifact in artifacts["artifacts"]]
            facts |= {key: value for key, value in first.items() if all(other.get(key) == value for other in others)}
        facts |= said.get("inputs", {}).get("parameterValues", {})
        outputs = {key: value["artifacts"][0]["uri"] for key, value in said["outputs"].get("artifacts", {}).items()}
        return cls(name=name, label=_label(name, facts, compared), outputs=outputs)


def _label(step: str, facts: Mapping[str, Any], compared: bool) -> str:
    model = re.match(r"models:/ffn-([^/]+)/", str(facts.get("model", "")))
    parts = [facts.get("protocol") or (model[1] if model else None), facts.get("stream")]
    if compared and "seed" in facts:
        parts = [facts["preset"], *parts, f"seed{facts['seed']}"]
    return f"{step} {'/'.join(str(part) for part in parts if part)}".strip()


def _cached_label(task: str, cache: Path, key: str, compared: bool) -> str:
    """The label of a step that did not run, from the metadata of what it wrote when it did."""
    facts: dict[str, Any] = {}
    for entry in cache.glob(f"{key}*.json"):
        for output in json.loads(entry.read_text()).values():
            facts |= output.get("metadata", {}) if isinstance(output, dict) else {"model": output}
    return _label(task, facts, compared)


def code_digest() -> str:
    """Names the code of the steps, which kfp.local's cache keys leave out."""
    code = [path for room in ("ffn", "components") for path in (ROOT / room).rglob("*.py")]
    files = sorted([*code, *(ROOT / "ffn" / "data" / "resources").iterdir()])
    return configuration.digest([(str(path.relative_to(ROOT)), hashlib.sha256(path.read_bytes()).hexdigest()) for path in files])


def last_line(log: Path) -> str:
    """The line of a step's log that says what went wrong: its clear one, or else its last."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    clear = [line.removeprefix("ffn: error: ") for line in lines if line.startswith("ffn: error: ")]
    return (clear or lines or ["(nothing)"])[-1]
