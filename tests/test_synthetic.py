"""Synthetic clips: everything follows from the seed, joints lie on the drawn hand, files hold what was rendered."""

import numpy as np
import pytest
import torch

from mmfast.data import synthetic
from mmfast.data.hand import Camera, hand_motion
from mmfast.data.synthetic import ACTIONS, hand_joints, render_clip, render_videos, write_video

SMALL = (64, 80)


def test_same_seed_gives_the_same_clip():
    assert torch.equal(render_clip(3, "wave", 4, SMALL), render_clip(3, "wave", 4, SMALL))


@pytest.mark.parametrize(("seed", "action"), [(4, "wave"), (3, "swipe")], ids=["seed", "action"])
def test_another_seed_or_action_gives_another_clip(seed, action):
    assert not torch.equal(render_clip(3, "wave", 4, SMALL), render_clip(seed, action, 4, SMALL))


def test_scene_does_not_depend_on_the_action():
    wave, swipe = render_clip(5, "wave", 2, SMALL), render_clip(5, "swipe", 2, SMALL)
    assert torch.equal(wave[:, :8, :8], swipe[:, :8, :8])


@pytest.mark.parametrize("action", ACTIONS)
def test_joints_lie_on_the_drawn_hand(action):
    clip = render_clip(7, action, 8, (96, 128)).float().numpy()
    empty = synthetic._moving_background(7, hand_motion(7, action, 8, (96, 128)).camera, 96, 128)
    drawn = np.abs(clip - empty).max(-1) > 6
    joints = hand_joints(7, action, 8, (96, 128)).numpy().round().astype(int)
    inside = ((joints >= 0) & (joints < (128, 96))).all(-1)
    frame, joint = np.nonzero(inside)
    x, y = joints[frame, joint].T
    assert len(frame) > 100
    assert drawn[frame, y, x].mean() > 0.97


def test_background_far_from_the_hand_is_left_alone():
    camera = hand_motion(7, "circle", 4, (96, 128)).camera
    clip = render_clip(7, "circle", 4, (96, 128)).float().numpy()
    assert np.abs(clip - synthetic._moving_background(7, camera, 96, 128))[:, :6, :6].max() <= 1


@pytest.mark.parametrize(("zoom", "shift"), [(1.0, (3.0, -2.0)), (1.25, (0.0, 0.0))], ids=["shift", "zoom"])
def test_background_moves_as_the_camera_says(zoom, shift):
    camera = Camera(np.array([[0.0, 0.0], shift]), np.array([1.0, zoom]))
    still, moved = synthetic._moving_background(1, camera, 65, 81)
    centre = np.array([40.0, 32.0])
    points = np.stack(np.meshgrid(np.arange(-12, 13, 4), np.arange(-12, 13, 4)), -1).reshape(-1, 2).astype(float)
    here = (centre + points).astype(int)
    there = camera.project(np.stack([points, points]), centre)[1].astype(int)
    expected = still[here[:, 1], here[:, 0]]
    assert np.abs(moved[there[:, 1], there[:, 0]] - expected).max() < 0.1


def test_turning_the_hand_leaves_its_shape():
    motion = hand_motion(2, "rotate", 6, 224)
    shape = motion.joints / motion.scale[:, None, None]
    distances = np.linalg.norm(shape[:, :, None] - shape[:, None], axis=-1)
    assert np.abs(distances - distances[0]).max() < 1e-9


def _spans(seed: int, action: str) -> dict[str, float]:
    motion = hand_motion(seed, action, 32, 224)
    joints = motion.joints / motion.scale.mean()
    tips, wrist = joints[:, [8, 12, 16, 20]], joints[:, 0]
    reach = np.linalg.norm(tips - wrist[:, None], axis=-1).mean(1)
    return {
        "size": np.ptp(motion.scale) / motion.scale.mean(),
        "wrist x": np.ptp(wrist[:, 0]),
        "wrist y": np.ptp(wrist[:, 1]),
        "fist": np.ptp(reach),
        "pinch": np.ptp(np.linalg.norm(joints[:, 4] - joints[:, 8], axis=-1)),
        "turn": np.ptp(joints[:, 5, 2] - joints[:, 17, 2]),
        "tip x": np.ptp(joints[:, 12, 0] - wrist[:, 0]),
    }


@pytest.mark.parametrize(
    ("action", "moves", "least"),
    [
        ("wave", "tip x", 0.8),
        ("open_close", "fist", 0.7),
        ("pinch", "pinch", 0.3),
        ("circle", "wrist y", 0.7),
        ("push", "size", 0.4),
        ("point", "wrist y", 0.4),
        ("rotate", "turn", 0.8),
        ("swipe", "wrist x", 1.0),
    ],
)
def test_action_moves_what_it_is_named_for(action, moves, least):
    spans = [_spans(seed, action)[moves] for seed in range(6)]
    assert min(spans) > least, spans


def test_pinching_fingers_meet():
    motion = hand_motion(0, "pinch", 48, 224)
    gap = np.linalg.norm(motion.joints[:, 4] - motion.joints[:, 8], axis=-1) / motion.scale
    assert gap.min() < 0.2  # two finger radii


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, "juggle", 2, 64), "action must be one of .*'juggle'"),
        ((0, "wave", 0, 64), "num_frames must be at least 1, got 0"),
        ((-1, "wave", 2, 64), "seed must be 0 or more, got -1"),
        ((0, "wave", 2, (8, 64)), "size must be at least 16"),
    ],
)
def test_senseless_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        render_clip(*arguments)


# -- files --


def test_file_holds_the_frames_that_were_written(tmp_path):
    pytest.importorskip("av")
    from mmfast.data.video import decode_frames

    frames = render_clip(1, "point", 6, SMALL)
    path = write_video(tmp_path / "a.mp4", frames)
    error = (decode_frames(path, range(6)).float() - frames.float()).abs().mean(dim=(1, 2, 3))
    assert error.max() < 8


def test_same_frames_give_the_same_file(tmp_path):
    pytest.importorskip("av")
    frames = render_clip(1, "wave", 4, SMALL)
    files = {write_video(tmp_path / f"{i}.mp4", frames).read_bytes() for i in range(12)}
    assert len(files) == 1


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    pytest.importorskip("av")
    path = tmp_path / "a.mp4"
    path.write_bytes(b"old")
    with pytest.raises(ValueError, match=r"a\.mp4: cannot be written"):
        write_video(path, render_clip(1, "point", 2, SMALL), codec="no_such_codec")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("a.mp4", b"old")]


@pytest.mark.parametrize(
    ("frames", "error", "message"),
    [
        (np.zeros((2, 15, 16, 3), np.uint8), ValueError, "H and W even"),
        (np.zeros((0, 16, 16, 3), np.uint8), ValueError, "at least one"),
        (np.zeros((2, 16, 16, 3), np.float32), TypeError, "frames must be uint8, got float32"),
    ],
    ids=["odd", "none", "float"],
)
def test_frames_that_no_file_can_hold_are_refused(tmp_path, frames, error, message):
    pytest.importorskip("av")
    with pytest.raises(error, match=message):
        write_video(tmp_path / "a.mp4", frames)


def test_videos_take_actions_and_seeds_in_turn(tmp_path):
    pytest.importorskip("av")
    from mmfast.data.video import decode_frames

    paths = render_videos(tmp_path / "clips", 9, seed=4, num_frames=2, size=SMALL)
    assert [p.name for p in paths[:2]] == [f"0000_{ACTIONS[0]}.mp4", f"0001_{ACTIONS[1]}.mp4"]
    written, expected = decode_frames(paths[8], [1]), render_clip(12, ACTIONS[0], 2, SMALL)[1:]
    assert (written.float() - expected.float()).abs().mean() < 8
