"""`ffn version` and `ffn health`."""

import re

import pytest

from pipeline.cli import main


def test_version_and_health(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FFN_COMMIT", "abc")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("FFN_CHECKPOINTS", "s3://bucket/states")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    assert main(["version"]) == 0
    assert re.fullmatch(r"ffn \S+, commit abc\n", capsys.readouterr().out)
    assert main(["health"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [
        ["torch", "ok"], ["scratch", "ok"], ["MLflow", "ok"], ["states", "FAILED"], ["data", "ok"]
    ]  # fmt: skip
    assert "no connection with http://127.0.0.1:1" in lines[-2]
