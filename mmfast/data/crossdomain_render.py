"""Pixels and exact flow of the cross-domain clips, all frames at once.

Everything is a tapered tube or a patch, painted back to front over a still picture that the camera passes over. A pixel's
coverage is clip(1/2 - d, 0, 1) with d its signed distance in pixels. The flow of a pixel is where the surface seen there
goes: the picture by the camera, a tube's point by its place along and across the tube, a patch's by its turn and size.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from mmfast.data.crossdomain_look import Look
from mmfast.data.crossdomain_motion import CameraWay, ClipMotion

_FLOAT = np.float32
# a hand's bones, the palm's first: joint, joint, radius at either end in palm lengths
_PALM_BONES = [(0, root, 0.26, 0.19) for root in (5, 9, 13, 17)]
_THUMB_BONES = [(0, 1, 0.22, 0.17), (1, 2, 0.165, 0.145), (2, 3, 0.14, 0.12), (3, 4, 0.12, 0.10)]
_FINGER_BONES = [
    (root + bone, root + bone + 1, *radii)
    for root in (5, 9, 13, 17)
    for bone, radii in enumerate(((0.135, 0.12), (0.12, 0.105), (0.105, 0.09)))
]
_BONES = np.array(_PALM_BONES + _THUMB_BONES + _FINGER_BONES)
_FROM, _TO = _BONES[:, 0].astype(int), _BONES[:, 1].astype(int)


@dataclass(frozen=True)
class Tubes:
    """Tapered tubes, in painting order in every frame, and where they are in the next one. All arrays [F, n]."""

    start: np.ndarray  # complex
    axis: np.ndarray  # complex, of length 1
    length: np.ndarray
    radius: np.ndarray  # at the start
    taper: np.ndarray  # radius gained a pixel of length
    next_start: np.ndarray  # complex
    next_axis: np.ndarray  # complex, of length 1
    stretch: np.ndarray  # next length / length
    swell: np.ndarray  # next radius / radius

    @classmethod
    def between(
        cls, start: np.ndarray, end: np.ndarray, radii: tuple[np.ndarray, np.ndarray], depth: np.ndarray | None = None
    ) -> Tubes:
        """From ends, radii at them and depth, all [F + 1, n]; near ones are painted over far ones."""
        span = end - start
        length = np.maximum(np.abs(span), 0.05)  # seen end on, a tube is a disc
        axis = span / np.maximum(np.abs(span), 1e-9)
        first, last = radii
        fields = [start[:-1], axis[:-1], length[:-1], first[:-1], ((last - first) / length)[:-1]]
        fields += [start[1:], axis[1:], length[1:] / length[:-1], first[1:] / first[:-1]]
        if depth is not None:
            order = np.argsort(depth[:-1], axis=1, kind="stable")
            fields = [np.take_along_axis(field, order, 1) for field in fields]
        return cls(*fields)


def _col(values: np.ndarray) -> np.ndarray:
    """[F] -> float32 [F, 1, 1]."""
    return values.astype(_FLOAT)[:, None, None]


class _Window:
    """A part of every frame, of one size, that holds the given points; x and y of its pixels."""

    def __init__(self, points: np.ndarray, margin: float, side: int) -> None:
        low = np.floor(np.stack([points.real.min(1), points.imag.min(1)]) - margin)
        high = np.ceil(np.stack([points.real.max(1), points.imag.max(1)]) + margin)
        self.width, self.height = (int(n) for n in np.clip((high - low).max(1) + 1, 1, side))
        self.left = np.clip(low[0], 0, side - self.width).astype(int)
        self.top = np.clip(low[1], 0, side - self.height).astype(int)
        self.x = _col(self.left) + np.arange(self.width, dtype=_FLOAT)[None, None]
        self.y = _col(self.top) + np.arange(self.height, dtype=_FLOAT)[None, :, None]
        self.shape = len(low[0]), self.height, self.width

    def of(self, frames: np.ndarray, t: int) -> np.ndarray:
        """The window of frames [C, F, H, W] in frame t: [C, height, width]."""
        return frames[:, t, self.top[t] : self.top[t] + self.height, self.left[t] : self.left[t] + self.width]


class Canvas:
    """The frames being painted: rgb float32 [3, F, H, W] in 0..255 and flow float32 [2, F, H, W], or None for one."""

    def __init__(self, num_frames: int, side: int, look: Look, camera: CameraWay, rgb: bool, flow: bool) -> None:
        self.look, self.side = look, side
        self.rgb: np.ndarray | None = None
        self.flow: np.ndarray | None = None
        x, y = np.arange(side, dtype=_FLOAT)[None, None], np.arange(side, dtype=_FLOAT)[None, :, None]
        if rgb:
            back, shift = 1 / camera.gain[:-1], camera.shift[:-1] - camera.centre / camera.gain[:-1]
            grid = np.empty((len(back), side, side, 2), dtype=_FLOAT)
            grid[..., 0] = x * _col(back.real) - y * _col(back.imag) + _col(shift.real)
            grid[..., 1] = x * _col(back.imag) + y * _col(back.real) + _col(shift.imag)
            grid *= _FLOAT(2 / look.picture.shape[-1])  # grid_sample counts half sides from the middle
            picture, places = torch.from_numpy(look.picture)[None], torch.from_numpy(grid.reshape(1, -1, side, 2))
            seen = F.grid_sample(picture, places, padding_mode="reflection", align_corners=False)
            self.rgb = seen.numpy().reshape(3, num_frames, side, side)
        if flow:
            self.flow = np.empty((2, num_frames, side, side), dtype=_FLOAT)
            pan = camera.gain[1:] * (camera.shift[:-1] - camera.shift[1:])
            self.flow[:] = _turned(x, y, np.full(num_frames, camera.centre), pan, camera.gain[1:] / camera.gain[:-1])

    def tubes(self, tubes: Tubes, colour: np.ndarray) -> None:
        """Paints tubes of one colour, lit as round bodies."""
        thick = float((tubes.radius + np.maximum(tubes.taper, 0) * tubes.length).max())
        ends = np.concatenate([tubes.start, tubes.start + tubes.axis * tubes.length], 1)
        window = _Window(ends, thick + 1, self.side)
        light, ambient = self.look.light, _FLOAT(self.look.ambient)
        clear, shade = np.ones(window.shape, dtype=_FLOAT), np.zeros(window.shape, dtype=_FLOAT)
        upper = np.zeros(window.shape, dtype=np.int64)
        for i in range(tubes.start.shape[1]):
            axis = tubes.axis[:, i]
            along, across, inner = _along_tube(tubes.start[:, i], axis, tubes.length[:, i], window.x, window.y)
            radius = _col(tubes.radius[:, i]) + _col(tubes.taper[:, i]) * inner
            along -= inner
            cover = radius - np.sqrt(along * along + across * across) + _FLOAT(0.5)
            np.clip(cover, 0, 1, out=cover)
            clear *= 1 - cover
            if self.rgb is not None:
                tilt = np.clip(across / radius, -1, 1)
                lit = np.sqrt(1 - tilt * tilt) * _FLOAT(light[2])
                lit += tilt * _col(light[1] * axis.real - light[0] * axis.imag)
                lit = ambient + (_FLOAT(1.3) - ambient) * np.maximum(lit, 0)
                shade += cover * (lit - shade)  # ends weighted by coverage, as it starts from nothing
            np.copyto(upper, i, where=cover > 0.5)
        if self.rgb is not None:
            for t in range(len(clear)):
                part = window.of(self.rgb, t)
                part *= clear[t]
                part += shade[t] * colour[:, None, None]
        if self.flow is not None:
            moved = _tube_flow(tubes, upper, window.x, window.y)
            for t, seen in enumerate(clear < 0.5):
                np.copyto(window.of(self.flow, t), moved[:, t], where=seen)

    def patch(self, middle: np.ndarray, gain: np.ndarray, shape: int, colours: np.ndarray) -> None:
        """Paints a flat striped thing: middle and gain (turn and size in pixels) complex [F + 1], colours [2, 3]."""
        window = _Window(middle[:-1, None], 1.5 * float(np.abs(gain).max()) + 1, self.side)
        back, size = 1 / gain[:-1], _col(np.abs(gain[:-1]))
        dx, dy = window.x - _col(middle[:-1].real), window.y - _col(middle[:-1].imag)
        u, v = dx * _col(back.real) - dy * _col(back.imag), dx * _col(back.imag) + dy * _col(back.real)
        if shape == 0:
            distance = np.hypot(u, v) - _FLOAT(1)
        else:
            half_u, half_v = (0.86, 0.86) if shape == 1 else (1.3, 0.55)
            distance = np.maximum(np.abs(u) - _FLOAT(half_u), np.abs(v) - _FLOAT(half_v))
        cover = np.clip(_FLOAT(0.5) - distance * size, 0, 1)
        if self.rgb is not None:
            stripe = np.clip(_FLOAT(0.5) + np.sin(u * _FLOAT(4)) * size * _FLOAT(0.25), 0, 1)
            dim = _FLOAT(0.3 + 0.7 * self.look.ambient + 0.25 * self.look.light[2])
            first, second = colours[:, :, None, None] * dim
            for t in range(len(cover)):
                part = window.of(self.rgb, t)
                part += cover[t] * (first + stripe[t] * (second - first) - part)
        if self.flow is not None:
            moved = _turned(window.x, window.y, middle[:-1], middle[1:] - middle[:-1], gain[1:] * back)
            for t, seen in enumerate(cover > 0.5):
                np.copyto(window.of(self.flow, t), moved[:, t], where=seen)

    def finish(self) -> np.ndarray:
        """uint8 [3, F, H, W]: the frames under the clip's light, with grain."""
        assert self.rgb is not None
        from_middle = np.linspace(-1, 1, self.side, dtype=_FLOAT) ** 2
        dark = 1 - _FLOAT(self.look.vignette) * (from_middle[:, None] + from_middle)
        frames = self.rgb * (self.look.gain[:, None, None, None] * dark)
        if self.look.grain is not None:
            frames += self.look.grain
        frames += _FLOAT(0.5)
        return np.clip(frames, 0, 255, out=frames).astype(np.uint8)


def _along_tube(
    start: np.ndarray, axis: np.ndarray, length: np.ndarray, x: np.ndarray, y: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Place of pixels along and across a tube a frame, and along it within its ends; start and axis complex [F]."""
    begin = start * axis.conj()
    ux, uy = _col(axis.real), _col(axis.imag)
    along = (x * ux - _col(begin.real)) + y * uy
    return along, (y * ux - _col(begin.imag)) - x * uy, np.clip(along, 0, _col(length))


def _turned(x: np.ndarray, y: np.ndarray, centre: np.ndarray, step: np.ndarray, turn: np.ndarray) -> np.ndarray:
    """float32 [2, F, h, w]: the flow of what is turned about a centre that takes a step; all complex [F]."""
    offset, real, imag = step - (turn - 1) * centre, _col(turn.real - 1), _col(turn.imag)
    return np.stack([x * real - y * imag + _col(offset.real), x * imag + y * real + _col(offset.imag)])


def _tube_flow(tubes: Tubes, upper: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """float32 [2, F, h, w]: where the surface of the tube seen at each pixel, upper [F, h, w], goes."""
    parts = (tubes.start, tubes.axis, tubes.next_start, tubes.next_axis)
    table = [side for part in parts for side in (part.real, part.imag)] + [tubes.length, tubes.stretch, tubes.swell]
    rows = np.stack(table, -1).astype(_FLOAT).reshape(-1, len(table))
    upper = upper + (np.arange(len(upper)) * tubes.start.shape[1])[:, None, None]
    px, py, ux, uy, qx, qy, vx, vy, length, stretch, swell = np.moveaxis(np.take(rows, upper, 0), -1, 0)
    dx, dy = x - px, y - py
    along, across = dx * ux + dy * uy, (dy * ux - dx * uy) * swell
    inner = np.clip(along, 0, length)
    along = inner * stretch + (along - inner) * swell  # round ends keep their shape
    return np.stack([qx + along * vx - across * vy - x, qy + along * vy + across * vx - y])


def paint(
    motion: ClipMotion, look: Look, side: int, rgb: bool, flow: bool
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """The clip: frames uint8 [3, F, H, W] and flow to the next frame float32 [2, F, H, W] in pixels (x right, y down)."""
    canvas = Canvas(len(motion.palm) - 1, side, look, motion.camera, rgb, flow)
    for i in range(motion.strays.shape[1]):
        canvas.patch(motion.strays[:, i], motion.stray_gain[:, i], int(look.shapes[1 + i]), look.colours[1 + i])
    palm, wrist = motion.palm[:, None], motion.joints[:, :1]
    elbow = motion.elbow[:, None]
    canvas.tubes(Tubes.between(wrist, elbow, (0.25 * palm, 0.36 * palm)), look.skin)
    cuff = wrist + look.sleeve_from * (elbow - wrist)
    canvas.tubes(Tubes.between(cuff, elbow, (0.36 * palm, 0.46 * palm)), look.sleeve)
    if not look.thing_on_top:
        _paint_thing(canvas, motion, look)
    ends = motion.joints[:, _FROM], motion.joints[:, _TO]
    depth = (motion.depth[:, _FROM] + motion.depth[:, _TO]) / 2
    # the palm lies under the fingers that grow from its front unless one is well behind it
    depth[:, : len(_PALM_BONES)] -= 0.35
    canvas.tubes(Tubes.between(*ends, (_BONES[:, 2] * palm, _BONES[:, 3] * palm), depth), look.skin)
    if look.thing_on_top:
        _paint_thing(canvas, motion, look)
    return canvas.finish() if rgb else None, canvas.flow


def _paint_thing(canvas: Canvas, motion: ClipMotion, look: Look) -> None:
    """The thing on the rod by which the hand holds it."""
    thick = 0.05 * motion.palm[:, None]
    grip = (motion.joints[:, :1] + motion.joints[:, 9:10]) / 2
    canvas.tubes(Tubes.between(grip, motion.thing[:, None], (thick, thick)), look.rod)
    canvas.patch(motion.thing, motion.thing_gain, int(look.shapes[0]), look.colours[0])
