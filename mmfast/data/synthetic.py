"""Synthetic clips: a hand that performs an action before a textured, slightly moving background.

Shapes are drawn from signed distances d (pixels, negative inside): coverage is clip(1/2 - d, 0, 1), which anti-aliases;
shading is that of a round body under one light. Everything follows from the seed and the action, on every machine.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmfast.data.container import VideoError, import_av
from mmfast.data.hand import ACTIONS, Camera, HandMotion, frame_size, hand_joints, hand_motion

__all__ = ["ACTIONS", "hand_joints", "render_clip", "render_videos", "write_video"]

_LIGHT = np.array([-0.42, -0.58, 0.70], dtype=np.float32)
_SKINS = np.array([[241, 205, 178], [224, 172, 135], [198, 134, 95], [141, 92, 62], [96, 62, 44]], dtype=np.float32)
_FINGER_RADIUS = ((0.155, 0.100), (0.125, 0.086), (0.128, 0.086), (0.120, 0.082), (0.105, 0.072))  # root, tip
_PALM = (0, 1, 5, 9, 13, 17)  # joints round the palm's outline; the heel of the hand is added


@dataclass
class _Look:
    skin: np.ndarray
    sleeve: np.ndarray
    sleeve_from: float  # along the forearm, 0 at the wrist


def _smooth_noise(rng: np.random.Generator, height: int, width: int, cells: int) -> np.ndarray:
    coarse = torch.from_numpy(rng.random((1, 1, cells + 3, cells + 3), dtype=np.float32))
    return F.interpolate(coarse, (height, width), mode="bicubic", align_corners=False)[0, 0].numpy()


def _colours(rng: np.random.Generator, count: int, low: float, high: float) -> np.ndarray:
    """float32 [count, 3, 1, 1]: colours half way to grey, as rooms have them."""
    colours = rng.uniform(low, high, (count, 3, 1, 1)).astype(np.float32)
    return (colours + colours.mean(1, keepdims=True)) / 2


def _background(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """float32 [3, height, width] in 0..255: a wall of two colours, a table edge, a few things, grain.

    In numpy, as the many small steps would spend their time waiting for torch's threads on a busy machine.
    """
    wall, paint, table = _colours(rng, 3, 50, 205)
    blend = sum(
        _smooth_noise(rng, height, width, cells) / np.float32(k) for k, cells in ((1.6, 3), (3.2, 9), (6.4, 27))
    )
    picture = paint + (wall - paint) * blend
    rows, columns = np.arange(height, dtype=np.float32)[:, None], np.arange(width, dtype=np.float32)[None]
    slope, wave = np.float32(rng.uniform(-0.15, 0.15)), np.float32(rng.uniform(0.15, 0.5))
    edge = np.float32(height * rng.uniform(0.55, 0.8)) + (columns - width / 2) * slope
    stripes = 1 + np.float32(0.10) * np.sin(rows * wave + 6 * _smooth_noise(rng, height, width, 5))
    picture = np.where(rows > edge, table * stripes * (0.75 + 0.5 * blend), picture)
    for _ in range(int(rng.integers(3, 7))):
        x, y = (rng.random(2) * (width, height)).astype(np.float32)
        w, h = ((0.03 + 0.12 * rng.random(2)) * (width, height)).astype(np.float32)
        turn, corner = rng.uniform(0, np.pi), min(w, h) * np.float32(rng.uniform(0.2, 1.0))
        c, s = np.float32(np.cos(turn)), np.float32(np.sin(turn))
        out_u = np.abs((columns - x) * c + (rows - y) * s) - (w - corner)
        out_v = np.abs((rows - y) * c - (columns - x) * s) - (h - corner)
        outside = np.hypot(np.maximum(out_u, 0), np.maximum(out_v, 0))
        distance = outside + np.minimum(np.maximum(out_u, out_v), 0) - corner
        colour = _colours(rng, 1, 25, 235)[0] * (0.85 + 0.3 * blend)
        picture += np.clip(0.5 - distance, 0, 1) * (colour - picture)
    return np.clip(picture + 5 * rng.standard_normal((height, width), dtype=np.float32), 0, 255)


def _moving_background(seed: int, camera: Camera, height: int, width: int) -> np.ndarray:
    """float32 [F, H, W, 3]: the still picture as the camera sees it in every frame."""
    margin = 0.15  # of a side, more than the camera ever moves
    tall, wide = round(height * (1 + 2 * margin)), round(width * (1 + 2 * margin))
    still = torch.from_numpy(_background(np.random.default_rng([seed, 3]), tall, wide))
    theta = np.zeros((len(camera.zoom), 2, 3), dtype=np.float32)
    # grid_sample counts half sides from the centre: pixel = centre + zoom * (world - shift), solved for world
    theta[:, 0, 0], theta[:, 1, 1] = width / wide / camera.zoom, height / tall / camera.zoom
    theta[:, :, 2] = camera.shift * 2 / np.array([wide, tall])
    grid = F.affine_grid(torch.from_numpy(theta), [len(theta), 3, height, width], align_corners=False)
    seen = F.grid_sample(still.expand(len(theta), -1, -1, -1), grid, padding_mode="reflection", align_corners=False)
    return seen.permute(0, 2, 3, 1).contiguous().numpy()


class _Canvas:
    """One frame being painted: float32 [H, W, 3]."""

    def __init__(self, picture: np.ndarray) -> None:
        self.picture = picture

    def window(self, points: np.ndarray, margin: float) -> tuple[tuple[slice, slice], np.ndarray, np.ndarray] | None:
        """The part of the picture within margin of the points, with its x and y; None when outside."""
        height, width = self.picture.shape[:2]
        x0, y0 = np.maximum(np.floor(points.min(0) - margin), 0).astype(int)
        x1, y1 = np.minimum(np.ceil(points.max(0) + margin) + 1, (width, height)).astype(int)
        if x0 >= x1 or y0 >= y1:
            return None
        x, y = np.arange(x0, x1, dtype=np.float32)[None], np.arange(y0, y1, dtype=np.float32)[:, None]
        return (slice(y0, y1), slice(x0, x1)), x, y

    def paint(self, where: tuple[slice, slice], distance: np.ndarray, normal: np.ndarray, colour: np.ndarray) -> None:
        """Paints a lit body. normal: [2, h, w], the image-plane part of the unit normal."""
        facing = np.sqrt(np.maximum(1 - (normal**2).sum(0), 0))
        lit = normal[0] * _LIGHT[0] + normal[1] * _LIGHT[1] + facing * _LIGHT[2]
        shade = 0.46 + 0.62 * np.maximum(lit, 0) + 0.12 * facing
        cover = np.clip(0.5 - distance, 0, 1)[..., None]
        part = self.picture[where]
        part += cover * (np.minimum(colour * shade[..., None], 255) - part)

    def shadow(self, where: tuple[slice, slice], distance: np.ndarray, reach: float, strength: float) -> None:
        self.picture[where] *= 1 - strength * np.exp(-np.maximum(distance, 0) / reach)[..., None]


def _bone_chain(
    points: np.ndarray, radii: np.ndarray, x: np.ndarray, y: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Union of tapered capsules: distance [h, w], normal [2, h, w], and the place along the chain (bones) [h, w].

    The shading of a joint's inner end is that of a tube, not of a ball, so that bones join without a seam.
    """
    best = normal = along = np.zeros(0)
    for i in range(len(points) - 1):
        axis = points[i + 1] - points[i]
        length = max(float(np.hypot(*axis)), 1e-3)
        ux, uy = axis / length
        dx, dy = x - points[i, 0], y - points[i, 1]
        raw = dx * ux + dy * uy
        place = np.clip(raw, 0, length)
        radius = radii[i] + (radii[i + 1] - radii[i]) * (place / length)
        ox, oy = dx - place * ux, dy - place * uy
        distance = np.hypot(ox, oy) - radius
        back = np.minimum(raw, 0)  # before the bone's start: keep only the offset across it
        if i < len(points) - 2:
            back = back + np.maximum(raw - length, 0)
        tilt = np.stack([ox - back * ux, oy - back * uy]) / radius
        tilt /= np.maximum(1, np.sqrt((tilt**2).sum(0)))
        if i == 0:
            best, normal, along = distance, tilt, place / length
        else:
            closer = distance < best
            best, normal = np.minimum(best, distance), np.where(closer, tilt, normal)
            along = np.where(closer, i + place / length, along)
    return best, normal, along


def _polygon_distance(points: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Signed distance to a polygon [P, 2]: nearest edge, and even-odd crossings for the sign."""
    shape = np.broadcast_shapes(x.shape, y.shape)
    nearest, inside = np.full(shape, np.inf, dtype=np.float32), np.zeros(shape, dtype=bool)
    for (ax, ay), (bx, by) in zip(points, np.roll(points, -1, 0), strict=True):
        ex, ey = bx - ax, by - ay
        along = np.clip(((x - ax) * ex + (y - ay) * ey) / max(ex * ex + ey * ey, 1e-6), 0, 1)
        nearest = np.minimum(nearest, (x - ax - along * ex) ** 2 + (y - ay - along * ey) ** 2)
        if ay != by:
            inside ^= ((y < ay) != (y < by)) & (x < ax + (y - ay) * (ex / ey))
    return np.where(inside, -1.0, 1.0) * np.sqrt(nearest)


def _draw_arm(canvas: _Canvas, motion: HandMotion, t: int, look: _Look) -> None:
    scale, wrist = motion.scale[t], motion.joints[t, 0, :2]
    points, radii = np.stack([wrist, motion.elbow[t]]), np.array([0.27, 0.40]) * scale
    window = canvas.window(points, 0.7 * scale)
    if window is None:
        return
    where, x, y = window
    distance, normal, along = _bone_chain(points, radii, x, y)
    canvas.shadow(where, distance, 0.16 * scale, 0.35)
    canvas.paint(where, distance, normal, look.skin)
    cuff = (look.sleeve_from - along) * float(np.hypot(*(points[1] - points[0])))
    canvas.paint(where, np.maximum(distance - 0.06 * scale, cuff), normal * 0.9, look.sleeve)


def _draw_palm(canvas: _Canvas, motion: HandMotion, t: int, look: _Look) -> None:
    scale, joints = motion.scale[t], motion.joints[t, :, :2]
    heel = joints[0] + 0.45 * (joints[17] - joints[5]) * np.array(0.75)
    outline = np.concatenate([joints[list(_PALM)], heel[None]])
    window = canvas.window(outline, 0.5 * scale)
    if window is None:
        return
    where, x, y = window
    distance = _polygon_distance(outline, x, y) - 0.13 * scale
    canvas.shadow(where, distance, 0.14 * scale, 0.25)
    edge = np.clip(1 + distance / (0.30 * scale), 0, 1) ** 1.5
    slope = np.stack(np.gradient(distance)[::-1]) if min(distance.shape) > 1 else np.zeros((2, *distance.shape))
    canvas.paint(where, distance, slope * edge * 0.85, look.skin)


def _draw_finger(canvas: _Canvas, motion: HandMotion, t: int, look: _Look, finger: int) -> None:
    scale, chain = motion.scale[t], motion.joints[t, 4 * finger + 1 : 4 * finger + 5]
    radii = np.linspace(*_FINGER_RADIUS[finger], 4) * scale
    window = canvas.window(chain[:, :2], 0.5 * scale)
    if window is None:
        return
    where, x, y = window
    distance, normal, _ = _bone_chain(chain[:, :2], radii, x, y)
    lift = float(np.clip(np.abs(chain[1:, 2]).mean() / (0.5 * scale), 0, 1))
    canvas.shadow(where, distance, 0.07 * scale, 0.10 + 0.28 * lift)
    canvas.paint(where, distance, normal, look.skin)


def render_clip(seed: int, action: str, num_frames: int = 16, size: int | tuple[int, int] = 224) -> Tensor:
    """A clip of a hand that performs an action; the same seed and action give the same clip.

    action: one of ACTIONS. size: one side or (height, width). Returns uint8 [num_frames, H, W, 3] RGB; `hand_joints`
    of the same arguments says where its joints are. Raises ValueError for an unknown action or a senseless number.
    """
    height, width = frame_size(size)
    motion = hand_motion(seed, action, num_frames, (height, width))
    rng = np.random.default_rng([seed, 4])
    skin = _SKINS[rng.integers(len(_SKINS))] * rng.uniform(0.92, 1.06)
    look = _Look(skin.astype(np.float32), rng.uniform(25, 210, 3).astype(np.float32), rng.uniform(0.14, 0.45))
    frames = _moving_background(seed, motion.camera, height, width)
    for t, picture in enumerate(frames):
        canvas = _Canvas(picture)
        depth = motion.joints[t, :, 2]
        parts = [(float(depth[list(_PALM)].mean()), -1)]
        # fingers grow from the palm's front: only one well behind it goes under it
        parts += [(float(depth[4 * f + 2 : 4 * f + 5].mean() + 0.5 * motion.scale[t]), f) for f in range(5)]
        _draw_arm(canvas, motion, t, look)
        for _, finger in sorted(parts):
            if finger < 0:
                _draw_palm(canvas, motion, t, look)
            else:
                _draw_finger(canvas, motion, t, look, finger)
    return torch.from_numpy(np.clip(frames + 0.5, 0, 255).astype(np.uint8))


def write_video(
    path: str | os.PathLike[str], frames: Tensor | np.ndarray, fps: int = 25, codec: str = "libx264"
) -> Path:
    """Encodes frames to a video file; the container follows from the name. Needs PyAV.

    frames: uint8 [F, H, W, 3] RGB, sides even. The file appears whole or not at all. Raises ValueError or TypeError for
    frames of another kind, VideoError for a file that cannot be written.
    """
    av = import_av()
    path, pixels = Path(path), np.ascontiguousarray(frames)
    if pixels.dtype != np.uint8:
        raise TypeError(f"frames must be uint8, got {pixels.dtype}")
    if pixels.ndim != 4 or pixels.shape[-1] != 3 or not len(pixels) or pixels.shape[1] % 2 or pixels.shape[2] % 2:
        raise ValueError(f"frames must be [F, H, W, 3], at least one, H and W even, got {pixels.shape}")
    aside = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    try:
        with av.open(f"file:{aside}", "w") as container:
            # without mbtree=0 libx264 gives different files from run to run
            options = {"crf": "18", "preset": "veryfast", "mbtree": "0"} if codec == "libx264" else {}
            stream = container.add_stream(codec, rate=fps, options=options)
            stream.height, stream.width, stream.pix_fmt = pixels.shape[1], pixels.shape[2], "yuv420p"
            for picture in pixels:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode(None))
        os.replace(aside, path)
    except (av.error.FFmpegError, av.codec.codec.UnknownCodecError, OSError) as error:
        raise VideoError(path, f"cannot be written: {error}") from None
    finally:
        aside.unlink(missing_ok=True)
    return path


def render_videos(
    folder: str | os.PathLike[str],
    count: int,
    seed: int = 0,
    num_frames: int = 48,
    size: int | tuple[int, int] = (240, 320),
) -> list[Path]:
    """Renders count videos into a folder, actions in turn: 0000_wave.mp4, 0001_open_close.mp4, ...

    Video i shows `render_clip(seed + i, ...)`. Needs PyAV.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    videos = []
    for i in range(count):
        action = ACTIONS[i % len(ACTIONS)]
        videos.append(write_video(folder / f"{i:04d}_{action}.mp4", render_clip(seed + i, action, num_frames, size)))
    return videos
