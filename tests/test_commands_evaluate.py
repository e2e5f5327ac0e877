"""mmfast evaluate and mmfast sweep as a user runs them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from command_runs import MAIN, run, write_checkpoint, write_labelled
from fit_clip_makers import write_clip_model

from mmfast import EVL
from mmfast.vit import MaskedViT

PROTOCOL = ("--n-way", 3, "--n-query", 3, "--episodes", 20, "--quiet")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_labelled(tmp_path_factory.mktemp("labelled"))


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


def test_evaluate_with_adapters_trained_on_the_supports(checkpoint: Path, labelled: Path, tmp_path: Path) -> None:
    out = tmp_path / "e.json"
    arguments = ("--checkpoint", checkpoint, "--out", out, "--k-shot", 1, "--head", "ted", *PROTOCOL, "--episodes", 3)
    assert run("evaluate", labelled, *arguments, "--adapter-steps", 2, "--adapter-before", "attn", "mlp") == 0
    about = json.loads(out.read_text())
    assert about["results"][0]["accuracy"] > 0.8
    assert about["settings"]["adaptation"]["steps"] == 2
    assert about["settings"]["adaptation"]["before"] == ["attn", "mlp"]
    assert not list(tmp_path.glob("*.features"))


@pytest.mark.parametrize("start", ["fresh", "decoder", "folder", "clip"])
def test_evaluate_with_a_decoder_trained_on_the_supports(
    start: str, checkpoint: Path, labelled: Path, tmp_path: Path, capsys: Any
) -> None:
    out, where, more = tmp_path / "e.json", checkpoint, []
    evl = EVL.from_pretrained(None, checkpoint, num_layers=2, num_classes=7)
    if start == "decoder":
        evl.save_decoder(tmp_path / "decoder.pth")
        more = ["--decoder", tmp_path / "decoder.pth"]
    elif start == "folder":
        where = tmp_path / "evl"
        evl.save_pretrained(where)
    elif start == "clip":
        where, more = write_clip_model(tmp_path / "clip"), ["--num-frames", 4, "--decoder-temporal", "positions"]
    arguments = ("--checkpoint", where, "--out", out, "--k-shot", 1, "--head", "evl", *PROTOCOL, "--episodes", 3)
    assert run("evaluate", labelled, *arguments, *more, "--decoder-steps", 2, "--decoder-lr", 1e-4) == 0
    about = json.loads(out.read_text())
    assert about["results"][0]["accuracy"] > 0.8
    assert about["settings"]["adaptation"]["steps"] == 2
    assert about["settings"]["mask_ratio"] == 0.75
    assert "evl head" in capsys.readouterr().out


def test_evaluate_with_a_decoder_and_no_steps_is_the_logistic_head(
    checkpoint: Path, labelled: Path, tmp_path: Path
) -> None:
    arguments = ("--checkpoint", checkpoint, "--k-shot", 1, "--views", 1, *PROTOCOL, "--episodes", 4)
    assert run("evaluate", labelled, *arguments, "--out", tmp_path / "a.json", "--fresh") == 0
    none = ("--head", "evl", "--decoder-steps", 0)
    assert run("evaluate", labelled, *arguments, "--out", tmp_path / "b.json", *none) == 0
    results = [json.loads((tmp_path / name).read_text())["results"] for name in ("a.json", "b.json")]
    assert results[0] == results[1]


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
    command = [sys.executable, "-c", MAIN, "evaluate", *map(str, arguments)]
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
        (["STORE", "--head", "ted"], "trains on clips, and"),
        (["STORE", "--head", "evl"], "--head evl trains on clips, and"),
        (
            ["LABELLED", "--checkpoint", "CHECKPOINT", "--decoder", "d.pth"],
            "--decoder and --interpolate are of --head evl",
        ),
        (
            ["LABELLED", "--checkpoint", "CHECKPOINT", "--head", "evl", "--adaptive"],
            "--head evl trains on the supports of every episode: it takes neither",
        ),
        (
            ["LABELLED", "--checkpoint", "CHECKPOINT", "--head", "evl", "--k-shot", "1", "--decoder-layers", "3"],
            "num_layers must be at most 2",
        ),
        (
            ["LABELLED", "--checkpoint", "CHECKPOINT", "--head", "ted", "--fresh"],
            "takes neither --adaptive nor --fresh",
        ),
        (
            ["LABELLED", "--checkpoint", "CHECKPOINT", "--head", "ted", "--k-shot", "1", "--adapter-layers", "7"],
            "adapter_layers must be numbers of blocks, 0..1",
        ),
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
