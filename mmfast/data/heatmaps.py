"""Hand heatmaps: 21 channels, one a joint, from the keypoints that a hand detector finds in the RGB frames."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

JOINTS = 21


def hand_heatmaps(
    keypoints: Tensor | np.ndarray,
    size: int | tuple[int, int] = 56,
    sigma: float = 10.0,
    source_size: tuple[int, int] = (224, 224),
    min_score: float = 0.3,
) -> Tensor:
    """A Gaussian of height 1 on every joint, several hands merged by the maximum: float32 [21, F, h, w].

    keypoints: [F, hands, 21, 2 or 3], or [F, 21, 2 or 3] for one hand: x and y in pixels of frames of source_size
    (height, width), (0, 0) the centre of the top left one, then a score. A joint whose x or y is NaN, or whose score is
    below min_score or NaN, gives nothing: a joint that no hand shows is an empty map. A joint outside the frame shows
    by its tail. The channel is the joint's, whichever hand it belongs to.

    sigma is counted in pixels of the heatmap. MM-CDFSL says "sigma 10" only; the mean and deviation of 0.3 by which it
    normalises its 56 x 56 maps leave no other reading: in pixels of a 456 x 256 frame, the mean would be 0.003.

    Raises ValueError for other shapes and for numbers that make no sense.
    """
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width) < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    if min(source_size) < 1:
        raise ValueError(f"source_size must be (height, width) of at least 1, got {source_size}")
    if not 0 < sigma < float("inf"):
        raise ValueError(f"sigma must be finite and above 0, got {sigma}")
    points = torch.as_tensor(keypoints, dtype=torch.float32)
    if points.dim() == 3:
        points = points[:, None]
    if points.dim() != 4 or points.shape[2] != JOINTS or points.shape[3] not in (2, 3):
        raise ValueError(f"keypoints must be [F, hands, 21, 2 or 3], got {tuple(points.shape)}")
    frames, hands = points.shape[:2]
    if not hands:
        return torch.zeros(JOINTS, frames, height, width)
    seen = points[..., :2].isfinite().all(-1)
    if points.shape[-1] == 3:
        seen = seen & (points[..., 2] >= min_score)  # False for NaN
    # A Gaussian is the product of two, one along each side: exp is called on F*21*(h + w) numbers, not F*21*h*w.
    along = []
    for axis, (side, source) in enumerate(((width, source_size[1]), (height, source_size[0]))):
        centre = torch.where(seen, (points[..., axis] + 0.5) * (side / source) - 0.5, 0.0)
        away = torch.arange(side) - centre[..., None]
        along.append(torch.exp(away.square() / (-2 * sigma * sigma)))
    columns, rows = along[0], along[1] * seen[..., None]
    merged = rows[:, 0, :, :, None] * columns[:, 0, :, None]
    for hand in range(1, hands):
        merged = torch.maximum(merged, rows[:, hand, :, :, None] * columns[:, hand, :, None])
    return merged.transpose(0, 1)
