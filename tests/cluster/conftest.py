"""What tests of a real cluster need, made once: recordings in its store, a compiled pipeline, a restricted namespace."""

import os
import secrets
import subprocess
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import boto3
import numpy as np
import pytest
from botocore.config import Config

from pipeline.server import Server
from tests.cluster.lab import NEEDED, Lab
from tests.conftest import toy_recordings


def recordings(folder: Path, protocol: str) -> Path:
    """Recordings that are learnt at once, in our own table's form; two thirds train."""
    (folder / "keypoints").mkdir(parents=True)
    arrays, labels = toy_recordings(36)
    lines = [f"id,label,{protocol}"]
    for number, (array, label) in enumerate(zip(arrays, labels, strict=True)):
        np.savez(folder / "keypoints" / f"s{number:02d}.npz", keypoints=array.astype(np.float32))
        lines.append(f"s{number:02d},class-{label},{'test' if number % 9 > 5 else 'train'}")
    (folder / "labels.csv").write_text("\n".join(lines) + "\n")
    (folder / "layout.json").write_text('{"layout": "ntu25", "space": "3d"}')
    return folder


def upload(folder: Path, suffix: str, name: str) -> None:
    """Put what is in `folder` where a run finds its recordings."""
    where = urlsplit(os.environ["FFN_CLUSTER_RECORDINGS"])
    config = Config(s3={"addressing_style": "path"}, request_checksum_calculation="when_required")
    region = os.environ.get("AWS_DEFAULT_REGION", "us-east-1")
    store = boto3.client("s3", endpoint_url=os.environ["FFN_CLUSTER_S3_URL"], region_name=region, config=config)
    prefix = "/".join(filter(None, (where.path.strip("/"), suffix, name)))
    for file in folder.rglob("*.*"):
        store.upload_file(str(file), where.netloc, f"{prefix}/{file.relative_to(folder)}")


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """Skips where the environment names no cluster; ends the schedules that tests left."""
    if missing := [f"{name}, {what}" for name, what in NEEDED.items() if not os.environ.get(name)]:
        pytest.skip(f"no cluster: {missing[0]}")
    suffix = secrets.token_hex(3)
    namespace = os.environ.get("FFN_KFP_NAMESPACE") or "kubeflow"
    made = Lab(folder=tmp_path_factory.mktemp("cluster"), suffix=suffix, server=Server.from_environment(), namespace=namespace)
    upload(recordings(made.folder / "recordings", made.protocol), suffix, "good")
    made.kfp = str(made.folder / "pipeline.yaml")
    made.ffn("cluster", "compile", "--protocols", made.protocol, "--streams", "j", "--preset", "S4-small", "--out", made.kfp)
    space = f"restricted-{suffix}"
    subprocess.run(["kubectl", "create", "namespace", space], check=True, capture_output=True)
    subprocess.run(["kubectl", "label", "namespace", space, "pod-security.kubernetes.io/enforce=restricted"], check=True)
    made.before = made.elsewhere()
    try:
        yield made
    finally:
        for name in made.made:
            made.ffn("cluster", "unschedule", name, "--experiment", made.protocol, status=None)
        subprocess.run(["kubectl", "delete", "namespace", space, "--wait=false"], check=False)
