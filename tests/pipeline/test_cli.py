"""The command line: one clear line for a mistake, steps on paths, the exit status."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from ffn.data.synth import write_ntu
from ffn.errors import FFNError
from pipeline import local
from pipeline.cli import main
from pipeline.local import Workspace, alone, last_line, workspace
from pipeline.local import run as run_here
from pipeline.predict import load

TINY = ["training.epochs=1", "training.batch_size=8", "model.width=8", "model.depths=1", "clip.frames=8", "clip.test_clips=1"]
SETTINGS = [part for setting in TINY for part in ("--set", setting)]


@pytest.fixture(scope="session")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("raw") / "ntu"
    write_ntu(folder, repeats=2)
    return folder


def test_every_step_runs_alone_on_paths(
    raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FFN_WORKSPACE", str(tmp_path / "workspace"))
    assert main(["ingest", str(raw), "--out", "set.arrow"]) == 0
    for stream in ("j", "b"):
        assert (
            main(
                [
                    "train",
                    "--data",
                    "set.arrow",
                    "--protocol",
                    "ntu60-xsub",
                    "--stream",
                    stream,
                    *SETTINGS,
                    "--seed",
                    "3",
                    "--out",
                    stream,
                ]
            )
            == 0
        )
        assert main(["evaluate", "--data", "set.arrow", "--checkpoint", stream, "--out", f"{stream}.arrow"]) == 0
    assert main(["fuse", "j.arrow", "b.arrow", "--out", "fused"]) == 0
    assert json.loads(Path("fused/result.json").read_text())["weights"] == {"j": 1.0, "b": 1.0}
    assert json.loads(Path("j/config.json").read_text())["config"]["training"]["seed"] == 3
    assert "ntu60-xsub/2s: top1 " in capsys.readouterr().out
    assert main(["predict", str(next(raw.glob("*.skeleton"))), "--checkpoint", "j", "--top", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    shares = [float(line.split("%")[0]) for line in lines]
    assert shares == sorted(shares, reverse=True)
    assert main(["predict", str(next(raw.glob("*.skeleton"))), "--checkpoint", "j", "b", "--every", "20"]) == 0
    spans = [tuple(map(int, line.split()[:2])) for line in capsys.readouterr().out.splitlines()]
    assert spans == [(start, start + 8) for start in range(0, spans[-1][1], 20)]
    assert not (tmp_path / "workspace" / "mlflow.db").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "--data", "nowhere"], "nowhere: no such file or folder"),
        (["run", "--data", ".", "--preset", "S5"], "unknown preset 'S5'"),
        (["run", "--data", ".", "--set", "training.epoch=1"], "did you mean training.epochs"),
        (["run", "--data", ".", "--presets", "S0,S5"], "unknown preset 'S5'"),
        (["run", "--data", ".", "--set", "training.seed=1"], "the seed is an input of its own"),
        (["cluster", "compile", "--presets", "S5", "--out", "x.yaml"], "unknown preset 'S5'"),
        (["cluster", "compile", "--out", "x"], "--out x: expected a name that ends with .yaml"),
        (["run", "--data", ".", "--set", "training.epochs=0"], "training.epochs=0: expected"),
        (["run", "--data", ".", "--name", "a/b"], "--name 'a/b'"),
        (["run", "--data", ".", "--protocols", "ntu60-xsub,it's"], 'protocol "it\'s"'),
        (["run", "--data", ".", "--workspace", "python3/x"], "kfp.local rewrites the text 'python3'"),
        (["train", "--data", "x.arrow", "--protocol", "p", "--stream", "j", "--out", "o"], "x.arrow: no such skeleton set"),
        (["evaluate", "--data", "x.arrow", "--checkpoint", "c", "--out", "o"], "x.arrow: no such skeleton set"),
        (["fuse", "x.arrow", "--out", "o"], "x.arrow: no such scores"),
        (["export", "--checkpoint", "c", "--out", "o"], "c: not a checkpoint"),
        (["predict", "x.skeleton", "--checkpoint", "c", "--every", "0"], "--every 0: expected at least 1 frame"),
        (["register", "j", "--fused", "f", "--data", "x.arrow"], "f: not fused scores"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("MLFLOW_TRACKING_URI", "FFN_ARTIFACTS"):  # `register` sets them for its process
        monkeypatch.setenv(name, "")
    try:
        status: object = main(arguments)
    except SystemExit as ended:
        status = ended.code
    assert status == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("ffn: error: ")
    assert said in line
    assert list(tmp_path.iterdir()) == []


def test_unknown_streams_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["run", "--data", ".", "--streams", "j,x"])
    assert "unknown stream x; expected some of j, b, jm, bm" in capsys.readouterr().err


def test_an_interrupt_is_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pipeline.local.run", interrupted)
    assert main(["run", "--data", "."]) == 130
    assert capsys.readouterr().err == "ffn: interrupted; the same command goes on where it stopped\n"


def test_output_that_nobody_reads_is_no_traceback(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "pipeline.cli", "synth", str(tmp_path / "s"), "--repeats", "2"]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


def test_help_is_instant() -> None:
    heavy = {"kfp", "kfp_server_api", "kubernetes", "mlflow", "numpy", "torch", "yaml"}
    code = f"import sys, pipeline.cli, components.cluster; print(*({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip() == ""


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("noise\nffn: error: the file is cut\n[noise]\n", "the file is cut"),
        ("Traceback\n\nValueError: x\n", "ValueError: x"),
        ("", "(nothing)"),
    ],
)
def test_a_failed_steps_clear_line_is_found(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "log").write_text(text)
    assert last_line(tmp_path / "log") == said


def test_one_name_is_run_once_at_a_time(tmp_path: Path) -> None:
    here = Workspace(root=tmp_path / "workspace")

    def again() -> None:
        run_here(source=tmp_path, protocols=["p"], streams=["j"], presets=["S4"], name="demo", workspace=here)

    with alone(here.root / "logs" / "demo", "demo"), pytest.raises(FFNError, match="run demo is going on already"):
        again()
    with alone(here.root / "logs" / "demo", "demo"):
        pass


def test_a_list_of_names_is_code_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = tmp_path / "ffn" / "data" / "resources" / "names.txt"
    names.parent.mkdir(parents=True)
    monkeypatch.setattr(local, "ROOT", tmp_path)
    names.write_text("a")
    before = local.code_digest()
    names.write_text("b")
    assert local.code_digest() != before


def test_the_command_that_shows_the_runs_can_be_pasted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    root = tmp_path / "my runs"
    assert shlex.split(workspace(root).ui())[-1] == f"sqlite:///{root}/mlflow.db"


def test_one_of_several_champions_is_to_be_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from components import registry

    for name in ("MLFLOW_TRACKING_URI", "FFN_ARTIFACTS"):  # `predict` sets them for its process
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(registry, "registered", lambda: ["ffn-p", "ffn-p-candidates", "ffn-q", "ffn-r"])
    monkeypatch.setattr(
        registry, "champion", lambda name: None if name == "ffn-r" else registry.Version(name=name, number="1", tags={})
    )
    with pytest.raises(FFNError, match=r"2 champions: ffn-p, ffn-q; choose one with --model$"):
        load("", (), Workspace(root=tmp_path))
    with pytest.raises(FFNError, match="ffn-r: no champion; registered models: ffn-p, ffn-p-candidates, ffn-q, ffn-r"):
        load("ffn-r", (), Workspace(root=tmp_path))
