"""M2CLIP from and to files: adapters on a CLIP of any dialect, both in one, mmfast's folders."""

from pathlib import Path
from typing import Any

import pytest
import torch
from m2clip_makers import END, batch, published, texts, tiny_config, tiny_model
from torch import Tensor

import mmfast
from mmfast.checkpoints.m2clip import adapter_state
from mmfast.clip import CLIP
from mmfast.m2clip import M2CLIP

HEADS = dict(vision_num_heads=3, text_num_heads=2)
State = dict[str, Tensor]


def parts(model: M2CLIP) -> tuple[State, State]:
    """The CLIP alone, without the block for masked words, and what trained, both in published names."""
    whole = published(model)
    last = f"transformer.resblocks.{model.config.clip.text_depth}."
    clip = {name: t for name, t in whole.items() if "adapter" not in name and not name.startswith(last)}
    return clip, {name: t for name, t in whole.items() if "adapter" in name}


def tied(preset: str, **changes: Any) -> M2CLIP:
    """A model whose block for masked words is a copy of the last text block, as when it starts."""
    model = tiny_model(preset, **changes)
    blocks = model.clip.text.transformer.resblocks
    own = {name: t for name, t in blocks[2].state_dict().items() if "adapter" not in name}
    blocks[3].load_state_dict(own, strict=False)
    return model


def assert_alike(got: M2CLIP, wanted: M2CLIP) -> None:
    assert got.config == wanted.config
    mine, theirs = got.state_dict(), wanted.state_dict()
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []


def load(source: Any, adapters: Any = None, preset: str = "k400", **options: Any) -> M2CLIP:
    return M2CLIP.from_pretrained(source, 3, adapters=adapters, preset=preset, **{**HEADS, **options})


@pytest.mark.parametrize("preset", ["k400", "ssv2", "paper", "reference"])
def test_adapters_on_a_clip_tell_where_they_stand(tmp_path: Path, preset: str) -> None:
    wanted = tied(preset)
    clip, trained = parts(wanted)
    file = tmp_path / "checkpoint-11.pth"
    torch.save(
        {"model": trained, "optimizer": {"state": {}}, "lr_sched": {}, "loss_scaler": {}, "next_epoch": 12}, file
    )
    same_losses = "reference" if preset == "reference" else "paper"
    got = load(clip, file, preset=same_losses)
    assert_alike(got, wanted)
    assert got.load_report is not None
    assert got.load_report.dialect == "m2clip"
    assert got.load_report.initialised == got.load_report.dropped == []
    assert not got.training


def test_clip_and_adapters_may_come_as_a_pair() -> None:
    wanted = tied("k400")
    assert_alike(load(parts(wanted)), wanted)
    with pytest.raises(ValueError, match="a pair of one and its adapters, got 3 parts"):
        load((*parts(wanted), {}))


def test_a_clip_of_hugging_face_takes_adapters() -> None:
    transformers = pytest.importorskip("transformers")
    wanted = tied("k400")
    c = wanted.config.clip
    tower = lambda name: dict(
        hidden_size=getattr(c, f"{name}_width"),
        intermediate_size=c.hidden(name),
        num_hidden_layers=getattr(c, f"{name}_depth"),
        num_attention_heads=getattr(c, f"{name}_num_heads"),
    )
    text = dict(vocab_size=c.vocab_size, max_position_embeddings=c.context_length, eos_token_id=END)
    config = transformers.CLIPConfig(
        vision_config={**tower("vision"), "image_size": c.image_size, "patch_size": c.patch_size},
        text_config={**tower("text"), **text},
        projection_dim=c.embed_dim,
    )
    theirs = transformers.CLIPModel(config).eval()
    got = load(theirs.state_dict(), parts(wanted)[1])
    got.enable_adapters(vision=False, text=False)
    given = batch(2)
    with torch.no_grad():
        image = theirs.get_image_features(pixel_values=given["video"].transpose(1, 2).flatten(0, 1)).pooler_output
        text = theirs.get_text_features(input_ids=given["class_token_ids"]).pooler_output
        video = got.encode_video(given["video"])
        torch.testing.assert_close(video.frame_features.flatten(0, 1), image, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(got.encode_text(given["class_token_ids"]).features, text, rtol=1e-4, atol=1e-5)


def test_files_of_ddp_with_the_clip_inside_are_read_leniently() -> None:
    wanted = tied("k400")
    clip, trained = parts(wanted)
    file = {"model": {f"module.{name}": t for name, t in (trained | {"logit_scale": clip["logit_scale"]}).items()}}
    got = load(clip, file)
    assert_alike(got, wanted)
    assert got.load_report is not None
    assert got.load_report.dropped == ["module.logit_scale"]


def test_a_whole_state_has_its_own_block_for_masked_words() -> None:
    wanted = tiny_model("ssv2")
    assert_alike(load(published(wanted), preset="ssv2"), wanted)


def test_half_precision_files_are_read_as_they_are() -> None:
    wanted = tied("k400")
    clip, trained = parts(wanted)
    got = load({name: t.half() for name, t in clip.items()}, trained)
    assert got.clip.visual.proj.dtype == torch.float32
    torch.testing.assert_close(got(batch()["video"]), wanted(batch()["video"]), rtol=0.1, atol=0.05)


def test_a_clip_alone_starts_adapters_anew_and_says_so() -> None:
    clip, trained = parts(tiny_model("k400"))
    got = load(clip, num_classes=5, num_words=7, vision_hidden=10, text_hidden=9)
    assert got.config == tiny_config("k400")
    assert got.load_report is not None
    assert len(got.load_report.initialised) == len(trained)
    assert all("adapter" in name for name in got.load_report.initialised)
    assert "copy of the last" in str(got.load_report)
    blocks = got.clip.text.transformer.resblocks
    assert torch.equal(blocks[3].attn.qkv.weight, blocks[2].attn.qkv.weight)


def test_a_clip_of_mmfast_takes_adapters(tmp_path: Path) -> None:
    wanted = tied("k400")
    clip = CLIP(wanted.config.clip)
    clip.load_state_dict({n: t for n, t in wanted.clip.state_dict().items() if n in clip.state_dict()})
    clip.save_pretrained(tmp_path / "clip")
    wanted.save_adapters(tmp_path / "adapters.pth")
    assert_alike(load(tmp_path / "clip", tmp_path / "adapters.pth"), wanted)


def test_saved_adapters_have_the_published_names(tmp_path: Path) -> None:
    model = tied("ssv2")
    model.save_adapters(tmp_path / "a.pth")
    saved = torch.load(tmp_path / "a.pth")["model"]
    assert saved.keys() == parts(model)[1].keys()
    assert "visual.transformer.resblocks.0.adapter_pre_attn.offset_adapter.conv.weight" in saved
    assert "transformer.resblocks.3.adapter_pre_mlp.textad_fc1.weight" in saved
    assert {"visual.t_adapter.conv.weight", "visual.adapter_fc.bias", "mlm_adapter.transform.LayerNorm.weight"} <= {
        *saved
    }
    assert sum(t.numel() for t in saved.values()) == model.num_trainable()
    assert list(tmp_path.iterdir()) == [tmp_path / "a.pth"]


def test_a_folder_of_mmfast_comes_back_whole(tmp_path: Path) -> None:
    model = tiny_model("reference")
    model.save_pretrained(tmp_path / "m")
    again = M2CLIP.from_pretrained(tmp_path / "m")
    assert_alike(again, model)
    assert torch.equal(again(batch()["video"]), model(batch()["video"]))


def test_load_pretrained_knows_both_forms(tmp_path: Path) -> None:
    model = tiny_model("ssv2")
    model.save_pretrained(tmp_path / "m")
    loaded = mmfast.load_pretrained(tmp_path / "m")
    assert isinstance(loaded, M2CLIP)
    assert_alike(loaded, model)
    whole = mmfast.load_pretrained(published(model), preset="ssv2", num_frames=3, **HEADS)
    assert isinstance(whole, M2CLIP)
    assert_alike(whole, model)


@pytest.mark.parametrize("form", ["published", "mmfast"])
def test_other_classes_and_words_start_their_heads_anew(tmp_path: Path, form: str) -> None:
    model = tied("k400")
    if form == "published":
        got = load(*parts(model), num_classes=3, num_words=4)
    else:
        model.save_pretrained(tmp_path / "m")
        got = M2CLIP.from_pretrained(tmp_path / "m", num_classes=3, num_words=4)
    assert got.load_report is not None
    assert got.load_report.initialised == [
        "adapter_fc.weight",
        "adapter_fc.bias",
        "mlm_adapter.bias",
        "mlm_adapter.decoder.weight",
    ]
    assert len(got.load_report.dropped) == 4
    assert got(batch()["video"]).shape == (4, 3)
    assert torch.equal(got.mlm_adapter.transform.dense.weight, model.mlm_adapter.transform.dense.weight)


def test_what_no_file_knows_can_be_chosen() -> None:
    clip, trained = parts(tied("k400"))
    got = load(clip, trained, class_scale=50.0, class_dropout=0.1)
    assert (got.config.class_scale, got.config.class_dropout) == (50.0, 0.1)
    got = load(clip, trained, gelu="erf")
    assert got.config.clip.gelu == "erf"


def test_the_state_dict_is_not_shared_with_the_model() -> None:
    clip, trained = parts(tied("k400"))
    before = trained["visual.adapter_fc.bias"].clone()
    model = load(clip, trained)
    with torch.no_grad():
        model.adapter_fc.bias.add_(1)
    assert torch.equal(trained["visual.adapter_fc.bias"], before)
    assert adapter_state(model)["visual.adapter_fc.bias"].data_ptr() != model.adapter_fc.bias.data_ptr()


# -- refused --


def wider(trained: State, name: str) -> State:
    rows, width = trained[name].shape
    return {**trained, name: torch.zeros(rows, width + 8)}


VISION = "visual.transformer.resblocks.1.adapter_pre_mlp.fc1.weight"
TEXT = "transformer.resblocks.3.adapter_pre_mlp.textad_fc1.weight"


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (
            lambda t: wider(t, VISION),
            {},
            f"{VISION} has shape .*adapters of another width, the CLIP's vision tower is 48",
        ),
        (lambda t: wider(t, TEXT), {}, "adapters of another width, the CLIP's text tower is 32"),
        (
            lambda t: {n: x for n, x in t.items() if "resblocks.1." not in n},
            {},
            "must stand alike in the last of 3 blocks",
        ),
        (lambda t: t, {"vision_hidden": 11}, "vision_hidden is 10 in the file, got 11"),
        (lambda t: t, {"text_before": "attn"}, "text_before is .*'mlp'.* in the file"),
        (lambda t: {**t, "other_adapter.x": torch.zeros(1)}, {}, "other_adapter.x, which M2CLIP has no place for"),
        (lambda t: {**t, "visual.t_adapter.fc1.weight": torch.zeros(3, 3)}, {}, "t_adapter.fc1.weight has shape"),
        (lambda t: {**t, VISION: t[VISION] * float("nan")}, {}, "NaN or infinity"),
        (lambda t: {"logit_scale": torch.zeros(())}, {}, "holds no adapters"),
    ],
    ids=["vision width", "text width", "gap", "hidden", "before", "unknown", "shape", "nan", "none"],
)
def test_bad_adapters(change: Any, options: dict[str, Any], message: str) -> None:
    clip, trained = parts(tied("k400"))
    with pytest.raises(ValueError, match=message):
        load(clip, change(trained), **options)


def test_adapters_without_a_clip() -> None:
    with pytest.raises(ValueError, match="give the CLIP file as source"):
        load(parts(tied("k400"))[1])


def test_adapters_twice(tmp_path: Path) -> None:
    model = tied("k400")
    with pytest.raises(ValueError, match="holds adapters of its own"):
        load(published(model), parts(model)[1])
    model.save_pretrained(tmp_path / "m")
    with pytest.raises(ValueError, match="an M2CLIP that has its own"):
        M2CLIP.from_pretrained(tmp_path / "m", adapters=parts(model)[1])
    with pytest.raises(ValueError, match="vision_hidden is fixed by the file"):
        M2CLIP.from_pretrained(tmp_path / "m", vision_hidden=4)


def test_text_of_a_loaded_model_ends_at_the_largest_id() -> None:
    wanted = tied("k400")
    got = load(*parts(wanted))
    ids = texts([2, 6])
    assert int(ids.max()) == END
    assert torch.equal(got.encode_text(ids).features, wanted.encode_text(ids).features)
