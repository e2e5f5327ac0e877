"""Against Hugging Face's CLIP with the same random weights: image, text, logits and every gradient."""

import os
from pathlib import Path

import pytest
import torch
from clip_makers import TINY, clips, hf_model, texts
from numerics import relative_error
from torch import Tensor

from mmfast import CLIP, CLIPConfig
from mmfast.checkpoints.clip import convert_clip

os.environ.setdefault("HF_HUB_OFFLINE", "1")
pytest.importorskip("transformers")
GEOMETRY = {
    "b16": {},
    "patch14": dict(patch_size=14, image_size=42, vision_mlp_ratio=3.0, text_mlp_ratio=2.0),
    "head80": dict(vision_width=160, text_width=128, norm_eps=1e-6),
}


def pair(tmp_path: Path, **changes) -> tuple[CLIP, torch.nn.Module]:
    config = CLIPConfig(**{**TINY, **changes})
    eps = {} if config.norm_eps == 1e-5 else dict(layer_norm_eps=config.norm_eps)
    theirs = hf_model(config, **eps)
    theirs.save_pretrained(tmp_path)
    ours = CLIP.from_pretrained(tmp_path)
    assert ours.config == config
    return ours, theirs


def pooled(output) -> Tensor:
    return getattr(output, "pooler_output", output)


@pytest.mark.parametrize("gelu", ["quick", "erf"])
@pytest.mark.parametrize("geometry", GEOMETRY)
def test_images_texts_and_logits(geometry: str, gelu: str, tmp_path: Path) -> None:
    ours, theirs = pair(tmp_path, gelu=gelu, **GEOMETRY[geometry])
    side = ours.config.image_size
    image, ids = clips(3, 1, (side, side))[:, :, 0], texts()
    with torch.no_grad():
        expected = theirs(input_ids=ids, pixel_values=image)
        assert relative_error(ours.encode_image(image), pooled(theirs.get_image_features(image))) <= 1e-5
        assert relative_error(ours.encode_text(ids), pooled(theirs.get_text_features(ids))) <= 1e-5
        assert relative_error(ours(image, ids)[0], expected.logits_per_image) <= 1e-5


def test_frames_are_images(tmp_path: Path) -> None:
    ours, theirs = pair(tmp_path)
    video = clips(2, 5)
    with torch.no_grad():
        expected = pooled(theirs.get_image_features(video.transpose(1, 2).flatten(0, 1))).view(2, 5, -1)
        assert relative_error(ours.encode_image(video), expected) <= 1e-5


@pytest.mark.parametrize("size", [(64, 48), (32, 96), (80, 80)])
def test_other_image_sizes(size: tuple[int, int], tmp_path: Path) -> None:
    ours, theirs = pair(tmp_path)
    image = clips(2, 1, size)[:, :, 0]
    with torch.no_grad():
        expected = pooled(theirs.get_image_features(image, interpolate_pos_encoding=True))
        assert relative_error(ours.encode_image(image), expected) <= 1e-5


def test_gradients(tmp_path: Path) -> None:
    ours, theirs = pair(tmp_path)
    image, ids = clips(3, 1)[:, :, 0], texts()
    ours(image, ids)[0].square().mean().backward()
    theirs = theirs.double()
    theirs(input_ids=ids, pixel_values=image.double()).logits_per_image.square().mean().backward()
    grads = {name: p.grad.float() for name, p in theirs.named_parameters()}
    expected = convert_clip(grads, vision_num_heads=2, text_num_heads=2).state
    for name, p in ours.named_parameters():
        assert relative_error(p.grad, expected[name]) <= 1e-5, name
