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
from makers import assert_same, canonical, mmcdfsl_stage2, tiny_config, tiny_mae_config
from video_files import moving_frames, write_clip

from mmfast.checkpoints import save_pretrained
from mmfast.commands import COMMANDS, SUMMARIES
from mmfast.data.dataset import ClipDataset
from mmfast.extract import FeatureStore
from mmfast.mae import MaskedAutoencoder
from mmfast.vit import MaskedViT


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    net = MaskedViT(tiny_config())
    net.load_state_dict(canonical(tiny_config()))
    save_pretrained(net, folder)
    return folder


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of six short videos; a class is a brightness."""
    folder = tmp_path_factory.mktemp("labelled")
    for name, level in (("bright", 200), ("dark", 0), ("grey", 100)):
        (folder / name).mkdir()
        for i in range(6):
            frames = moving_frames(6, seed=i) // 8 + np.uint8(level)
            write_clip(folder / name / f"{i}.mp4", frames)
    return folder


def run(command: str, *arguments: object) -> int:
    return COMMANDS[command]([str(a) for a in arguments])


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


_MAIN = "import sys; from mmfast.commands import COMMANDS; sys.exit(COMMANDS[sys.argv[1]](sys.argv[2:]))"
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
    code = listen + _SLOW + _MAIN
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


PROTOCOL = ("--n-way", 3, "--n-query", 3, "--episodes", 20, "--quiet")


def test_evaluate_scores_the_heads_and_writes_table_and_json(
    checkpoint: Path, labelled: Path, tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "e.json"
    arguments = ("--checkpoint", checkpoint, "--out", out, "--k-shot", 1, 2, "--views", 3, "--adaptive")
    assert run("evaluate", labelled, *arguments, *PROTOCOL) == 0
    about = json.loads(out.read_text())
    assert [row["k_shot"] for row in about["results"]] == [1, 2]
    assert all(row["accuracy"] > 0.8 and row["episodes"] == 20 for row in about["results"])
    assert 1 <= about["results"][0]["adaptive"]["mean_views"] <= 3
    shown = capsys.readouterr().out
    assert f"{100 * about['results'][1]['accuracy']:.2f} %" in shown


def test_evaluate_of_stored_features_is_that_of_the_clips_and_encodes_nothing(
    checkpoint: Path, labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("extract", labelled, "--checkpoint", checkpoint, "--out", tmp_path / "f", "--quiet") == 0
    common = ("--k-shot", 1, *PROTOCOL)
    assert run("evaluate", labelled, "--checkpoint", checkpoint, "--out", tmp_path / "a.json", *common) == 0
    monkeypatch.setattr(MaskedViT, "encode", None)
    assert run("evaluate", tmp_path / "f", "--out", tmp_path / "b.json", *common) == 0
    results = [json.loads((tmp_path / name).read_text())["results"] for name in ("a.json", "b.json")]
    assert results[0] == results[1]


def test_evaluate_with_fresh_masks(checkpoint: Path, labelled: Path, tmp_path: Path) -> None:
    out = tmp_path / "e.json"
    arguments = ("--checkpoint", checkpoint, "--out", out, "--k-shot", 1, "--fresh", *PROTOCOL)
    assert run("evaluate", labelled, *arguments, "--episodes", 3) == 0
    assert json.loads(out.read_text())["results"][0]["accuracy"] > 0.8
    assert not list(tmp_path.glob("*.features"))


def test_two_processes_share_clips_and_episodes_and_give_the_table_of_one(
    checkpoint: Path, labelled: Path, tmp_path: Path
) -> None:
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = [labelled, "--checkpoint", checkpoint, "--out", tmp_path / "two.json", "--adaptive", *PROTOCOL]
    arguments += ["--k-shot", 1, 2, "--workers", 1]
    env = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-c", _MAIN, "evaluate", *map(str, arguments)]
    ranks = [
        subprocess.Popen(
            command, env={**env, "RANK": str(rank)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=300) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    assert "shots" in said[0][0]
    assert said[1][0] == ""
    for rank in range(2):
        index = json.loads((tmp_path / "two.json.features" / f"index-{rank:05}.json").read_text())
        assert sum(len(shard["ids"]) for shard in index["shards"]) == 9
    arguments[arguments.index("--out") + 1] = tmp_path / "one.json"
    assert run("evaluate", *arguments) == 0
    one, two = (json.loads((tmp_path / f"{name}.json").read_text())["results"] for name in ("one", "two"))
    assert one == two


def test_evaluate_refuses_classes_that_are_too_small_by_name(
    checkpoint: Path, labelled: Path, tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "e.json"
    assert run("evaluate", labelled, "--checkpoint", checkpoint, "--out", out, *PROTOCOL) == 2
    assert "too few in bright (6), dark (6), grey (6)" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["STORE", "--views", "3"], "views must lie in 1..2"),
        (["STORE", "--fresh"], "holds features only"),
        (["LABELLED"], "--checkpoint is needed"),
        (["STORE", "--adaptive", "--fresh"], "--fresh keeps none"),
        (["STORE", "--agreement", "2"], "agreement must lie in [0, 1]"),
        (["FLAT", "--checkpoint", "CHECKPOINT"], "its clips have no labels"),
    ],
)
def test_evaluate_names_what_is_wrong(
    checkpoint: Path, labelled: Path, tmp_path: Path, arguments: list[str], message: str, capsys: Any
) -> None:
    places = {"CHECKPOINT": checkpoint, "LABELLED": labelled, "STORE": tmp_path / "f", "FLAT": labelled / "dark"}
    if arguments[0] == "STORE":
        assert run("extract", labelled, "--checkpoint", checkpoint, "--out", tmp_path / "f", "--quiet") == 0
    assert run("evaluate", *[places.get(a, a) for a in arguments], *PROTOCOL, "--out", tmp_path / "e.json") == 2
    assert message in capsys.readouterr().err


def test_broken_clips_take_no_part_and_evaluate_exits_with_1(checkpoint: Path, labelled: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(labelled, tmp_path / "some")
    (tmp_path / "some" / "dark" / "5.mp4").write_bytes(b"no video")
    out = tmp_path / "e.json"
    assert run("evaluate", tmp_path / "some", "--checkpoint", checkpoint, "--out", out, "--k-shot", 1, *PROTOCOL) == 1
    about = json.loads(out.read_text())
    assert [one["clip"] for one in about["failed"]] == ["dark/5.mp4"]
    assert about["results"][0]["accuracy"] > 0.8


def test_sweep_measures_every_setting_and_chooses_within_the_budget(
    checkpoint: Path, labelled: Path, tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "s"
    ways = ("--mask-ratios", 0, 0.5, "--views", 1, 2, "--k-shot", 1, "--timed-runs", 2, *PROTOCOL)
    assert run("sweep", labelled, "--checkpoint", checkpoint, "--out", out, *ways) == 0
    about = json.loads((out / "sweep.json").read_text())
    points = [(s["mask_ratio"], s["views"], s["adaptive"]) for s in about["settings"]]
    assert points == [(0, 1, False), (0.5, 1, False), (0.5, 2, False), (0.5, 2, True)]
    assert all(s["ms"] > 0 and s["gflops"] > 0 for s in about["settings"])
    assert (out / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert about["best"]["accuracy"] == max(s["accuracy"] for s in about["settings"])
    least = min(s["gflops"] for s in about["settings"])
    assert run("sweep", labelled, "--checkpoint", checkpoint, "--out", out, "--max-gflops", least, *ways) == 0
    assert json.loads((out / "sweep.json").read_text())["best"]["gflops"] == least
    assert run("sweep", labelled, "--checkpoint", checkpoint, "--out", out, "--max-ms", 0, *ways) == 0
    assert "no setting fits the budget" in capsys.readouterr().err


def test_the_published_operation_counts_come_out() -> None:
    """MM-CDFSL's table: 68.5 GFLOPs unmasked, 37.0 at ratio 0.75 and two views."""
    from mmfast.commands.sweep import gflops
    from mmfast.config import from_name

    config = from_name("mmcdfsl_small_rgb")
    assert gflops(config, 1568, 1)[1] == pytest.approx(68.5, abs=0.1)
    assert gflops(config, 392, 2)[1] == pytest.approx(37.0, abs=0.1)
    assert gflops(config, 1568, 1)[0] == pytest.approx(113.8, abs=0.1)
