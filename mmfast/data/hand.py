"""The hand of the synthetic clips: a small articulated skeleton, posed frame by frame, in pixels.

The skeleton lives in palm lengths: wrist at the origin, x to the little finger, y towards the fingers, z towards the
viewer. A finger bends out of the palm's plane towards the viewer; the thumb swings across the palm as well. The posed
hand is turned in space (roll in the image plane, yaw about the forearm, pitch), scaled, and dropped onto the image; the
camera's own motion is then applied to it as to the background. Everything follows from (seed, action, number of frames,
size).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

ACTIONS = ("wave", "open_close", "pinch", "circle", "push", "point", "rotate", "swipe")

# thumb, index, middle, ring, little: root, bones, direction from +y in degrees (positive to the little finger)
_ROOTS = np.array([[-0.27, 0.20], [-0.31, 0.93], [-0.06, 1.0], [0.19, 0.95], [0.41, 0.82]])
_BONES = np.array([[0.38, 0.31, 0.26], [0.44, 0.27, 0.22], [0.49, 0.31, 0.23], [0.45, 0.29, 0.22], [0.34, 0.21, 0.19]])
_SPREAD = np.array([-46.0, -8.0, -1.0, 6.0, 14.0])
_BEND = np.radians([[18.0, 22.0, 28.0], [75.0, 100.0, 65.0]])  # full bend of each joint: thumb, other fingers


@dataclass(frozen=True)
class Camera:
    """Where the image's centre looks, frame by frame: pixel = centre + zoom * (world - shift)."""

    shift: np.ndarray  # [F, 2] pixels
    zoom: np.ndarray  # [F]

    def project(self, points: np.ndarray, centre: np.ndarray) -> np.ndarray:
        """World points [F, J, 2], in pixels from the image's centre, to pixels of the image."""
        return centre + self.zoom[:, None, None] * (points - self.shift[:, None])


@dataclass(frozen=True)
class HandMotion:
    """A posed hand in every frame."""

    joints: np.ndarray  # [F, 21, 3]: x and y in pixels of the image, z in pixels towards the viewer
    elbow: np.ndarray  # [F, 2] pixels
    scale: np.ndarray  # [F] pixels of one palm length
    camera: Camera


def frame_size(size: int | tuple[int, int]) -> tuple[int, int]:
    """(height, width) from an int or a pair; ValueError below 16 pixels."""
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width) < 16:
        raise ValueError(f"size must be at least 16 pixels a side, got {(height, width)}")
    return height, width


def _camera(rng: np.random.Generator, num_frames: int, side: int) -> Camera:
    t = np.linspace(0.0, 1.0, num_frames)
    phase, rate = rng.uniform(0, 2 * np.pi, 3), rng.uniform(0.4, 1.1, 3) * 2 * np.pi
    drift = rng.uniform(-0.05, 0.05, 2)
    sway = 0.018 * np.sin(t[:, None] * rate[:2] + phase[:2])
    return Camera(side * (drift * (t[:, None] - 0.5) + sway), 1.0 + 0.03 * np.sin(t * rate[2] + phase[2]))


@dataclass
class _Pose:
    """One number or vector a frame; the action fills in what it moves."""

    bend: np.ndarray  # [F, 5] 0 straight to 1 folded; the thumb's is how far it lies across the palm
    shift: np.ndarray  # [F, 2] palm lengths, y up
    roll: np.ndarray  # [F] radians, and so on
    yaw: np.ndarray
    pitch: np.ndarray
    zoom: np.ndarray
    spread: np.ndarray


def _pose(action: str, phase: np.ndarray, gain: float) -> _Pose:
    sine, pulse = np.sin(phase), (1 - np.cos(phase)) / 2
    zeros, ones = np.zeros_like(phase), np.ones_like(phase)
    bend, shift = np.full((len(phase), 5), 0.08), np.zeros((len(phase), 2))
    pose = _Pose(bend, shift, zeros, zeros, zeros, ones, ones)
    if action == "wave":
        pose.roll = np.radians(30) * gain * sine
        pose.spread = 1.4 * ones
    elif action == "open_close":
        bend[:] = pulse[:, None] * np.array([0.9, 0.95, 0.97, 0.97, 0.95])
        pose.spread = 1.5 - 0.6 * pulse
    elif action == "pinch":
        # at the end of the pulse the tips of thumb and index finger touch
        bend[:] = np.stack([0.25 + 0.42 * pulse, 0.25 + 0.49 * pulse, *(k * ones for k in (0.30, 0.22, 0.16))], 1)
        pose.yaw, pose.spread = np.radians(35) * ones, 1.3 * ones
    elif action == "circle":
        bend[:] = (0.85, 0.03, 0.92, 0.95, 0.95)
        shift[:] = 0.55 * gain * np.stack([np.cos(phase), sine], 1)
    elif action == "push":
        pose.zoom = 1 + 0.35 * gain * sine
        pose.spread, pose.pitch = 1.3 * ones, np.radians(18) * sine
    elif action == "point":
        bend[:] = (0.85, 0.02, 0.93, 0.95, 0.95)
        shift[:, 1] = 0.65 * gain * (pulse - 0.5)
        pose.pitch = np.radians(35) * (1 - pulse)
    elif action == "rotate":
        pose.yaw = np.radians(85) * sine
    elif action == "swipe":
        shift[:, 0] = 0.95 * gain * sine
        pose.roll = np.radians(-16) * np.cos(phase)
    else:
        raise ValueError(f"action must be one of {ACTIONS}, got {action!r}")
    return pose


def _skeleton(bend: np.ndarray, spread: np.ndarray) -> np.ndarray:
    """Joints [F, 21, 3] in palm lengths: wrist, then root to tip of thumb, index, middle, ring and little finger."""
    joints = np.zeros((len(bend), 21, 3))
    for finger in range(5):
        thumb = finger == 0
        angle = np.radians(_SPREAD[finger]) * (np.ones_like(spread) if thumb else spread)
        at = np.tile(np.append(_ROOTS[finger], 0.0), (len(bend), 1))
        lift = np.full(len(bend), 0.15) + 0.75 * bend[:, 0] if thumb else np.zeros(len(bend))
        joints[:, 4 * finger + 1] = at
        for bone in range(3):
            turn = _BEND[0 if thumb else 1, bone] * bend[:, finger]
            if thumb:
                angle = angle + turn + np.radians(26) * bend[:, 0] * (bone < 2)
            else:
                lift = lift + turn
            flat = np.cos(lift)
            step = np.stack([np.sin(angle) * flat, np.cos(angle) * flat, np.sin(lift)], 1)
            at = at + _BONES[finger, bone] * step
            joints[:, 4 * finger + 2 + bone] = at
    return joints


def _turn(joints: np.ndarray, roll: np.ndarray, yaw: np.ndarray, pitch: np.ndarray) -> np.ndarray:
    """Rotates joints [F, J, 3] about the wrist: pitch about x, then yaw about y, then roll about z."""
    for angle, (i, j) in ((pitch, (1, 2)), (yaw, (2, 0)), (roll, (0, 1))):
        c, s = np.cos(angle)[:, None], np.sin(angle)[:, None]
        a, b = joints[..., i].copy(), joints[..., j].copy()
        joints[..., i], joints[..., j] = c * a - s * b, s * a + c * b
    return joints


def hand_motion(seed: int, action: str, num_frames: int, size: int | tuple[int, int]) -> HandMotion:
    """The posed hand of a clip, as it is drawn. Raises ValueError for an unknown action or a senseless number."""
    if num_frames < 1:
        raise ValueError(f"num_frames must be at least 1, got {num_frames}")
    if seed < 0:
        raise ValueError(f"seed must be 0 or more, got {seed}")
    height, width = frame_size(size)
    side = min(height, width)
    camera = _camera(np.random.default_rng([seed, 1]), num_frames, side)
    rng = np.random.default_rng([seed, 2])
    cycles, start, gain = rng.uniform(0.9, 1.6), rng.uniform(0, 2 * np.pi), rng.uniform(0.8, 1.15)
    lean, tilt, length = np.radians(rng.uniform(-22, 22)), np.radians(rng.uniform(-12, 12, 2)), rng.uniform(0.19, 0.24)
    place, mirror = rng.uniform(-0.06, 0.06, 2), rng.choice([-1.0, 1.0])
    widths, lengths = rng.uniform(0.94, 1.06), rng.uniform(0.94, 1.06)

    pose = _pose(action, start + 2 * np.pi * cycles * np.arange(num_frames) / num_frames, gain)
    joints = _skeleton(pose.bend, pose.spread) * np.array([widths, lengths, 1.0])
    joints = _turn(joints, pose.roll, pose.yaw + tilt[0], pose.pitch + tilt[1])
    joints[..., 0] *= mirror
    arm = np.stack([np.zeros(num_frames), np.full(num_frames, -3.2), np.zeros(num_frames)], 1)[:, None]
    joints = _turn(np.concatenate([joints, arm], 1), np.full(num_frames, lean), np.zeros(1), np.zeros(1))

    scale = side * length * pose.zoom
    joints = joints * scale[:, None, None]
    origin = side * (place + np.array([0.0, -0.20])) + side * length * pose.shift * np.array([mirror, 1.0])
    flat = (joints[..., :2] + origin[:, None]) * np.array([1.0, -1.0])  # image rows grow downwards
    flat = camera.project(flat, np.array([(width - 1) / 2, (height - 1) / 2]))
    placed = np.concatenate([flat[:, :21], joints[:, :21, 2:] * camera.zoom[:, None, None]], 2)
    return HandMotion(placed, flat[:, 21], scale * camera.zoom, camera)


def hand_joints(seed: int, action: str, num_frames: int = 16, size: int | tuple[int, int] = 224) -> Tensor:
    """Where the joints of `render_clip`'s hand are.

    Returns float32 [F, 21, 2]: (x, y) in pixels, (0, 0) the centre of the top left pixel; wrist, then four joints each
    of thumb, index, middle, ring and little finger, root to tip. A joint may lie outside the image. Raises ValueError
    for an unknown action.
    """
    return torch.from_numpy(hand_motion(seed, action, num_frames, size).joints[..., :2].astype(np.float32))
