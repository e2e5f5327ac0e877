"""The study of few-shot heads side by side: the same episodes for all, and a table of what it found."""

import sys
from pathlib import Path

import torch
from makers import tiny_config

from mmfast import MaskedViT
from mmfast.peft import Adaptation

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from synthetic_adapters import heads_study, markdown


def test_heads_are_compared_on_the_same_episodes() -> None:
    torch.manual_seed(0)
    labels = torch.arange(5).repeat(17)
    clips = {
        "clip_id": torch.arange(len(labels)),
        "label": labels,
        "rgb": (100 + 20 * labels.view(-1, 1, 1, 1, 1) + torch.randint(0, 60, (len(labels), 3, 4, 32, 32))).byte(),
    }
    rows = heads_study(MaskedViT(tiny_config()), clips, shots=(1, 2), episodes=3, how=Adaptation(steps=2))
    assert [row["shots"] for row in rows] == [1, 2]
    for row in rows:
        gain = row["adapted"]["mean"] - row["logistic"]["mean"]
        assert abs(row["gain over logistic"]["mean"] - gain) <= 1e-12
        assert row["logistic"]["mean"] > 0.3  # classes differ in brightness
    table = markdown(rows)
    assert "| head | 1-shot | 2-shot |" in table
    assert f"{100 * rows[1]['adapted']['mean']:.2f} ±" in table
