"""What is replaced inside kfp.local: the kfp that is installed has it, another one is refused, and nothing stays replaced."""

import builtins
import inspect
import logging

import pytest
from kfp.local import logging_utils, subprocess_task_handler

from ffn.errors import FFNError
from pipeline import replaced


def test_the_installed_kfp_is_the_one_this_was_written_for() -> None:
    assert replaced.require_known() is subprocess_task_handler


@pytest.mark.parametrize("module", replaced.RELIED_ON)
def test_a_kfp_that_has_changed_is_refused_before_a_run_begins(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replaced, "RELIED_ON", {**replaced.RELIED_ON, module: ("def something_else(",)})
    with (
        pytest.raises(FFNError, match=rf"kfp 2\.\S+ has changed .* kfp\.local\.{module}: 'def something_else\('; install"),
        replaced.replaced(lambda *_: 0, lambda *_: None, lambda _: None),
    ):
        raise AssertionError


def test_a_kfp_without_a_module_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replaced, "RELIED_ON", {"orchestrated": ()})
    with pytest.raises(FFNError, match=r"kfp 2\.\S+ has no kfp\.local\.orchestrated, which local runs rely on"):
        replaced.require_known()


def test_kfp_is_silent_but_for_cache_hits_and_what_it_warns_of(capsys: pytest.CaptureFixture[str]) -> None:
    cached: list[tuple[str, str]] = []
    warned: list[str] = []
    with replaced.replaced(lambda *_: 0, lambda *hit: cached.append(hit), warned.append):
        logging.info("Task train cache hit (key=0123456789ab); skipping execution.")
        for level in (logging.INFO, logging.WARNING, logging.ERROR):
            logging.log(level, f"level {level}")
        logging.error("Task 'train' finished with status FAILURE")  # the step's own word of it is enough
        print("kfp's")
    assert cached == [("train", "0123456789ab")]
    assert warned == ["level 30", "level 40"]
    assert capsys.readouterr().out == ""


def test_nothing_stays_replaced() -> None:
    theirs, speak, filters = subprocess_task_handler.run_local_subprocess, builtins.print, list(logging.getLogger().filters)
    started: list[list[str]] = []

    def start(full_command: list[str], env_vars: object = None) -> int:
        started.append(full_command)
        return 0

    def interrupted() -> None:
        with replaced.replaced(start, lambda *_: None, lambda _: None):
            assert subprocess_task_handler.run_local_subprocess(["step"]) == 0
            logging_utils.indented_print().__enter__()  # as two steps at once leave it
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert started == [["step"]]
    assert (subprocess_task_handler.run_local_subprocess, builtins.print) == (theirs, speak)
    assert list(logging.getLogger().filters) == filters
    assert inspect.signature(start).parameters.keys() == inspect.signature(theirs).parameters.keys()
