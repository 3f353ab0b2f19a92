"""Slow, plain references written from the published formulas: one sample, one frame, one joint at a time, float64."""

import math

import numpy as np

NTU_PARENTS = (1, 20, 20, 2, 20, 4, 5, 6, 20, 8, 9, 10, 0, 12, 13, 14, 0, 16, 17, 18, 20, 22, 7, 24, 11)
COCO_PARENTS = (0, 0, 0, 1, 2, 0, 0, 5, 6, 7, 8, 0, 0, 11, 12, 13, 14)


def rotation_about(axis, angle):
    """Counter-clockwise rotation by the half-angle (Euler-Rodrigues) formula."""
    if np.abs(axis).sum() < 1e-6 or abs(angle) < 1e-6:
        return np.eye(3)
    axis = axis / math.sqrt((axis**2).sum())
    a = math.cos(angle / 2)
    b, c, d = axis * math.sin(angle / 2)
    return np.array(
        [
            [a * a + b * b - c * c - d * d, 2 * (b * c - a * d), 2 * (b * d + a * c)],
            [2 * (b * c + a * d), a * a + c * c - b * b - d * d, 2 * (c * d - a * b)],
            [2 * (b * d - a * c), 2 * (c * d + a * b), a * a + d * d - b * b - c * c],
        ]
    )


def angle_between(u, v):
    if np.abs(u).sum() < 1e-6 or np.abs(v).sum() < 1e-6:
        return 0.0
    return math.acos(float(np.clip((u / np.linalg.norm(u)) @ (v / np.linalg.norm(v)), -1, 1)))


def normalize_3d(x, spine=(0, 1), shoulders=(4, 8)):
    """`x` (M, T, V, 3): empty frames of the main person dropped, persons swapped, centred, spine to +z, shoulders to +x."""
    x = np.asarray(x, np.float64)
    seen = [[t for t in range(x.shape[1]) if not np.allclose(person[t], 0)] for person in x]
    x = x[:, seen[1]][[1, 0]] if len(x) == 2 and len(seen[0]) < len(seen[1]) else x[:, seen[0]]
    origin = x[0, 0, spine[1]].copy()
    for m in range(x.shape[0]):
        for t in range(x.shape[1]):
            for v in range(x.shape[2]):
                if (x[m, t, v] != 0).any():
                    x[m, t, v] -= origin
    for (start, end), target in ((spine, np.array([0.0, 0, 1])), (shoulders, np.array([1.0, 0, 0]))):
        line = x[0, 0, end] - x[0, 0, start]
        turn = rotation_about(np.cross(line, target), angle_between(line, target))
        x = np.einsum("mtvc,kc->mtvk", x, turn)
    return x


def normalize_2d(x, width, height):
    x = np.asarray(x, np.float64).copy()
    x[..., 0] = (x[..., 0] - width / 2) / (width / 2)
    x[..., 1] = (x[..., 1] - height / 2) / (height / 2)
    return x


def bones(x, parents, space):
    out = np.zeros_like(x)
    for v, p in enumerate(parents):
        out[..., v, :] = x[..., v, :] - x[..., p, :]
        if space == "2d":
            out[..., v, 2] = (x[..., v, 2] + x[..., p, 2]) / 2
    return out


def motions(x, space):
    out = np.zeros_like(x)
    for t in range(x.shape[1] - 1):
        out[:, t] = x[:, t + 1] - x[:, t]
        if space == "2d":
            out[:, t, :, 2] = (x[:, t + 1, :, 2] + x[:, t, :, 2]) / 2
    return out


def stream(x, name, parents, space):
    if "b" in name:
        x = bones(x, parents, space)
    return motions(x, space) if "m" in name else x


def frame_numbers(frames, length, start, draws):
    """Uniform sampling of one recording; `draws` (2 length + 1) uniforms choose skipped slots, then places in bins."""
    if frames < length:
        return [(start + i) % frames for i in range(length)]
    if frames < 2 * length:
        keys = draws[: length + 1]
        skipped = set(np.argsort(keys, kind="stable")[: frames - length].tolist())
        out, offset = [], 0
        for i in range(length):
            offset += i in skipped
            out.append(i + offset)
        return out
    bounds = [i * frames // length for i in range(length + 1)]
    return [
        low + int(np.float32(u) * np.float32(high - low))
        for low, high, u in zip(bounds, bounds[1:], draws[length + 1 :], strict=False)
    ]


def clip(x, numbers, persons):
    """Frames `numbers` of (M, T, V, C), padded with zeros to `persons`."""
    x = x[:persons, numbers]
    return np.concatenate([x, np.zeros((persons - len(x), *x.shape[1:]))])
