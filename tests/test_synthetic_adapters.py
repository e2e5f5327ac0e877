"""The study of few-shot heads side by side: the same episodes for all, and a table of what it found."""

import copy
import sys
from pathlib import Path
from typing import Any

import torch
from makers import tiny_config

from mmfast import EVL, EVLConfig, MaskedViT, ViTConfig
from mmfast.evl_fewshot import DecoderAdaptation
from mmfast.peft import Adaptation

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import synthetic_lab
from synthetic_adapters import heads_study, markdown, source_decoder
from synthetic_cdfsl import parse as study_options


def test_heads_are_compared_on_the_same_episodes() -> None:
    torch.manual_seed(0)
    labels = torch.arange(5).repeat(17)
    clips = {
        "clip_id": torch.arange(len(labels)),
        "label": labels,
        "rgb": (100 + 20 * labels.view(-1, 1, 1, 1, 1) + torch.randint(0, 60, (len(labels), 3, 4, 32, 32))).byte(),
    }
    model, short = MaskedViT(tiny_config(num_classes=0)), DecoderAdaptation(steps=2, lr=1e-4)
    source = EVL(EVLConfig(model.config, num_layers=1), copy.deepcopy(model))
    how: dict[str, Any] = dict(how=Adaptation(steps=2), decoder=short, of_source=short)
    rows = heads_study(model, clips, shots=(1, 2), episodes=3, source=source, **how)
    assert [row["shots"] for row in rows] == [1, 2]
    for row in rows:
        for name in ("adapted", "decoded", "source"):
            gain = row[name]["mean"] - row["logistic"]["mean"]
            assert abs(row[f"gain of {name} over logistic"]["mean"] - gain) <= 1e-12
        assert row["logistic"]["mean"] > 0.3  # classes differ in brightness
    table = markdown(rows)
    assert "| head | 1-shot | 2-shot |" in table
    for name in ("adapted", "decoded", "source"):
        assert f"{100 * rows[1][name]['mean']:.2f} ±" in table
    without = heads_study(model, clips, shots=(1,), episodes=1, **how)
    assert "source" not in markdown(without)


def test_a_decoder_learns_the_source_classes(tmp_path: Path) -> None:
    options = study_options(["--source-clips", "2", "--target-clips", "1", "--test-clips", "1", "--batch", "4"])
    synthetic_lab.draw(options, tmp_path)
    lab = synthetic_lab.Lab(options, tmp_path)
    torch.manual_seed(0)
    encoder = MaskedViT(ViTConfig(**synthetic_lab.SIZES["rgb"], **synthetic_lab.TINY, final_norm=True))
    before = {name: t.clone() for name, t in encoder.state_dict().items()}
    evl = source_decoder(encoder, lab, 3)
    assert evl.config.num_classes == synthetic_lab.CLASSES
    fresh = source_decoder(encoder, lab, 1)
    assert not torch.equal(evl.decoder.cls_token, fresh.decoder.cls_token)
    for net in (encoder, evl.backbone):
        assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())
