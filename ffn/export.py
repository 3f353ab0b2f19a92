"""Export: a model as one file that needs neither this package nor Python, preprocessing inside.

The graph takes raw keypoints (N, M, L, V, 3) float32, zeros where a recording is shorter or a person absent, and gives
(N, K) probabilities: which frames and persons count, normalisation, the streams, the clips, the networks and their fusion
are all part of it. Batch-norms are folded into the convolutions around them. It computes what
`ffn.inference.FusedModel.predict` does.
"""

import copy
import importlib.util
import json
import logging
import shutil
import warnings
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn.utils.fusion import fuse_conv_bn_eval

import ffn
from ffn.checkpoint import Checkpoint, publishing_folder, require_replaceable
from ffn.data.sampler import TEST_SEED
from ffn.data.store import Space
from ffn.errors import FFNError
from ffn.inference import FusedModel, with_clips
from ffn.layouts import Layout
from ffn.model.attention import AFF
from ffn.model.common import Layers
from ffn.model.rivals.common import PersonNorm
from ffn.model.spatial import ESFGCN, GCN
from ffn.model.temporal import TCN
from ffn.streams import alignment

Format = Literal["onnx", "torch"]
FILES: dict[Format, tuple[str, ...]] = {
    "onnx": ("model.onnx", "model.json", "recogniser.py"),
    "torch": ("model.pt2", "model.json"),
}
OPSET = 20
TOLERANCE = 1e-4
"""Largest difference of a probability between the export and the model it was made of."""


def export(model: FusedModel, out: Path | str, *, format: Format = "onnx", clips: int = 1) -> Path:
    """Write `model` to the folder `out`, published whole: the file itself, `model.json` about it, for ONNX `recogniser.py`.

    `clips` test clips per recording are averaged; a recording of as many frames as a clip gives the same clip every time.
    `onnx`: ONNX Runtime and every other engine that reads ONNX. `torch`: a program of torch.export, for torch and its
    compilers; TorchScript is no longer developed. Raises `FFNError` where the packages for ONNX are not installed, or where
    the export and the model give probabilities that differ by more than `TOLERANCE`.
    """
    missing = [name for name in ("onnx", "onnxruntime", "onnxscript") if not importlib.util.find_spec(name)]
    if format == "onnx" and missing:
        raise FFNError(f"export to ONNX needs {', '.join(missing)}: pip install 'ffn-skeleton[export]', or --format torch")
    if clips < 1:
        raise FFNError(f"export with clips={clips}: expected at least 1")
    require_replaceable(Path(out), FILES[format])
    model = with_clips(model, clips)
    about = json.dumps(description(model), indent=1)
    with publishing_folder(Path(out)) as partial, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's exporter about its own parts, and that torchvision is not there
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        (partial / "model.json").write_text(about)
        program = traced(model)
        if format == "onnx":
            written = torch.onnx.export(program, dynamo=True, opset_version=OPSET, output_names=["probabilities"], verbose=False)
            assert written is not None
            written.model.metadata_props["ffn"] = about
            written.model.graph.name = "ffn"
            written.save(partial / "model.onnx")
            shutil.copyfile(Path(__file__).with_name("recogniser.py"), partial / "recogniser.py")
        else:
            torch.export.save(program, partial / "model.pt2", extra_files={"model.json": about})
        require_parity(model, partial)
    return Path(out)


def description(model: FusedModel) -> dict[str, Any]:
    """What a caller has to know, as JSON types; also the ONNX file's metadata under `ffn`."""
    meta = model.meta
    return {
        "input": {"keypoints": ["recordings", "persons", "frames", len(meta.layout.joints), 3]}
        | ({"image_size": ["width, height"]} if meta.space == "2d" else {}),
        "output": {"probabilities": ["recordings", len(meta.classes)]},
        "classes": list(meta.classes),
        "space": meta.space,
        "units": "metres" if meta.space == "3d" else "pixels and a score",
        "image_size": list(meta.image_size),
        "layout": meta.layout.name,
        "joints": list(meta.layout.joints),
        "window": meta.config.clip.frames,
        "clips": meta.config.clip.test_clips,
        "streams": dict(model.weights),
        "preset": meta.config.preset,
        "protocol": meta.protocol,
        "data_digest": meta.data_digest,
        "opset": OPSET,
        "ffn": ffn.__version__,
    }


def require_parity(model: FusedModel, folder: Path) -> None:
    """Raise `FFNError` where the export in `folder` does not give the probabilities of `model` for random recordings."""
    window, joints = model.meta.config.clip.frames, len(model.meta.layout.joints)
    rng, size = np.random.default_rng(0), (1280, 720)
    recordings = [
        rng.normal(size=(persons, frames, joints, 3)).astype(np.float32) + 3
        for persons, frames in ((1, window), (2, window // 2 + 1), (2, 2 * window + 3))
    ]
    expected = model.predict(recordings, size)
    for x, p in zip(recordings, expected, strict=True):
        difference = float(np.abs(run(folder, x[None], size)[0] - p).max())
        if not difference <= TOLERANCE:
            raise FFNError(
                f"{folder}: the export differs from the model by {difference:.1e}; this is a fault of ffn or its packages"
            )


def run(folder: Path, keypoints: NDArray[np.float32], image_size: tuple[int, int]) -> NDArray[np.float32]:
    """(N, K) probabilities of keypoints (N, M, L, V, 3) by the export in `folder`."""
    if (folder / "model.onnx").exists():
        from ffn.recogniser import Recogniser

        return Recogniser(folder).probabilities(list(keypoints), image_size)
    about = json.loads((folder / "model.json").read_text())
    inputs = [torch.from_numpy(keypoints)] + ([torch.tensor(image_size, dtype=torch.float32)] if about["space"] == "2d" else [])
    with torch.inference_mode():
        p: NDArray[np.float32] = torch.export.load(folder / "model.pt2").module()(*inputs).numpy()
    return p


def traced(model: FusedModel) -> ExportedProgram:
    """The whole of `model`, recordings to probabilities, as one graph; recordings, persons (1 or 2) and frames may vary."""
    meta = model.meta
    with torch.no_grad():
        recognition = Recognition(model).eval()
    keypoints = torch.randn(3, 2, 2 * meta.config.clip.frames + 5, len(meta.layout.joints), 3)
    shapes: dict[str, Any] = {"keypoints": {0: Dim("recordings", min=1), 1: Dim("persons", min=1, max=2), 2: Dim("frames", min=1)}}
    inputs: tuple[Tensor, ...] = (keypoints,)
    if meta.space == "2d":
        inputs, shapes["image_size"] = (keypoints, torch.tensor([1280.0, 720.0])), None
    with torch.no_grad():
        return torch.export.export(recognition, inputs, dynamic_shapes=shapes)


class Recognition(nn.Module):
    """Recordings (N, M, L, V, 3) float32, M 1 or 2, to probabilities (N, K); `image_size` (2,) in pixels in 2D.

    The ingestion's choice of frames and persons, the sampler's clips and the mean over clips and streams, as one function
    of tensors. All recordings are as long as the tensor; a frame of zeros is none.
    """

    def __init__(self, model: FusedModel) -> None:
        super().__init__()
        meta = model.meta
        self.layout, self.space, self.clip = meta.layout, meta.space, meta.config.clip
        self.weights = {stream: weight / sum(model.weights.values()) for stream, weight in model.weights.items()}
        self.scores = nn.ModuleDict({stream: PersonMean(model.streams[stream][1], meta) for stream in model.weights})
        clips, frames = self.clip.test_clips, self.clip.frames
        draws = torch.rand(clips, 2 * frames + 1, generator=torch.Generator().manual_seed(TEST_SEED))
        slots, shares = draws[:, : frames + 1], draws[:, frames + 1 :]
        least = slots.sort(1).values.T[:, :, None]  # (T + 1, clips, 1)
        spare = torch.arange(frames + 1)[:, None, None]
        self.skipped = nn.Buffer(((slots < least) & (spare > 0)).cumsum(2)[:, :, :-1])  # (T + 1, clips, T): by frames to spare
        place = (torch.arange(clips, dtype=torch.float64)[:, None] + 0.5) / clips
        self.places = nn.Buffer((torch.arange(frames, dtype=torch.float64) + place) / frames)  # (clips, T)
        self.shares = nn.Buffer(shares.contiguous())

    def forward(self, keypoints: Tensor, image_size: Tensor | None = None) -> Tensor:
        x, order, count = self.arranged(keypoints.half().float())
        n, m = x.shape[:2]
        clips, frames = self.clip.test_clips, self.clip.frames
        numbers = self.frame_numbers(count).flatten(1)
        last = (numbers == count[:, None] - 1)[:, None].expand(n, m, clips * frames)
        here = self.normal(_frames(x, order.gather(1, numbers)), x, order, image_size)
        there = None
        if any("m" in stream for stream in self.weights):
            following = torch.minimum(numbers + 1, count[:, None] - 1)
            there = self.normal(_frames(x, order.gather(1, following)), x, order, image_size)
        present = (x != 0).flatten(2).any(2)[:, :, None, None, None]
        total = torch.zeros((), device=x.device)
        for stream, weight in self.weights.items():
            clip = _bone(here, self.layout, self.space) if "b" in stream else here
            if "m" in stream:
                assert there is not None
                moved = _bone(there, self.layout, self.space) if "b" in stream else there
                clip = _motion(clip, moved, last, self.space)
            clip = (clip * present).view(n, m, clips, frames, *clip.shape[3:]).transpose(1, 2).flatten(0, 1)
            total = total + weight * self.scores[stream](clip).softmax(1).view(n, clips, -1).mean(1)
        return total

    def frame_numbers(self, count: Tensor) -> Tensor:
        """Frames (N, clips, T) of recordings of `count` (N,) frames. Source: `ffn.data.sampler.Sampler.test_batch`."""
        clips, length = self.shares.shape
        count = count[:, None, None]
        if self.clip.sampling == "random":
            return (self.places * count.double()).long()
        steps, clip = torch.arange(length, device=count.device), torch.arange(clips, device=count.device)[:, None]
        around = (clip * count // clips + steps) % count
        skipping = steps + self.skipped[(count - length).clamp(0, length).flatten()]
        low = steps * count // length
        binned = low + (self.shares * ((steps + 1) * count // length - low)).long()
        return torch.where(count < length, around, torch.where(count < 2 * length, skipping, binned))

    def arranged(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What ingestion keeps of `x` (N, M, L, V, 3): main person first, other frames zero; frame numbers; count of frames (N,).

        The numbers (N, L) of the frames that are kept come first. Source: `ffn.data.persons`.
        """
        time = torch.arange(x.shape[2], device=x.device)
        seen = _seen(x)
        rank = seen.sum(2) if self.space == "3d" else seen.any(2).long()
        x = torch.where((rank[:, -1] > rank[:, 0])[:, None, None, None, None], x.flip(1), x)
        seen = _seen(x)
        kept = seen[:, 0] if self.space == "3d" else time < ((time + 1) * seen.any(1)).amax(1, keepdim=True)
        order = torch.where(kept, time, time + x.shape[2]).argsort(1)
        return x * kept[:, None, :, None, None], order, kept.sum(1).clamp_min(1)

    def normal(self, frames: Tensor, x: Tensor, order: Tensor, image_size: Tensor | None) -> Tensor:
        """The chosen `frames` (N, M, T, V, 3) of the recordings `x`, normalised."""
        if self.space == "2d":
            assert image_size is not None
            return _normal_2d(frames, image_size)
        first = _frames(x[:, :1], order[:, :1])[:, 0, 0]
        return _normal_3d(frames, *alignment(first, self.layout))


def _seen(x: Tensor) -> Tensor:
    """(N, M, L): which persons are there in which frames."""
    return (x != 0).flatten(3).any(3)


def _frames(x: Tensor, numbers: Tensor) -> Tensor:
    """Frames `numbers` (N, T) of `x` (N, M, L, V, 3)."""
    index = numbers[:, None, :, None, None].expand(-1, x.shape[1], -1, *x.shape[3:])
    return x.gather(2, index)


# The formulas of `ffn.streams`, where they are arranged for large batches, as a graph can hold them.


def _normal_2d(x: Tensor, image_size: Tensor) -> Tensor:
    return torch.cat([x[..., :2] / (image_size / 2) - 1, x[..., 2:]], -1)


def _normal_3d(x: Tensor, origin: Tensor, turn: Tensor) -> Tensor:
    present = (x != 0).any(-1, keepdim=True)
    centered = (x - origin[:, None, None, None]) * present
    return (centered.flatten(1, 3) @ turn.transpose(1, 2)).view(x.shape)


def _bone(x: Tensor, layout: Layout, space: Space) -> Tensor:
    return _difference(x, x[..., list(layout.parents), :], space)


def _motion(x: Tensor, following: Tensor, last: Tensor, space: Space) -> Tensor:
    return _difference(following, x, space) * ~last[..., None, None]


def _difference(x: Tensor, other: Tensor, space: Space) -> Tensor:
    if space == "3d":
        return x - other
    return torch.cat([x[..., :2] - other[..., :2], (x[..., 2:] + other[..., 2:]) / 2], -1)


class PersonMean(nn.Module):
    """Clips (N, M, T, V, 3) to logits (N, K) as the network gives them for `clip.persons` persons, absent ones zeros.

    The classifier is linear, so the mean over persons may follow it: an absent person costs one constant, not a forward
    pass. Not so where persons have a batch-norm of their own.
    """

    nobody: Tensor

    def __init__(self, network: nn.Module, meta: Checkpoint) -> None:
        super().__init__()
        self.persons = meta.config.clip.persons
        self.network = folded(network)
        self.together = any(isinstance(module, PersonNorm) for module in network.modules())
        silence = torch.zeros(1, 1, meta.config.clip.frames, len(meta.layout.joints), 3)
        self.register_buffer("nobody", self.network(silence))

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, : self.persons]
        n, m = x.shape[:2]
        if self.together:
            logits: Tensor = self.network(nn.functional.pad(x, (0, 0, 0, 0, 0, 0, 0, self.persons - m)))
            return logits
        each = self.network(x.flatten(0, 1)[:, None]).view(n, m, -1)
        mean: Tensor = (each.sum(1) + (self.persons - m) * self.nobody) / self.persons
        return mean


def folded(network: nn.Module) -> nn.Module:
    """A copy of `network` in evaluation mode that computes the same with less: batch-norms and constants folded.

    In it features are (B, C, T, V) in that order in memory, the order ONNX Runtime's convolutions take.
    """
    network = copy.deepcopy(network).eval()
    for parameter in network.parameters():
        parameter.data = parameter.data.contiguous()
    return _fold(network)


def _fold(module: nn.Module) -> nn.Module:
    if isinstance(module, GCN):
        return FoldedGCN(module)
    if isinstance(module, ESFGCN):
        return FoldedESFGCN(module)
    if isinstance(module, TCN):
        return fuse_conv_bn_eval(module.conv, module.norm)
    for name, child in module.named_children():
        setattr(module, name, _fold(child))
    if isinstance(module, AFF):
        return FoldedAFF(module)
    if isinstance(module, Layers) or type(module) is nn.Sequential:
        layers: list[nn.Module] = []
        for layer in module:
            if isinstance(layer, nn.BatchNorm2d) and layers and isinstance(layers[-1], nn.Conv2d):
                layers[-1] = fuse_conv_bn_eval(layers[-1], layer)
            else:
                layers.append(layer)
        return nn.Sequential(*layers)
    return module


class FoldedGraph(nn.Module):
    """1x1 convolution, aggregation over the graph and batch-norm, without their constant: (B, C_in, T, V) -> (B, C_out, T, V).

    All subsets' neighbours in one product, (V, S·V), side by side; then one convolution over the S copies of a joint, which
    lie V apart. `constant` (C_out, 1, V) is what is left to add.
    """

    def __init__(self, conv: nn.Conv2d, norm: nn.BatchNorm2d, adjacency: Tensor) -> None:
        super().__init__()
        subsets, joints, _ = adjacency.shape
        scale, shift = _affine(norm)
        self.adjacency = nn.Buffer(adjacency.transpose(0, 1).reshape(joints, -1).contiguous())
        self.conv = nn.Conv2d(conv.in_channels, norm.num_features, (1, subsets), dilation=(1, joints), bias=False)
        weight = conv.weight.view(subsets, -1, conv.in_channels) * scale[:, None]
        self.conv.weight = nn.Parameter(weight.permute(1, 2, 0)[:, :, None].contiguous())
        assert conv.bias is not None
        bias = torch.einsum("sw,sc->cw", adjacency.sum(1), conv.bias.view(subsets, -1) * scale)
        self.constant = nn.Buffer((bias + shift[:, None])[:, None])

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x @ self.adjacency)
        return y


class FoldedGCN(nn.Module):
    """`GCN` with everything folded that can be."""

    def __init__(self, gcn: GCN) -> None:
        super().__init__()
        self.graph = FoldedGraph(gcn.conv, gcn.norm, gcn.adjacency * gcn.importance)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.graph(x) + _over_frames(self.graph.constant, x))


class FoldedESFGCN(nn.Module):
    """`ESFGCN` with everything folded that can be: shift, subtraction and mask are one matrix (V, V) for each channel."""

    def __init__(self, gcn: ESFGCN) -> None:
        super().__init__()
        self.graph = FoldedGraph(gcn.conv, gcn.norm, gcn.adjacency)
        self.residual = gcn.residual
        mask = torch.tanh(gcn.shift.mask) + 1  # (V, C_in)
        joints, channels = mask.shape
        joint, channel = torch.arange(joints)[:, None], torch.arange(channels)
        shift = mask.new_zeros(channels, joints, joints)
        shift[channel, (joint + channel) % joints, joint] += mask
        shift[channel, joint, joint] -= gcn.shift.alpha * mask
        self.shift = nn.Buffer(shift)
        self.conv = gcn.shift.conv
        scale, constant = (part.view(joints, -1).T[:, None].contiguous() for part in _affine(gcn.shift.norm))
        self.scale = nn.Buffer(scale)
        self.constant = nn.Buffer(constant + self.graph.constant)

    def forward(self, x: Tensor) -> Tensor:
        y = self.graph(x) + self.residual(x)
        shifted = self.conv(x @ self.shift) * _over_frames(self.scale, x)
        return torch.relu(shifted + _over_frames(self.constant, x) + y)


class FoldedAFF(nn.Module):
    """`AFF` written out: ONNX has no interpolation, and its stand-in weighs two formulas."""

    def __init__(self, aff: AFF) -> None:
        super().__init__()
        self.weights, self.align = aff.weights, aff.align

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        y = self.align(y)
        mixed: Tensor = y + self.weights(x + y) * (x - y)
        return mixed


def _affine(norm: nn.BatchNorm1d | nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Scale and shift of a batch-norm in evaluation mode."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    return scale, norm.bias - norm.running_mean * scale


def _over_frames(constant: Tensor, x: Tensor) -> Tensor:
    """(C, 1, V) as (C, T, V): ONNX Runtime repeats it once, when it loads, and adds equal shapes several times faster."""
    return constant.expand(-1, x.shape[2], -1)
