"""What EVL and its config refuse, by name."""

from typing import Any

import pytest
import torch
from evl_makers import BACKBONES, FRAMES, clips, tiny_config, tiny_model

from mmfast import EVL, EVLConfig, Pack, pack_masks, random_masks, tube_masks


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (dict(num_layers=4), ValueError, "num_layers must be at most 3, the backbone's blocks, got 4"),
        (dict(num_layers=0), ValueError, "num_layers must be at least 1"),
        (dict(num_layers=True), TypeError, "num_layers must be an int"),
        (dict(grid=(3,)), ValueError, "grid must be two sizes"),
        (dict(grid=(0, 3)), ValueError, "grid must be at least 1"),
        (dict(decoder_num_heads=5), ValueError, "decoder_num_heads must divide decoder_dim 48"),
        (dict(mlp_dropout=1.0), ValueError, "mlp_dropout must be below 1"),
        (dict(temporal_conv=1), TypeError, "temporal_conv must be True or False"),
        (dict(norm_eps=0.0), ValueError, "norm_eps must be finite and above 0"),
    ],
    ids=lambda v: str(next(iter(v.items()))) if isinstance(v, dict) else None,
)
def test_config_names_the_field(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        tiny_config(**changes)


@pytest.mark.parametrize("backbone", ["clip", "vit"])
def test_config_goes_to_plain_data_and_back(backbone: str) -> None:
    config = tiny_config(backbone, num_layers=1, temporal_conv=False, zero_query=True)
    assert EVLConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match=r"unknown config field 'layers'.*num_layers"):
        EVLConfig.from_dict({**config.to_dict(), "layers": 2})
    with pytest.raises(ValueError, match="backbone must tell its model"):
        EVLConfig.from_dict({**config.to_dict(), "backbone": {"model": "ResNet"}})
    with pytest.raises(TypeError, match="backbone must be a CLIPConfig or a ViTConfig, got NoneType"):
        EVLConfig(None)  # type: ignore[arg-type]  # on purpose


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("ViT-B/16", (768, (14, 14), 8, 12, 768)),
        ("ViT-L/14", (1024, (16, 16), 8, 16, 1024)),
        ("ViT-L/14@336px", (1024, (24, 24), 8, 16, 1024)),
        ("videomae_small_patch16_224", (384, (14, 14), 8, 6, 384)),
    ],
)
def test_published_backbones(name: str, wanted: tuple[Any, ...]) -> None:
    c = EVLConfig.preset("paper", name)
    assert (c.width, c.grid, c.num_frames, c.decoder_num_heads, c.decoder_dim) == wanted


def test_published_sizes_of_the_decoder() -> None:
    """32.9M parameters at ViT-B/16, of which 4.48M are tables; 58.3M and 7.87M at ViT-L/14."""
    for name, decoder, tables in (("ViT-B/16", 32.9, 4.48), ("ViT-L/14", 58.3, 7.87)):
        with torch.device("meta"):
            model = EVL(EVLConfig.preset("paper", name))
        counts = {n: p.numel() / 1e6 for n, p in model.named_parameters() if p.requires_grad}
        assert abs(sum(v for n, v in counts.items() if "cross_attention" in n) - tables) < 0.006
        assert abs(sum(v for n, v in counts.items() if n.startswith("decoder.")) - decoder) < 0.06


def test_video_of_another_size() -> None:
    model = tiny_model()
    with pytest.raises(
        ValueError, match=r"video has 3 frames, the temporal positions are of 4; resize\(num_frames=3\)"
    ):
        model(torch.zeros(1, 3, 3, 24, 24))
    with pytest.raises(ValueError, match=r"grid of 2 x 3 cells, the tables of offsets are of 3 x 3; resize\(grid="):
        model(torch.zeros(1, 3, FRAMES, 16, 24))
    with pytest.raises(ValueError, match="multiples of the patch size 8"):
        model(torch.zeros(1, 3, FRAMES, 20, 24))
    with pytest.raises(ValueError, match="video has 2 channels"):
        model(torch.zeros(1, 2, FRAMES, 24, 24))


@torch.no_grad()
def test_without_tables_any_size_runs() -> None:
    model = tiny_model(temporal_positions=False, temporal_cross_attention=False)
    assert bool(model(torch.randn(1, 3, 7, 16, 40)).isfinite().all())


def test_masks_that_are_no_tubes() -> None:
    model = tiny_model()
    video = clips(model.config)
    with pytest.raises(ValueError, match="the same cells in all 4 frames"):
        model(video, random_masks(2, 1, (FRAMES, 3, 3), keep=4))
    unequal = torch.cat([tube_masks(1, 1, (FRAMES, 3, 3), keep=n)[:, 0] for n in (4, 5)])
    with pytest.raises(ValueError, match="equally many cells in every view"):
        model(video, unequal)
    with pytest.raises(ValueError, match="a Pack of tube masks"):
        model(video, pack_masks(tube_masks(2, 1, (FRAMES, 3, 3), keep=4)))
    with pytest.raises(TypeError, match="mask must be a bool tensor"):
        model(video, torch.zeros(2, 36))
    assert isinstance(pack_masks(tube_masks(1)), Pack)


def test_features_that_do_not_fit() -> None:
    model = tiny_model()
    layers = list(model.stream(clips(model.config)))
    for given, message in (
        (layers[:1], "features must be of 2 blocks, one a layer of the decoder, got 1"),
        ([], "got 0"),
        (layers * 2, "got more"),
        ([layers[0]._replace(out=layers[0].out[..., 1:])] * 2, r"out must be \[V, F, L, 48\]"),
        ([layers[0]._replace(out=layers[0].out[:, 1:])] * 2, "features are of 3 frames, the temporal positions of 4"),
        ([layers[0]._replace(q=None)] * 2, "features must have q and k"),
    ):
        with pytest.raises(ValueError, match=message):
            model.decode(given)


@pytest.mark.parametrize("backbone", ["clip", "vit"])
def test_stream_of_more_blocks_than_there_are(backbone: str) -> None:
    model = tiny_model(backbone)
    with pytest.raises(ValueError, match=r"last must lie in 1\.\.3, the blocks there are, got 4"):
        next(model.backbone.stream(clips(model.config), None, 4))
    assert BACKBONES[backbone] == model.config.backbone
