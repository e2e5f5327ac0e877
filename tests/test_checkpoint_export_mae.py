"""Pre-training models written for others: VideoMAE, MM-CDFSL and Hugging Face; transformers itself computes the same."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from makers import (
    MAE_GEOMETRY,
    assert_same,
    hf_config,
    hf_pretrain,
    mmcdfsl_pretrain,
    save_hf,
    tiny_config,
    tiny_mae_config,
    videomae_pretrain,
)
from numerics import relative_error

from mmfast.checkpoints import convert, export_config, export_mae_state, export_state
from mmfast.config import MAEConfig
from mmfast.mae import MaskedAutoencoder
from mmfast.masks import tube_masks

os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.mark.parametrize(
    ("dialect", "classes"),
    [("videomae_pretrain", 0), ("mmcdfsl_pretrain", 5), ("hf_videomae_pretrain", 0), ("hf_videomae_pretrain_v5", 0)],
)
def test_export_and_convert_is_a_round_trip(dialect: str, classes: int) -> None:
    config = tiny_mae_config(num_classes=classes)
    state = videomae_pretrain(config)
    got = convert(export_mae_state(state, config, dialect), model="MaskedAutoencoder", **MAE_GEOMETRY, norm_eps=1e-6,
                  fc_norm_eps=1e-6, decoder_norm_eps=1e-6, head_drop_rate=0.0)  # fmt: skip
    assert got.config == config
    assert_same(got.state, state)


def test_export_writes_the_published_names() -> None:
    config, with_classes = tiny_mae_config(), tiny_mae_config(num_classes=5)
    state = videomae_pretrain(config)
    assert_same(export_mae_state(state, config, "videomae_pretrain"), state)
    assert_same(export_mae_state(state, config, "hf_videomae_pretrain"), hf_pretrain(state, "4.57"))
    exported = export_mae_state(videomae_pretrain(with_classes), with_classes, "mmcdfsl_pretrain")
    assert_same(exported, mmcdfsl_pretrain(with_classes, ""))


@pytest.mark.parametrize(
    ("overrides", "dialect", "message"),
    [
        ({"num_classes": 5}, "videomae_pretrain", "no model with num_classes above 0"),
        ({"num_classes": 5}, "hf_videomae_pretrain", "no model with num_classes above 0"),
        ({}, "mmcdfsl_pretrain", "no model with no classes"),
        ({"num_classes": 5, "fc_norm": False}, "mmcdfsl_pretrain", "no model with no fc_norm"),
        ({"init_values": 0.1}, "hf_videomae_pretrain_v5", "init_values above 0"),
        ({"qkv_bias": "full"}, "videomae_pretrain", 'qkv_bias "full"'),
        ({"gelu": "quick"}, "videomae_pretrain", 'gelu "quick"'),
        ({"decoder_mlp_ratio": 2.0}, "videomae_pretrain", "decoder_mlp_ratio 2 and mlp_ratio 4"),
        ({}, "hf_videomae", "dialect must be one of videomae_pretrain, mmcdfsl_pretrain"),
    ],
)
def test_export_refuses_what_the_other_cannot_compute(overrides: dict[str, Any], dialect: str, message: str) -> None:
    config = tiny_mae_config(**overrides)
    with pytest.raises(ValueError, match=message):
        export_mae_state(videomae_pretrain(config), config, dialect)


def test_export_refuses_a_state_of_another_config() -> None:
    with pytest.raises(ValueError, match=r"it differs in decoder\.blocks\.2\."):
        export_mae_state(videomae_pretrain(tiny_mae_config()), tiny_mae_config(decoder_depth=2), "videomae_pretrain")


def test_each_function_exports_its_own_model() -> None:
    state = videomae_pretrain(tiny_mae_config())
    with pytest.raises(ValueError, match="use export_mae_state"):
        export_state(state, tiny_mae_config(), "hf_videomae")
    with pytest.raises(TypeError, match="config must be a MAEConfig"):
        export_mae_state(state, tiny_config(), "videomae_pretrain")


# -- transformers itself -----------------------------------------------------------------------------------------------

# Its decoder.norm has eps 1e-5 whatever its config says, so all have it here: nothing else differs then.
EPS = dict(norm_eps=1e-5)


def hf_model(**changes: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    about = hf_config(tiny_mae_config(), layer_norm_eps=1e-5) | changes
    model = transformers.VideoMAEForPreTraining(transformers.VideoMAEConfig(**about)).eval()
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.1)
    return model


def assert_computes_the_same(ours: MaskedAutoencoder, theirs: Any) -> None:
    config: MAEConfig = ours.config
    draw = torch.Generator().manual_seed(1)
    video = torch.randn(2, config.in_chans, 4, 32, 32, generator=draw)
    mask = tube_masks(2, 1, config.grid, mask_ratio=0.5)[:, 0]
    with torch.no_grad():
        expected = theirs(video.transpose(1, 2), bool_masked_pos=mask)
        assert relative_error(ours(video, mask).pred, expected.logits) <= 1e-5
        assert relative_error(ours.reconstruction_loss(video, mask), expected.loss) <= 1e-5


@pytest.mark.parametrize("normalize", [True, False])
def test_saved_by_transformers(tmp_path: Path, normalize: bool) -> None:
    """Their key biases are random here: to leave them out changes nothing."""
    theirs = hf_model(norm_pix_loss=normalize)
    theirs.save_pretrained(tmp_path)
    ours = MaskedAutoencoder.from_pretrained(tmp_path)
    assert not ours.load_report.initialised
    assert all(name.endswith("key.bias") for name in ours.load_report.dropped)
    assert_computes_the_same(ours, theirs)


def test_transformers_biases_are_loaded(tmp_path: Path) -> None:
    theirs = hf_model()
    theirs.save_pretrained(tmp_path)
    ours = MaskedAutoencoder.from_pretrained(tmp_path)
    layers = [*theirs.videomae.encoder.layer, *theirs.decoder.decoder_layers]
    for block, layer in zip([*ours.encoder.blocks, *ours.decoder.blocks], layers, strict=True):
        attention = layer.attention.attention
        assert torch.equal(block.attn.q_bias, attention.query.bias)
        assert torch.equal(block.attn.v_bias, attention.value.bias)


def test_other_channels_saved_by_transformers_predict_the_same(tmp_path: Path) -> None:
    theirs = hf_model(num_channels=2)
    theirs.save_pretrained(tmp_path)
    video = torch.randn(2, 2, 4, 32, 32)
    mask = tube_masks(2, 1, (2, 2, 2), mask_ratio=0.5)[:, 0]
    with torch.no_grad():
        expected = theirs(video.transpose(1, 2), bool_masked_pos=mask).logits
        assert relative_error(MaskedAutoencoder.from_pretrained(tmp_path)(video, mask).pred, expected) <= 1e-5


@pytest.mark.parametrize("overrides", [{}, {"qkv_bias": "full"}, {"qkv_bias": "none", "gelu": "tanh"}])
def test_transformers_loads_what_is_exported(tmp_path: Path, overrides: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    config = tiny_mae_config(**EPS, **overrides)
    ours = MaskedAutoencoder(config).eval()
    ours.load_state_dict(videomae_pretrain(config))
    exported = export_mae_state(ours.state_dict(), config, "hf_videomae_pretrain_v5")
    folder = save_hf(tmp_path / "m", exported, export_config(config))
    load = transformers.VideoMAEForPreTraining.from_pretrained
    theirs, info = load(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert_computes_the_same(ours, theirs.eval())


def test_the_decoders_norm_keeps_its_own_eps(tmp_path: Path) -> None:
    theirs = hf_model(layer_norm_eps=1e-2)
    theirs.save_pretrained(tmp_path)
    ours = MaskedAutoencoder.from_pretrained(tmp_path)
    assert (ours.config.norm_eps, ours.config.decoder_norm_eps) == (1e-2, 1e-5)
    assert_computes_the_same(ours, theirs)
