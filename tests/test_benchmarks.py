"""The benchmark as a program: what it prints, its exit codes, and that a wrong result stops it."""

import json
import sys
from pathlib import Path

import pytest
import torch

from mmfast import MaskedViT, config, mae

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import ensemble_masked
import harness
import ladder
import loss_curve
import ops
import report
import train_report
import train_step
import train_variants
import variants

CPU = torch.device("cpu")
TINY = dict(img_size=32, num_frames=4, embed_dim=64, depth=2, num_heads=1, num_classes=5)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    model = MaskedViT.from_name("videomae_small_patch16_224", **TINY)
    ladder.spread_weights(model, 3)
    folder = tmp_path_factory.mktemp("tiny")
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def rungs() -> variants.Rungs:
    model = MaskedViT.from_name("videomae_small_patch16_224", **TINY).eval()
    ladder.spread_weights(model, 3)
    frames = torch.randint(0, 256, (3, 4, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return variants.Rungs(model, model.state_dict(), frames.permute(0, 4, 1, 2, 3), seed=5)


CASE = variants.Case(views=2, kept=2, cells=4, slots=2)


def test_every_rung_computes_the_published_probabilities(rungs):
    gate = variants.check(rungs, CASE, rungs.calls(CASE))
    assert gate.red == []
    assert {"published", "published + SDPA", "strong", "mmfast"} <= set(gate.errors)


def test_wrong_weights_turn_the_gate_red(rungs):
    rungs.model.blocks[1].mlp.fc2.weight.data[0, 0] += 0.1
    assert variants.check(rungs, CASE, rungs.calls(CASE)).red == ["mmfast"]


def test_a_nan_turns_the_gate_red(rungs):
    calls = rungs.calls(CASE) | {"mmfast": lambda: torch.full((3, 5), float("nan"))}
    assert variants.check(rungs, CASE, calls).red == ["mmfast"]


def test_a_peer_that_crashes_is_left_out_and_named(rungs):
    def crash() -> None:
        raise RuntimeError("no kernel")

    gate = variants.check(rungs, CASE, rungs.calls(CASE) | {"strong": crash})
    assert gate.red == []
    assert gate.crashed == {"strong": "RuntimeError: no kernel"}
    assert "strong" not in gate.errors


def test_our_own_crash_is_an_error(rungs):
    with pytest.raises(ZeroDivisionError):
        variants.check(rungs, CASE, rungs.calls(CASE) | {"mmfast": lambda: 1 / 0})


def test_one_run_writes_table_probabilities_and_figure(checkpoint, tmp_path, capsys):
    pytest.importorskip("av")
    pytest.importorskip("matplotlib")
    out, figure, trace = tmp_path / "out.json", tmp_path / "out.png", tmp_path / "trace.json"
    arguments = ["--checkpoint", checkpoint, "--views", "1", "3", "--keep", "2", "--rounds", "2", "--device", "cpu"]
    arguments += ["--json", str(out), "--plot", str(figure), "--profile", str(trace)]
    assert ensemble_masked.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "all 8 tokens, 1 view" in printed
    assert "4 of 8 tokens (ratio 0.5), 3 views" in printed
    saved = json.loads(out.read_text())
    assert [case["case"]["views"] for case in saved["ladders"]] == [1, 1, 3]
    for file in saved["files"]:
        assert sum(file["probabilities"]) == pytest.approx(1, abs=1e-5)
        assert file["name"] in printed
    assert len(saved["files"]) == 4
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert "mmfast::" in trace.read_text()


def test_bad_videos_are_named_and_the_rest_is_done(checkpoint, tmp_path, capsys):
    pytest.importorskip("av")
    from mmfast.data.synthetic import render_videos

    render_videos(tmp_path, 1, num_frames=8, size=64)
    (tmp_path / "broken.mp4").write_bytes(b"not a video")
    arguments = ["--checkpoint", checkpoint, "--keep", "2", "--rounds", "2", "--device", "cpu", "--clips", "1"]
    assert ensemble_masked.main([*arguments, "--video", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert "1 videos could not be read" in printed
    assert "broken.mp4" in printed
    assert "0000_" in printed


def test_nothing_decodable_ends_with_two(checkpoint, tmp_path, capsys):
    pytest.importorskip("av")
    (tmp_path / "broken.mp4").write_bytes(b"not a video")
    arguments = ["--checkpoint", checkpoint, "--keep", "2", "--device", "cpu", "--video", str(tmp_path)]
    assert ensemble_masked.main(arguments) == 2
    assert "none of the 1 videos could be read" in capsys.readouterr().err


def test_a_red_gate_ends_with_three_and_no_number(checkpoint, capsys, monkeypatch):
    right = MaskedViT.ensemble

    def wrong(*args, **options):
        probs = right(*args, **options)
        return probs.roll(1, dims=1)

    monkeypatch.setattr(MaskedViT, "ensemble", wrong)
    assert ensemble_masked.main(["--checkpoint", checkpoint, "--keep", "2", "--device", "cpu"]) == 3
    captured = capsys.readouterr()
    assert "mmfast: relative error" in captured.err
    assert captured.out == ""


def test_without_av_rendered_frames_are_used_and_said(checkpoint, capsys, monkeypatch):
    monkeypatch.setattr(ensemble_masked, "have_av", lambda: False)
    assert ensemble_masked.main(["--checkpoint", checkpoint, "--keep", "2", "--rounds", "2", "--device", "cpu"]) == 0
    assert "PyAV is not installed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--views", "0"], "at least 1"),
        (["--mask-ratio", "1"], r"[0, 1)"),
        (["--device", "tpu"], "cpu or cuda"),
        (["--rounds", "1"], "at least 2"),
    ],
)
def test_wrong_options_are_refused(arguments, said, capsys):
    with pytest.raises(SystemExit, match="2"):
        ensemble_masked.main(arguments)
    assert said in capsys.readouterr().err


def test_unknown_model_is_one_line(capsys):
    assert ensemble_masked.main(["--model", "videomae_smal", "--device", "cpu"]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_peak_memory_counts_what_is_held_at_once():
    """8 MB are held while 4 MB more come and go; what was allocated before does not count."""
    before = torch.ones(1_000_000)

    def call() -> None:
        kept = torch.empty(2_000_000)
        for _ in range(3):
            torch.empty(1_000_000)
        kept.add_(before.sum())

    assert harness.peak_memory(call, CPU) == pytest.approx(12_000_000, abs=1000)


def test_rounds_are_interleaved():
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    timings = harness.measure(calls, CPU, rounds=3)
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert timings["a"].samples == 3


def test_json_is_whole_or_unchanged(tmp_path):
    path = tmp_path / "out.json"
    harness.write_json(path, {"a": 1})
    with pytest.raises(TypeError, match="object"):
        harness.write_json(path, {"a": 2, "b": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("op", ops.all_ops(ops.Bench(CPU, torch.float32, 2, 16, 64)), ids=lambda op: op.name)
def test_ops_have_a_right_provider(op):
    errors, raised = op.check()
    assert raised == {}
    assert errors["mmfast"] <= op.allowed(errors)


def test_speedups_are_against_the_named_rows():
    def row(name: str, ms: float) -> report.Row:
        return report.Row(name, harness.Timing(ms, ms, ms, ms, 2), 4, 1.0, 1.0, 1.0, None, None)

    rows = [row("published", 8.0), row("strong", 4.0), row("mmfast", 2.0)]
    gate = variants.Gate({r.name: 0.0 for r in rows}, 1e-5, {}, {})
    saved = report.Ladder(CASE, rows, 1.0, gate).as_json()["rows"][2]
    assert (saved["speedup_published"], saved["speedup_best_peer"], saved["clips_per_second"]) == (4.0, 2.0, 2000.0)


# -- training ----------------------------------------------------------------------------------------------------------

BLOCKS = dict(embed_dim=64, depth=2, num_heads=1)
DECODER = dict(decoder_embed_dim=64, decoder_depth=1, decoder_num_heads=1)


@pytest.fixture
def tiny_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models "tiny" and, for distillation, "tiny_rgb", "tiny_flow" and "tiny_pose", over 8 tokens."""
    frames = dict(img_size=32, num_frames=4)
    classifier = {**BLOCKS, **frames, "final_norm": True, "norm_eps": 1e-5}
    monkeypatch.setitem(config._MAE_NAMES, "tiny", {**BLOCKS, **frames, **DECODER})
    monkeypatch.setitem(config._NAMES, "tiny_rgb", classifier)
    monkeypatch.setitem(config._NAMES, "tiny_flow", {**classifier, "in_chans": 2})
    monkeypatch.setitem(config._NAMES, "tiny_pose", {**classifier, "in_chans": 21, "img_size": 8, "patch_size": 4})


def training_work(
    mode: str, *more: str, autocast: torch.dtype | None = None, device: torch.device = CPU
) -> train_step.Work:
    arguments = ["--mode", mode, "--model", "tiny", "--mask-ratio", "0.5", "--batch", "2", "--device", str(device)]
    return train_step.prepare(train_step.parse([*arguments, *more]), train_variants.Setup(device, autocast))


@pytest.mark.parametrize("pixels", ["--uint8", "--seed=1"], ids=["uint8", "float"])
@pytest.mark.parametrize("mode", ["pretrain", "distill"])
def test_every_training_step_is_the_published_one(mode, pixels, tiny_names):
    work = training_work(mode, pixels, "--peers", "published", "transformers", "eager")
    gate = train_variants.check(work.variants, work.published)
    assert gate.red == []
    assert gate.crashed == {}
    assert {"published", "eager", "mmfast", "mmfast, lean mlp", "mmfast, lean blocks"} <= set(gate.errors)
    norms = [outcome.norm for name, outcome in gate.outcomes.items() if name != "transformers"]
    assert norms == pytest.approx([norms[0]] * len(norms), rel=1e-5)


def test_training_steps_under_autocast_are_within_the_published_error(tiny_names):
    work = training_work("pretrain", "--peers", "published", "eager", autocast=torch.bfloat16)
    gate = train_variants.check(work.variants, work.published)
    assert gate.red == []
    assert gate.allowed.gradient > train_variants.FP32_BAR
    assert gate.errors["mmfast"].gradient > train_variants.FP32_BAR  # autocast was on


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("mode", ["pretrain", "distill"])
def test_training_steps_on_a_gpu_are_the_published_ones(mode, autocast, tiny_names, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    work = training_work(mode, "--peers", "published", "eager", autocast=autocast, device=torch.device("cuda"))
    gate = train_variants.check(work.variants, work.published)
    assert gate.red == [], train_report.red_lines(gate)
    rows = train_report.rows_of(work.variants, gate, work.clips, 2, 1.0)
    assert [row.name for row in rows][-3:] == ["mmfast", "mmfast, lean mlp", "mmfast, lean blocks"]


def test_other_weights_turn_the_training_gate_red(tiny_names):
    work = training_work("pretrain", "--peers", "published", "--no-recompute")
    work.variants[-1].module.model.decoder.blocks[0].mlp.fc2.weight.data[0, 0] += 0.1
    assert train_variants.check(work.variants, work.published).red == ["mmfast"]


def test_a_right_loss_with_wrong_gradients_is_red(tiny_names):
    work = training_work("pretrain", "--peers", "published", "--no-recompute")
    work.variants[-1].probes[0].register_hook(lambda gradient: gradient * 1.01)
    assert train_variants.check(work.variants, work.published).red == ["mmfast"]


def test_a_nan_turns_the_training_gate_red(tiny_names):
    work = training_work("distill", "--peers", "published", "--no-recompute")
    work.variants[-1].probes[-1].register_hook(lambda gradient: gradient * float("nan"))
    assert train_variants.check(work.variants, work.published).red == ["mmfast"]


def test_a_step_trains_and_its_memory_is_counted(tiny_names):
    work = training_work("pretrain", "--peers", "published", "--no-recompute")
    before = float(work.variants[-1].backward())
    gate = train_variants.check(work.variants, work.published)
    row = train_report.rows_of(work.variants, gate, work.clips, 2, 1.0)[-1]
    assert float(work.variants[-1].backward()) < before
    weights = sum(p.nbytes for p in work.variants[-1].module.parameters())
    assert row.weights_bytes == weights
    assert row.optimiser_bytes >= 2 * weights
    assert row.step_bytes >= weights  # the gradients at least
    assert row.peak_bytes == row.weights_bytes + row.optimiser_bytes + row.step_bytes


def test_one_training_run_writes_table_json_and_figure(tiny_names, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out, figure = tmp_path / "out.json", tmp_path / "out.png"
    arguments = ["--model", "tiny", "--mask-ratio", "0.5", "--batch", "2", "--device", "cpu", "--rounds", "2"]
    arguments += ["--peers", "published", "--json", str(out), "--plot", str(figure)]
    assert train_step.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "2 source and 2 target clips, 4 of 8 tokens" in printed
    saved = json.loads(out.read_text())
    assert [row["name"] for row in saved["rows"]] == ["published", "mmfast", "mmfast, lean mlp", "mmfast, lean blocks"]
    assert saved["rows"][0]["speedup_published"] == 1.0
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_a_red_training_gate_ends_with_three_and_no_number(tiny_names, capsys, monkeypatch):
    right = mae.MaskedAutoencoder.patch_loss
    monkeypatch.setattr(mae.MaskedAutoencoder, "patch_loss", lambda *args: 1.001 * right(*args))
    arguments = ["--model", "tiny", "--mask-ratio", "0.5", "--batch", "2", "--device", "cpu", "--peers", "published"]
    assert train_step.main(arguments) == 3
    captured = capsys.readouterr()
    assert "mmfast: relative error of the loss" in captured.err
    assert captured.out == ""


def test_an_unknown_training_model_is_one_line(capsys):
    assert train_step.main(["--model", "tinny", "--device", "cpu"]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_loss_curves_start_alike_and_are_compared(monkeypatch, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setitem(config._MAE_NAMES, "tiny", {**BLOCKS, **DECODER})
    out, figure = tmp_path / "out.json", tmp_path / "out.png"
    arguments = ["--model", "tiny", "--steps", "3", "--size", "32", "--frames", "4", "--clips", "4", "--batch", "2"]
    arguments += ["--mask-ratio", "0.5", "--device", "cpu", "--json", str(out), "--plot", str(figure)]
    assert loss_curve.main(arguments) == 0
    assert "mmfast, fp32 - plain torch, fp32" in capsys.readouterr().out
    saved = json.loads(out.read_text())
    curves = saved["curves"]
    assert curves["mmfast, fp32"] == pytest.approx(curves["plain torch, fp32"], rel=1e-4)
    assert curves["mmfast, bf16 autocast"] == pytest.approx(curves["plain torch, fp32"], rel=1e-2)
    assert curves["mmfast, bf16 autocast"] != curves["mmfast, fp32"]
    assert saved["differences"][0]["max"] == max(
        abs(a - b) for a, b in zip(curves["mmfast, fp32"], curves["plain torch, fp32"], strict=True)
    )
    assert figure.read_bytes().startswith(b"\x89PNG")
