"""Normalisation and the four streams, as pure functions of batched keypoints.

Tensors are (..., V, 3) float: x, y, z in metres (3D), or x, y and a score (2D).
Source: MMAction2 v1.2.0, `PreNormalize2D`, `PreNormalize3D`, `JointToBone`, `ToMotion`, `GenSkeFeat`; in float32 throughout,
where MMAction2 keeps the data's float16.
"""

import torch
from torch import Tensor

from ffn.data.store import Space
from ffn.layouts import Layout


def normalize_2d(x: Tensor, image_size: Tensor) -> Tensor:
    """Pixels to [-1, 1]: (x - w/2) / (w/2), y likewise; the score stays.

    `x` (N, ..., V, 3), `image_size` (N, 2) width and height in pixels. Joints without a score are not masked.
    """
    half = image_size.to(x.dtype).view(-1, *[1] * (x.ndim - 2), 2) / 2
    return torch.cat([x[..., :2] / half - 1, x[..., 2:]], -1)


def alignment(first: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Origin and rotation that stand a skeleton upright and face-on.

    `first` (N, V, 3) is the main person's first frame. Returns the origin (N, 3), the top of the spine bone, and rotations
    (N, 3, 3), y = R x, that turn the spine bone to +z and then the line between the shoulders (right minus left) to +x.
    A layout without spine or shoulders is centred on its centre joint and not turned.
    """
    origin = first[:, layout.spine[1] if layout.spine else layout.center]
    turn = torch.eye(3, dtype=first.dtype, device=first.device).expand(len(first), 3, 3)
    present = (first != 0).any(-1, keepdim=True)
    centered = (first - origin[:, None]) * present
    for bone, axis in ((layout.spine, 2), (layout.shoulders, 0)):
        if bone:
            line = centered[:, bone[1]] - centered[:, bone[0]]
            turn = rotation_to_axis((turn @ line[..., None])[..., 0], axis) @ turn
    return origin, turn


def rotation_to_axis(vectors: Tensor, axis: int) -> Tensor:
    """Rotations (N, 3, 3) that turn `vectors` (N, 3) to the positive coordinate axis; identity where a vector is zero."""
    target = torch.zeros_like(vectors)
    target[:, axis] = 1
    length = vectors.norm(dim=-1, keepdim=True)
    unit = vectors / length.clamp_min(1e-12)
    normal = torch.linalg.cross(unit, target)
    sine, cosine = normal.norm(dim=-1), unit[:, axis]
    k = normal / sine.clamp_min(1e-12)[:, None]
    x, y, z = k.unbind(-1)
    zero = torch.zeros_like(x)
    cross = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], -1).view(-1, 3, 3)
    eye = torch.eye(3, dtype=vectors.dtype, device=vectors.device)
    turn = eye + sine[:, None, None] * cross + (1 - cosine)[:, None, None] * (cross @ cross)
    # As in the source, a vector that is (anti)parallel to the axis has no rotation plane and stays as it is.
    still = (sine < 1e-6) | (length[:, 0] < 1e-6)
    return torch.where(still[:, None, None], eye, turn)


def normalize_3d(x: Tensor, origin: Tensor, turn: Tensor) -> Tensor:
    """`x` (N, ..., V, 3) moved to `origin` (N, 3) and turned by `turn` (N, 3, 3); a joint at exactly zero is missing and stays."""
    shape = (-1, *[1] * (x.ndim - 2), 3)
    present = (x != 0).any(-1, keepdim=True)
    centered = ((x - origin.view(shape)) * present).flatten(1, -2)
    return torch.bmm(centered, turn.transpose(1, 2)).view(x.shape)


def bone(x: Tensor, layout: Layout, space: Space) -> Tensor:
    """Joint minus its parent; in 2D the score is the mean of both. (..., V, 3) -> (..., V, 3)."""
    parent = x[..., list(layout.parents), :]
    if space == "3d":
        return x - parent
    return torch.cat([x[..., :2] - parent[..., :2], (x[..., 2:] + parent[..., 2:]) / 2], -1)


def motion(x: Tensor, following: Tensor, last: Tensor, space: Space) -> Tensor:
    """The next original frame minus this one; in 2D the score is the mean of both; the last frame is zero.

    `x`, `following` (..., V, 3); `last` (...) bool marks frames that have no next one.
    """
    moved = (
        following - x if space == "3d" else torch.cat([following[..., :2] - x[..., :2], (x[..., 2:] + following[..., 2:]) / 2], -1)
    )
    return moved.masked_fill(last[..., None, None], 0)
