"""Labels, features and episodes of a small collection, for the tests of episodes and of adaptive ensembles."""

from typing import Any

import torch
from torch import Tensor

from mmfast.episodes import Episodes

LABELS = torch.arange(7).repeat(13)  # 13 clips of each of 7 classes


def small(**changes: Any) -> Episodes:
    options: dict[str, Any] = dict(n_way=3, k_shot=2, n_query=4, episodes=11, seed=5)
    return Episodes(LABELS, **{**options, **changes})


def features(views: int = 3, dim: int = 12, noise: float = 2.0) -> Tensor:
    """[C, P, D]: of each class around a point, views of a clip around the clip."""
    make = torch.Generator().manual_seed(3)
    centre = torch.randn(7, 1, dim, generator=make)[LABELS]
    clip = centre + noise * torch.randn(len(LABELS), 1, dim, generator=make)
    return clip + 0.7 * torch.randn(len(LABELS), views, dim, generator=make)
