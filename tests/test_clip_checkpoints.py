"""CLIP checkpoints of every dialect into one layout; what is damaged, foreign or contradictory is refused by name."""

import json
import re
import zipfile
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from clip_makers import HEADS, TINY, Archived, State, clips, hf_model, make, open_clip_folder, openai, texts

from mmfast import CLIP, CLIPConfig, MaskedViT, load_pretrained
from mmfast.checkpoints.clip import convert_clip
from mmfast.checkpoints.torchscript import is_torchscript, read_torchscript
from mmfast.commands import convert

GELU_NOTE = "assumed, as OpenAI"


@pytest.fixture(scope="module")
def model() -> CLIP:
    return make()


@pytest.fixture(scope="module")
def state(model: CLIP) -> State:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(got: State, expected: State) -> bool:
    return got.keys() == expected.keys() and all(torch.equal(got[name], expected[name]) for name in got)


def script(path: Path, state: State) -> Path:
    about = {"input_resolution": 48, "context_length": 13, "vocab_size": 100}
    held = openai(state) | {name: torch.tensor(value) for name, value in about.items()}
    torch.jit.script(Archived(held)).save(path)
    return path


# -- OpenAI and open_clip ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "text."])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_openai_and_open_clip_state_dicts(prefix: str, text: str, state: State, model: CLIP) -> None:
    got = convert_clip({prefix + name: tensor for name, tensor in openai(state, text).items()}, **HEADS)
    assert (got.dialect, got.config, got.dropped) == ("openai_clip", model.config, [])
    assert same(got.state, state)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_openai_torchscript_archives(dtype: torch.dtype, tmp_path: Path, state: State, model: CLIP) -> None:
    half = {name: tensor.to(dtype) for name, tensor in state.items()}
    path = script(tmp_path / "ViT-B-32.pt", half)
    got = convert_clip(path, **HEADS)
    assert got.config == model.config
    assert same(got.state, half)
    assert got.dropped == ["input_resolution", "context_length", "vocab_size"]
    loaded = CLIP.from_pretrained(path, **HEADS)
    assert same(loaded.state_dict(), {name: tensor.float() for name, tensor in half.items()})
    assert any("stored as float16" in note for note in loaded.load_report.notes) == (dtype is torch.float16)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_an_archive_is_read_as_torch_reads_it(tmp_path: Path) -> None:
    """Buffers, shared storages, views and modules in lists, without torch.jit.load."""

    class Tree(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList(torch.nn.Linear(3, 3) for _ in range(2))
            self.layers[1].weight = self.layers[0].weight
            self.register_buffer("rows", torch.arange(12.0).view(3, 4)[:, 1:])
            self.sizes, self.names = [1, 2], {"a": 0.5}

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer(x)
            return x + self.rows.sum() * self.sizes[0]

    tree = Tree()
    torch.jit.script(tree).save(tmp_path / "a.pt")
    got = read_torchscript(tmp_path / "a.pt")
    assert same(got, tree.state_dict())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_an_archive_with_foreign_classes_is_refused(tmp_path: Path, state: State) -> None:
    path, other = script(tmp_path / "a.pt", state), tmp_path / "b.pt"
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(other, "w") as new:
        for name in old.namelist():
            hostile = b"cposix\nmkdir\n(S'" + str(tmp_path / "made").encode() + b"'\ntR."
            new.writestr(name, hostile if name.endswith("/data.pkl") else old.read(name))
    assert is_torchscript(other)
    with pytest.raises(ValueError, match=r"b\.pt: is a damaged TorchScript archive .*posix\.mkdir"):
        convert_clip(other)
    assert not (tmp_path / "made").exists()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_video_transformer_is_not_sought_in_an_archive(tmp_path: Path, state: State) -> None:
    with pytest.raises(ValueError, match="TorchScript archive, as OpenAI's CLIP"):
        MaskedViT.from_pretrained(script(tmp_path / "a.pt", state))


@pytest.mark.parametrize(("quick", "gelu"), [(True, "quick"), (False, "erf")])
def test_open_clip_folders(quick: bool, gelu: str, tmp_path: Path, state: State) -> None:
    about = dict(
        embed_dim=40, quick_gelu=quick, vision_cfg=dict(width=64, head_width=32), text_cfg=dict(width=32, heads=2)
    )
    folder = open_clip_folder(tmp_path / "m", openai(state), about, dict(mean=[0.5, 0.5, 0.5], std=[0.25, 0.25, 0.25]))
    got = convert_clip(folder)
    assert (got.config.gelu, got.config.vision_num_heads, got.config.text_num_heads) == (gelu, 2, 2)
    assert (got.config.mean, got.config.std) == ((0.5,) * 3, (0.25,) * 3)
    assert same(got.state, state)
    assert not any(GELU_NOTE in note for note in got.notes)


def test_open_clip_text_projection_as_a_linear_layer(state: State) -> None:
    other = openai(state, "text.")
    other["text.text_projection.weight"] = other.pop("text.text_projection").t().contiguous()
    assert same(convert_clip(other, **HEADS).state, state)


def test_an_open_clip_folder_of_another_tower_is_refused(tmp_path: Path, state: State) -> None:
    about = dict(vision_cfg=dict(timm_model_name="convnext_base"), text_cfg={})
    with pytest.raises(ValueError, match="vision_cfg is a 'convnext_base'"):
        convert_clip(open_clip_folder(tmp_path / "m", openai(state), about, {}))


def test_an_open_clip_folder_without_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "open_clip_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"none of open_clip_model\.safetensors"):
        convert_clip(tmp_path)


def test_what_a_state_dict_does_not_tell_is_noted_and_overridden() -> None:
    state = openai(make(text_width=128).state_dict())
    got = convert_clip(state)
    assert any("vision_num_heads 1 assumed from the width 64" in note for note in got.notes)
    assert any("text_num_heads 2 assumed from the width 128" in note for note in got.notes)
    assert any(GELU_NOTE in note for note in got.notes)
    asked = convert_clip(state, gelu="erf", vision_num_heads=4, text_num_heads=None).config
    assert (asked.gelu, asked.vision_num_heads, asked.text_num_heads) == ("erf", 4, 2)


# -- Hugging Face ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gelu", ["quick", "erf"])
@pytest.mark.parametrize("form", ["folder", "state"])
def test_hugging_face(form: str, gelu: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    theirs = hf_model(CLIPConfig(**TINY, gelu=gelu))
    if form == "folder":
        theirs.save_pretrained(tmp_path)
        got = convert_clip(tmp_path)
    else:
        got = convert_clip(
            theirs.state_dict() | {"text_model.embeddings.position_ids": torch.arange(13)}, **HEADS, gelu=gelu
        )
        assert got.dropped == ["text_model.embeddings.position_ids"]
    assert (got.dialect, got.config) == ("hf_clip", CLIPConfig(**TINY, gelu=gelu))
    key = theirs.vision_model.encoder.layers[1].self_attn.k_proj
    packed = (
        got.state["visual.transformer.resblocks.1.attn.qkv.weight"],
        got.state["visual.transformer.resblocks.1.attn.qkv.bias"],
    )
    assert torch.equal(packed[0][64:128], key.weight)
    assert torch.equal(packed[1][64:128], key.bias)
    assert torch.equal(got.state["visual.proj"], theirs.visual_projection.weight.t())


def test_defaults_that_transformers_leaves_out_of_its_config(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    theirs = hf_model(CLIPConfig(**{**TINY, "vision_width": 48, "vision_num_heads": 12, "text_num_heads": 8}))
    theirs.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for tower in ("vision_config", "text_config"):
        for name in ("num_attention_heads", "hidden_act", "layer_norm_eps"):
            config[tower].pop(name, None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    got = convert_clip(tmp_path).config
    assert (got.vision_num_heads, got.text_num_heads, got.gelu, got.norm_eps) == (12, 8, "quick", 1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_config": {"hidden_act": "gelu"}}, "one hidden_act and layer_norm_eps"),
        ({"text_config": {"hidden_act": "relu"}, "vision_config": {"hidden_act": "relu"}}, "got 'relu'"),
        ({"model_type": "siglip"}, "config.json is of a 'siglip' model"),
    ],
)
def test_what_hugging_face_has_and_this_has_not(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    hf_model(CLIPConfig(**TINY)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for name, value in changes.items():
        config[name] = {**config[name], **value} if isinstance(value, dict) else value
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=re.escape(message)):
        convert_clip(tmp_path)


def test_hugging_faces_preprocessor_says_how_pixels_are_normalised(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    hf_model(CLIPConfig(**TINY)).save_pretrained(tmp_path)
    about = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "rescale_factor": 0.00392156862745098}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(about))
    config = convert_clip(tmp_path).config
    assert (config.mean, config.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


# -- mmfast ------------------------------------------------------------------------------------------------------------


def test_saved_models_come_back(tmp_path: Path) -> None:
    model = make(gelu="erf", mean=(0.5, 0.5, 0.5))
    model.save_pretrained(tmp_path)
    back = CLIP.from_pretrained(tmp_path)
    assert back.config == model.config
    assert same(back.state_dict(), model.state_dict())
    assert (back.load_report.dialect, back.load_report.dropped, back.training) == ("mmfast", [], False)
    with torch.no_grad():
        assert torch.equal(back.encode_image(clips()), model.encode_image(clips()))


def test_load_pretrained_finds_a_clip(tmp_path: Path, state: State) -> None:
    loaded = load_pretrained(openai(state), **HEADS)
    assert isinstance(loaded, CLIP)
    assert same(loaded.state_dict(), state)
    assert len(loaded.load_report.loaded) == len(state)


def test_convert_on_the_command_line(tmp_path: Path) -> None:
    model = make(vision_num_heads=1, text_width=64, text_num_heads=1)
    torch.save(openai(model.state_dict()), tmp_path / "a.pt")
    assert convert.main([str(tmp_path / "a.pt"), str(tmp_path / "out")]) == 0
    assert same(CLIP.from_pretrained(tmp_path / "out").state_dict(), model.state_dict())
    with pytest.raises(ValueError, match="--to must be mmfast for a CLIP, got 'hf_videomae'"):
        convert.main([str(tmp_path / "a.pt"), str(tmp_path / "b"), "--to", "hf_videomae"])


def test_the_result_shares_no_memory_with_its_source(state: State) -> None:
    source = {name: tensor.clone() for name, tensor in openai(state).items()}
    got = convert_clip(source, **HEADS).state
    for tensor in source.values():
        tensor.zero_()
    assert same(got, state)


# -- refused -----------------------------------------------------------------------------------------------------------


def changed(state: State, **changes: Any) -> State:
    """OpenAI's names, one tensor changed or, by None, left out; double underscores stand for points."""
    out = openai(state)
    for name, value in changes.items():
        name = name.replace("__", ".")
        if value is None:
            del out[name]
        else:
            out[name] = value
    return out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(ln_final__weight=None), r"lacks 1 tensors of the model, among them text\.ln_final\.weight"),
        (
            dict(visual__ln_post__weight=torch.ones(63)),
            r"visual\.ln_post\.weight has shape \(63,\), .* makes it \(64,\)",
        ),
        (dict(visual__head__weight=torch.ones(2)), r"holds visual\.head\.weight, which CLIP has no place for"),
        (dict(logit_scale=torch.tensor(float("nan"))), r"1 of \d+ tensors hold NaN or infinity: logit_scale"),
        (dict(visual__positional_embedding=torch.ones(8, 64)), "has 8 rows, but a class token and a square grid"),
        (dict(visual__proj=None), "visual.proj must have 2 dimensions, got nothing"),
        (dict(visual__class_embedding=None), r"openai_clip: no visual\.class_embedding"),
        (dict(visual__layer1__0__conv1__weight=torch.ones(1)), "its vision tower is a ResNet"),
    ],
)
def test_what_is_no_such_clip_is_refused(changes: dict[str, Any], message: str, state: State) -> None:
    with pytest.raises(ValueError, match=message):
        convert_clip(changed(state, **changes), **HEADS)


def test_a_number_of_heads_that_cannot_be_guessed_is_asked_for() -> None:
    state = openai(make(vision_width=48, vision_num_heads=3).state_dict())
    with pytest.raises(ValueError, match="vision_num_heads is not in the file and vision_width is 48; give"):
        convert_clip(state, text_num_heads=2)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (dict(vision_width=128), "the config makes it"),
        (dict(vision_num_heads=5), "vision_num_heads must divide vision_width 64, got 5"),
        (dict(heads=2), "unknown config field 'heads'"),
    ],
)
def test_an_override_that_contradicts_the_file_is_refused(
    overrides: dict[str, Any], message: str, state: State
) -> None:
    with pytest.raises(ValueError, match=message):
        convert_clip(openai(state), **{**HEADS, **overrides})


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        CLIP.from_pretrained(tmp_path / "none.pt")


def test_a_video_transformer_is_no_clip(tmp_path: Path) -> None:
    tiny = MaskedViT.from_name("videomae_small_patch16_224", depth=1)
    tiny.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="config.json is of a MaskedViT"):
        CLIP.from_pretrained(tmp_path)


def test_texts_survive_a_round_trip_through_openai_names(state: State, model: CLIP) -> None:
    back = CLIP.from_pretrained(openai(state), **HEADS)
    with torch.no_grad():
        assert torch.equal(back.encode_text(texts()), model.encode_text(texts()))


def test_safetensors_files(tmp_path: Path, state: State) -> None:
    safetensors.torch.save_file({n: t.contiguous() for n, t in openai(state).items()}, tmp_path / "a.safetensors")
    assert same(convert_clip(tmp_path / "a.safetensors", **HEADS).state, state)
