"""Exports compute what the model does that they were made of, and are published whole or not at all."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ffn import export as exporting
from ffn.checkpoint import Checkpoint
from ffn.config import FUSIONS, override, preset
from ffn.errors import FFNError
from ffn.export import TOLERANCE, Recognition, export, folded, run
from ffn.inference import FusedModel, windows, with_clips
from ffn.layouts import COCO17, NTU25
from ffn.model.network import build
from ffn.recogniser import Recogniser
from tests.conftest import recordings

LAYOUT = {"3d": NTU25, "2d": COCO17}
SMALL = ["model.width=8", "clip.frames=12", "clip.test_clips=3"]
SHALLOW = [*SMALL, "model.depths=1,1"]
PRESETS = {
    **dict.fromkeys(("S0", "S0-2", "S1", "S3-cvsta", "S3-mscam", "S4"), SHALLOW),
    **dict.fromkeys(("S4-small", "ST-GCN++", "AAGCN", "CTR-GCN", "MS-G3D"), SMALL),
}
SIZE = (1280, 720)
CLASSES = 3


def lively(network: nn.Module, joints: int) -> nn.Module:
    """`network` with statistics and parameters that a training would leave; its logits differ by about one between clips."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in network.state_dict().items():
        if "running_var" in name:
            tensor.uniform_(0.5, 2, generator=generator)
        elif tensor.is_floating_point():
            tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.05)
    (classifier,) = (module for module in network.modules() if isinstance(module, nn.Linear) and module.out_features == CLASSES)
    with torch.no_grad():
        logits = network.eval()(torch.randn(8, 2, 12, joints, 3, generator=generator))
        classifier.weight /= logits.std(0)[:, None]
        classifier.bias.sub_(logits.mean(0)).div_(logits.std(0))
    return network


def made(name: str, space: str, weights: dict[str, float], settings: list[str] | None = None) -> FusedModel:
    config = override(preset(name), PRESETS[name] if settings is None else settings)

    def meta(stream: str) -> Checkpoint:
        return Checkpoint(
            config=config, layout=LAYOUT[space], space=space, classes=("sit", "stand", "wave"), protocol="p", stream=stream,
            data_digest="d", key="k", image_size=SIZE if space == "2d" else (0, 0),
        )  # fmt: skip

    torch.manual_seed(0)  # some networks see hardly any difference between recordings
    nets = {stream: lively(build(config.model, LAYOUT[space], CLASSES), len(LAYOUT[space].joints)) for stream in weights}
    return FusedModel(streams={stream: (meta(stream), net) for stream, net in nets.items()}, weights=weights)


def padded(arrays: list[np.ndarray]) -> np.ndarray:
    """Recordings as one tensor (N, 2, L, V, 3), zeros where there is nothing."""
    x = np.zeros((len(arrays), 2, max(a.shape[1] for a in arrays), *arrays[0].shape[2:]), np.float32)
    for row, a in zip(x, arrays, strict=True):
        row[: len(a), : a.shape[1]] = a
    return x


def hard(space: str) -> list[np.ndarray]:
    """Recordings of all lengths, with gaps, a main person who comes second, and one person in the second place alone."""
    arrays = [a.astype(np.float32) for a in recordings(space, 8)]
    arrays[0][:, 2:5] = 0
    arrays[1][0, arrays[1].shape[1] // 3 :] = 0
    arrays[1][1] = arrays[1][0, ::-1] + 1
    arrays[3] = np.concatenate([np.zeros_like(arrays[2]), arrays[2]])
    return arrays


@pytest.mark.parametrize("space", ["2d", "3d"])
@pytest.mark.parametrize("name", PRESETS)
def test_a_folded_network_computes_the_same(name, space):
    ((meta, network),) = made(name, space, {"j": 1.0}).streams.values()
    light = folded(network.double())  # so that only a wrong formula differs
    for batch in (1, 5):
        x = torch.randn(batch, 2, 12, len(meta.layout.joints), 3, generator=torch.Generator().manual_seed(batch)).double()
        with torch.inference_mode():
            torch.testing.assert_close(light(x), network(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("space", ["2d", "3d"])
@pytest.mark.parametrize(("name", "sampling"), [("S4", "uniform"), ("S4", "random"), ("CTR-GCN", "uniform")])
def test_the_graph_prepares_as_ingestion_and_sampler_do(name, sampling, space):
    for clips in (1, 3):
        settings = [*PRESETS[name], f"clip.sampling={sampling}"]
        model = with_clips(made(name, space, FUSIONS["4s"], settings), clips)
        whole = Recognition(model).eval()
        expected = model.predict(hard(space), SIZE)
        assert np.ptp(expected, 0).max() > 0.01, "recordings must make a difference"
        with torch.inference_mode():
            got = whole(torch.from_numpy(padded(hard(space))), *[torch.tensor(SIZE, dtype=torch.float32)] * (space == "2d"))
        np.testing.assert_allclose(got, expected, atol=TOLERANCE)


def test_one_person_alone_is_a_clip_with_nobody_beside():
    model = made("S4", "3d", {"j": 1.0})
    alone = recordings("3d")[0].astype(np.float32)
    assert len(alone) == 1
    with torch.inference_mode():
        got = Recognition(model).eval()(torch.from_numpy(alone[None]))
    np.testing.assert_allclose(got, model.predict([alone]), atol=TOLERANCE)


@pytest.fixture(scope="module")
def onnx_3d(tmp_path_factory) -> tuple[FusedModel, Path]:
    model = made("S4", "3d", {"j": 1.0, "bm": 0.5})
    return with_clips(model, 1), export(model, tmp_path_factory.mktemp("onnx") / "made")


@pytest.mark.slow
def test_onnx_gives_the_models_probabilities(onnx_3d):
    model, folder = onnx_3d
    assert sorted(file.name for file in folder.iterdir()) == ["model.json", "model.onnx", "recogniser.py"]
    recogniser = Recogniser(folder, threads=2)
    expected = model.predict(hard("3d"))
    np.testing.assert_allclose(recogniser.probabilities(hard("3d")), expected, atol=TOLERANCE)
    np.testing.assert_allclose(recogniser.probabilities(hard("3d")[:1]), expected[:1], atol=TOLERANCE)
    whole = recogniser._alone.run(None, {"keypoints": padded(hard("3d"))})[0]
    np.testing.assert_allclose(whole, expected, atol=TOLERANCE)
    assert recogniser.classes == ["sit", "stand", "wave"]
    assert json.loads(recogniser._alone.get_modelmeta().custom_metadata_map["ffn"]) == recogniser.about


@pytest.mark.slow
def test_the_folder_runs_without_torch_and_ffn(onnx_3d, tmp_path):
    model, folder = onnx_3d
    x = np.concatenate([np.zeros((1, 14, 25, 3), np.float32), recordings("3d", 4)[2].astype(np.float32)[:, :12]], 1)
    np.save(tmp_path / "x.npy", x)
    code = (
        "import sys, runpy; sys.modules.update(dict.fromkeys(['torch', 'ffn', 'pyarrow']));"
        "runpy.run_path(sys.argv.pop(1), run_name='__main__')"
    )

    def said(*options: str) -> list[str]:
        command = [sys.executable, "-c", code, str(folder / "recogniser.py"), str(tmp_path / "x.npy"), *options]
        return subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path).stdout.splitlines()

    p = model.predict([x])[0]
    assert said() == [f"{100 * p[k]:5.1f} %  {model.classes[k]}" for k in p.argsort()[::-1]]
    first, *_, last = said("--every", "7")
    assert first.split() == ["0", "12", "-", "nobody", "visible"]
    best = model.predict([x[:, 14:26]])[0]
    assert last == f"    14     26  {100 * best.max():5.1f} %  {model.classes[best.argmax()]}"


@pytest.mark.slow
def test_onnx_of_a_rival_in_2d(tmp_path):
    model = made("CTR-GCN", "2d", {"jm": 1.0}, [*SMALL, "clip.sampling=random"])
    folder = export(model, tmp_path / "made", clips=2)
    expected = with_clips(model, 2).predict(hard("2d"), SIZE)
    np.testing.assert_allclose(Recogniser(folder).probabilities(hard("2d")), expected, atol=TOLERANCE)
    other = with_clips(model, 2).predict(hard("2d"), (640, 480))
    np.testing.assert_allclose(Recogniser(folder).probabilities(hard("2d"), (640, 480)), other, atol=TOLERANCE)


@pytest.mark.slow
def test_torch_program(tmp_path):
    model = made("S0", "2d", {"j": 1.0, "b": 1.0}, [*SHALLOW, "clip.sampling=random"])
    folder = export(model, tmp_path / "made", format="torch")
    assert sorted(file.name for file in folder.iterdir()) == ["model.json", "model.pt2"]
    np.testing.assert_allclose(
        run(folder, padded(hard("2d")), SIZE), with_clips(model, 1).predict(hard("2d"), SIZE), atol=TOLERANCE
    )


def test_an_export_that_differs_is_not_published(tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "traced", lambda model: torch.export.export(nn.Identity(), (torch.zeros(1),)))
    monkeypatch.setattr(exporting, "run", lambda folder, x, size: np.full((1, 3), 1 / 3))
    with pytest.raises(FFNError, match="the export differs from the model by"):
        export(made("S0", "3d", {"j": 1.0}), tmp_path / "made", format="torch")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clips": 0}, "clips=0: expected at least 1"),
        ({"format": "onnx"}, r"needs onnxscript: pip install 'ffn-skeleton\[export\]'"),
    ],
)
def test_what_cannot_be_exported_is_said_at_once(options, message, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "traced", lambda model: pytest.fail("traced"))
    if "format" in options:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "onnxscript" else object())
    with pytest.raises(FFNError, match=message):
        export(made("S0", "3d", {"j": 1.0}), tmp_path / "made", **options)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FFNError, match=r"holds notes.txt, which would be lost"):
        export(made("S0", "3d", {"j": 1.0}), tmp_path, format="torch")


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.zeros((1, 4, 25, 3)), "recording 0: nobody visible"),
        (np.zeros((1, 4, 17, 3)), r"expected \(persons, frames, 25, 3\)"),
        (np.zeros((1, 0, 25, 3)), r"expected \(persons, frames, 25, 3\)"),
        (np.full((1, 4, 25, 3), np.nan), "recording 0: NaN, infinite or too large joint"),
        (np.full((1, 4, 25, 3), 7e4), "too large joint"),
    ],
)
def test_the_recogniser_names_the_bad_recording(x, message, tmp_path):
    about = exporting.description(made("S0", "3d", {"j": 1.0}))
    (tmp_path / "model.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match=message):
        Recogniser(tmp_path).probabilities([x])


def test_windows_are_whole():
    assert windows(30, 12, 6) == [(0, 12), (6, 18), (12, 24), (18, 30)]
    assert windows(29, 12, 6) == [(0, 12), (6, 18), (12, 24)]
    assert windows(12, 12, 100) == [(0, 12)]
    assert windows(7, 12, 6) == [(0, 7)]
