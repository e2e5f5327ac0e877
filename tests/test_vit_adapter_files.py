"""TED-Adapters in a MaskedViT's files."""

from pathlib import Path

import pytest
import torch
from adapter_makers import GRID, SMALL, adapter_parameters, clips, make, randomised
from numerics import relative_error

from mmfast import MaskedAutoencoder, MaskedViT, tube_masks
from mmfast.checkpoints import export_state, load_pretrained, load_pretrained_vit
from mmfast.config import MAEConfig


@pytest.mark.parametrize("layers", [None, (0, 2)], ids=["all", "some"])
def test_a_saved_model_comes_back(tmp_path: Path, layers: tuple[int, ...] | None) -> None:
    model, video = make(adapter_before=("attn", "mlp"), adapter_layers=layers), clips()
    model.save_pretrained(tmp_path)
    back = MaskedViT.from_pretrained(tmp_path)
    assert back.config == model.config
    assert back.load_report is not None
    assert set(back.load_report.loaded) == set(model.state_dict())
    with torch.no_grad():
        assert torch.equal(back(video), model(video))


@pytest.mark.parametrize("layers", [None, (1,)], ids=["all", "one"])
def test_a_bare_state_dict_tells_where_adapters_are(layers: tuple[int, ...] | None) -> None:
    model = make(adapter_before=("mlp",), adapter_layers=layers)
    back = MaskedViT.from_pretrained(model.state_dict(), num_heads=2, img_size=(48, 64), num_frames=8)
    assert back.config == model.config


def test_adapters_are_asked_for_on_a_file_without(tmp_path: Path) -> None:
    model, video = make(adapter_hidden=0), clips()
    model.save_pretrained(tmp_path)
    got, report = load_pretrained_vit(tmp_path, adapter_hidden=8, adapter_before=("attn",))
    assert set(report.initialised) == set(adapter_parameters(got))
    assert len(report.initialised) == 36
    with torch.no_grad():
        assert relative_error(got.eval()(video), model(video)) <= 1e-6


def test_adapters_are_left_out_where_that_is_asked_for(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    got, report = load_pretrained_vit(tmp_path, adapter_hidden=0)
    assert len(report.dropped) == 36
    assert not adapter_parameters(got)


def test_adapters_of_another_width_are_refused(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"adapter_pre_attn.conv.bias has shape \(24,\)"):
        load_pretrained_vit(tmp_path, adapter_hidden=8)


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("blocks.1.adapter_pre_attn.offset_adapter.conv.weight", "has no blocks.1.adapter_pre_attn.offset_adapter"),
        ("blocks.1.adapter_pre_attn.fc1.weight", "equally wide and stand in the same blocks"),
    ],
)
def test_an_adapter_that_is_not_whole_is_refused(lost: str, message: str) -> None:
    state = make(adapter_before=("attn", "mlp")).state_dict()
    del state[lost]
    with pytest.raises(ValueError, match=message):
        load_pretrained_vit(state, num_heads=2, img_size=(48, 64), num_frames=8)


def test_no_other_project_computes_adapters() -> None:
    model = make()
    with pytest.raises(ValueError, match="no model with adapters"):
        export_state(model.state_dict(), model.config, "videomae_finetune")


def test_an_autoencoders_encoder_has_them_and_its_decoder_not(tmp_path: Path) -> None:
    config = MAEConfig(**SMALL, adapter_hidden=8, adapter_layers=(2,), decoder_embed_dim=32, decoder_num_heads=2)
    model = MaskedAutoencoder(config).eval()
    randomised(model.encoder)
    assert len(adapter_parameters(model)) == 12
    model.save_pretrained(tmp_path)
    back = load_pretrained(tmp_path)
    assert back.config == config
    video, mask = clips(), tube_masks(2, 1, GRID, 0.5)[:, 0]
    with torch.no_grad():
        tokens = back.encode(video, back.packs(video, mask, None)[0])  # type: ignore[union-attr, operator]  # an autoencoder
        assert relative_error(tokens, model.encoder.forward_features(video, mask).flatten(0, 1)) <= 1e-6
