"""Models written for others: mmfast's own folders, the names of VideoMAE and Hugging Face, and transformers itself."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from makers import GEOMETRY, assert_same, canonical, hf_config, hf_videomae, save_hf, tiny_config

from mmfast.checkpoints import convert, export_config, export_state, load_pretrained_vit
from mmfast.config import ViTConfig
from mmfast.vit import MaskedViT


@pytest.mark.parametrize("dialect", ["videomae_finetune", "hf_videomae", "hf_videomae_v5"])
def test_export_and_convert_is_a_round_trip(dialect: str) -> None:
    config = tiny_config()
    state = canonical(config)
    exported = export_state(state, config, dialect)
    assert_same(convert(exported, **GEOMETRY, norm_eps=1e-6, fc_norm_eps=1e-6).state, state)


def test_export_of_full_biases_for_the_hub_leaves_out_the_key() -> None:
    state = canonical(tiny_config(qkv_bias="full"))
    exported = export_state(state, tiny_config(qkv_bias="full"), "hf_videomae")
    query = exported["videomae.encoder.layer.1.attention.attention.q_bias"]
    assert torch.equal(query, state["blocks.1.attn.qkv.bias"][:64])
    assert not any("key.bias" in name for name in exported)


def test_export_writes_the_names_of_the_hub() -> None:
    config = tiny_config()
    assert_same(export_state(canonical(config), config, "hf_videomae"), hf_videomae(canonical(config), "4.57"))


@pytest.mark.parametrize(
    ("overrides", "dialect", "message"),
    [
        ({"final_norm": True}, "hf_videomae", "no model with final_norm and fc_norm at once"),
        ({"final_norm": True}, "videomae_finetune", "no model with final_norm and fc_norm at once"),
        ({"init_values": 0.1}, "hf_videomae", "init_values above 0"),
        ({"qkv_bias": "full"}, "videomae_finetune", 'qkv_bias "full"'),
        ({"gelu": "quick"}, "videomae_finetune", 'gelu "quick"'),
        ({"fc_norm": False}, "hf_videomae", "neither final_norm nor fc_norm"),
        ({"pool": "first"}, "hf_videomae", 'pool "first" with fc_norm'),
        ({}, "timm", "dialect must be one of"),
    ],
)
def test_export_refuses_what_the_other_cannot_compute(overrides: dict[str, Any], dialect: str, message: str) -> None:
    config = tiny_config(**overrides)
    with pytest.raises(ValueError, match=message):
        export_state(canonical(config), config, dialect)


def test_export_refuses_a_state_of_another_config() -> None:
    with pytest.raises(ValueError, match="it differs in head.bias, head.weight"):
        export_state(canonical(tiny_config()), tiny_config(num_classes=6), "hf_videomae")


# -- transformers itself -----------------------------------------------------------------------------------------------


def hf_model(kind: str, **changes: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.VideoMAEConfig(
        **hf_config(tiny_config()) | dict(decoder_hidden_size=64, decoder_num_hidden_layers=1, num_labels=5)
        | dict(decoder_num_attention_heads=2, decoder_intermediate_size=64) | changes
    )  # fmt: skip
    model = getattr(transformers, kind)(config).eval()
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.1)
    return model


@pytest.mark.parametrize("kind", ["VideoMAEModel", "VideoMAEForVideoClassification", "VideoMAEForPreTraining"])
@pytest.mark.parametrize("mean_pooling", [True, False])
def test_saved_by_transformers(tmp_path: Path, kind: str, mean_pooling: bool) -> None:
    theirs = hf_model(kind, use_mean_pooling=mean_pooling)
    theirs.save_pretrained(tmp_path)
    ours, report = load_pretrained_vit(tmp_path)
    video = torch.randn(2, 4, 3, 32, 32)
    with torch.no_grad():
        if kind == "VideoMAEForVideoClassification":
            expected, got = theirs(video).logits, ours.eval()(video.transpose(1, 2))
        else:
            encoder = theirs if kind == "VideoMAEModel" else theirs.videomae
            expected, got = encoder(video).last_hidden_state, ours.eval().forward_features(video.transpose(1, 2))
    assert float((got - expected).norm() / expected.norm()) < 1e-5
    assert not report.initialised
    dropped = [name for name in report.dropped if not name.endswith("key.bias")]
    assert all(name.startswith(("decoder.", "mask_token", "encoder_to_decoder.")) for name in dropped)


@pytest.mark.parametrize(
    "overrides",
    [{}, {"final_norm": True, "fc_norm": False, "pool": "first"}, {"num_classes": 0, "fc_norm": False}],
    ids=["mean", "first", "bare"],
)
def test_transformers_loads_what_is_exported(tmp_path: Path, overrides: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    config = tiny_config(norm_eps=1e-12, fc_norm_eps=1e-5, **overrides)
    state = canonical(config)
    ours = MaskedViT(config).eval()
    ours.load_state_dict(state)
    about = export_config(config)
    folder = save_hf(tmp_path / "m", export_state(state, config, "hf_videomae_v5"), about)
    theirs, info = getattr(transformers, about["architectures"][0]).from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    video = torch.randn(2, 4, 3, 32, 32)
    with torch.no_grad():
        out = theirs.eval()(video)
        if config.num_classes:
            expected, got = out.logits, ours(video.transpose(1, 2))
        else:
            expected, got = out.last_hidden_state, ours.forward_features(video.transpose(1, 2))
    assert float((got - expected).norm() / expected.norm()) < 1e-5


def test_the_native_round_trip(tmp_path: Path) -> None:
    config = tiny_config(final_norm=True, init_values=0.1, gelu="quick", norm_eps=1e-5, mean=(0.1, 0.2, 0.3))
    model = MaskedViT(config)
    model.load_state_dict(canonical(config))
    model.save_pretrained(tmp_path / "a" / "b")
    again = MaskedViT.from_pretrained(tmp_path / "a" / "b")
    assert (again.config, again.load_report.dialect) == (config, "mmfast")
    assert_same(dict(again.state_dict()), canonical(config))
    assert sorted(p.name for p in (tmp_path / "a" / "b").iterdir()) == ["config.json", "model.safetensors"]


def test_native_norm_eps_override_takes_fc_norm_along(tmp_path: Path) -> None:
    MaskedViT(tiny_config()).save_pretrained(tmp_path)
    config = convert(tmp_path, norm_eps=1e-5).config
    assert (config.norm_eps, config.fc_norm_eps) == (1e-5, 1e-5)


def test_native_statistics_follow_an_override_of_the_channels(tmp_path: Path) -> None:
    MaskedViT(tiny_config(mean=(0.1, 0.2, 0.3))).save_pretrained(tmp_path)
    assert convert(tmp_path, in_chans=2).config.mean == (0.0507, 0.4671)
    assert convert(tmp_path, in_chans=2, mean=(0.0, 1.0)).config.mean == (0.0, 1.0)


def test_native_config_that_does_not_fit_its_weights_is_refused(tmp_path: Path) -> None:
    MaskedViT(tiny_config()).save_pretrained(tmp_path)
    about = json.loads((tmp_path / "config.json").read_text())
    about["config"]["num_classes"] = 6
    (tmp_path / "config.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match=r"head\.bias has shape \(5,\), but the config makes it \(6,\)"):
        convert(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"version": 99}, "version 99"), ({"model": "Other"}, "must hold a MaskedViT"), ({"config": 3}, "and its config")],
)
def test_config_json_of_another_kind_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    MaskedViT(tiny_config()).save_pretrained(tmp_path)
    about = json.loads((tmp_path / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match=message):
        convert(tmp_path)


def test_config_is_frozen_plain_data() -> None:
    assert ViTConfig.from_dict(json.loads(json.dumps(tiny_config().to_dict()))) == tiny_config()
