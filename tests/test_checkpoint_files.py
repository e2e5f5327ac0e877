"""Files that hold checkpoints: every container reads alike; what is hostile, damaged or no checkpoint is refused."""

import argparse
import json
import os
import pickle
import re
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from makers import GEOMETRY, State, canonical, tiny_config

from mmfast.checkpoints import container, convert, read, save_pretrained
from mmfast.vit import MaskedViT


@pytest.fixture(scope="module")
def state() -> State:
    return canonical(tiny_config())


def training_file(state: State) -> dict[str, Any]:
    """What VideoMAE's training scripts save."""
    about = {"args": argparse.Namespace(lr=1e-3), "epoch": np.int64(3), "best": np.float64(0.5), "ok": np.bool_(True)}
    return {"model": state, "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}}, **about}


def shards(folder: Path, state: State, kind: str) -> Path:
    names = list(state)
    stem, save = {
        "safetensors": ("model", safetensors.torch.save_file),
        "bin": ("pytorch_model", torch.save),
    }[kind]
    where = {}
    for i, part in enumerate((names[:9], names[9:])):
        shard = f"{stem}-0000{i + 1}-of-00002.{kind}"
        save({name: state[name] for name in part}, folder / shard)
        where |= dict.fromkeys(part, shard)
    index = folder / f"{stem}.{kind}.index.json"
    index.write_text(json.dumps({"weight_map": where}))
    return index


def write(kind: str, folder: Path, state: State) -> Path:
    path = folder / {"zip": "a.pth", "old": "a.pt", "safetensors": "a.safetensors"}.get(kind, "unused")
    match kind:
        case "zip":
            torch.save(training_file(state), path)
        case "old":
            torch.save(training_file(state), path, _use_new_zipfile_serialization=False)
        case "safetensors":
            safetensors.torch.save_file(state, path)
        case "safetensors folder":
            safetensors.torch.save_file(state, folder / "model.safetensors")
        case "bin folder":
            torch.save(state, folder / "pytorch_model.bin")
        case "deepspeed folder":
            (folder / "checkpoint").mkdir()
            torch.save({"module": state}, folder / "checkpoint" / "mp_rank_00_model_states.pt")
        case _:
            shards(folder, state, kind.removeprefix("shards "))
    return path if path.exists() else folder


KINDS = ["zip", "old", "safetensors", "safetensors folder", "bin folder", "deepspeed folder"]


@pytest.mark.parametrize("kind", [*KINDS, "shards safetensors", "shards bin"])
def test_every_container_reads_alike(kind: str, tmp_path: Path, state: State) -> None:
    got = convert(write(kind, tmp_path, state), **GEOMETRY)
    assert got.dialect == "videomae_finetune"
    assert all(torch.equal(got.state[name], state[name]) for name in state)


def test_what_lies_beside_the_weights_is_noted(tmp_path: Path, state: State) -> None:
    notes = convert(write("zip", tmp_path, state), **GEOMETRY).notes
    assert any("beside 'model': optimizer, args, epoch, best, ok" in note for note in notes)


def test_the_result_outlives_its_file(tmp_path: Path, state: State) -> None:
    path = write("zip", tmp_path, state)
    got = convert(path, **GEOMETRY).state
    path.write_bytes(b"")
    assert torch.equal(got["head.weight"], state["head.weight"])


# -- code in a file ----------------------------------------------------------------------------------------------------


class Hostile:
    """Unpickled, it makes a folder."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])
@pytest.mark.parametrize("folder", [True, False], ids=["folder", "file"])
def test_code_in_a_file_is_refused_by_name_and_not_run(
    zipped: bool, folder: bool, tmp_path: Path, state: State
) -> None:
    target, path = tmp_path / "made", tmp_path / "pytorch_model.bin"
    holding = {"model": state, "callback": Hostile(target)}
    torch.save(holding, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"refused.*(posix|nt)\.mkdir.*trust=True"):
        convert(tmp_path if folder else path, **GEOMETRY)
    assert not target.exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_plain_pickle_with_code_is_not_run(tmp_path: Path) -> None:
    (tmp_path / "a.pth").write_bytes(pickle.dumps({"model": Hostile(tmp_path / "made")}))
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "a.pth"))):
        read(tmp_path / "a.pth")
    assert not (tmp_path / "made").exists()


def test_trust_runs_it(tmp_path: Path, state: State) -> None:
    torch.save({"model": state, "callback": Hostile(tmp_path / "made")}, tmp_path / "a.pth")
    assert convert(tmp_path / "a.pth", trust=True, **GEOMETRY).dialect == "videomae_finetune"
    assert (tmp_path / "made").exists()


def test_trust_takes_a_whole_pickled_model(tmp_path: Path, state: State) -> None:
    model = torch.nn.Sequential()
    model.add_module("backbone", torch.nn.Linear(2, 2))
    torch.save({"model": model}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"refused.*torch\.nn\.modules"):
        read(tmp_path / "a.pth")
    assert list(read(tmp_path / "a.pth", trust=True).tensors) == ["backbone.weight", "backbone.bias"]


def test_the_allowed_names_are_given_back(tmp_path: Path, state: State) -> None:
    before = set(map(str, torch.serialization.get_safe_globals()))
    read(write("zip", tmp_path, state))
    assert set(map(str, torch.serialization.get_safe_globals())) == before


# -- damage ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["zip", "old", "safetensors"])
@pytest.mark.parametrize("part", [0.02, 0.5, 0.999])
def test_a_cut_file_is_refused_by_path(kind: str, part: float, tmp_path: Path, state: State) -> None:
    path = write(kind, tmp_path, state)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * part)])
    with pytest.raises(ValueError, match=re.escape(str(path)) + ".*damaged or cut short"):
        convert(path, **GEOMETRY)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"hello, this is a text file of some length\n", "neither safetensors nor a file of torch.save"),
        (b"<!DOCTYPE html><html>Not Found</html>", "starts with b'<!DOCTYPE html>"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "Git LFS pointer"),
        (b"\x80\x04garbage", "damaged or cut short"),
        (b"PK\x03\x04garbage", "damaged or cut short"),
    ],
    ids=["empty", "text", "html", "lfs", "pickle", "zip"],
)
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_file_that_is_no_checkpoint_says_what_it_is(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "a.pth")


def test_a_text_file_named_safetensors(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_text("hi")
    with pytest.raises(ValueError, match="no safetensors file"):
        read(tmp_path / "a.safetensors")


def test_another_zip_archive(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.zeros(2))
    with pytest.raises(ValueError, match=r"not one of torch\.save"):
        read(tmp_path / "a.npz")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_is_recognised(tmp_path: Path) -> None:
    torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)).save(tmp_path / "ViT-B-16.pt")
    with pytest.raises(ValueError, match="TorchScript archive, as OpenAI's CLIP"):
        read(tmp_path / "ViT-B-16.pt")


@pytest.mark.parametrize(
    ("holding", "message"),
    [
        ([torch.ones(2)], "holds a list, not a dict of tensors"),
        (torch.ones(2), "holds a Tensor, not a dict of tensors"),
        ({"epoch": 3, "lr": 0.1}, "is not a dict of tensors; its keys are epoch, lr"),
        ({"model": {"epoch": 3}}, r"\['model'\]: is not a dict of tensors"),
        ({}, "its keys are none"),
    ],
    ids=["list", "tensor", "numbers", "nested", "empty"],
)
def test_a_file_without_tensors(holding: Any, message: str, tmp_path: Path) -> None:
    torch.save(holding, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "a.pth")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_named_and_counted(bad: float, state: State) -> None:
    state = {name: t.clone() for name, t in state.items()}
    state["head.weight"][3, 1] = bad
    state["blocks.1.mlp.fc1.bias"][0] = bad
    match = r"2 of \d+ tensors hold NaN or infinity: blocks\.1\.mlp\.fc1\.bias, head\.weight"
    with pytest.raises(ValueError, match=match):
        convert(state, **GEOMETRY)


def test_large_weights_are_finite(state: State) -> None:
    large = {name: torch.full_like(t, 3e38) if name.endswith("fc1.weight") else t for name, t in state.items()}
    assert torch.equal(convert(large, **GEOMETRY).state["blocks.0.mlp.fc1.weight"], large["blocks.0.mlp.fc1.weight"])


def test_quantised_weights_are_refused(state: State) -> None:
    with pytest.raises(ValueError, match=r"head\.weight must be floating point, got torch\.int8"):
        convert(state | {"head.weight": torch.zeros(5, 64, dtype=torch.int8)}, **GEOMETRY)


def test_half_precision_is_noted(state: State) -> None:
    got = convert({name: t.half() for name, t in state.items()}, **GEOMETRY)
    assert "stored as float16" in got.notes


def test_two_names_for_one_tensor(state: State) -> None:
    with pytest.raises(ValueError, match=r"head\.bias and module\.head\.bias are both head\.bias"):
        read(state | {"module.head.bias": torch.zeros(5)})


# -- paths and folders -------------------------------------------------------------------------------------------------


def test_a_missing_path_is_not_downloaded() -> None:
    with pytest.raises(FileNotFoundError, match="models are not downloaded"):
        read("MCG-NJU/videomae-base")


def test_a_model_in_place_of_its_state_dict() -> None:
    with pytest.raises(TypeError, match=r"got MaskedViT; pass its \.state_dict\(\)"):
        read(MaskedViT(tiny_config()))


def test_an_empty_folder_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "weights.onnx").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"holds none of model\.safetensors.*it holds weights\.onnx"):
        read(tmp_path)


@pytest.mark.parametrize(("text", "message"), [("{", "is not JSON"), ("[]", "must hold a JSON object, got list")])
def test_a_broken_config_json_is_named(text: str, message: str, tmp_path: Path, state: State) -> None:
    write("safetensors folder", tmp_path, state)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=rf"config\.json: {message}"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: {}, "has no weight_map"),
        (lambda m: {"weight_map": m | {"head.bias": "model-3.safetensors"}}, "which is missing"),
        (lambda m: {"weight_map": m | {"head.bias": "../up.safetensors"}}, "must be a file beside it"),
        (
            lambda m: {"weight_map": m | {"head.scale": m["head.bias"]}},
            "1 tensors are in no shard, among them head.scale",
        ),
    ],
    ids=["no map", "missing", "outside", "lacking"],
)
def test_a_wrong_index_of_shards(change: Any, message: str, tmp_path: Path, state: State) -> None:
    index = shards(tmp_path, state, "safetensors")
    index.write_text(json.dumps(change(json.loads(index.read_text())["weight_map"])))
    with pytest.raises(ValueError, match=message):
        read(tmp_path)


# -- saving ------------------------------------------------------------------------------------------------------------


def test_saving_over_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m").write_text("mine")
    with pytest.raises(ValueError, match="folder must be a folder"):
        save_pretrained(MaskedViT(tiny_config()), tmp_path / "m")
    assert (tmp_path / "m").read_text() == "mine"


def test_a_failed_save_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = MaskedViT(tiny_config())
    model.save_pretrained(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def half(state: State, path: Path, metadata: Any) -> None:
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(safetensors.torch, "save_file", half)
    with pytest.raises(OSError, match="disk full"):
        model.save_pretrained(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_saved_files_have_the_usual_rights(tmp_path: Path) -> None:
    MaskedViT(tiny_config()).save_pretrained(tmp_path)
    mask = os.umask(0)
    os.umask(mask)
    assert {stat.S_IMODE(p.stat().st_mode) for p in tmp_path.iterdir()} == {0o666 & ~mask}


def test_saving_what_is_no_mmfast_model(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="must have a ViTConfig"):
        save_pretrained(torch.nn.Linear(2, 2), tmp_path)


def test_wrappers_are_taken_off_wherever_they_stand() -> None:
    found = container.read({"_forward_module.student_rgb._orig_mod.module.a": torch.ones(1)})
    assert list(found.tensors) == ["student_rgb.a"]
    assert found.written_as(["student_rgb.a"]) == ["_forward_module.student_rgb._orig_mod.module.a"]
