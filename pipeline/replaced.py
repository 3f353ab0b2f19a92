"""What of `kfp.local` is replaced while a pipeline runs, and what of it is relied on: all of it here.

It offers no other way to have a step's process started by us (so that a person reads one line per event, the rest goes to a log
file, and an interrupt ends every step), to silence it, or to hear of a cache hit. Each of these places is looked at before a run
begins: where kfp has changed, the run says so and does not start.

Source: kfp 2.17.0, sdk/python/kfp/local: subprocess_task_handler.py:108 (`run_local_subprocess`) and :139, logging_utils.py:82
(`indented_print`), orchestrator/task_executor.py:120 (a cache hit), cache.py:111 (an entry's name).
"""

import builtins
import contextlib
import importlib
import importlib.metadata
import inspect
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ffn.errors import FFNError

Start = Callable[..., int]
"""`(full_command: list[str], env_vars: Mapping[str, str] | None) -> int`: runs a step's process, returns its exit status."""

HIT = re.compile(r"Task (\S+) cache hit \(key=(\w+)")
"""What kfp.local logs of a step whose outputs it found, with the beginning of its key."""

RELIED_ON: Mapping[str, tuple[str, ...]] = {
    "subprocess_task_handler": (
        "def run_local_subprocess(\n    full_command: List[str],\n    env_vars: Optional[Dict[str, str]] = None,\n) -> int:",
        "return_code = run_local_subprocess(\n                full_command=full_command,\n",
        "el.replace('python3', ",
    ),
    "logging_utils": ("original_print = builtins.print",),
    "orchestrator.task_executor": ("f'Task {task_name} cache hit (key={cache_key[:12]}); '",),
    "task_dispatcher": ("finished with status",),
    "cache": ("return os.path.join(self.cache_root, f'{key}.json')",),
}
"""Module of kfp.local -> what its text must hold."""


def changed(texts: Mapping[str, str]) -> list[str]:
    """The modules of `RELIED_ON` whose text is not what we rely on, each with the line that is missing."""
    return [f"{name}: {line!r}" for name, lines in RELIED_ON.items() for line in lines if line not in texts[name]]


def require_known() -> Any:
    """The module that starts processes. Raises `FFNError` where the installed kfp is not the one that this was written for."""
    version = importlib.metadata.version("kfp")
    advice = "install the version of constraints.txt, or mend pipeline/replaced.py"
    try:
        modules = {name: importlib.import_module(f"kfp.local.{name}") for name in RELIED_ON}
    except ImportError as error:
        raise FFNError(f"kfp {version} has no {error.name}, which local runs rely on; {advice}") from None
    if missing := changed({name: inspect.getsource(module) for name, module in modules.items()}):
        raise FFNError(f"kfp {version} has changed where local runs rely on it, kfp.local.{missing[0]}; {advice}")
    return modules["subprocess_task_handler"]


def require_untouched(path: Path | str) -> None:
    """Raises `FFNError` for a path that kfp.local would change in a step's command line."""
    if "python3" in str(path):
        raise FFNError(f"{path}: kfp.local rewrites the text 'python3' in every path; use a folder without it in its name")


@contextlib.contextmanager
def replaced(start: Start, cached: Callable[[str, str], None], warned: Callable[[str], None]) -> Iterator[None]:
    """Inside the block kfp.local starts steps by `start`, and is silent but for what it tells `cached` (a task and the beginning
    of its key) and `warned` (its warnings and errors, but not that a step failed). Raises `FFNError` as `require_known`."""
    handler = require_known()
    root, theirs, speak = logging.getLogger(), handler.run_local_subprocess, builtins.print
    level = root.level

    def heard(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if hit := HIT.match(text):
            cached(hit[1], hit[2])
        elif record.levelno >= logging.WARNING and "finished with status" not in text:
            warned(text)
        return False

    root.addFilter(heard)
    root.setLevel(logging.INFO)
    handler.run_local_subprocess = start
    try:
        with open(os.devnull, "w") as silence, contextlib.redirect_stdout(silence):
            yield
    finally:
        handler.run_local_subprocess = theirs
        builtins.print = speak  # kfp.local indents it, and parallel steps leave it so
        root.removeFilter(heard)
        root.setLevel(level)
