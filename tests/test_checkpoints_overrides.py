"""What overrides change in a checkpoint; what is refused because it would change the model."""

from typing import Any

import pytest
import torch
from makers import (
    GEOMETRY,
    assert_same,
    canonical,
    decoder,
    hf_videomae,
    prefixed,
    tiny_config,
)

from mmfast.checkpoints import convert


def test_another_number_of_classes_drops_the_head() -> None:
    got = convert(canonical(tiny_config()), **GEOMETRY, num_classes=7)
    assert got.initialised == got.dropped == ["head.weight", "head.bias"]
    assert (got.config.num_classes, "head.weight" in got.state) == (7, False)


def test_no_classes_drops_the_head() -> None:
    got = convert(canonical(tiny_config()), **GEOMETRY, num_classes=0)
    assert (got.initialised, got.dropped) == ([], ["head.weight", "head.bias"])


def test_flow_from_rgb_drops_the_patch_embedding() -> None:
    got = convert(prefixed(canonical(tiny_config()), "backbone."), **GEOMETRY, in_chans=2)
    assert got.initialised == ["patch_embed.proj.weight", "patch_embed.proj.bias"]
    assert got.dropped == ["backbone.patch_embed.proj.weight", "backbone.patch_embed.proj.bias"]
    assert got.config.mean == (0.0507, 0.4671)


def test_a_smaller_depth_drops_the_blocks_above() -> None:
    got = convert(canonical(tiny_config()), **GEOMETRY, depth=1)
    assert got.dropped
    assert all(name.startswith("blocks.1.") for name in got.dropped)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"depth": 3}, r"has no blocks\.2\.norm1\.weight"),
        ({"embed_dim": 128}, "the config makes it"),
        ({"mlp_ratio": 2.0}, r"blocks\.0\.mlp\.fc1\.weight has shape"),
        ({"num_clases": 3}, "unknown config field 'num_clases'"),
    ],
)
def test_an_override_the_file_cannot_follow_is_refused(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        convert(canonical(tiny_config()), **{**GEOMETRY, **overrides})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("blocks.1.mlp.fc1.weight", r"has no blocks\.1\.mlp\.fc1\.weight"),
        ("blocks.0.attn.qkv.weight", "of no known dialect"),
        ("head.bias", r"has no head\.bias"),
        ("fc_norm.bias", r"has no fc_norm\.bias"),
    ],
)
def test_a_missing_tensor_is_named(name: str, message: str) -> None:
    state = canonical(tiny_config())
    del state[name]
    with pytest.raises(ValueError, match=message):
        convert(state, **GEOMETRY)


@pytest.mark.parametrize("name", ["blocks.0.attn.relative_position_bias_table", "cls_token", "patch_embed.norm.weight"])
def test_a_tensor_that_would_change_the_model_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"holds {name}, which MaskedViT has no place for"):
        convert(canonical(tiny_config()) | {name: torch.ones(3)}, **GEOMETRY)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (prefixed(canonical(tiny_config()), "visual."), "the prefix 'visual.' is none of backbone., encoder., model."),
        (canonical(tiny_config()) | decoder(tiny_config()), r"no encoder\.patch_embed.*\n.*has a decoder"),
        (hf_videomae(canonical(tiny_config())) | {"videomae.embeddings.cls_token": torch.ones(1)}, "has a class token"),
        (
            {"embeddings.patch_embeddings.projection.weight": torch.ones(64, 3, 16, 16)},
            "has 4 dimensions, so it is an image model",
        ),
    ],
    ids=["prefix", "bare encoder", "class token", "image"],
)
def test_a_near_miss_is_told_why(state: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=rf"(?s)of no known dialect.*{message}"):
        convert(state, **GEOMETRY)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_embed.proj.weight": torch.ones(64, 3, 16, 16)}, r"patch embedding must be .* got \(64, 3, 16, 16\)"),
        ({"blocks.0.mlp.fc1.weight": None}, "has no first block"),
        ({"backbone.head.bias": torch.ones(5)}, r"head\.bias and backbone\.head\.bias are both head\.bias"),
    ],
    ids=["image", "no block", "twice"],
)
def test_a_broken_state_dict_is_refused(change: dict[str, torch.Tensor | None], message: str) -> None:
    state = {name: t for name, t in (canonical(tiny_config()) | change).items() if t is not None}
    with pytest.raises(ValueError, match=message):
        convert(state, **GEOMETRY)


def test_an_unknown_file_is_told_why_by_each_dialect() -> None:
    with pytest.raises(ValueError, match="of no known dialect") as error:
        convert({"conv1.weight": torch.ones(2), "fc.weight": torch.ones(2)})
    for dialect in ("mmfast", "mmcdfsl", "hf_videomae", "videomae_pretrain", "videomae_finetune"):
        assert f"\n  {dialect}: " in str(error.value)


def test_the_result_shares_no_memory_with_the_source() -> None:
    state = canonical(tiny_config())
    got = convert(state, **GEOMETRY).state
    before = {name: t.clone() for name, t in got.items()}
    for tensor in state.values():
        tensor.fill_(7)
    assert_same(got, before)
