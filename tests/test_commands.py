"""The commands as a user runs them: results, exit codes, and one clear line for whatever is wrong."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_runs import MAIN, run, write_checkpoint, write_labelled
from makers import assert_same, canonical, mmcdfsl_stage2, tiny_config, tiny_mae_config
from numerics import relative_error
from video_files import write_clip

from mmfast.checkpoints import save_pretrained
from mmfast.commands import COMMANDS, SUMMARIES
from mmfast.data.dataset import ClipDataset
from mmfast.extract import FeatureStore
from mmfast.mae import MaskedAutoencoder
from mmfast.vit import MaskedViT


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_labelled(tmp_path_factory.mktemp("labelled"))


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_has_one_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(command, "--help") == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: mmfast {command}")
    assert SUMMARIES[command].split()[0] in shown


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_an_unknown_option_is_one_line_and_exit_code_2(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(command, "a", "b", "--checkpoint", "c", "--out", "d", "--vieuws", 3) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith(f"mmfast {command}: ")


def test_predict_needs_nothing_but_a_folder_and_a_checkpoint(checkpoint: Path, labelled: Path, tmp_path: Path) -> None:
    out = tmp_path / "p.csv"
    assert run("predict", labelled, "--checkpoint", checkpoint, "--out", out, "--quiet") == 0
    assert [row["path"] for row in _rows(out)] == [str(p) for p in sorted(labelled.rglob("*.mp4"))]


def test_predict_few_shot_finds_the_classes_of_a_labelled_folder(
    checkpoint: Path, labelled: Path, tmp_path: Path
) -> None:
    out = tmp_path / "p.csv"
    for head in ("logistic", "prototype", "ridge"):
        arguments = ("--checkpoint", checkpoint, "--support", labelled, "--out", out, "--head", head, "--quiet")
        assert run("predict", labelled, *arguments) == 0
        rows = _rows(out)
        assert [row["label"] for row in rows] == [Path(row["path"]).parent.name for row in rows]


def test_predict_names_unreadable_videos_and_exits_with_1(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "v").mkdir()
    write_clip(tmp_path / "v" / "good.mp4", 6)
    (tmp_path / "v" / "bad.mp4").write_bytes(b"no video")
    assert run("predict", tmp_path / "v", "--checkpoint", checkpoint, "--out", tmp_path / "p.json", "--quiet") == 1
    assert "bad.mp4" in capsys.readouterr().err
    about = json.loads((tmp_path / "p.json").read_text())
    assert len(about["clips"]) == len(about["failed"]) == 1


@pytest.mark.parametrize("ending", ["txt", "json"])
def test_predict_takes_class_names_from_a_file(checkpoint: Path, labelled: Path, tmp_path: Path, ending: str) -> None:
    names = [f"class {k}" for k in range(5)]
    file = tmp_path / f"names.{ending}"
    file.write_text("\n".join(names) if ending == "txt" else json.dumps(names))
    out = tmp_path / "p.csv"
    video = labelled / "dark" / "0.mp4"
    assert run("predict", video, "--checkpoint", checkpoint, "--classes", file, "--out", out, "--quiet") == 0
    assert _rows(out)[0]["label"] in names


def test_extract_fills_a_feature_store(checkpoint: Path, labelled: Path, tmp_path: Path) -> None:
    out = tmp_path / "f"
    assert run("extract", labelled, "--checkpoint", checkpoint, "--out", out, "--views", 3, "--quiet") == 0
    store = FeatureStore(out)
    assert store.labels == [name for name in ("bright", "dark", "grey") for _ in range(6)]
    assert store.features().shape == (18, 3, 64)
    assert store.settings["about"] == {"stride": None, "resize": "squash"}


def test_extract_takes_its_place_from_the_launcher(
    checkpoint: Path, labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, seen in ((1, 9), (0, 18)):
        monkeypatch.setenv("RANK", str(rank))
        assert run("extract", labelled, "--checkpoint", checkpoint, "--out", tmp_path / "f", "--quiet") == 0
        assert len(FeatureStore(tmp_path / "f")) == seen


_SLOW = (
    "import time; from mmfast.data.dataset import ClipDataset; read = ClipDataset.__getitem__;"
    "ClipDataset.__getitem__ = lambda self, i: (time.sleep(30 * (i > 5)), read(self, i))[1];"
)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_command_ends_cleanly_and_goes_on(
    checkpoint: Path, labelled: Path, tmp_path: Path, sent: signal.Signals
) -> None:
    out = tmp_path / "f"
    options = ["--batch", "2", "--shard-size", "2", "--workers", "0", "--quiet"]
    arguments = ["extract", str(labelled), "--checkpoint", str(checkpoint), "--out", str(out), *options]
    # A background job of a shell is born deaf to Ctrl-C, and its children with it.
    listen = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler);"
    code = listen + _SLOW + MAIN
    child = subprocess.Popen([sys.executable, "-c", code, *arguments], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while len(list(out.glob("features-*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    child.send_signal(sent)
    _, error = child.communicate(timeout=60)
    assert child.returncode == 130, error
    assert "Traceback" not in error
    assert error.endswith("stopped; the same command goes on from here\n")
    assert len(FeatureStore(out)) >= 4
    assert COMMANDS["extract"](arguments[1:]) == 0
    assert len(FeatureStore(out)) == 18


def test_a_full_disk_is_one_line_and_exit_code_1(
    checkpoint: Path, labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert run("extract", labelled, "--checkpoint", checkpoint, "--out", tmp_path / "f", "--quiet") == 1
    assert "mmfast extract: No space left on device\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("predict", ["nowhere", "--checkpoint", "CHECKPOINT"], "nowhere: no such file or folder"),
        ("predict", ["LABELLED", "--checkpoint", "nowhere"], "no file or folder 'nowhere'"),
        ("predict", ["LABELLED", "--checkpoint", "CHECKPOINT", "--head", "ridge"], "--head is for --support"),
        ("predict", ["LABELLED", "--checkpoint", "CHECKPOINT", "--out", "p.txt"], "out must end in .csv or .json"),
        ("predict", ["LABELLED", "--checkpoint", "CHECKPOINT", "--views", "0"], "views must be at least 1"),
        ("predict", ["LABELLED", "--checkpoint", "CHECKPOINT", "--device", "cuda:77"], "device 'cuda:77' cannot be"),
        ("predict", ["LABELLED", "--checkpoint", "CHECKPOINT", "--branch", "x"], "branch and head are for MM-CDFSL"),
        ("extract", ["LABELLED", "--checkpoint", "CHECKPOINT", "--out", "F", "--root", "x"], "root is for annotations"),
        ("extract", ["nowhere.csv", "--checkpoint", "CHECKPOINT", "--out", "F"], "nowhere.csv: cannot be read"),
        ("doctor", ["nowhere.json", "--dataset", "epic"], "nowhere.json"),
        ("doctor", ["LABELLED", "--template", "rgb=x"], "--template is for annotations"),
        ("doctor", ["LABELLED", "--clip-end", "annotated"], "--clip-end is for annotations"),
        ("doctor", ["x.json", "--dataset", "wear", "--template", "x"], "template must be MODALITY=PATH, MODALITY one"),
        ("extract", ["LABELLED", "--checkpoint", "CHECKPOINT", "--out", "F", "--windows", "0"], "windows must be at"),
        ("convert", ["nowhere", "out"], "no file or folder 'nowhere'"),
    ],
)
def test_wrong_arguments_are_one_line_and_exit_code_2(
    checkpoint: Path,
    labelled: Path,
    tmp_path: Path,
    command: str,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    places = {"CHECKPOINT": checkpoint, "LABELLED": labelled}
    assert run(command, *[places.get(a, a) for a in arguments]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"mmfast {command}: ")
    assert message in last


def test_other_masks_into_the_same_folder_are_refused(
    checkpoint: Path, labelled: Path, tmp_path: Path, capsys: Any
) -> None:
    arguments = (labelled, "--checkpoint", checkpoint, "--out", tmp_path / "f", "--quiet")
    assert run("extract", *arguments) == 0
    assert run("extract", *arguments, "--mask-ratio", 0.5) == 2
    assert "mask_ratio (0.75 there, 0.5 now)" in capsys.readouterr().err


def test_the_student_of_a_distillation_checkpoint_is_what_runs(labelled: Path, tmp_path: Path) -> None:
    from mmfast.extract import weights_fingerprint

    config = tiny_config(num_classes=3, final_norm=True, norm_eps=1e-5)
    torch.save({"module": mmcdfsl_stage2(config)}, tmp_path / "stage2.pt")
    arguments = ("--num-frames", 4, "--img-size", 32, "--num-heads", 2, "--quiet")
    assert run("extract", labelled, "--checkpoint", tmp_path / "stage2.pt", "--out", tmp_path / "f", *arguments) == 0
    sizes = dict(num_frames=4, img_size=32, num_heads=2)
    student = MaskedViT.from_pretrained(tmp_path / "stage2.pt", branch="student_rgb", **sizes)
    assert FeatureStore(tmp_path / "f").settings["weights"] == weights_fingerprint(student)


def test_convert_there_and_back_keeps_every_tensor(checkpoint: Path, tmp_path: Path, capsys: Any) -> None:
    there, back = tmp_path / "hf", tmp_path / "back"
    assert run("convert", checkpoint, there, "--to", "hf_videomae") == 0
    assert "tensors loaded" in capsys.readouterr().out
    assert run("convert", there, back) == 0
    assert_same(MaskedViT.from_pretrained(back).state_dict(), MaskedViT.from_pretrained(checkpoint).state_dict())


def test_convert_to_hugging_face_tells_how_pixels_are_normalised(tmp_path: Path) -> None:
    """So that it comes back, and transformers' own processor has it."""
    config = tiny_config(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    model = MaskedViT(config)
    model.load_state_dict(canonical(config))
    save_pretrained(model, tmp_path / "own")
    assert run("convert", tmp_path / "own", tmp_path / "hf", "--to", "hf_videomae") == 0
    again = MaskedViT.from_pretrained(tmp_path / "hf").config
    assert (again.mean, again.std, again.img_size) == (config.mean, config.std, config.img_size)
    flow = tmp_path / "flow"
    save_pretrained(MaskedViT(tiny_config(in_chans=2)), flow)
    assert run("convert", flow, tmp_path / "hf_flow", "--to", "hf_videomae") == 0
    assert not (tmp_path / "hf_flow" / "preprocessor_config.json").exists()


def test_transformers_reads_the_preprocessor_that_convert_writes(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = tiny_config(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    model = MaskedViT(config)
    model.load_state_dict(canonical(config))
    save_pretrained(model, tmp_path / "own")
    assert run("convert", tmp_path / "own", tmp_path / "hf", "--to", "hf_videomae") == 0
    processor = transformers.VideoMAEImageProcessor.from_pretrained(tmp_path / "hf")
    frames = list(np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8))
    theirs = processor(frames, return_tensors="pt")["pixel_values"].transpose(1, 2)
    model = MaskedViT.from_pretrained(tmp_path / "hf")
    raw = torch.from_numpy(np.stack(frames)).permute(3, 0, 1, 2)[None]
    with torch.no_grad():
        assert relative_error(model(raw), model(theirs)) <= 1e-5


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_convert_writes_a_file_for_the_published_loaders(checkpoint: Path, tmp_path: Path, ending: str) -> None:
    file = tmp_path / "sub" / f"model.{ending}"
    assert run("convert", checkpoint, file, "--to", "videomae_finetune") == 0
    again = MaskedViT.from_pretrained(file, num_heads=2, num_frames=4, img_size=32)
    assert_same(again.state_dict(), MaskedViT.from_pretrained(checkpoint).state_dict())


def test_convert_a_pretraining_model(tmp_path: Path) -> None:
    mae = MaskedAutoencoder(tiny_mae_config())
    save_pretrained(mae, tmp_path / "mae")
    assert run("convert", tmp_path / "mae", tmp_path / "p.pth", "--to", "videomae_pretrain") == 0
    state = torch.load(tmp_path / "p.pth", weights_only=True)["model"]
    assert_same(state, dict(mae.state_dict()))


def test_convert_does_not_write_over_what_is_there(checkpoint: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "m.pth"
    out.write_bytes(b"precious")
    assert run("convert", checkpoint, out, "--to", "videomae_finetune") == 2
    assert out.read_bytes() == b"precious"
    assert "--force writes over it" in capsys.readouterr().err
    assert run("convert", checkpoint, out, "--to", "videomae_finetune", "--force") == 0


def test_convert_refuses_a_dialect_that_is_not_the_models(checkpoint: Path, tmp_path: Path, capsys: Any) -> None:
    assert run("convert", checkpoint, tmp_path / "x.pth", "--to", "videomae_pretrain") == 2
    assert "dialect must be one of videomae_finetune" in capsys.readouterr().err
    assert not (tmp_path / "x.pth").exists()


def test_doctor_says_what_is_wrong_by_its_exit_code(labelled: Path, tmp_path: Path, capsys: Any) -> None:
    assert run("doctor", labelled, "--decode", "--num-frames", 4, "--json", tmp_path / "r.json") == 0
    assert json.loads((tmp_path / "r.json").read_text())["usable"] == 18
    manifest = tmp_path / "m.csv"
    manifest.write_text(f"path,label\n{labelled / 'dark' / '0.mp4'},dark\ngone.mp4,dark\n")
    assert run("doctor", manifest) == 1
    assert "gone.mp4" in capsys.readouterr().out


def test_info_prints_versions_and_devices(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("info") == 0
    assert "torch" in capsys.readouterr().out


def test_a_programming_error_is_not_hidden(checkpoint: Path, labelled: Path, tmp_path: Path, monkeypatch: Any) -> None:
    def broken(self: ClipDataset, place: int) -> Any:
        raise AttributeError("a bug")

    monkeypatch.setattr(ClipDataset, "__getitem__", broken)
    with pytest.raises(AttributeError, match="a bug"):
        run("extract", labelled, "--checkpoint", checkpoint, "--out", tmp_path / "f", "--quiet")


def test_annotations_with_paths_of_ones_own(tmp_path: Path, capsys: Any) -> None:
    clip = {"uid": "a", "video_id": "7", "start_frame": 2, "end_frame": 4, "action_id": 0, "action_name": "take"}
    about = {"version": "1", "date": "today", "description": "", "split": "val", "clips": [clip]}
    (tmp_path / "val.json").write_text(json.dumps(about))
    (tmp_path / "mine" / "7").mkdir(parents=True)
    for i in range(2, 5):
        (tmp_path / "mine" / "7" / f"{i}.jpg").write_bytes(b"a picture")
    where = (tmp_path / "val.json", "--dataset", "meccano", "--root", tmp_path)
    assert run("doctor", *where, "--num-frames", 3) == 1
    own = ("--template", "rgb=mine/{video_id}/{frame}.jpg")
    assert run("doctor", *where, *own, "--num-frames", 3) == 0
    assert run("doctor", *where, *own, "--num-frames", 5) == 1
    assert "have no file" in capsys.readouterr().out
    assert run("doctor", *where, *own, "--num-frames", 5, "--clip-end", "annotated") == 1
    assert "2 samples lie past its end" in capsys.readouterr().out
