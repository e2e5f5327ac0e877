"""What moves in the cross-domain clips: a hand, its fingers, its tilt and the thing it holds, all in one stationary process.

The state of a clip is four planes of two channels each: the hand's place (right, up), its fingers (index, the others),
its tilt (roll, size), and the thing's place seen from the hand (right, up). An action says how each plane moves. A moving
channel is A cos(phase), A Rayleigh and the first phase uniform, so standard normal in every frame; a channel at rest is
such a draw held; a circle is A cos, A sin of one phase, which is a pair of independent normals again. Unequal halves of a
swing (slow there, quick back) spend the same share of time at every place as equal ones. Hence in any one frame the
joint distribution of the whole state is N(0, 1) in every channel, whatever the action: only the order of frames tells.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mmfast.data.hand import _skeleton, _turn

_QUICK = 0.28  # share of a skewed swing's period that its quick half takes
_ROOTS, _TIPS = (0, 1, 5, 9, 13, 17), (4, 8, 12, 16, 20)


@dataclass(frozen=True)
class Move:
    """How one plane (u, v) of the state moves."""

    u: float = 0.0  # swings along u in one base cycle; 0 rests
    v: float = 0.0
    skew: int = 0  # +1: up quickly and down slowly, -1: the other way round, 0: evenly
    spin: int = 0  # +1: round from u to v, -1: from v to u; u and v then share amplitude and phase
    turn: float = 0.0  # the plane's axes are turned by so many degrees


@dataclass(frozen=True)
class Action:
    """A class: what each plane does; `name` says it."""

    name: str
    hand: Move = Move()
    fingers: Move = Move()
    tilt: Move = Move()
    thing: Move = Move()

    @property
    def moves(self) -> tuple[Move, Move, Move, Move]:
        return self.hand, self.fingers, self.tilt, self.thing


_SIDE, _UP, _RISE, _FALL = Move(u=1), Move(v=1), Move(u=1, turn=45), Move(u=1, turn=-45)
_ANTICLOCKWISE, _CLOCKWISE = Move(spin=1), Move(spin=-1)
_TO_RIGHT, _TO_LEFT = Move(u=1, skew=1), Move(u=1, skew=-1)
_UPWARDS, _DOWNWARDS = Move(u=1, skew=1, turn=90), Move(u=1, skew=-1, turn=90)
_FOLD, _GRASP, _RELEASE = Move(u=1, turn=45), Move(u=1, skew=1, turn=45), Move(u=1, skew=-1, turn=45)

# Two by two, each pair alike but for the direction of time, or mirrored: shuffled frames do not tell which is which.
SOURCE_ACTIONS = (
    Action("circle_clockwise", hand=_CLOCKWISE),
    Action("circle_anticlockwise", hand=_ANTICLOCKWISE),
    Action("dash_right_folding", hand=_TO_RIGHT, fingers=_FOLD),
    Action("dash_left_folding", hand=_TO_LEFT, fingers=_FOLD),
    Action("dash_up", hand=_UPWARDS),
    Action("dash_down", hand=_DOWNWARDS),
    Action("sway_orbit_clockwise", hand=_SIDE, thing=_CLOCKWISE),
    Action("sway_orbit_anticlockwise", hand=_SIDE, thing=_ANTICLOCKWISE),
    Action("bob_grasping", hand=_UP, fingers=_GRASP),
    Action("bob_releasing", hand=_UP, fingers=_RELEASE),
    Action("toss", thing=_UPWARDS),
    Action("drop", thing=_DOWNWARDS),
    Action("rise_twice", hand=Move(u=2, turn=45)),
    Action("fall_twice", hand=Move(u=2, turn=-45)),
    Action("twist_right", tilt=_TO_RIGHT, fingers=_FOLD),
    Action("twist_left", tilt=_TO_LEFT, fingers=_FOLD),
)
TARGET_ACTIONS = (
    Action("circle_clockwise_folding", hand=_CLOCKWISE, fingers=_FOLD),
    Action("circle_anticlockwise_folding", hand=_ANTICLOCKWISE, fingers=_FOLD),
    Action("dash_rise", hand=Move(u=1, skew=1, turn=45)),
    Action("dash_fall", hand=Move(u=1, skew=-1, turn=45)),
    Action("weave_along", hand=Move(u=1, v=2)),
    Action("weave_upright", hand=Move(u=2, v=1)),
    Action("bob_orbit_clockwise", hand=_UP, thing=_CLOCKWISE),
    Action("bob_orbit_anticlockwise", hand=_UP, thing=_ANTICLOCKWISE),
    Action("sway_grasping", hand=_SIDE, fingers=_GRASP),
    Action("sway_releasing", hand=_SIDE, fingers=_RELEASE),
)


def _swing(phase: np.ndarray, skew: int) -> np.ndarray:
    """cos of the phase, its way down (first half) and up (second half) given unequal shares of the time."""
    down = 0.5 if skew == 0 else (1 - _QUICK if skew > 0 else _QUICK)
    x = phase / (2 * np.pi) % 1.0
    return np.cos(np.pi * np.where(x < down, x / down, 1 + (x - down) / (1 - down)))


def state(rng: np.random.Generator, moves: Sequence[Move], num_frames: int, wobble: float) -> np.ndarray:
    """float64 [num_frames + 1, planes, 2]: the state in every frame and one more, N(0, 1) in every channel.

    wobble: share of every channel's standard deviation that a random swing unrelated to the action takes, 0 to 1. The same
    number of draws is taken whatever the moves, so that two actions with one rng differ in nothing but the action.
    """
    planes = len(moves)
    amplitude, phase = rng.rayleigh(size=(2, planes, 2)), rng.uniform(0, 2 * np.pi, (2, planes, 2))
    rate, stray_rate = rng.uniform(0.8, 1.25, planes), rng.uniform(0.4, 1.6, (planes, 2))
    cycle = 2 * np.pi * np.arange(num_frames + 1)[:, None] / num_frames
    z = np.empty((num_frames + 1, planes, 2))
    for p, move in enumerate(moves):
        at = phase[0, p] + rate[p] * cycle * (move.u, move.v)
        z[:, p, 0] = amplitude[0, p, 0] * _swing(at[:, 0], move.skew)
        z[:, p, 1] = amplitude[0, p, 1] * np.cos(at[:, 1])
        if move.spin:
            round_ = phase[0, p, 0] + move.spin * rate[p] * cycle[:, 0]
            z[:, p] = amplitude[0, p, 0] * np.stack([np.cos(round_), np.sin(round_)], 1)
        if move.turn:
            c, s = np.cos(np.radians(move.turn)), np.sin(np.radians(move.turn))
            z[:, p] = z[:, p] @ np.array([[c, s], [-s, c]])
    stray = amplitude[1] * np.cos(phase[1] + stray_rate * cycle[..., None])
    return np.sqrt(1 - wobble**2) * z + wobble * stray


@dataclass(frozen=True)
class CameraWay:
    """Camera of every frame: pixel = centre + gain * (world - shift), complex numbers x + iy, y down, world in pixels."""

    centre: complex
    gain: np.ndarray  # complex [F + 1]: zoom and turn
    shift: np.ndarray  # complex [F + 1]

    def project(self, world: np.ndarray) -> np.ndarray:
        """World points [F + 1, ...] to pixels."""
        trailing = (1,) * (world.ndim - 1)
        return self.centre + self.gain.reshape(-1, *trailing) * (world - self.shift.reshape(-1, *trailing))


def camera_way(
    rng: np.random.Generator, num_frames: int, side: int, drift: float, shake: float, zoom: float
) -> CameraWay:
    """A camera that drifts evenly and shakes; drift and shake are shares of the side, zoom of 1. Unrelated to the action."""
    t = np.linspace(0, 1, num_frames + 1)
    way = rng.uniform(-drift, drift, 2) @ (1, 1j)
    phase, rate = rng.uniform(0, 2 * np.pi, (4, 2)), rng.uniform((0.4, 1.5), (1.0, 3.0), (4, 2))
    waves = (np.cos(phase + 2 * np.pi * rate * t[:, None, None]) @ (0.7, 0.3)).T
    gain = (1 + zoom * waves[2]) * np.exp(0.5j * zoom * waves[3])
    return CameraWay((side - 1) * (0.5 + 0.5j), gain, side * (way * (t - 0.5) + shake * (waves[0] + 1j * waves[1])))


@dataclass(frozen=True)
class ClipMotion:
    """Where everything of a clip is, in its F frames and the one after: pixels as complex numbers x + iy, y down."""

    state: np.ndarray  # float64 [F + 1, 4, 2]
    joints: np.ndarray  # complex [F + 1, 21]
    depth: np.ndarray  # float64 [F + 1, 21], towards the viewer, palm lengths
    elbow: np.ndarray  # complex [F + 1]
    palm: np.ndarray  # float64 [F + 1]: pixels of one palm length
    thing: np.ndarray  # complex [F + 1]: the middle of the thing held
    thing_gain: np.ndarray  # complex [F + 1]: its turn and its size in pixels
    strays: np.ndarray  # complex [F + 1, n]: things that move on their own
    stray_gain: np.ndarray  # complex [F + 1, n]
    camera: CameraWay


def clip_motion(
    rng: np.random.Generator, action: Action, num_frames: int, side: int, camera: CameraWay, wobble: float, strays: int
) -> ClipMotion:
    """The posed hand, the thing and the strays of a clip, as they are drawn."""
    z = state(rng, action.moves, num_frames, wobble)
    lean, length, mirror = np.radians(rng.uniform(-25, 25)), rng.uniform(0.185, 0.23), rng.choice([-1.0, 1.0])
    yaw, pitch = np.radians(rng.uniform(-18, 18, 2))
    widths = rng.uniform(0.92, 1.08, 2)
    radius, heading = rng.uniform(0.075, 0.105, 1 + strays), rng.uniform(0, 2 * np.pi, 1 + strays)
    loose = state(rng, [Move(u=rng.uniform(0, 1), v=rng.uniform(0, 1)) for _ in range(strays)], num_frames, 0.3)

    index, others = 1 / (1 + np.exp(-1.7 * z[:, 1].T))
    bend = np.stack([0.5 * (index + others), index, others, others, others], 1)
    roll, near = np.radians(42) * np.tanh(0.8 * z[:, 2, 0]), np.exp(0.26 * np.tanh(0.8 * z[:, 2, 1]))
    still = np.zeros(num_frames + 1)
    joints = _skeleton(bend, 1.3 + still) * np.array([*widths, 1.0]) * np.array([mirror, 1.0, 1.0])
    elbow = np.array([0.0, -3.4, 0.0]) + np.zeros((num_frames + 1, 1, 3))
    joints = _turn(np.concatenate([joints, elbow], 1), roll + lean, still + yaw, still + pitch)
    middle = (joints[:, :1] + joints[:, 9:10]) / 2
    palm = side * length * near
    flat = ((joints - middle)[..., :2] @ (1, -1j)) * palm[:, None]
    place = side * 0.125 * (z[:, 0] @ (1, -1j)) + 0.04j * side
    thing = place + side * 0.19 * (z[:, 3] @ (1, -1j)) * near
    flat = camera.project(flat + place[:, None])
    zoom = np.abs(camera.gain)
    spin = np.exp(1j * (heading - (roll[:, None] + 0.6 * z[:, 3, :1]) * np.append(1.0, np.zeros(strays))))
    size = side * radius * spin * camera.gain[:, None]
    return ClipMotion(
        state=z,
        joints=flat[:, :21],
        depth=joints[:, :21, 2],
        elbow=flat[:, 21],
        palm=palm * zoom,
        thing=camera.project(thing),
        thing_gain=size[:, 0] * near,
        strays=camera.project(side * 0.27 * (loose @ (1, -1j))),
        stray_gain=size[:, 1:],
        camera=camera,
    )
