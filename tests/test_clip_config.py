"""CLIPConfig: published names, validation by field name, JSON."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmfast import CLIP, CLIPConfig
from mmfast.clip_config import list_clip_models


@pytest.mark.parametrize(
    ("name", "alias", "sizes"),
    [
        ("clip_vit_b32", "ViT-B/32", (512, 224, 32, 768, 12, 12, 512, 8)),
        ("clip_vit_b16", "ViT-B-16", (512, 224, 16, 768, 12, 12, 512, 8)),
        ("clip_vit_l14", "ViT-L/14", (768, 224, 14, 1024, 24, 16, 768, 12)),
        ("clip_vit_l14_336", "ViT-L/14@336px", (768, 336, 14, 1024, 24, 16, 768, 12)),
    ],
)
def test_published_sizes(name: str, alias: str, sizes: tuple[int, ...]) -> None:
    c = CLIPConfig.from_name(name)
    assert CLIPConfig.from_name(alias) == c
    tower = (c.vision_width, c.vision_depth, c.vision_num_heads, c.text_width, c.text_num_heads)
    assert (c.embed_dim, c.image_size, c.patch_size, *tower) == sizes
    assert (c.gelu, c.norm_eps, c.text_depth, c.context_length, c.vocab_size) == ("quick", 1e-5, 12, 77, 49408)


@pytest.mark.parametrize(
    ("name", "millions"), [("clip_vit_b32", 151.277313), ("clip_vit_b16", 149.620737), ("clip_vit_l14", 427.616513)]
)
def test_parameter_counts_are_the_published_ones(name: str, millions: float) -> None:
    import torch

    with torch.device("meta"):
        model = CLIP.from_name(name)
    assert sum(p.numel() for p in model.parameters()) == round(millions * 1e6)


def test_an_unknown_name_comes_with_the_close_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown CLIP model 'clip_vit_b61' \(did you mean clip_vit_b16"):
        CLIPConfig.from_name("clip_vit_b61")


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("embed_dim", 0, ValueError),
        ("image_size", 225, ValueError),
        ("patch_size", 1.5, TypeError),
        ("vision_num_heads", 7, ValueError),
        ("text_num_heads", True, TypeError),
        ("vision_mlp_ratio", 0.0, ValueError),
        ("text_mlp_ratio", "4", TypeError),
        ("norm_eps", float("nan"), ValueError),
        ("gelu", "relu", ValueError),
        ("mean", (0.5, 0.5), ValueError),
        ("std", (0.5, 0.5, 0.0), ValueError),
    ],
)
def test_a_bad_field_is_named(field: str, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=field):
        CLIPConfig(**{field: value})


@given(st.sampled_from(list_clip_models()), st.sampled_from(["quick", "erf", "tanh"]), st.integers(1, 20))
def test_json_round_trip(name: str, gelu: Any, context: int) -> None:
    config = CLIPConfig.from_name(name, gelu=gelu, context_length=context)
    assert CLIPConfig.from_json(config.to_json()) == config
