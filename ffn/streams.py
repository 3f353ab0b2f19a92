"""Normalisation and the four streams, as pure functions of batched keypoints.

A row is one person's frame, 3 V numbers float32: x, y, z in metres (3D), or x, y and a score (2D) of joint after joint.
Joint by joint everything here is `matrix (x - origin)`, and a stream takes differences of joints and of frames. Differences
are therefore taken first, on the keypoints as they are, where they are exact; the origin comes next, once for every joint that
is seen (it drops out of a difference of two); the matrix comes last, with the augmentation in it.
All is done on whole rows, with operators whose inner loop is a row: one over three coordinates costs ten times as much.
Source: MMAction2 v1.2.0, `PreNormalize2D`, `PreNormalize3D`, `JointToBone`, `ToMotion`, `GenSkeFeat`; in float32 throughout,
where MMAction2 keeps the data's float16. Joints of 2D keypoints without a score are not masked.
"""

import functools

import torch
from torch import Tensor

from ffn.data.store import Space
from ffn.layouts import Layout


def image_scale(image_size: Tensor, halvings: int) -> tuple[Tensor, Tensor]:
    """Origin (N, 3) and scale (N, 3) that take pixels to [-1, 1] in images of (N, 2) pixels, width and height.

    The score keeps its origin and is halved `halvings` times: once for every `difference`, which adds up two.
    """
    half = image_size / 2
    score = torch.zeros_like(half[:, :1])
    return torch.cat([half, score], 1), torch.cat([1 / half, score + 0.5**halvings], 1)


def alignment(first: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Origin and rotation that stand a skeleton upright and face-on.

    `first` (N, V, 3) is the main person's first frame. Returns the origin (N, 3), the top of the spine bone, and rotations
    (N, 3, 3), y = R x, that turn the spine bone to +z and then the line between the shoulders (right minus left) to +x.
    A layout without spine or shoulders is centred on its centre joint and not turned.
    """
    origin = first[:, layout.spine[1] if layout.spine else layout.center]
    turn = torch.eye(3, dtype=first.dtype, device=first.device).expand(first.shape[0], 3, 3)
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


def seen(x: Tensor) -> Tensor:
    """1 for every joint of the rows `x` (R, V * 3), 0 for one at exactly zero, which is missing: (R, V)."""
    bits = x.view(torch.int32).view(-1, 3)  # or-ed column by column: a reduction over three takes twice as long
    bits = bits[:, 0] | bits[:, 1] | bits[:, 2]
    return (bits + bits != 0).float().view(len(x), -1)  # doubled, so that minus zero is zero


def difference(x: Tensor, other: Tensor, space: Space) -> Tensor:
    """`x` minus `other`, rows (R, V * 3); in 2D the scores are added up (and halved by `image_scale`)."""
    if space == "3d":
        return x - other
    return torch.addcmul(x, other, _tensor((-1.0, -1.0, 1.0) * (x.shape[1] // 3), x.device))


def bone(x: Tensor, layout: Layout, space: Space) -> Tensor:
    """`difference` of every joint from its parent, in rows of 3 V numbers or of V."""
    width = x.shape[1] // len(layout.parents)
    columns = tuple(width * parent + axis for parent in layout.parents for axis in range(width))
    return difference(x, x.index_select(1, _tensor(columns, x.device)), space)


def centered(x: Tensor, seen: Tensor, origin: Tensor) -> Tensor:
    """`x` (P, T, V * 3) minus `origin` (P, 3) as often as `seen` (P * T or 1, V) says: once for a joint, never if it is missing."""
    joints = seen.shape[1]
    often = seen.index_select(1, _tensor(tuple(column // 3 for column in range(3 * joints)), x.device))
    often = often.view(-1, x.shape[1] if len(seen) > 1 else 1, 3 * joints)
    return x.addcmul(often, origin.repeat(1, joints)[:, None], value=-1)


def turned(x: Tensor, matrix: Tensor) -> Tensor:
    """Every joint of `x` (P, T, V * 3) times its person's `matrix` (P, 3, 3), or times the diagonal (P, 3) of one.

    By hand, as a sum over the matrix's three cyclic diagonals: a batched product of inner size 3 takes twice as long on a CPU.
    """
    joints = x.shape[-1] // 3
    if matrix.ndim == 2:
        return x * matrix.repeat(1, joints)[:, None]
    rows = x.flatten(0, 1)
    out = x * matrix.diagonal(dim1=1, dim2=2).repeat(1, joints)[:, None]
    for shift in (1, 2):
        coefficients = torch.stack([matrix[:, axis, (axis + shift) % 3] for axis in range(3)], 1)
        columns = tuple(3 * joint + (axis + shift) % 3 for joint in range(joints) for axis in range(3))
        other = rows.index_select(1, _tensor(columns, x.device)).view_as(x)
        out.addcmul_(other, coefficients.repeat(1, joints)[:, None])
    return out


@functools.cache
def _tensor(values: tuple[float, ...], device: torch.device) -> Tensor:
    """`values` on `device`, made once."""
    return torch.tensor(values, device=device)
