"""The network: a training step of S4 beside plain ST-GCN and beside S4 as one writes it first; memory kept for backward."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import REPEATS, Row, Scale, compare, measured, require_close, threads
from benchmarks.reference import network as reference
from ffn.config import PRESETS, Config
from ffn.layouts import COCO17
from ffn.losses import loss
from ffn.machine import keep_memory
from ffn.model.graph import spatial_adjacency
from ffn.model.network import build
from ffn.training import sgd

CLASSES = 60
SHAPES: dict[Scale, tuple[int, ...]] = {"toy": (4, 2, 16, 17, 3), "quick": (8, 2, 100, 17, 3), "full": (8, 2, 100, 17, 3)}
"""(N, M, T, V, C) of the clips that are timed."""
NTU: dict[Scale, tuple[int, ...]] = {scale: (10, *shape[1:]) for scale, shape in SHAPES.items()}
PAIRS = 2
"""Of the ten clips of a batch as NTU has them: a fifth shows two persons."""


def run(scale: Scale) -> Iterator[Row]:
    """All rows of the network, on two threads."""
    keep_memory()
    ours = {name: network(name) for name in ("S0", "S4")}
    plain = {name: reference_network(name) for name in ours}
    for name in ours:
        require_same(name)
        reference.take(plain[name], ours[name])
    with threads(2):
        steps = {name: training_step(ours[name], PRESETS[name], SHAPES[scale]) for name in ours}
        plain_steps = {name: training_step(plain[name], PRESETS[name], SHAPES[scale]) for name in ours}
        ntu = training_step(ours["S4"], PRESETS["S4"], NTU[scale], PAIRS)
        plain_ntu = training_step(plain["S0"], PRESETS["S0"], NTU[scale], PAIRS)
        for what, mine, theirs, said, target in (
            ("S4 beside plain S0", steps["S4"], plain_steps["S0"], "ST-GCN as MMAction2 writes it", 1 / 0.85),
            ("S4 beside plain S4", steps["S4"], plain_steps["S4"], "S4 written plainly", None),
            ("S0 beside plain S0", steps["S0"], plain_steps["S0"], "ST-GCN as MMAction2 writes it", None),
            ("S4 beside plain S0, two persons in a fifth of the clips", ntu, plain_ntu, "ST-GCN as MMAction2 writes it", 1 / 0.85),
        ):
            yield compare(
                f"training step, {what}", mine, theirs, reference=said, repeats=REPEATS[scale], target=target,
            )  # fmt: skip
        clips = torch.randn(SHAPES[scale])
        for name in ours:
            yield measured(
                f"kept for backward, {name}", [kept(ours[name], clips)], "MB",
                reference=f"{name} written plainly", reference_value=kept(plain[name], clips),
            )  # fmt: skip


def workloads(scale: Scale) -> Mapping[str, Callable[[], object]]:
    """A training step of S4 and of plain ST-GCN."""
    keep_memory()
    torch.set_num_threads(2)
    return {
        "S4": training_step(network("S4"), PRESETS["S4"], SHAPES[scale]),
        "plain ST-GCN": training_step(reference_network("S0"), PRESETS["S0"], SHAPES[scale]),
    }


def network(name: str) -> nn.Module:
    """Ours, the preset `name`, with weights that give every part something to do."""
    torch.manual_seed(0)
    made = build(PRESETS[name].model, COCO17, CLASSES)
    for parameter in made.parameters():
        if parameter.ndim <= 2:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    return made


def reference_network(name: str) -> reference.Skeleton:
    """The plain network that computes the same as the preset S0 or S4."""
    return reference.Skeleton(torch.from_numpy(spatial_adjacency(COCO17)), CLASSES, naive=name == "S4")


def require_same(name: str) -> None:
    """Raise `FFNError` where ours and the plain network differ: logits and all gradients in float64, logits in float32."""
    for dtype, rtol in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        ours, plain = network(name).to(dtype), reference_network(name).to(dtype)
        reference.take(plain, ours)
        clips = torch.randn(4, 2, 24, 17, 3, dtype=dtype)
        clips[2:, 1] = 0  # nobody
        logits, expected = ours(clips), plain(clips)
        scale = float(expected.detach().abs().max())
        require_close(f"logits of {name}, {dtype}", logits.detach(), expected.detach(), rtol=rtol, atol=rtol * scale)
        if dtype == torch.float64:
            logits.square().sum().backward()
            expected.square().sum().backward()
            for which, mine, theirs in gradients(ours, plain):
                require_close(f"gradient of {name}, {which}", mine, theirs, rtol=1e-6, atol=1e-8 * scale**2)


def gradients(ours: nn.Module, plain: reference.Skeleton) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, ours, the plain network's) gradient of every parameter of the plain network."""
    mine = dict(reference.renamed({name: value.grad for name, value in ours.named_parameters() if value.grad is not None}))
    for name, value in plain.named_parameters():
        assert value.grad is not None, name
        yield name, mine[name], value.grad


def training_step(made: nn.Module, config: Config, shape: tuple[int, ...], pairs: int | None = None) -> Callable[[], object]:
    """Forward, the preset's loss in its last epoch, backward and an SGD step on the same random clips (`shape`) every time.

    Two persons are in all clips, or in `pairs` of them.
    """
    generator = torch.Generator().manual_seed(1)
    clips = torch.randn(shape, generator=generator)
    if pairs is not None:
        clips[pairs:, 1:] = 0
    labels = torch.randint(CLASSES, (len(clips),), generator=generator)
    recipe = config.training
    if isinstance(made, reference.Skeleton):
        optimizer = torch.optim.SGD(
            made.parameters(), lr=1e-3, momentum=recipe.momentum, weight_decay=recipe.weight_decay, nesterov=True
        )
    else:
        optimizer = sgd(made, dataclasses.replace(recipe, lr=1e-3))

    def step() -> None:
        value = loss(config.loss, made(clips), labels, epoch=recipe.epochs, epochs=recipe.epochs)
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(value)
        optimizer.step()

    return step


def kept(made: nn.Module, clips: Tensor) -> float:
    """Megabytes of features that a forward pass keeps for the backward pass, each memory counted once; weights are not."""
    weights = {value.untyped_storage().data_ptr() for value in made.parameters()}
    sizes: dict[int, int] = {}

    def note(tensor: Tensor) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        logits = made(clips)
    total = sum(sizes.values()) / 1e6
    del logits
    return total
