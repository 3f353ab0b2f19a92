"""Training on a CPU: 1x1 convolutions, compiled together with what stands before and after them.

Batch-norms, their sums and ReLUs are worked out a few frames at a time, where the product that takes them does its work, and
the statistics of what it makes are taken there too; in the backward pass the gradient goes through the batch-norm on its way to
both gradients of the product. Features are written and read once a convolution, and not in between.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from ffn.model import loops, product_loops, tiles
from ffn.model.loops import share_threads
from ffn.model.statistics import Norm, Normal, Statistics, frames, leave, like, of_sums, parts, scalar, total

Array = NDArray[Any]


@dataclass(frozen=True)
class Sum:
    """The sum of one or two normalised features and of a residual (B, C, T, V), and its ReLU; not worked out yet."""

    terms: tuple[Normal, ...]
    residual: Tensor | None = None
    relu: bool = True

    def total(self) -> Tensor:
        """The sum."""
        share_threads()
        made: Callable[..., Tensor] = _Total.apply
        return made([term.statistics for term in self.terms], self.relu, self.residual, *(term.x for term in self.terms))

    def product(
        self, weight: Tensor, bias: Tensor, norm: Norm, *, copies: int = 0, pooled: bool = False
    ) -> tuple[Normal, list[Tensor]]:
        """Its 1x1 convolution, `weight` (N, C / groups, 1, 1), to features that `norm` is of, and what else is asked for.

        That is the sum itself as often as others take it, and sums over frames and joints (B, C). The gradients of all of them
        meet in one pass. There is no gradient for `bias` (N,), see `NormedConv2d`.
        """
        share_threads()
        made: Callable[..., tuple[Tensor, ...]] = _SumProduct.apply
        found: list[Statistics] = []
        x, *others = made(
            [term.statistics for term in self.terms], self.relu, norm, copies, pooled, found, self.residual, weight, bias.detach(),
            norm.weight, norm.bias, *(term.x for term in self.terms),
        )  # fmt: skip
        return Normal(x, found[0]), others


@dataclass(frozen=True)
class GraphAndShift:
    """The weights of ESF-GCN: adjacency (S, V, V), convolution (S·N, C, 1, 1) and (S·N,), mask (V·C,) and convolution (N, C, 1, 1).

    `source` (V·C,) are the places in a frame that the shift takes its values from, `target` undoes it. The residual is a
    convolution too, (N, C, 1, 1), or the identity.
    """

    adjacency: Tensor
    graph: Tensor
    bias: Tensor
    graph_norm: Norm
    mask: Tensor
    alpha: float
    source: Tensor
    target: Tensor
    shift: Tensor
    shift_norm: Norm
    residual: Tensor | None

    def __call__(self, x: Tensor) -> tuple[Sum, Tensor]:
        """The sum of graph convolution, convolution of the shift, and residual of `x` (B, C, T, V), `fusable`; `x` for all others.

        The gradient of the sum is that of the residual: it is not told of it twice, and all that it gives meets in one pass.
        """
        if not fits(x, x.shape[1]):
            return self._filled_up(x)
        share_threads()
        subsets, joints, _ = self.adjacency.shape
        matrix = self.adjacency.permute(2, 0, 1).reshape(joints * subsets, joints)
        weight = self.graph.view(subsets, -1, x.shape[1]).transpose(0, 1)
        bias = self.adjacency.sum(1).T @ self.bias.view(subsets, -1)
        made: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]] = _GraphAndShift.apply
        found: list[Statistics] = []
        graph, shift, residual, same = made(
            self, found, x, matrix, weight, bias, self.mask, self.shift, self.residual, self.graph_norm.weight,
            self.graph_norm.bias, self.shift_norm.weight, self.shift_norm.bias,
        )  # fmt: skip
        return Sum((Normal(graph, found[0]), Normal(shift, found[1])), residual), same

    def _filled_up(self, x: Tensor) -> tuple[Sum, Tensor]:
        """The same with zeros for channels, so that they are whole vectors."""
        channels, joints = x.shape[1], self.adjacency.shape[1]
        more = -channels % (tiles.VECTOR // x.element_size())
        own = torch.arange(joints)[:, None] * (channels + more) + torch.arange(channels, channels + more)
        source, target = (
            torch.cat([(places.view(joints, -1) // channels * (channels + more)) + torch.arange(channels), own], 1).view(-1)
            for places in (self.source, self.target)
        )
        filled = replace(
            self,
            graph=functional.pad(self.graph, (0, 0, 0, 0, 0, more)),
            mask=functional.pad(self.mask.view(joints, -1), (0, more)).view(-1),
            source=source,
            target=target,
            shift=functional.pad(self.shift, (0, 0, 0, 0, 0, more)),
            residual=None if self.residual is None else functional.pad(self.residual, (0, 0, 0, 0, 0, more)),
        )
        summed, _ = filled(functional.pad(x, (0, 0, 0, 0, 0, more)).contiguous(memory_format=torch.channels_last))
        return summed, x


def fits(x: Tensor, *channels: int) -> bool:
    """Whether products can take features of the type of `x` and as many `channels`: whole vectors."""
    return all(count * x.element_size() % tiles.VECTOR == 0 for count in channels)


def _places(index: Tensor) -> Array:
    """`index` as numbers that count from no end: numba need not ask whether they are negative."""
    return index.numpy().view(np.uint64)


def _span(x: Tensor) -> int:
    """How many frames of `x` (B, C, T, V) a loop takes at a time: few enough for a core's cache, and for whole tiles of rows."""
    frame = x.shape[1] * x.shape[3] * x.element_size()
    return next((span for span in (8, 4, 2) if span * frame <= 2**18), 1)


def form(x: Tensor) -> tuple[int, int, int]:
    """`form` in `ffn.model.product_loops`."""
    return x.shape[2], x.shape[3], _span(x)


class _Total(torch.autograd.Function):
    """`Sum.total`."""

    @staticmethod
    def forward(ctx: Any, statistics: list[Statistics], relu: bool, residual: Tensor | None, *features: Tensor) -> Tensor:
        x = features[0]
        y = like(x)
        terms = _terms(statistics, features)
        loops.normal_sum(*terms, _given(residual, terms[0]), scalar(0 if relu else -np.inf, x), frames(y))
        ctx.save_for_backward(*features, *([y] if relu else []))
        ctx.statistics, ctx.residual = statistics, residual is not None
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        share_threads()
        statistics = ctx.statistics
        count = len(statistics)
        features, (y,) = ctx.saved_tensors[:count], ctx.saved_tensors[count:] or (None,)
        dz = grads[0] if y is None else like(grads[0])
        terms = _terms(statistics, features)
        flat = terms[0]
        sums = np.empty((loops.PARTS, 1 + count, 1, flat.shape[1]), flat.dtype)
        loops.normal_sum_gradients(frames(grads[0]), _given(y, flat), *terms, frames(dz), sums)
        joints = grads[0].shape[3]
        sums = sums.reshape(loops.PARTS, 1 + count, joints, -1)
        leave(total(sums), statistics)
        return None, None, dz if ctx.residual else None, *(dz,) * count


class _SumProduct(torch.autograd.Function):
    """`Sum.product`."""

    @staticmethod
    def forward(
        ctx: Any, statistics: list[Statistics], relu: bool, norm: Norm, copies: int, pooled: bool, found: list[Statistics],
        residual: Tensor | None, weight: Tensor, bias: Tensor, norm_weight: Tensor, norm_bias: Tensor, *features: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        x = features[0]
        b, c, t, v = x.shape
        outputs = len(weight)
        terms = _terms(statistics, features)
        flat = terms[0]
        floor = scalar(0 if relu else -np.inf, x)
        weights = _Weights.of(weight, c)
        z = like(x) if copies or residual is not None or len(features) > 1 else None
        out = torch.empty(b, outputs, t, v, dtype=x.dtype, memory_format=torch.channels_last)
        sums, sums_of_parts = np.empty((parts(x), 3, 1, outputs), flat.dtype), np.empty((parts(x) * pooled, c), flat.dtype)
        product_loops.normal_product(
            *terms, _given(residual, flat), floor, _given(z, flat), weights.panels, weights.diagonal,
            np.tile(bias.numpy(), v), form(x), frames(out), sums, sums_of_parts,
        )  # fmt: skip
        found.append(of_sums(norm, out, sums))
        ctx.save_for_backward(out, *features, *([] if z is None else [z]))
        ctx.statistics, ctx.own, ctx.weights, ctx.floor = statistics, found[0], weights, floor
        ctx.residual, ctx.copies, ctx.pooled, ctx.shape = residual is not None, copies, pooled, weight.shape
        ctx.kept = z is not None
        ctx.set_materialize_grads(False)
        others = [] if z is None else [z, *(z.view_as(z) for _ in range(copies - 1))][:copies]
        if pooled:
            others.append(torch.from_numpy(sums_of_parts.reshape(b, -1, c).sum(1)))
        return out, *others

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        share_threads()
        statistics, own, weights, copies = ctx.statistics, ctx.own, ctx.weights, ctx.copies
        out, *features = ctx.saved_tensors
        z = features.pop() if ctx.kept else None
        x = features[0]
        terms = _terms(statistics, features)
        flat = terms[0]
        through, dnorm_weight, dnorm_bias = own.terms(out.shape[1])
        direct = [frames(grad) for grad in grads[1 : 1 + copies] if grad is not None]
        direct += [flat[:0]] * (2 - len(direct))
        dpooled = grads[-1] if ctx.pooled else None
        dz = like(x)
        sums = np.empty((parts(x), 1 + len(features), max(len(each.mean) for each in statistics), x.shape[1]), flat.dtype)
        dpanels = np.empty((min(parts(x), product_loops.GROUPS), *weights.panels.shape), flat.dtype)
        assert grads[0] is not None
        product_loops.normal_product_gradients(
            frames(grads[0]), frames(out), through.reshape(3, -1), own.last, flat.dtype.type(own.times), *terms, ctx.floor,
            _given(z, flat), weights.transposed, weights.diagonal, form(x), *direct,
            flat[:0] if dpooled is None else dpooled.contiguous().numpy(), frames(dz), sums, dpanels,
        )  # fmt: skip
        leave(total(sums), statistics)
        dweight = weights.gradient(_summed(dpanels), ctx.shape)
        dresidual = dz if ctx.residual else None
        return *(None,) * 6, dresidual, dweight, None, dnorm_weight, dnorm_bias, *(dz,) * len(features)


def _terms(statistics: Sequence[Statistics], features: Sequence[Tensor]) -> tuple[Array, Array, Array, Array]:
    """Frames of one or two `features`, each with its slope, level and mean (3, V·C); a second that is not there has no frames."""
    x, *more = (frames(each) for each in features)
    affine, *others = (each.frame.reshape(3, -1) for each in statistics)
    return (x, affine, more[0], others[0]) if more else (x, affine, x[:0], affine)


def _given(x: Tensor | None, like: Array) -> Array:
    """Frames of `x`, or none of as many entries as `like` has."""
    return like[:0] if x is None else frames(x)


def _summed(groups: Array) -> Tensor:
    """The sum of gradients of groups (G, ...)."""
    return torch.from_numpy(groups).sum(0)


@dataclass(frozen=True)
class _Weights:
    """The weights of a 1x1 convolution (N, C / groups, 1, 1) as panels, see `ffn.model.tiles`."""

    panels: Array
    transposed: Array
    diagonal: bool

    @staticmethod
    def of(weight: Tensor, channels: int) -> "_Weights":
        """Of a convolution of as many `channels`."""
        matrix = weight.detach().flatten(1)
        outputs, inputs = matrix.shape
        groups = channels // inputs
        if groups > 1:
            blocks = matrix.numpy().reshape(groups, outputs // groups, inputs).swapaxes(1, 2)
            diagonal, transposed = tiles.to_diagonal(blocks), tiles.to_diagonal(blocks.swapaxes(1, 2))
            if outputs == channels and diagonal is not None and transposed is not None:
                return _Weights(diagonal, transposed, diagonal=True)
            dense = matrix.new_zeros(groups, outputs // groups, groups, inputs)
            every = torch.arange(groups)
            dense[every, :, every] = matrix.view(groups, outputs // groups, inputs)
            matrix = dense.view(outputs, channels)
        matrix = matrix[:, None]
        return _Weights(tiles.to_panels(matrix), tiles.to_transposed(matrix), diagonal=False)

    def gradient(self, dpanels: Tensor, shape: tuple[int, ...]) -> Tensor:
        """That of weights of this `shape`, from that of the panels (P, K, W)."""
        outputs, inputs = shape[:2]
        if self.diagonal:
            blocks = tiles.from_diagonal(dpanels.numpy())
            return torch.from_numpy(np.ascontiguousarray(blocks.swapaxes(1, 2))).view(shape)
        matrix = tiles.from_panels(dpanels)
        groups = matrix.shape[1] // inputs
        if groups > 1:
            every = torch.arange(groups)
            matrix = matrix.view(groups, outputs // groups, groups, inputs)[every, :, every]
        return matrix.reshape(shape)


class _GraphAndShift(torch.autograd.Function):
    """`GraphAndShift.__call__`; `weight` is (N, S, C), `bias` (V, N)."""

    @staticmethod
    def forward(
        ctx: Any, weights: GraphAndShift, found: list[Statistics], x: Tensor, matrix: Tensor, weight: Tensor, bias: Tensor,
        mask: Tensor, shift_weight: Tensor, residual_weight: Tensor | None, *_: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        b, c, t, v = x.shape
        outputs = len(weight)
        flat = frames(x)
        matrices = [weight, shift_weight.view(outputs, 1, c)]
        if residual_weight is not None:
            matrices.append(residual_weight.view(outputs, 1, c))
        panels, transposed = [tiles.to_panels(each) for each in matrices], [tiles.to_transposed(each) for each in matrices]
        if residual_weight is None:
            panels.append(panels[1][:0])
            transposed.append(transposed[1][:0])
        graph, shift, *others = (torch.empty(b, outputs, t, v, dtype=x.dtype, memory_format=torch.channels_last) for _ in matrices)
        sums, sums2 = (np.empty((parts(x), 3, period, outputs), flat.dtype) for period in (1, v))
        product_loops.graph_and_shift(
            flat, matrix.numpy(), panels[0], bias.flatten().numpy(), _places(weights.source), mask.numpy(),
            scalar(weights.alpha, x), panels[1], panels[2], form(x), frames(graph), sums, frames(shift), sums2,
            frames(others[0]) if others else flat[:0],
        )  # fmt: skip
        found += [of_sums(weights.graph_norm, graph, sums), of_sums(weights.shift_norm, shift, sums2)]
        ctx.save_for_backward(x, graph, shift, matrix, mask)
        ctx.found, ctx.weights, ctx.shape = found, weights, weight.shape
        ctx.transposed, ctx.panels = transposed, [each.shape for each in panels]
        ctx.set_materialize_grads(False)
        residual = others[0] if others else x.detach()
        ctx.mark_non_differentiable(residual)
        return graph, shift, residual, x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        share_threads()
        x, graph, shift, matrix, mask = ctx.saved_tensors
        c, v = x.shape[1], x.shape[3]
        weights, outputs = ctx.weights, ctx.shape[0]
        dz, _, _, direct = grads
        assert dz is not None
        flat = frames(x)
        of_graph, of_shift = ctx.found
        terms, *dgraph_norm = of_graph.terms(outputs)
        terms2, *dshift_norm = of_shift.terms(outputs)
        dx = like(x)
        groups = min(parts(x), product_loops.GROUPS)
        of_groups = [tiles.dots(groups, len(matrix), v, flat.dtype)]
        of_groups += [np.empty((groups, *shape), flat.dtype) for shape in (*ctx.panels, (v * outputs,), (v * c,))]
        product_loops.graph_and_shift_gradients(
            frames(dz), frames(graph), terms.reshape(3, -1), frames(shift), terms2.reshape(3, -1), of_graph.last,
            flat.dtype.type(of_graph.times), flat, matrix.numpy(), matrix.T.contiguous().numpy(), ctx.transposed[0],
            _places(weights.source), _places(weights.target), mask.numpy(), mask[weights.target].numpy(), scalar(weights.alpha, x),
            *ctx.transposed[1:], _given(direct, flat), form(x), parts(x), frames(dx), *of_groups,
        )  # fmt: skip
        dmatrix, *dpanels, dbias, dmask = map(_summed, of_groups)
        dmatrix = dmatrix.sum(2)[: len(matrix), :v]
        dweight, dshift, dresidual = map(tiles.from_panels, dpanels)
        shape = outputs, c, 1, 1
        return (
            None, None, dx, dmatrix, dweight.view(ctx.shape), dbias.view(v, outputs), dmask, dshift.view(shape),
            None if weights.residual is None else dresidual.view(shape), *dgraph_norm, *dshift_norm,
        )  # fmt: skip
