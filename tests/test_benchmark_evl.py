"""The benchmark of EVL as a program: its check, its memory figures, and a run of seconds."""

import json
import sys
from pathlib import Path

import pytest
import torch

from mmfast import clip_config
from mmfast.evl import EVL
from mmfast.evl_decoder import Decoder

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import evl
import evl_ways
from train_variants import Gate, Setup

CPU = torch.device("cpu")
TINY = dict(
    embed_dim=32, image_size=24, patch_size=8, vision_width=32, vision_depth=3, vision_num_heads=2, context_length=7,
    vocab_size=60, text_width=32, text_depth=1, text_num_heads=2,
)  # fmt: skip
TINY_RUN = ["--model", "tiny", "--classes", "5", "--layers", "2", "--frames", "3", "--batch", "2"]
PEERS = ["published", "eager", "eager, one query"]


@pytest.fixture(autouse=True)
def tiny_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(clip_config._NAMES, "tiny", TINY)


def checked(*more: str, autocast: torch.dtype | None = None, device: torch.device = CPU) -> Gate:
    options = evl.parse([*TINY_RUN, "--device", str(device), "--peers", *PEERS, *more])
    setup = Setup(device, autocast)
    ways, model = evl_ways.prepare(options, setup)
    return evl_ways.check(ways, model, evl_ways.draw_batch(model.config, 2, 0, device), setup)


def test_every_way_has_the_published_loss_and_gradients():
    gate = checked()
    assert gate.red == []
    assert gate.crashed == {}
    trained = {"published, end to end", "eager, end to end", "mmfast, end to end"}
    trained |= {"mmfast, end to end, lean mlp", "mmfast, end to end, lean blocks"}
    both = {*PEERS, "mmfast"}
    assert set(gate.errors) == trained | both | {f"{name}, cached" for name in both}


def test_what_trains_end_to_end_is_compared_in_the_backbone_too():
    options = evl.parse([*TINY_RUN, "--device", "cpu", "--peers", "published"])
    ways, _ = evl_ways.prepare(options, Setup(CPU))
    counts = {way.name: sum(p.numel() for p in way.probes) for way in ways}
    own = {way.name: way for way in ways}["mmfast, end to end"].module
    unread = ("backbone.ln_post", "backbone.proj")
    everything = [p for name, p in own.named_parameters() if not name.startswith(unread)]
    keys_biases = options.layers * TINY["vision_width"]
    assert counts["mmfast, end to end"] == sum(p.numel() for p in everything) - keys_biases
    assert counts["mmfast, end to end"] == counts["published, end to end"] > counts["mmfast"] == counts["published"]


def test_steps_under_autocast_are_checked_too():
    gate = checked(autocast=torch.bfloat16)
    assert gate.red == []
    assert gate.errors["mmfast"].gradient > 1e-4  # autocast was on


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["fp32", "bf16"])
def test_steps_on_a_gpu_are_the_published_ones(autocast, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    gate = checked(autocast=autocast, device=torch.device("cuda"))
    assert gate.red == []
    assert gate.crashed == {}


def test_a_wrong_decoder_ends_with_three_and_no_number(capsys, monkeypatch):
    right = Decoder.temporal

    def wrong(self, i, features):
        return right(self, i, features) + 0.01 * features.out

    monkeypatch.setattr(Decoder, "temporal", wrong)
    assert evl.main([*TINY_RUN, "--device", "cpu", "--peers", "published", "--quick"]) == 3
    captured = capsys.readouterr()
    assert "mmfast: relative error of the loss" in captured.err
    assert captured.out == ""


def test_an_error_of_the_backbones_gradients_alone_is_told(monkeypatch):
    right = EVL._features

    def wrong(self, block, views):
        tokens, qkv = block
        if tokens.requires_grad:
            tokens.register_hook(lambda gradient: 1.001 * gradient)
        return right(self, (tokens, qkv), views)

    monkeypatch.setattr(EVL, "_features", wrong)
    gate = checked()
    assert gate.red == ["mmfast, end to end", "mmfast, end to end, lean mlp", "mmfast, end to end, lean blocks"]


def test_a_peer_that_crashes_is_left_out_and_named(monkeypatch):
    from evl_peers import QueryAttention

    def crash(self, x, z):
        raise RuntimeError("not on this machine")

    monkeypatch.setattr(QueryAttention, "one_query", crash)
    gate = checked()
    assert set(gate.crashed) == {"eager, one query", "eager, one query, cached"}
    assert "not on this machine" in gate.crashed["eager, one query"]


def test_one_run_writes_tables_json_and_figure(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out, figure = tmp_path / "out.json", tmp_path / "out.png"
    arguments = [*TINY_RUN, "--device", "cpu", "--peers", "published", "--rounds", "2", "--times", "3"]
    assert evl.main([*arguments, "--json", str(out), "--plot", str(figure)]) == 0
    printed = capsys.readouterr().out
    saved = json.loads(out.read_text())
    rows = {row["name"]: row["timing"]["median"] for row in saved["rows"]}
    reached, alone = saved["reached"], saved["decoder_alone"]
    times = alone["published"]["timing"]["median"] / alone["mmfast"]["timing"]["median"]
    assert reached["decoder_speedup"] == times
    assert reached["step_speedup over published, end to end"] == rows["published, end to end"] / rows["mmfast"]
    assert f"decoder_speedup: {times:.3f}" in printed
    assert saved["equal_memory"]["clips"] == 3
    peaks = saved["batches"]["published, end to end"]["peaks"]
    assert saved["equal_memory"]["others"]["published, end to end"] == peaks["1"]
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_a_quick_run_measures_nothing_at_equal_memory(tmp_path, capsys):
    out = tmp_path / "out.json"
    assert evl.main([*TINY_RUN, "--device", "cpu", "--quick", "--no-recompute", "--json", str(out)]) == 0
    saved = json.loads(out.read_text())
    assert saved["equal_memory"] is None
    assert not any("compiled" in row["name"] or "lean" in row["name"] for row in saved["rows"])
    assert all(row["timing"]["samples"] == 2 for row in saved["rows"])
    assert "does not fit" not in capsys.readouterr().out


def test_batches_that_fit_follow_from_two_peaks():
    memory = evl_ways.Memory({2: 700, 6: 1500})
    assert (memory.clip_bytes, memory.fixed_bytes) == (200, 300)
    assert memory.most(1500) == 6
    assert memory.most(1499) == 5
    assert memory.most(100) == 0


def test_a_frozen_step_holds_less_than_an_end_to_end_one():
    options = evl.parse([*TINY_RUN, "--device", "cpu", "--peers"])
    ways, model = evl_ways.prepare(options, Setup(CPU))
    batch = evl_ways.draw_batch(model.config, 2, 0, CPU)
    found = evl.memories(ways, batch, [1, 2], Setup(CPU))
    frozen, trained = found["mmfast"], found["mmfast, end to end"]
    assert frozen.clip_bytes < trained.clip_bytes
    states = sum(2 * p.nbytes for p in model.backbone.parameters())
    assert trained.peaks[1] - frozen.peaks[1] > states  # the backbone's states of AdamW, at least


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--json", "/nowhere/at/all.json"], "is no folder"),
        (["--memory-batches", "2", "2"], "must be two different numbers"),
        (["--device", "tpu"], "--device must be cpu or cuda"),
    ],
)
def test_wrong_options_are_refused_at_once(arguments, told, capsys):
    with pytest.raises(SystemExit):
        evl.main(arguments)
    assert told in capsys.readouterr().err


def test_a_model_that_does_not_exist_ends_with_two(capsys):
    assert evl.main(["--model", "clip_vit_b15", "--device", "cpu"]) == 2
    assert "clip_vit_b16" in capsys.readouterr().err
