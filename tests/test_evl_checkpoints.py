"""EVL's files: published decoders on backbones of every dialect, mmfast's folders, sizes that do not fit."""

import dataclasses
from pathlib import Path
from typing import Any

import clip_makers
import pytest
import torch
from evl_makers import BACKBONES, CLASSES, FRAMES, clips, plain_logits, randomise, tiny_config, tiny_model
from numerics import relative_error
from torch import Tensor

from mmfast import CLIP, EVL, EVLConfig, MaskedViT, load_pretrained
from mmfast.checkpoints.evl import decoder_state


def published(model: EVL, path: Path) -> Path:
    """The file its authors' training leaves: prefix, optimiser and all."""
    state = {f"module.{n}": t for n, t in decoder_state(model).items()}
    content = {"model": state, "optimizer": {}, "lr_sched": {"last_epoch": 3}, "loss_scaler": {}, "next_step": 7}
    torch.save(content, path)
    return path


@pytest.fixture
def clip() -> CLIP:
    torch.manual_seed(0)
    return CLIP(BACKBONES["clip"])  # type: ignore[arg-type]  # the one of a CLIP


def trained(clip: CLIP, **changes: Any) -> EVL:
    """An EVL on this CLIP, nothing at its initial zero; the CLIP changes too."""
    return randomise(EVL(tiny_config(**changes), clip))


def restated(model: EVL, video: Tensor) -> Tensor:
    return plain_logits(model.config, {n: t.double() for n, t in model.state_dict().items()}, video.double())


@torch.no_grad()
def test_published_decoder_on_openai_weights(clip: CLIP, tmp_path: Path) -> None:
    model = trained(clip)
    torch.save(clip_makers.openai(clip.state_dict()), tmp_path / "clip.pt")
    got = EVL.from_pretrained(
        published(model, tmp_path / "checkpoint-7.pth"), tmp_path / "clip.pt", num_heads=3, decoder_num_heads=3
    )
    video = clips(model.config)
    assert relative_error(got(video), restated(model, video)) < 1e-5
    assert got.load_report is not None
    assert not got.load_report.initialised
    assert got.load_report.dialect == "evl"


@torch.no_grad()
def test_backbone_of_hugging_face(tmp_path: Path) -> None:
    theirs = clip_makers.hf_model(BACKBONES["clip"])  # type: ignore[arg-type]  # the one of a CLIP
    theirs.save_pretrained(tmp_path / "hf")
    own = CLIP.from_pretrained(tmp_path / "hf")
    model = trained(own)
    with torch.no_grad():
        for p, q in zip(own.parameters(), CLIP.from_pretrained(tmp_path / "hf").parameters(), strict=True):
            p.copy_(q)
    got = EVL.from_pretrained(decoder_state(model), tmp_path / "hf", decoder_num_heads=3)
    video = clips(model.config)
    assert relative_error(got(video), restated(model, video)) < 1e-5


@torch.no_grad()
def test_backbone_of_videomae(tmp_path: Path) -> None:
    model = tiny_model("vit")
    model.backbone.save_pretrained(tmp_path / "vit")
    got = EVL.from_pretrained(decoder_state(model), tmp_path / "vit")
    video = clips(model.config)
    assert relative_error(got(video), restated(model, video)) < 1e-5


@pytest.mark.parametrize("backbone", ["clip", "vit"])
@torch.no_grad()
def test_a_folder_comes_back_as_it_was(backbone: str, tmp_path: Path) -> None:
    model = tiny_model(backbone, temporal_conv=False)
    model.save_pretrained(tmp_path / "evl")
    got = load_pretrained(tmp_path / "evl")
    assert isinstance(got, EVL)
    assert got.config == model.config
    assert torch.equal(got(clips(model.config)), model(clips(model.config)))


@torch.no_grad()
def test_a_saved_decoder_comes_back_as_it_was(clip: CLIP, tmp_path: Path) -> None:
    model = trained(clip)
    model.save_decoder(tmp_path / "decoder.pth")
    assert set(torch.load(tmp_path / "decoder.pth")["model"]) == {f"module.{n}" for n in decoder_state(model)}
    got = load_pretrained(tmp_path / "decoder.pth", backbone=clip)
    assert isinstance(got, EVL)
    assert torch.equal(got(clips(model.config)), model(clips(model.config)))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["decoder.pth"]


def test_published_names_and_shapes() -> None:
    state = decoder_state(tiny_model())
    layer = {f"decoder.decoder_layers.1.attn.{n}_proj.{p}" for n in ("q", "k", "v", "out") for p in ("weight", "bias")}
    layer |= {f"decoder.decoder_layers.1.norm{n}.{p}" for n in (1, 2, 3) for p in ("weight", "bias")}
    layer |= {f"decoder.decoder_layers.1.mlp.fc{n}.{p}" for n in (1, 2) for p in ("weight", "bias")}
    other = {"decoder.temporal_conv.1.weight": (48, 1, 3), "decoder.temporal_conv.1.bias": (48,)}
    other |= {"decoder.temporal_pos_embed.1": (FRAMES, 48), "decoder.cls_token": (48,)}
    other |= {f"decoder.cross_attention.1.w{n}": (25, 48) for n in (1, 2)}
    other |= {"proj.0.weight": (48,), "proj.0.bias": (48,), "proj.2.weight": (CLASSES, 48), "proj.2.bias": (CLASSES,)}
    assert {n for n in state if ".1." in f"{n}." or n.startswith("proj.") or n == "decoder.cls_token"} == layer | set(
        other
    )
    assert {n: tuple(state[n].shape) for n in other} == other


@pytest.mark.parametrize("missing", ["temporal_conv", "temporal_positions", "temporal_cross_attention"])
@torch.no_grad()
def test_the_file_tells_which_modules_there_are(clip: CLIP, missing: str) -> None:
    model = trained(clip, **{missing: False})
    got = EVL.from_pretrained(decoder_state(model), clip, num_frames=FRAMES)
    assert dataclasses.replace(got.config, num_frames=FRAMES) == model.config
    assert torch.equal(got(clips(model.config)), model(clips(model.config)))


def test_a_new_decoder_on_a_backbone(clip: CLIP) -> None:
    model = EVL.from_pretrained(None, clip, num_classes=7, num_layers=3, preset="reference")
    assert model.config == EVLConfig(BACKBONES["clip"], num_layers=3, num_classes=7, zero_query=True)
    assert not model.decoder.cls_token.any()
    assert model.load_report is not None
    assert set(model.load_report.initialised) == set(decoder_state(model))


@torch.no_grad()
def test_another_number_of_classes_starts_the_head_anew(clip: CLIP) -> None:
    model = trained(clip)
    got = EVL.from_pretrained(decoder_state(model), clip, num_classes=9)
    assert got.load_report is not None
    assert got.load_report.dropped == got.load_report.initialised == ["proj.2.weight", "proj.2.bias"]
    assert torch.equal(got.encode(clips(model.config)), model.encode(clips(model.config)))


@torch.no_grad()
def test_half_precision_backbone_on_request(clip: CLIP) -> None:
    model = trained(clip)
    got = EVL.from_pretrained(decoder_state(model), clip, backbone_dtype=torch.bfloat16)
    assert {p.dtype for p in got.backbone.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in got.decoder.parameters()} == {torch.float32}


@torch.no_grad()
def test_frames_and_grids_are_interpolated_on_request(clip: CLIP) -> None:
    state = decoder_state(trained(clip))
    # Tables and positions that are linear stay so, whatever they are resized to.
    offset = torch.arange(-2.0, 3.0)
    state["decoder.cross_attention.0.w1"] = (offset[:, None] * 10 + offset).reshape(25, 1).repeat(1, 48)
    state["decoder.temporal_pos_embed.0"] = torch.arange(4.0)[:, None].repeat(1, 48)
    got = EVL.from_pretrained(state, clip, num_frames=8, interpolate=True)
    inner = got.decoder.temporal_pos_embed[0][1:-1, 0]  # type: ignore[index]  # is there
    assert torch.allclose(inner, torch.arange(1, 7) / 2 - 0.25)
    got.resize(grid=(4, 3))
    table = got.decoder.cross_attention[0].w1.view(7, 5, 48)  # type: ignore[index,union-attr,operator]  # is there
    assert torch.allclose(table[3, :, 0], offset, atol=1e-4)
    assert torch.allclose(table[2:5, 2, 5], torch.tensor([-50 / 7, 0, 50 / 7]), atol=0.5)
    video = torch.randn(1, 3, 8, 32, 24)
    assert relative_error(got(video), plain_logits_of_size(got, video)) < 1e-5


def plain_logits_of_size(model: EVL, video: Tensor) -> Tensor:
    """The restatement on CLIP's positions as they are resized for this video."""
    state = {n: t.double() for n, t in model.state_dict().items()}
    resized = model.backbone._positions_of((video.shape[2], video.shape[3] // 8, video.shape[4] // 8))
    own = state["backbone.positional_embedding"]
    state["backbone.positional_embedding"] = torch.cat((own[:1], resized.double()))
    return plain_logits(model.config, state, video.double())


@torch.no_grad()
def test_a_decoder_of_another_grid_is_resized_to_the_backbones(clip: CLIP) -> None:
    large = EVL(tiny_config(grid=(5, 5)))
    state = decoder_state(randomise(large))
    with pytest.raises(ValueError, match=r"5 x 5 grid, the backbone's is 3 x 3; interpolate=True"):
        EVL.from_pretrained(state, clip)
    got = EVL.from_pretrained(state, clip, interpolate=True)
    assert got.config.grid == (3, 3)
    large.resize(grid=(3, 3))
    assert torch.equal(got.decoder.cross_attention[1].w2, large.decoder.cross_attention[1].w2)  # type: ignore[index]  # is there


def test_refused_files(clip: CLIP) -> None:
    state = decoder_state(trained(clip))
    deep = {n.replace("decoder_layers.1.", "decoder_layers.3."): t for n, t in state.items()}
    nan = {**state, "proj.2.bias": torch.full((CLASSES,), float("nan"))}
    for given, message in (
        (clip.state_dict(), "holds no decoder of EVL"),
        ({**state, "backbone.cls_token": torch.zeros(48)}, "holds backbone.cls_token beside decoder and head"),
        ({**state, "decoder.cls_token": torch.zeros(32)}, "a decoder of width 32, the backbone's is 48"),
        (deep, "reads the last 4 blocks, the backbone has 3"),
        ({**state, "decoder.norm.weight": torch.zeros(4)}, "decoder.norm.weight .* has no place for it"),
        ({**state, "decoder.cross_attention.0.w1": torch.zeros(24, 48)}, "tables of 24 offsets"),
        (nan, "NaN"),
    ):
        with pytest.raises(ValueError, match=message):
            EVL.from_pretrained(given, clip)
    lacking = {n: t for n, t in state.items() if n != "decoder.decoder_layers.1.mlp.fc1.bias"}
    with pytest.raises(ValueError, match=r"lacks decoder\.decoder_layers\.1\.mlp\.fc1\.bias"):
        EVL.from_pretrained(lacking, clip)


def test_refused_arguments(clip: CLIP, tmp_path: Path) -> None:
    model = trained(clip)
    state = decoder_state(model)
    for options, message in (
        (dict(num_layers=1), "num_layers is 2 in the file, got 1"),
        (dict(num_frames=8), "num_frames is 4 in the file, got 8; interpolate=True"),
        (dict(num_head=3), "unknown config field 'num_head'"),
        (dict(preset="papr"), "unknown preset 'papr'"),
    ):
        with pytest.raises(ValueError, match=message):
            EVL.from_pretrained(state, clip, **options)
    with pytest.raises(ValueError, match="backbone must be given"):
        EVL.from_pretrained(state)
    with pytest.raises(ValueError, match="num_heads must not be given"):
        EVL.from_pretrained(state, clip, num_heads=3)
    with pytest.raises(ValueError, match="num_layers must be at most 3, the backbone's blocks, got 4"):
        EVL.from_pretrained(None, clip, num_layers=4)
    model.save_pretrained(tmp_path / "evl")
    with pytest.raises(ValueError, match="must not be given with"):
        EVL.from_pretrained(tmp_path / "evl", clip)


def test_backbone_of_another_config_is_refused() -> None:
    with pytest.raises(ValueError, match="it has another"):
        EVL(tiny_config(), MaskedViT(BACKBONES["vit"]))  # type: ignore[arg-type]  # the one of a ViT
    with pytest.raises(TypeError, match="got str"):
        EVL(tiny_config(), "clip")  # type: ignore[arg-type]  # on purpose
