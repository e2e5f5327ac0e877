"""Every checkpoint dialect into canonical names, and into models."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from makers import (
    GEOMETRY,
    assert_same,
    canonical,
    decoder,
    hf_config,
    hf_videomae,
    mmcdfsl_classifier,
    mmcdfsl_stage1,
    mmcdfsl_stage2,
    prefixed,
    save_hf,
    tiny_config,
    videomae_pretrain,
)
from numerics import relative_error

from mmfast.checkpoints import canonical_shapes, convert, load_into, load_pretrained, load_pretrained_vit
from mmfast.layers import sinusoid_positions
from mmfast.vit import MaskedViT


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"qkv_bias": "full", "final_norm": True},
        {"qkv_bias": "none", "init_values": 0.1, "fc_norm": False},
        {"in_chans": 21, "patch_size": 4, "num_classes": 0, "tubelet_size": 1, "mlp_ratio": 2.5},
    ],
    ids=["plain", "full-norm", "no-bias-gamma", "pose"],
)
def test_canonical_shapes_are_those_of_the_model(overrides: dict[str, Any]) -> None:
    config = tiny_config(**overrides)
    assert canonical_shapes(config) == {name: tuple(t.shape) for name, t in MaskedViT(config).state_dict().items()}


# -- VideoMAE ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "module.", "backbone.", "encoder.", "_orig_mod.", "module._orig_mod.backbone."])
def test_finetuned_videomae(prefix: str) -> None:
    state = canonical(tiny_config())
    got = convert(prefixed(state, prefix), **GEOMETRY)
    assert (got.dialect, got.config, got.dropped, got.initialised) == ("videomae_finetune", tiny_config(), [], [])
    assert_same(got.state, state)


@pytest.mark.parametrize("container", [["model"], ["module"], ["state_dict"], ["state_dict", "model"]])
def test_containers(container: list[str]) -> None:
    nested: Any = canonical(tiny_config())
    for name in reversed(container):
        nested = {name: nested, "epoch": 3}
    got = convert(nested, **GEOMETRY)
    assert len(got.state) == len(canonical_shapes(tiny_config()))
    assert any("epoch" in note for note in got.notes)


def test_geometry_comes_from_the_shapes() -> None:
    config = tiny_config(
        embed_dim=128, in_chans=21, patch_size=4, img_size=56, num_frames=16, tubelet_size=1, mlp_ratio=2.5, depth=3
    )
    assert convert(canonical(config)).config == config


def test_a_width_that_is_no_multiple_of_64_needs_num_heads() -> None:
    with pytest.raises(ValueError, match="give num_heads"):
        convert(canonical(tiny_config(embed_dim=48)))


def test_layer_scale_of_v2_is_kept() -> None:
    state = canonical(tiny_config(init_values=0.1))
    got = convert(state, **GEOMETRY)
    assert got.config.init_values > 0
    assert_same(got.state, state)


def test_cosine_attention_is_refused() -> None:
    state = canonical(tiny_config()) | {"blocks.0.attn.scale": torch.ones(2, 1, 1)}
    with pytest.raises(ValueError, match=r"blocks\.0\.attn\.scale: cosine attention"):
        convert(state, **GEOMETRY)


def test_pretraining_model_gives_its_encoder_and_lists_the_decoder() -> None:
    config = tiny_config(num_classes=0, fc_norm=False, final_norm=True)
    got = convert({"model": videomae_pretrain(config)}, **GEOMETRY)
    assert (got.dialect, got.config) == ("videomae_pretrain", config)
    assert_same(got.state, canonical(config))
    assert set(got.dropped) == set(decoder(config))


def test_pretraining_model_as_the_start_of_fine_tuning() -> None:
    got = convert(videomae_pretrain(tiny_config(num_classes=0, fc_norm=False, final_norm=True)), **GEOMETRY,
                  num_classes=9, fc_norm=True, final_norm=False)  # fmt: skip
    assert set(got.initialised) == {"fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"}
    assert {"encoder.norm.weight", "encoder.norm.bias"} <= set(got.dropped)


def test_without_mean_pooling_the_head_reads_the_first_token() -> None:
    got = convert(canonical(tiny_config(final_norm=True, fc_norm=False)), **GEOMETRY)
    assert (got.config.pool, got.config.final_norm, got.config.fc_norm) == ("first", True, False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_sinusoid_table_in_a_file_is_dropped(dtype: torch.dtype) -> None:
    state = canonical(tiny_config()) | {"pos_embed": sinusoid_positions(8, 64)[None].to(dtype)}
    assert convert(state, **GEOMETRY).dropped == ["pos_embed"]


def test_learned_positions_are_refused() -> None:
    with pytest.raises(ValueError, match="pos_embed .* is learned"):
        convert(canonical(tiny_config()) | {"pos_embed": torch.zeros(1, 8, 64)}, **GEOMETRY)


# -- MM-CDFSL ----------------------------------------------------------------------------------------------------------

MMCDFSL = dict(final_norm=True, fc_norm=True)


@pytest.mark.parametrize("prefix", ["_forward_module.model.", "model.", ""])
def test_mmcdfsl_stage_1_keeps_fc_norm_and_head(prefix: str) -> None:
    config = tiny_config(**MMCDFSL)
    got = convert({"module": mmcdfsl_stage1(config, prefix)}, **GEOMETRY)
    assert (got.dialect, got.config) == ("mmcdfsl", config)
    assert_same(got.state, canonical(config))
    assert set(got.dropped) == {prefix + name for name in decoder(config)}


@pytest.mark.parametrize("prefix", ["_forward_module.", ""])
def test_mmcdfsl_stage_2_gives_the_student_with_eps_1e_5(prefix: str) -> None:
    config = tiny_config(**MMCDFSL, norm_eps=1e-5)
    got = convert({"state_dict": mmcdfsl_stage2(config, prefix)}, **GEOMETRY)
    assert got.config == config
    assert_same(got.state, canonical(config, seed=0))
    assert f"{prefix}cmt.mlp_to_flow.0.weight" in got.dropped


@pytest.mark.parametrize(
    ("branch", "seed", "own"),
    [
        ("teacher_rgb", 1, {}),
        ("teacher_flow", 2, {"in_chans": 2}),
        ("teacher_pose", 3, {"in_chans": 21, "patch_size": 4, "img_size": 8}),
    ],
)
def test_mmcdfsl_branches(branch: str, seed: int, own: dict[str, Any]) -> None:
    config = tiny_config(**MMCDFSL, norm_eps=1e-5, **own)
    got = convert(mmcdfsl_stage2(tiny_config(**MMCDFSL)), branch=branch, **{**GEOMETRY, "img_size": config.img_size})
    assert got.config == config
    assert_same(got.state, canonical(config, seed))


def test_mmcdfsl_head_is_chosen() -> None:
    state = mmcdfsl_classifier(canonical(tiny_config(**MMCDFSL)), {"verb": 3, "noun": 4})
    got = convert(state, head="noun", **GEOMETRY)
    assert torch.equal(got.state["head.weight"], state["head_noun.weight"])
    assert {"head_action.weight", "head_verb.bias"} <= set(got.dropped)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"branch": "teacher_depth"}, "branch must be one of student_rgb, teacher_flow, teacher_pose, teacher_rgb"),
        ({"head": "adverb"}, "head must be one of action, verb, noun"),
    ],
)
def test_mmcdfsl_wrong_choice_names_the_right_ones(choice: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        convert(mmcdfsl_stage2(tiny_config(**MMCDFSL)), **choice, **GEOMETRY)


def test_branch_means_nothing_elsewhere() -> None:
    with pytest.raises(ValueError, match="branch and head are for MM-CDFSL"):
        convert(canonical(tiny_config()), branch="student_rgb", **GEOMETRY)


# -- Hugging Face ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("biases", ["4.57", "5.17", "5.23"])
@pytest.mark.parametrize("root", ["videomae.", ""])
def test_hf_dialects(biases: str, root: str) -> None:
    config = tiny_config(norm_eps=1e-12, fc_norm_eps=1e-5)
    got = convert(hf_videomae(canonical(config), biases, root), **GEOMETRY)
    assert (got.dialect, got.config) == ("hf_videomae", config)
    assert_same(got.state, canonical(config))
    assert len(got.dropped) == (2 if biases == "5.17" else 0)


def test_hf_key_bias_is_kept_when_asked_for() -> None:
    got = convert(hf_videomae(canonical(tiny_config()), "5.17"), qkv_bias="full", **GEOMETRY)
    assert torch.equal(got.state["blocks.0.attn.qkv.bias"][64:128], torch.full((64,), 0.25))
    assert got.dropped == []


@pytest.mark.parametrize("name", ["", "model.safetensors"], ids=["folder", "file"])
def test_hf_config_json_is_read(tmp_path: Path, name: str) -> None:
    about = hf_config(tiny_config(), layer_norm_eps=3e-6, hidden_act="gelu_new", num_frames=8, image_size=[32, 64])
    folder = save_hf(tmp_path / "m", hf_videomae(canonical(tiny_config())), about)
    config = convert(folder / name).config
    assert (config.norm_eps, config.fc_norm_eps, config.num_heads) == (3e-6, 1e-5, 2)
    assert (config.gelu, config.num_frames, config.img_size) == ("tanh", 8, (32, 64))


@pytest.mark.parametrize("name", ["", "model.safetensors"], ids=["folder", "file"])
@pytest.mark.parametrize(
    ("changes", "normalised"),
    [
        ({}, lambda px: (px / 255 - 0.5) / 0.25),
        ({"rescale_factor": 1 / 127.5}, lambda px: (px / 127.5 - 0.5) / 0.25),
        ({"do_rescale": False}, lambda px: (px - 0.5) / 0.25),
        ({"do_normalize": False}, lambda px: px / 255),
    ],
    ids=["usual", "another factor", "not rescaled", "not normalised"],
)
def test_hf_preprocessor_says_how_pixels_are_normalised(
    changes: dict[str, Any], normalised: Any, name: str, tmp_path: Path
) -> None:
    folder = save_hf(tmp_path / "m", hf_videomae(canonical(tiny_config())), hf_config(tiny_config()))
    about = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25], "rescale_factor": 1 / 255, **changes}
    (folder / "preprocessor_config.json").write_text(json.dumps(about))
    model = MaskedViT.from_pretrained(folder / name)
    shape = (1, 3, model.config.num_frames, *model.config.frame_size)
    raw = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert relative_error(model(raw), model(normalised(raw.double()).float())) <= 1e-5


@pytest.mark.parametrize("about", ['{"size": 224}', '{"image_mean": null, "image_std": null}'])
def test_a_preprocessor_without_statistics_leaves_the_usual_ones(about: str, tmp_path: Path) -> None:
    folder = save_hf(tmp_path / "m", hf_videomae(canonical(tiny_config())), hf_config(tiny_config()))
    (folder / "preprocessor_config.json").write_text(about)
    assert convert(folder).config.mean == tiny_config().mean


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "timesformer"}, "of a 'timesformer' model"),
        ({"hidden_act": "relu"}, "hidden_act must be one of"),
    ],
)
def test_hf_config_of_another_model_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    folder = save_hf(tmp_path / "m", hf_videomae(canonical(tiny_config())), hf_config(tiny_config(), **changes))
    with pytest.raises(ValueError, match=message):
        convert(folder)


def test_config_json_of_another_project_is_not_read(tmp_path: Path) -> None:
    state = prefixed(canonical(tiny_config()), "model.")
    folder = save_hf(tmp_path / "m", state, {"model_type": "VideoMAEv2_Base"})
    assert "config.json is of another project and was not read" in convert(folder, **GEOMETRY).notes


def test_hf_unknown_tensor_in_a_layer_is_refused() -> None:
    state = hf_videomae(canonical(tiny_config())) | {"videomae.encoder.layer.0.adapter.weight": torch.ones(1)}
    with pytest.raises(ValueError, match=r"layer\.0\.adapter\.weight, which MaskedViT has no place for"):
        convert(state, **GEOMETRY)


def test_hf_bias_under_two_names_is_refused() -> None:
    state = hf_videomae(canonical(tiny_config()))
    state["videomae.encoder.layer.0.attention.attention.query.bias"] = torch.ones(64)
    with pytest.raises(ValueError, match=r"q_bias and .*query\.bias are the same bias"):
        convert(state, **GEOMETRY)


def test_hf_position_table_is_dropped() -> None:
    table = {"videomae.embeddings.position_embeddings": sinusoid_positions(8, 64)[None]}
    assert convert(hf_videomae(canonical(tiny_config())) | table, **GEOMETRY).dropped == list(table)


def test_hf_without_a_key_is_refused() -> None:
    state = hf_videomae(canonical(tiny_config()))
    del state["videomae.encoder.layer.1.attention.attention.key.weight"]
    with pytest.raises(ValueError, match="query, key and value must be there"):
        convert(state, **GEOMETRY)


# -- biases ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lost", [["q_bias"], ["v_bias"], ["q_bias", "v_bias"]])
@pytest.mark.parametrize("hugging_face", [False, True])
def test_a_block_without_its_biases_is_refused(lost: list[str], hugging_face: bool) -> None:
    state = canonical(tiny_config())
    for bias in lost:
        del state[f"blocks.1.attn.{bias}"]
    with pytest.raises(ValueError, match=r"biases must be in all blocks or in none.*block 1 has"):
        convert(hf_videomae(state) if hugging_face else state, **GEOMETRY)


def test_no_biases_anywhere_is_a_model_without() -> None:
    got = convert(canonical(tiny_config(qkv_bias="none")), **GEOMETRY)
    assert got.config.qkv_bias == "none"
    assert any("no query and value biases" in note for note in got.notes)


@pytest.mark.parametrize("biases", ["4.57", "5.17"])
def test_biases_that_are_all_zero_are_warned_of(biases: str) -> None:
    state = canonical(tiny_config())
    state = {name: t * 0 if name.endswith(("q_bias", "v_bias")) else t for name, t in state.items()}
    with pytest.warns(UserWarning, match="every query and value bias is 0"):
        convert(hf_videomae(state, biases), **GEOMETRY)


def test_biases_that_are_not_zero_are_not_warned_of() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert(canonical(tiny_config()), **GEOMETRY)


def test_a_model_of_full_biases_taken_without_the_key_computes_the_same() -> None:
    state = canonical(tiny_config(qkv_bias="full"))
    full, _ = load_pretrained_vit(state, **GEOMETRY)
    without, _ = load_pretrained_vit(state, qkv_bias="qv", **GEOMETRY)
    video = torch.randn(2, 3, 4, 32, 32)
    torch.testing.assert_close(without(video), full(video), rtol=1e-5, atol=1e-6)


# -- models ------------------------------------------------------------------------------------------------------------


def test_the_report_reads_well() -> None:
    model, report = load_pretrained_vit(canonical(tiny_config()), **GEOMETRY, num_classes=7)
    text = str(report)
    assert "videomae_finetune: " in text
    assert "initialised (not in the file), 2: head.weight, head.bias" in text
    assert torch.isfinite(model.get_parameter("head.weight")).all()


def test_load_into_refuses_a_model_of_another_layout() -> None:
    with pytest.raises(ValueError, match="has not the layout of MaskedViT"):
        load_into(lambda config: torch.nn.Linear(2, 2), canonical(tiny_config()), **GEOMETRY)


def test_load_pretrained_gives_a_model_at_rest_with_its_report() -> None:
    model = load_pretrained(canonical(tiny_config()), **GEOMETRY)
    assert not model.training
    assert len(model.load_report.loaded) == len(canonical_shapes(tiny_config()))
