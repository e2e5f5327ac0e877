"""Hand heatmaps from keypoints."""

import math

import numpy as np
import pytest
import torch

from mmfast.data.hand import hand_joints
from mmfast.data.heatmaps import hand_heatmaps


def _one(x: float, y: float, *score: float) -> torch.Tensor:
    """[1, 1, 21, 2 or 3]: every joint at one place."""
    return torch.tensor([[[[x, y, *score]] * 21]])


def test_values_are_a_gaussian_of_the_heatmaps_pixels() -> None:
    maps = hand_heatmaps(_one(111.5, 55.5), size=(28, 56), sigma=10.0, source_size=(112, 224))
    x, y = (111.5 + 0.5) / 4 - 0.5, (55.5 + 0.5) / 4 - 0.5
    wanted = [[math.exp(-((c - x) ** 2 + (r - y) ** 2) / 200) for c in range(56)] for r in range(28)]
    torch.testing.assert_close(maps[7, 0], torch.tensor(wanted))


def test_peaks_of_a_synthetic_hand_lie_on_its_joints() -> None:
    joints = hand_joints(3, "open_close", 5, 112)
    maps = hand_heatmaps(joints, sigma=3.0, source_size=(112, 112))
    assert maps.shape == (21, 5, 56, 56)
    at = maps.flatten(2).argmax(2)
    seen = torch.stack([at % 56, at // 56], -1).transpose(0, 1)
    wanted = ((joints + 0.5) / 2 - 0.5).clamp(0, 55)
    assert float((seen - wanted).abs().max()) <= 0.5 + 1e-4


def test_published_statistics_fit_sigma_in_heatmap_pixels() -> None:
    """Mean and deviation of 0.3: near enough with sigma in pixels of the map, a hundred times off in the frame's."""
    right = torch.stack([hand_joints(seed, "wave", 4, 224) for seed in range(6)]).flatten(0, 1)
    left = torch.stack([hand_joints(seed, "pinch", 4, 224) for seed in range(6)]).flatten(0, 1)
    hands = torch.stack([right * 0.7 + torch.tensor([50.0, 60.0]), left * 0.7 + torch.tensor([-10.0, 60.0])], 1)
    maps = hand_heatmaps(hands)
    assert 0.2 < float(maps.mean()) < 0.4
    assert 0.2 < float(maps.std()) < 0.4
    assert float(hand_heatmaps(hands, sigma=10 * 56 / 456).mean()) < 0.01


def test_two_hands_merge_by_the_maximum() -> None:
    both = torch.cat([_one(40.0, 40.0), _one(180.0, 150.0)], 1)
    singly = torch.maximum(hand_heatmaps(both[:, :1]), hand_heatmaps(both[:, 1:]))
    assert torch.equal(hand_heatmaps(both), singly)
    assert float(hand_heatmaps(both).max()) <= 1


@pytest.mark.parametrize("point", [_one(float("nan"), 3.0), _one(9.0, 9.0, 0.1), _one(9.0, 9.0, float("nan"))])
def test_a_joint_not_seen_gives_zeros(point: torch.Tensor) -> None:
    assert not hand_heatmaps(point).any()


def test_a_hand_not_seen_leaves_the_other() -> None:
    seen, unseen = _one(60.0, 60.0, 0.9), _one(200.0, 200.0, 0.1)
    assert torch.equal(hand_heatmaps(torch.cat([unseen, seen], 1)), hand_heatmaps(seen))


def test_a_joint_outside_shows_by_its_tail() -> None:
    maps = hand_heatmaps(_one(-20.5, 111.5))
    assert 0 < float(maps[0, 0, 28, 0]) < 1
    assert float(maps[0, 0, 28, 0]) == pytest.approx(float(maps[0, 0].max()))


def test_no_hands_and_no_frames() -> None:
    assert not hand_heatmaps(np.zeros((3, 0, 21, 2))).any()
    assert hand_heatmaps(np.zeros((0, 1, 21, 2))).numel() == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keypoints": torch.zeros(1, 1, 20, 2)}, "keypoints must be"),
        ({"keypoints": torch.zeros(1, 1, 21, 4)}, "keypoints must be"),
        ({"sigma": 0.0}, "sigma"),
        ({"size": 0}, "size"),
        ({"source_size": (0, 5)}, "source_size"),
    ],
)
def test_bad_input_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hand_heatmaps(**{"keypoints": _one(1.0, 1.0), **options})
