"""ViTConfig: validation by field name, defaults that follow other fields, JSON, and the registry of names."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmfast.config import MAEConfig, ViTConfig, from_name, list_models, mae_from_name, usual_num_heads


def test_grid_and_tokens_of_the_default() -> None:
    config = ViTConfig()
    assert (config.grid, config.num_tokens, config.mlp_dim) == ((8, 14, 14), 1568, 3072)


def test_grid_of_an_oblong_frame() -> None:
    assert ViTConfig(img_size=(32, 48), num_frames=6).grid == (3, 2, 3)


@pytest.mark.parametrize(
    ("chans", "mean", "std"),
    [
        (3, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        (2, (0.0507, 0.4671), (10.9280, 8.6857)),
        (21, (0.3,) * 21, (0.3,) * 21),
        (1, (0.0,), (1.0,)),
    ],
)
def test_statistics_follow_the_channels(chans: int, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    config = ViTConfig(in_chans=chans)
    assert (config.mean, config.std) == (mean, std)


def test_fc_norm_eps_follows_norm_eps_unless_given() -> None:
    assert ViTConfig(norm_eps=1e-12).fc_norm_eps == 1e-12
    assert ViTConfig(norm_eps=1e-12, fc_norm_eps=1e-5).fc_norm_eps == 1e-5


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("img_size", 225),
        ("img_size", (224, 225)),
        ("img_size", (224, 224, 224)),
        ("patch_size", 0),
        ("in_chans", -1),
        ("num_frames", 15),
        ("tubelet_size", 0),
        ("embed_dim", 0),
        ("depth", 0),
        ("num_heads", 7),
        ("mlp_ratio", 0.0),
        ("mlp_ratio", 0.001),
        ("mlp_ratio", float("inf")),
        ("qkv_bias", "k"),
        ("norm_eps", 0.0),
        ("fc_norm_eps", float("nan")),
        ("num_classes", -1),
        ("pool", "max"),
        ("init_values", -1.0),
        ("drop_path_rate", 1.0),
        ("head_drop_rate", -0.1),
        ("mean", (0.5,)),
        ("std", (0.5, 0.5, 0.0)),
        ("gelu", "sigmoid"),
    ],
)
def test_bad_value_names_its_field(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{field} "):
        ViTConfig.from_dict({field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [("depth", 12.0), ("depth", True), ("norm_eps", "1e-6"), ("fc_norm", 1), ("mean", 0.5), ("img_size", "224")],
)
def test_wrong_type_names_its_field(field: str, value: Any) -> None:
    with pytest.raises(TypeError, match=rf"^{field} "):
        ViTConfig.from_dict({field: value})


def test_unknown_field_is_refused_by_name_with_the_close_one() -> None:
    with pytest.raises(ValueError, match=r"'num_head'.*num_heads"):
        ViTConfig.from_dict({"num_head": 3})


@given(
    st.fixed_dictionaries(
        {
            "img_size": st.sampled_from([32, (32, 64)]),
            "in_chans": st.integers(1, 22),
            "mlp_ratio": st.floats(0.5, 8),
            "norm_eps": st.floats(1e-12, 1e-3),
            "qkv_bias": st.sampled_from(["qv", "full", "none"]),
            "fc_norm": st.booleans(),
        }
    )
)
def test_json_round_trip(fields: dict[str, Any]) -> None:
    config = ViTConfig(**fields)
    assert ViTConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize(("dim", "hidden"), [(1408, 6144), (384, 1536), (67, 191), (1280, 5120)])
def test_mlp_dim_survives_its_ratio(dim: int, hidden: int) -> None:
    assert ViTConfig(embed_dim=dim, num_heads=1, mlp_ratio=hidden / dim).mlp_dim == hidden


def test_json_that_is_no_object_is_refused() -> None:
    with pytest.raises(ValueError, match="JSON object"):
        ViTConfig.from_json("[1]")


@pytest.mark.parametrize(
    ("name", "dim", "depth", "heads", "hidden", "patch"),
    [
        ("videomae_small_patch16_224", 384, 12, 6, 1536, 16),
        ("vit_base_patch16_224", 768, 12, 12, 3072, 16),
        ("vit_large_patch16_224", 1024, 24, 16, 4096, 16),
        ("videomae_huge", 1280, 32, 16, 5120, 16),
        ("vit_giant_patch14_224", 1408, 40, 16, 6144, 14),
    ],
)
def test_published_sizes(name: str, dim: int, depth: int, heads: int, hidden: int, patch: int) -> None:
    c = from_name(name)
    assert (c.embed_dim, c.depth, c.num_heads, c.mlp_dim, c.patch_size) == (dim, depth, heads, hidden, patch)


def test_every_modality_of_mmcdfsl_has_the_same_grid() -> None:
    assert {from_name(f"mmcdfsl_small_{m}").grid for m in ("rgb", "flow", "pose")} == {(8, 14, 14)}


def test_from_name_takes_overrides() -> None:
    config = from_name("videomae_small_patch16_224", num_classes=204, in_chans=2)
    assert (config.num_classes, config.mean) == (204, (0.0507, 0.4671))


def test_unknown_name_lists_the_close_ones() -> None:
    with pytest.raises(ValueError, match="did you mean videomae_small_patch16_224"):
        from_name("videomae_smal_patch16_224")


def test_every_listed_name_builds() -> None:
    for name in list_models():
        (mae_from_name if name.startswith("pretrain_") else from_name)(name)


@pytest.mark.parametrize(("dim", "heads"), [(384, 6), (1280, 16), (1408, 16), (512, 8), (100, None)])
def test_usual_heads(dim: int, heads: int | None) -> None:
    assert usual_num_heads(dim) == heads


# -- MAEConfig ---------------------------------------------------------------------------------------------------------


def test_the_encoder_of_an_autoencoder_has_its_norm_and_no_classes() -> None:
    config = MAEConfig(num_classes=204, head_drop_rate=0.5, in_chans=2, drop_path_rate=0.1)
    assert config.encoder == ViTConfig(
        final_norm=True, fc_norm=False, head_drop_rate=0.5, in_chans=2, drop_path_rate=0.1
    )


def test_the_decoder_has_its_own_width_over_the_same_tokens() -> None:
    config = MAEConfig(decoder_embed_dim=192, decoder_depth=2, decoder_num_heads=3, decoder_mlp_ratio=2.5, gelu="tanh",
                       drop_path_rate=0.1)  # fmt: skip
    inner = config.decoder
    assert (inner.embed_dim, inner.depth, inner.num_heads, inner.mlp_dim) == (192, 2, 3, 480)
    assert (inner.grid, inner.gelu, inner.drop_path_rate) == (config.grid, "tanh", 0.0)


@pytest.mark.parametrize(
    ("fields", "values"), [({}, 1536), ({"in_chans": 2}, 1024), ({"in_chans": 21, "patch_size": 4}, 672)]
)
def test_values_predicted_for_a_token(fields: dict[str, Any], values: int) -> None:
    assert MAEConfig(**fields).patch_dim == values


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("decoder_embed_dim", 0),
        ("decoder_depth", 0),
        ("decoder_num_heads", 0),
        ("decoder_num_heads", 7),
        ("final_norm", False),
        ("num_classes", -1),
    ],
)
def test_bad_value_of_an_autoencoder_names_its_field(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{field} "):
        MAEConfig.from_dict({field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [("decoder_depth", 4.0), ("decoder_embed_dim", True), ("normalize_target", 1), ("decoder_num_heads", "6")],
)
def test_wrong_type_of_an_autoencoder_names_its_field(field: str, value: Any) -> None:
    with pytest.raises(TypeError, match=rf"^{field} "):
        MAEConfig.from_dict({field: value})


def test_json_round_trip_of_an_autoencoder() -> None:
    config = MAEConfig(num_classes=5, decoder_depth=2, normalize_target=False, mean=(0.1, 0.2, 0.3))
    again = MAEConfig.from_json(config.to_json())
    assert (again, type(again)) == (config, MAEConfig)


def test_a_vit_config_knows_no_decoder() -> None:
    with pytest.raises(ValueError, match="unknown config field 'decoder_embed_dim'"):
        ViTConfig.from_dict(MAEConfig().to_dict())


@pytest.mark.parametrize(
    ("name", "encoder", "inner"),
    [
        ("pretrain_videomae_small_patch16_224", (384, 12, 6), (192, 4, 3)),
        ("pretrain_videomae_base_patch16_224", (768, 12, 12), (384, 4, 6)),
        ("pretrain_videomae_large_patch16_224", (1024, 24, 16), (512, 4, 8)),
        ("pretrain_videomae_huge_patch16_224", (1280, 32, 16), (640, 4, 8)),
    ],
)
def test_published_pre_training_sizes(name: str, encoder: tuple[int, ...], inner: tuple[int, ...]) -> None:
    config = mae_from_name(name)
    assert [(c.embed_dim, c.depth, c.num_heads) for c in (config.encoder, config.decoder)] == [encoder, inner]


def test_every_modality_of_mmcdfsl_pre_training_has_the_same_grid() -> None:
    configs = [mae_from_name(f"pretrain_mmcdfsl_small_{m}", num_classes=204) for m in ("rgb", "flow", "pose")]
    assert {c.grid for c in configs} == {(8, 14, 14)}
    assert [c.patch_dim for c in configs] == [1536, 1024, 672]


def test_a_name_of_the_other_model_is_refused() -> None:
    with pytest.raises(ValueError, match="names a MaskedAutoencoder, not a MaskedViT"):
        from_name("pretrain_videomae_small_patch16_224")
    with pytest.raises(ValueError, match="did you mean pretrain_videomae_small_patch16_224"):
        mae_from_name("videomae_small_patch16_224")
