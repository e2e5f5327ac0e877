"""Pre-training checkpoints: every dialect into a MaskedAutoencoder, which model a file is, folders."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from makers import (
    GEOMETRY,
    MAE_GEOMETRY,
    State,
    assert_same,
    canonical,
    decoder,
    hf_config,
    hf_pretrain,
    hf_videomae,
    loaded_mae,
    mmcdfsl_pretrain,
    mmcdfsl_stage2,
    prefixed,
    save_hf,
    tiny_config,
    tiny_mae_config,
    videomae_pretrain,
)

from mmfast.checkpoints import canonical_shapes, convert, load_pretrained, load_pretrained_mae, load_pretrained_vit
from mmfast.checkpoints.geometry import read_config
from mmfast.checkpoints.layout import Draft, model_name
from mmfast.config import MAEConfig, list_models, mae_from_name
from mmfast.layers import sinusoid_positions
from mmfast.mae import MaskedAutoencoder
from mmfast.vit import MaskedViT

DECODER = set(decoder(tiny_mae_config()))


@pytest.mark.parametrize(
    "overrides",
    [{}, {"num_classes": 5}, {"num_classes": 5, "fc_norm": False}, {"qkv_bias": "full", "init_values": 0.1}],
    ids=["plain", "classes", "no-fc-norm", "full-gamma"],
)
def test_canonical_shapes_are_those_of_the_model(overrides: dict[str, Any]) -> None:
    config = tiny_mae_config(**overrides)
    shapes = {model_name(name, config): shape for name, shape in canonical_shapes(config).items()}
    assert shapes == {name: tuple(t.shape) for name, t in MaskedAutoencoder(config).state_dict().items()}


@pytest.mark.parametrize("name", [name for name in list_models() if name.startswith("pretrain_")])
def test_published_models_are_told_by_their_shapes(name: str) -> None:
    config = mae_from_name(name)
    state = {name: torch.empty(shape, device="meta") for name, shape in canonical_shapes(config).items()}
    draft = Draft(state, {}, mae_fields={"head_drop_rate": config.head_drop_rate})
    assert read_config(draft, MAEConfig, {}, "a file") == config


# -- VideoMAE ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "_orig_mod."])
def test_videomae(prefix: str, tmp_path: Path) -> None:
    state = videomae_pretrain(tiny_mae_config())
    file = {"model": prefixed(state, prefix), "args": argparse.Namespace(lr=1.0), "epoch": 3}
    torch.save(file, tmp_path / "checkpoint.pth")
    config, got, report = loaded_mae(tmp_path / "checkpoint.pth")
    assert (report.dialect, config) == ("videomae_pretrain", tiny_mae_config())
    assert not report.initialised
    assert not report.dropped
    assert_same(got, state)


def test_geometry_comes_from_the_shapes() -> None:
    config = tiny_mae_config(
        embed_dim=128, in_chans=21, patch_size=4, img_size=56, num_frames=16, tubelet_size=1, mlp_ratio=2.5, depth=1
    )
    config = MAEConfig.from_dict({**config.to_dict(), "decoder_mlp_ratio": 3.5, "decoder_embed_dim": 64,
                                  "decoder_num_heads": 1})  # fmt: skip
    model, report = load_pretrained_mae(videomae_pretrain(config))
    assert model.config == config
    assert {"num_heads 2 assumed from the width 128", "decoder_num_heads 1 assumed from the width 64"} <= {
        *report.notes
    }


def test_the_giant_of_videomae_v2_has_patches_of_14_on_224_pixels() -> None:
    config = tiny_mae_config(patch_size=14, img_size=224, mlp_ratio=48 / 11, decoder_mlp_ratio=48 / 11, num_frames=16)
    got = load_pretrained_mae(videomae_pretrain(config), num_heads=2, decoder_num_heads=2)[0].config
    assert (got.grid, got.mlp_dim, got.decoder.mlp_dim) == ((8, 16, 16), 279, 558)


def test_layer_scale_of_v2_is_kept() -> None:
    state = videomae_pretrain(tiny_mae_config(init_values=0.1))
    assert_same(loaded_mae(state)[1], state)


def test_the_class_branch_of_our_own_state_dict_is_kept() -> None:
    state = videomae_pretrain(tiny_mae_config(num_classes=5))
    config, got, _ = loaded_mae({"state_dict": prefixed(state, "model.")})
    assert config == tiny_mae_config(num_classes=5)
    assert_same(got, state)


def test_cosine_attention_in_the_decoder_is_refused_for_the_autoencoder_alone() -> None:
    state = videomae_pretrain(tiny_mae_config()) | {"decoder.blocks.0.attn.scale": torch.ones(2, 1, 1)}
    with pytest.raises(ValueError, match=r"decoder\.blocks\.0\.attn\.scale: cosine attention"):
        loaded_mae(state)
    assert "decoder.blocks.0.attn.scale" in load_pretrained_vit(state, **GEOMETRY)[1].dropped


def test_learned_positions_of_the_decoder_are_refused_and_sinusoids_dropped() -> None:
    state = videomae_pretrain(tiny_mae_config())
    assert loaded_mae(state | {"pos_embed": sinusoid_positions(8, 128)[None]})[2].dropped == ["pos_embed"]
    with pytest.raises(ValueError, match=r"pos_embed \(1, 8, 128\) is learned"):
        loaded_mae(state | {"pos_embed": torch.zeros(1, 8, 128)})


# -- MM-CDFSL ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["_forward_module.model.", "model.", ""])
def test_mmcdfsl_stage_1(prefix: str) -> None:
    config = tiny_mae_config(num_classes=5, head_drop_rate=0.5)
    got_config, got, report = loaded_mae({"module": mmcdfsl_pretrain(config, prefix)})
    assert (report.dialect, got_config, report.initialised, report.dropped) == ("mmcdfsl", config, [], [])
    assert_same(got, videomae_pretrain(config))


def test_mmcdfsl_head_is_chosen() -> None:
    state = mmcdfsl_pretrain(tiny_mae_config(num_classes=5), "model.")
    state |= {"model.head_verb.weight": torch.ones(3, 64), "model.head_verb.bias": torch.ones(3)}
    config, got, report = loaded_mae(state, head="verb")
    assert (config.num_classes, float(got["head.weight"].min())) == (3, 1.0)
    assert report.dropped == ["model.head_action.weight", "model.head_action.bias"]


def test_mmcdfsl_student_starts_with_a_new_decoder_and_its_own_class_branch() -> None:
    source = mmcdfsl_stage2(tiny_config(final_norm=True, fc_norm=True, embed_dim=128))
    expected = canonical(tiny_config(final_norm=True, fc_norm=True, embed_dim=128), seed=0)
    config, got, report = loaded_mae({"module": source}, decoder_num_heads=None)
    assert all(torch.equal(got[model_name(name, config)], tensor) for name, tensor in expected.items())
    assert (config.norm_eps, config.num_classes, config.decoder_embed_dim) == (1e-5, 5, 64)
    assert {name.partition(".")[0] for name in report.initialised} == {"decoder", "encoder_to_decoder", "mask_token"}
    assert "no decoder in the file: it starts anew" in report.notes


@pytest.mark.parametrize(("branch", "chans", "patch"), [("teacher_flow", 2, 16), ("teacher_pose", 21, 4)])
def test_mmcdfsl_teachers(branch: str, chans: int, patch: int) -> None:
    source = mmcdfsl_stage2(tiny_config(final_norm=True))
    config, got, _ = loaded_mae(source, branch=branch, img_size=2 * patch, decoder_embed_dim=128)
    assert (config.in_chans, config.patch_size) == (chans, patch)
    assert torch.equal(
        got["encoder.patch_embed.proj.weight"], source[f"_forward_module.{branch}.encoder.patch_embed.proj.weight"]
    )


# -- Hugging Face ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("biases", ["4.57", "5.17", "5.23"])
@pytest.mark.parametrize("about", [True, False], ids=["config.json", "bare"])
def test_hugging_face(biases: str, about: bool, tmp_path: Path) -> None:
    config = tiny_mae_config(norm_eps=1e-12, fc_norm_eps=1e-5, decoder_norm_eps=1e-5)
    state = videomae_pretrain(config)
    folder = save_hf(tmp_path / "m", hf_pretrain(state, biases), hf_config(config))
    model, report = (
        load_pretrained_mae(folder) if about else load_pretrained_mae(hf_pretrain(state, biases), **MAE_GEOMETRY)
    )
    assert (report.dialect, model.config, report.initialised) == ("hf_videomae", config, [])
    assert_same(dict(model.state_dict()), state)
    assert [name for name in report.dropped if not name.endswith("key.bias")] == []
    assert len(report.dropped) == (5 if biases == "5.17" else 0)


def test_hugging_face_biases_are_there_after_loading() -> None:
    """transformers 5 loads the published q_bias and v_bias as zeros."""
    state = videomae_pretrain(tiny_mae_config())
    model, _ = load_pretrained_mae(hf_pretrain(state, "4.57"), **MAE_GEOMETRY)
    for block in (model.encoder.blocks[1], model.decoder.blocks[2]):
        assert block.attn.q_bias.any()
        assert block.attn.v_bias.any()


def test_hugging_face_key_biases_are_kept_when_asked_for() -> None:
    config, got, report = loaded_mae(hf_pretrain(videomae_pretrain(tiny_mae_config()), "5.17"), qkv_bias="full")
    assert torch.equal(got["decoder.blocks.2.attn.qkv.bias"][128:256], torch.full((128,), 0.25))
    assert (config.qkv_bias, report.dropped) == ("full", [])


def test_hugging_face_config_gives_heads_and_targets(tmp_path: Path) -> None:
    about = hf_config(tiny_mae_config(), decoder_num_attention_heads=4, norm_pix_loss=False)
    folder = save_hf(tmp_path / "m", hf_pretrain(videomae_pretrain(tiny_mae_config())), about)
    config = load_pretrained_mae(folder)[0].config
    assert (config.decoder_num_heads, config.normalize_target) == (4, False)


def test_a_classifiers_config_says_nothing_of_a_decoder(tmp_path: Path) -> None:
    """transformers writes its default decoder into every config.json."""
    about = hf_config(tiny_config(embed_dim=128), decoder_num_attention_heads=6, norm_pix_loss=False)
    folder = save_hf(tmp_path / "m", hf_videomae(canonical(tiny_config(embed_dim=128))), about)
    config = load_pretrained_mae(folder)[0].config
    assert (config.decoder_embed_dim, config.decoder_num_heads, config.normalize_target) == (64, 1, True)


def test_hugging_face_without_the_encoders_norm_is_refused() -> None:
    """With use_mean_pooling the decoder reads tokens that no norm has seen, which MaskedAutoencoder's never does."""
    state = hf_pretrain(videomae_pretrain(tiny_mae_config()))
    state = {name: t for name, t in state.items() if not name.startswith("videomae.layernorm.")}
    with pytest.raises(ValueError, match=r"has no encoder\.norm\.weight"):
        loaded_mae(state)
    assert set(loaded_mae(state, final_norm=True)[2].initialised) == {"encoder.norm.weight", "encoder.norm.bias"}


# -- files without a decoder -------------------------------------------------------------------------------------------


def test_a_fine_tuned_model_gives_its_encoder() -> None:
    source = canonical(tiny_config(embed_dim=128))
    config, got, report = loaded_mae(source, decoder_num_heads=None)
    assert (config.num_classes, config.decoder_embed_dim, config.decoder_num_heads) == (0, 64, 1)
    assert all(torch.equal(got[f"encoder.{n}"], t) for n, t in source.items() if n.startswith(("blocks.", "patch_")))
    assert {"encoder.norm.weight", "encoder.norm.bias"} | DECODER >= set(report.initialised) - {
        f"decoder.{name}" for name in canonical(tiny_config(embed_dim=64, depth=4))
    }
    assert report.dropped == ["fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"]
    assert any("classifier reads other features" in note for note in report.notes)


@pytest.mark.parametrize(("width", "inner", "heads"), [(384, 192, 3), (768, 384, 6)])
def test_a_new_decoder_is_the_published_one(width: int, inner: int, heads: int) -> None:
    state = canonical(tiny_config(embed_dim=width, num_heads=width // 64, depth=1, img_size=16, num_frames=2))
    config = convert(state, model="MaskedAutoencoder").config
    assert isinstance(config, MAEConfig)
    assert (config.decoder_embed_dim, config.decoder_num_heads, config.decoder_depth) == (inner, heads, 4)


def test_a_new_decoder_of_no_usual_width_must_be_given() -> None:
    with pytest.raises(ValueError, match="decoder_embed_dim is 32; give decoder_num_heads"):
        load_pretrained_mae(canonical(tiny_config()), **GEOMETRY)


def test_a_fine_tuned_model_with_new_classes_has_a_new_class_branch() -> None:
    _, got, report = loaded_mae(canonical(tiny_config()), num_classes=5)
    assert {"fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"} <= set(report.initialised)
    assert torch.equal(got["fc_norm.weight"], torch.ones(64))


# -- which model a file is ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "state",
    [
        videomae_pretrain(tiny_mae_config()),
        hf_pretrain(videomae_pretrain(tiny_mae_config())),
        mmcdfsl_pretrain(tiny_mae_config(num_classes=5)),
    ],
    ids=["videomae", "hf", "mmcdfsl"],
)
def test_load_pretrained_gives_the_autoencoder_of_a_pre_training_file(state: State) -> None:
    model = load_pretrained(state, **MAE_GEOMETRY)
    assert isinstance(model, MaskedAutoencoder)
    assert not model.training
    assert not model.load_report.initialised


@pytest.mark.parametrize(
    "state",
    [canonical(tiny_config()), hf_videomae(canonical(tiny_config())), mmcdfsl_stage2(tiny_config(final_norm=True))],
    ids=["finetune", "hf", "mmcdfsl"],
)
def test_load_pretrained_gives_the_vit_of_another(state: State) -> None:
    assert isinstance(load_pretrained(state, **GEOMETRY), MaskedViT)


@pytest.mark.parametrize("make", [videomae_pretrain, lambda c: hf_pretrain(videomae_pretrain(c), "5.17")])
def test_a_vit_from_a_pre_training_file_is_its_encoder(make: Any) -> None:
    config = tiny_mae_config()
    source = make(config)
    model = MaskedViT.from_pretrained(source, **GEOMETRY)
    assert_same(dict(model.state_dict()), canonical(config.encoder))
    dropped = model.load_report.dropped
    assert {n for n in source if n.startswith(("decoder.", "mask_", "encoder_to_"))} <= {*dropped}
    assert len(set(dropped)) == len(dropped)
    assert "a pre-training model: only its encoder is taken" in model.load_report.notes


def test_the_report_reads_well() -> None:
    report = loaded_mae(videomae_pretrain(tiny_mae_config()), in_chans=2)[2]
    assert "videomae_pretrain: 71 tensors loaded" in str(report)
    assert "initialised (not in the file), 4: encoder.patch_embed.proj.weight, " in str(report)
    assert "dropped from the file, 4: encoder.patch_embed.proj.weight, " in str(report)


# -- folders -----------------------------------------------------------------------------------------------------------


def saved(folder: Path, **overrides: Any) -> MaskedAutoencoder:
    model = MaskedAutoencoder(tiny_mae_config(**overrides))
    model.load_state_dict(videomae_pretrain(model.config))
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"num_classes": 5, "head_drop_rate": 0.5, "normalize_target": False, "norm_eps": 1e-5, "gelu": "tanh"},
        {"num_classes": 5, "fc_norm": False, "qkv_bias": "none", "init_values": 0.1, "decoder_mlp_ratio": 2.5},
        {"fc_norm": False, "in_chans": 2, "mean": (0.1, 0.2), "drop_path_rate": 0.1},
    ],
    ids=["plain", "classes", "no-fc-norm", "flow"],
)
@pytest.mark.parametrize("load", [load_pretrained, MaskedAutoencoder.from_pretrained])
def test_the_native_round_trip(load: Any, overrides: dict[str, Any], tmp_path: Path) -> None:
    model = saved(tmp_path / "m", **overrides)
    again = load(tmp_path / "m")
    assert (again.config, again.load_report.dialect, again.training) == (model.config, "mmfast", False)
    assert not again.load_report.initialised
    assert not again.load_report.dropped
    assert_same(dict(again.state_dict()), dict(model.state_dict()))
    about = json.loads((tmp_path / "m" / "config.json").read_text())
    assert (about["model"], about["config"]) == ("MaskedAutoencoder", model.config.to_dict())


@pytest.mark.parametrize("classes", [0, 5])
def test_a_vit_from_a_folder_of_an_autoencoder(classes: int, tmp_path: Path) -> None:
    model = saved(tmp_path, num_classes=classes)
    vit = MaskedViT.from_pretrained(tmp_path)
    assert vit.config == tiny_config(num_classes=classes, final_norm=True, fc_norm=classes > 0)
    own = {model_name(n, model.config): t for n, t in vit.state_dict().items()}
    assert_same(own, {n: model.state_dict()[n] for n in own})
    assert set(vit.load_report.dropped) == DECODER


def test_an_autoencoder_from_a_folder_of_a_vit(tmp_path: Path) -> None:
    MaskedViT(tiny_config(embed_dim=128, drop_path_rate=0.1)).save_pretrained(tmp_path)
    model, report = load_pretrained_mae(tmp_path)
    assert (model.config.drop_path_rate, model.config.num_classes, model.config.decoder_embed_dim) == (0.1, 0, 64)
    assert "head.weight" in report.dropped


def test_native_overrides(tmp_path: Path) -> None:
    saved(tmp_path)
    config = load_pretrained_mae(tmp_path, in_chans=2, norm_eps=1e-5)[0].config
    assert (config.mean, config.fc_norm_eps) == ((0.0507, 0.4671), 1e-5)


def test_heads_follow_an_override_of_the_decoders_width(tmp_path: Path) -> None:
    saved(tmp_path)
    assert load_pretrained_mae(tmp_path, decoder_embed_dim=192)[0].config.decoder_num_heads == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "Other"}, "must hold a MaskedViT or a MaskedAutoencoder"),
        ({"config": 3}, "and its config"),
        ({"config": {"decoder_dept": 2}}, "unknown config field 'decoder_dept'"),
    ],
)
def test_config_json_of_another_kind_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    saved(tmp_path)
    about = json.loads((tmp_path / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match=message):
        load_pretrained_mae(tmp_path)


def test_a_folder_of_an_autoencoder_without_its_decoder_is_refused(tmp_path: Path) -> None:
    MaskedViT(tiny_config()).save_pretrained(tmp_path)
    about = json.loads((tmp_path / "config.json").read_text()) | {"model": "MaskedAutoencoder"}
    (tmp_path / "config.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match="says MaskedAutoencoder, but there is no decoder"):
        load_pretrained(tmp_path)
