"""Against Hugging Face's VideoMAE with the same random weights: RGB, flow and pose geometry, full and masked."""

import os

import pytest
import torch
from numerics import relative_error

from mmfast import MaskedViT, random_masks, tube_masks

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers")

GEOMETRY = {"rgb": (3, 16, 64), "flow": (2, 16, 64), "pose": (21, 4, 16)}


def build(kind: str, modality: str, **changes):
    channels, patch, size = GEOMETRY[modality]
    config = transformers.VideoMAEConfig(
        image_size=size,
        patch_size=patch,
        num_channels=channels,
        num_frames=8,
        tubelet_size=2,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=256,
        num_labels=5,
        **changes,
    )
    torch.manual_seed(0)
    model = getattr(transformers, kind)(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model


def video_of(modality: str) -> torch.Tensor:
    channels, _, size = GEOMETRY[modality]
    return torch.randn(2, channels, 8, size, size, generator=torch.Generator().manual_seed(1))


def ours(theirs, tmp_path) -> MaskedViT:
    theirs.save_pretrained(tmp_path)
    return MaskedViT.from_pretrained(tmp_path)


@pytest.mark.parametrize("mean_pooling", [True, False], ids=["mean", "first-token"])
@pytest.mark.parametrize("modality", GEOMETRY)
def test_classifier(modality: str, mean_pooling: bool, tmp_path) -> None:
    theirs = build("VideoMAEForVideoClassification", modality, use_mean_pooling=mean_pooling)
    model = ours(theirs, tmp_path)
    assert not model.load_report.initialised
    video = video_of(modality)
    with torch.no_grad():
        assert relative_error(model(video), theirs(video.transpose(1, 2)).logits) <= 1e-5


@pytest.mark.parametrize("masks", [tube_masks, random_masks])
@pytest.mark.parametrize("modality", GEOMETRY)
def test_masked_encoder(modality: str, masks, tmp_path) -> None:
    theirs = build("VideoMAEModel", modality, use_mean_pooling=False)
    model = ours(theirs, tmp_path)
    video = video_of(modality)
    mask = masks(2, 1, model.config.grid, 0.75)[:, 0]
    with torch.no_grad():
        expected = theirs(video.transpose(1, 2), bool_masked_pos=mask).last_hidden_state
        assert relative_error(model.forward_features(video, mask), expected) <= 1e-5


def test_masked_ensemble(tmp_path) -> None:
    theirs = build("VideoMAEForVideoClassification", "rgb", use_mean_pooling=True)
    model = ours(theirs, tmp_path)
    video, masks = video_of("rgb"), tube_masks(2, 3, model.config.grid, 0.75, seed=3)
    with torch.no_grad():
        expected = 0
        for view in range(3):
            tokens = theirs.videomae(video.transpose(1, 2), bool_masked_pos=masks[:, view]).last_hidden_state
            expected = expected + theirs.classifier(theirs.fc_norm(tokens.mean(1))).softmax(-1) / 3
    assert relative_error(model.ensemble(video, 3, 0.75, seed=3), expected) <= 1e-5


def test_biases_are_used(tmp_path) -> None:
    """transformers 5 once loaded every q and v bias as zero; here a change of one must change the output."""
    theirs = build("VideoMAEForVideoClassification", "rgb")
    model, video = ours(theirs, tmp_path), video_of("rgb")
    with torch.no_grad():
        before = model(video)
        for name in ("q_bias", "v_bias"):
            assert getattr(model.blocks[0].attn, name).abs().max() > 0
            getattr(model.blocks[0].attn, name).add_(0.5)
            assert relative_error(model(video), before) > 1e-4
            before = model(video)
