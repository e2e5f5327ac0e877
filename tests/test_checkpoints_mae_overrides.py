"""Pre-training checkpoints: what overrides change, and what is refused."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from makers import (
    GEOMETRY,
    assert_same,
    decoder,
    hf_pretrain,
    loaded_mae,
    mmcdfsl_pretrain,
    prefixed,
    tiny_mae_config,
    videomae_pretrain,
)

from mmfast.checkpoints import convert, load_pretrained_mae, load_pretrained_vit

DECODER = set(decoder(tiny_mae_config()))
PIXELS = [
    "encoder.patch_embed.proj.weight",
    "encoder.patch_embed.proj.bias",
    "decoder.head.weight",
    "decoder.head.bias",
]


# -- overrides ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pixels",
    [{"in_chans": 2}, {"in_chans": 21, "patch_size": 4, "img_size": 8}, {"in_chans": 6, "tubelet_size": 1}],
    ids=["flow", "pose", "as many values"],
)
def test_other_pixels_start_the_patch_embedding_and_the_decoders_head_anew(pixels: dict[str, Any]) -> None:
    source = videomae_pretrain(tiny_mae_config())
    config, got, report = loaded_mae({"model": prefixed(source, "module.")}, **pixels)
    assert sorted(report.initialised) == sorted(PIXELS)
    assert report.dropped == [f"module.{name}" for name in PIXELS]
    assert config == tiny_mae_config(**pixels)
    kept = {name: t for name, t in got.items() if name not in PIXELS}
    assert_same(kept, {name: t for name, t in source.items() if name not in PIXELS})
    assert any("a flow or pose model is made from an RGB file" in note for note in report.notes)


def test_other_classes_start_the_head_anew() -> None:
    config, got, report = loaded_mae(mmcdfsl_pretrain(tiny_mae_config(num_classes=5)), num_classes=7)
    assert report.initialised == ["head.weight", "head.bias"]
    assert report.dropped == ["_forward_module.model.head_action.weight", "_forward_module.model.head_action.bias"]
    assert torch.equal(got["fc_norm.weight"], videomae_pretrain(tiny_mae_config(num_classes=5))["fc_norm.weight"])


def test_no_classes_leave_the_class_branch_out() -> None:
    _, _, report = loaded_mae(videomae_pretrain(tiny_mae_config(num_classes=5)), num_classes=0)
    assert sorted(report.dropped) == ["fc_norm.bias", "fc_norm.weight", "head.bias", "head.weight"]


def test_classes_are_added_to_a_file_without() -> None:
    config, _, report = loaded_mae(videomae_pretrain(tiny_mae_config()), num_classes=5)
    assert sorted(report.initialised) == ["fc_norm.bias", "fc_norm.weight", "head.bias", "head.weight"]
    assert config == tiny_mae_config(num_classes=5)


def test_a_smaller_decoder_depth_drops_the_blocks_above() -> None:
    config, _, report = loaded_mae(hf_pretrain(videomae_pretrain(tiny_mae_config()), "5.17"), decoder_depth=2)
    own = [name for name in report.dropped if not name.endswith("key.bias")]
    assert len(own) == 15
    assert all(name.startswith("decoder.decoder_layers.2.") for name in own)
    assert len(set(report.dropped)) == len(report.dropped)


def test_another_decoder_width_starts_the_decoder_anew() -> None:
    source = videomae_pretrain(tiny_mae_config())
    config, got, report = loaded_mae(source, decoder_embed_dim=64)
    assert (config.decoder_embed_dim, config.decoder_depth, set(report.dropped)) == (64, 3, DECODER)
    assert set(report.initialised) == DECODER
    assert all(torch.equal(got[n], t) for n, t in source.items() if n.startswith("encoder."))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"decoder_depth": 4}, r"has no decoder\.blocks\.3\.norm1\.weight, which a model of depth 4 needs"),
        ({"decoder_mlp_ratio": 2.0}, r"decoder\.blocks\.0\.mlp\.fc1\.weight has shape"),
        ({"depth": 3}, r"has no encoder\.blocks\.2\.norm1\.weight"),
        ({"final_norm": False}, "final_norm must be True"),
        ({"decoder_dim": 3}, "unknown config field 'decoder_dim'"),
        ({"decoder_num_heads": 3}, "decoder_num_heads must divide decoder_embed_dim 128"),
    ],
)
def test_an_override_the_file_cannot_follow_is_refused(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loaded_mae(videomae_pretrain(tiny_mae_config()), **overrides)


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mask_token", "has no mask_token"),
        ("encoder_to_decoder.weight", r"has a decoder, but no encoder_to_decoder\.weight"),
        ("decoder.norm.bias", r"has no decoder\.norm\.bias, which a model of depth 3 needs"),
        ("decoder.head.weight", r"has no decoder\.head\.weight"),
        ("decoder.blocks.2.attn.q_bias", r"decoder\.block 2 has v_bias"),
        ("encoder.norm.bias", r"has no encoder\.norm\.bias"),
        ("head.bias", r"has no head\.bias"),
    ],
)
def test_a_missing_tensor_is_named(name: str, message: str) -> None:
    state = videomae_pretrain(tiny_mae_config(num_classes=5))
    del state[name]
    with pytest.raises(ValueError, match=message):
        loaded_mae(state)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("decoder.head.weight", torch.ones(7, 128), r"decoder\.head\.weight has shape \(7, 128\), .* \(1536, 128\)"),
        ("mask_token", torch.ones(1, 1, 64), r"mask_token has shape \(1, 1, 64\)"),
        ("decoder.extra.weight", torch.ones(1), r"holds decoder\.extra\.weight, which MaskedAutoencoder has no place"),
        ("decoder.norm.weight", torch.full((128,), float("nan")), "1 of 75 tensors hold NaN or infinity: decoder.norm"),
        ("mask_token", torch.ones(1, 1, 128, dtype=torch.int8), "mask_token must be floating point"),
    ],
)
def test_a_wrong_tensor_is_named(name: str, tensor: torch.Tensor, message: str) -> None:
    state = videomae_pretrain(tiny_mae_config()) | {name: tensor}
    with pytest.raises(ValueError, match=message):
        loaded_mae(state)
    load_pretrained_vit(state, **GEOMETRY)  # to which the decoder does not matter


def test_a_file_of_neither_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="of no known dialect"):
        load_pretrained_mae({"conv1.weight": torch.ones(2), "fc.weight": torch.ones(2)})


def test_code_in_a_file_is_not_run(tmp_path: Path) -> None:
    torch.save({"model": videomae_pretrain(tiny_mae_config()), "callback": print}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"refused.*print.*trust=True"):
        loaded_mae(tmp_path / "a.pth")
    assert loaded_mae(tmp_path / "a.pth", trust=True)[2].dialect == "videomae_pretrain"


def test_a_model_of_no_such_name_is_refused() -> None:
    with pytest.raises(ValueError, match="model must be MaskedViT or MaskedAutoencoder or None, got 'MAE'"):
        convert(videomae_pretrain(tiny_mae_config()), model="MAE")


@pytest.mark.parametrize("stack", ["encoder.", "decoder."])
def test_biases_that_are_all_zero_in_one_stack_are_warned_of(stack: str) -> None:
    state = videomae_pretrain(tiny_mae_config())
    lost = lambda name: name.startswith(stack) and name.endswith(("q_bias", "v_bias"))
    of = " of the decoder" if stack == "decoder." else ""
    with pytest.warns(UserWarning, match=f"every query and value bias{of} is 0"):
        loaded_mae({name: t * 0 if lost(name) else t for name, t in state.items()})


def test_a_decoder_that_is_left_out_is_not_warned_of() -> None:
    state = videomae_pretrain(tiny_mae_config())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert({n: t * 0 if n.startswith("decoder.") else t for n, t in state.items()}, **GEOMETRY)
