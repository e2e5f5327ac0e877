"""run_all.py: every section on tiny models, what happens to one that fails, parts, and merging their results."""

import importlib
import io
import json
import pkgutil
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import mmfast_kernels
from mmfast import clip_config, config

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import harness
import machines
import ops
import ops_inference
import ops_more
import ops_training
import probes
import report_inputs
import results_file
import run_all
import scaling_inputs
import sections
import sections_models
import sections_steps
import variants
from section_run import Run

CPU = torch.device("cpu")
TINY = ops.Bench(CPU, torch.float32, 2, 16, 64)
OPS = [
    *ops_more.training_ops(TINY),
    *ops_more.loss_ops(TINY, 1, 32, 1),
    ops_more.stencil_op(TINY, 1, 3, (3, 4), 8),
    ops_more.temporal_op(TINY, 1, 3, 3, 2, 32),
    *ops_training.decoder_ops(TINY, 1, 64, (2, 4, 4), 4),
    *ops_training.more_training_ops(TINY),
    ops_training.stencil_training(TINY, 1, frames=3, grid=(3, 4), hidden=8),
    ops_training.temporal_training(TINY, 1, frames=3, side=3, heads=2, dim=32),
    *ops_inference.inference_ops(TINY),
    *ops_inference.fp8_ops(TINY),
]
# Parts of a TED-Adapter, which the section "ted" measures as a whole, and in it alone.
IN_TED = {"ted_project", "ted_stencil_", "ted_stencil_backward_"}
GREEN = {"state": "green", "why": "", "seconds": 1.0}


@pytest.fixture(autouse=True)
def quick_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured ones take seconds."""
    limits = {"copy_gb_s": 10.0, "gemm_tflop_s": 0.05, "gemm_size": 64.0}
    monkeypatch.setattr(harness, "ceilings", lambda device, dtype: dict(limits))


@pytest.fixture(autouse=True)
def own_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names that sections register must not be seen by other tests."""
    for module, table in ((config, "_NAMES"), (config, "_MAE_NAMES"), (clip_config, "_NAMES")):
        monkeypatch.setattr(module, table, dict(getattr(module, table)))


def run_of(tmp_path: Path, **changes: Any) -> Run:
    return Run(CPU, tmp_path / "section.json", time.monotonic() + 600, quick=True, **changes)


# -- sections ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in run_all.LIMITS if name != run_all.GATE])
def test_every_section_runs_and_is_green(name, tmp_path):
    run = run_of(tmp_path)
    sections.SECTIONS[name](run)
    run.save()
    saved = json.loads(run.path.read_text())
    assert saved["red"] == []
    if name == "host":
        assert saved["skipped"] == ["host: needs a GPU"]
    else:
        assert saved["rows"]
        assert saved["skipped"] == []
    assert list(tmp_path.iterdir()) == [run.path]


def test_a_section_is_run_by_its_own_process(tmp_path, monkeypatch):
    options = run_all.parse(["--out", str(tmp_path), "--device", "cpu", "--section", "attention", "--quick"])
    assert run_all.run_section(options) == 0
    saved = json.loads((tmp_path / "attention.json").read_text())
    assert {"mmfast", "torch"} <= {row["provider"] for row in saved["rows"]}
    assert saved["machine_after"]["date"] >= saved["machine"]["date"]


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name in run_all.LIMITS if name not in (run_all.GATE, "ceilings")])
def test_every_section_runs_on_a_gpu(name, tmp_path):
    run = Run(torch.device("cuda"), tmp_path / "section.json", time.monotonic() + 600, quick=True)
    sections.SECTIONS[name](run)
    assert run.result["red"] == []
    assert run.result["rows"]


def test_a_wrong_op_is_red_and_has_no_time(tmp_path, monkeypatch):
    right = ops.layer_norm
    monkeypatch.setattr(ops, "layer_norm", lambda *args: 1.01 * right(*args))
    run = run_of(tmp_path)
    sections.kernels(run)
    assert [line.split(":")[0] for line in run.result["red"]] == ["layer_norm 32x64 by mmfast"]
    timed = {(row["op"], row["provider"]) for row in run.result["rows"]}
    assert ("layer_norm", "mmfast") not in timed
    assert ("layer_norm", "torch") in timed


def test_a_wrong_model_is_red_and_has_no_time(tmp_path, monkeypatch):
    monkeypatch.setattr(sections_models.MaskedViT, "ensemble", lambda self, *a, **k: torch.zeros(2, 5))
    run = run_of(tmp_path)
    sections_models.ladder_small(run)
    assert run.result["rows"] == []
    assert "mmfast: relative error" in run.result["red"][0]


def test_a_wrong_peer_is_dropped_and_the_rest_timed(tmp_path, monkeypatch):
    right = variants.PlainViT.strong
    monkeypatch.setattr(variants.PlainViT, "strong", lambda *args: 1.1 * right(*args))
    run = run_of(tmp_path)
    sections_models.ladder_small(run)
    assert "strong: relative error" in run.result["red"][0]
    [row] = run.result["rows"]
    assert {"published", "mmfast", "mmfast, fused"} <= {each["name"] for each in row["rows"]}
    assert not any(each["name"].startswith("strong") for each in row["rows"])


def test_what_crashes_is_red_and_the_rest_goes_on(tmp_path, monkeypatch):
    right = sections_models.MaskedViT.ensemble

    def one_in_two(self: Any, video: torch.Tensor, **options: Any) -> torch.Tensor:
        if video.shape[0] == 1:
            raise RuntimeError("no kernel for one clip")
        return right(self, video, **options)

    monkeypatch.setattr(sections_models.MaskedViT, "ensemble", one_in_two)
    run = run_of(tmp_path)
    sections_models.grid(run)
    assert len(run.result["red"]) == 1
    assert "RuntimeError: no kernel for one clip" in run.result["red"][0]
    assert [row["clips"] for row in run.result["rows"]] == [2]


def test_fused_crashing_is_red_and_mmfast_is_timed(tmp_path, monkeypatch):
    right = sections_models.MaskedViT.ensemble

    def not_fused(self: Any, *args: Any, **options: Any) -> torch.Tensor:
        if self.fused is not None:
            raise RuntimeError("no kernel")
        return right(self, *args, **options)

    monkeypatch.setattr(sections_models.MaskedViT, "ensemble", not_fused)
    run = run_of(tmp_path)
    sections_models.ladder_small(run)
    assert [line.split(": ", 1)[1] for line in run.result["red"]] == ["RuntimeError: no kernel"]
    assert {row["name"] for row in run.result["rows"][0]["rows"]} >= {"mmfast", "published"}


def test_a_step_that_differs_is_red(tmp_path, monkeypatch):
    import ted_adapter

    right = ted_adapter.TEDAdapter.run
    monkeypatch.setattr(ted_adapter.TEDAdapter, "run", lambda self, x, layout: right(self, x * 1.001, layout))
    run = run_of(tmp_path)
    sections.SECTIONS["ted"](run)
    assert run.result["red"] == ["ted: results differ from the published ones"]
    assert run.result["rows"] == []


def test_a_step_is_kept_from_before_what_is_compiled(tmp_path):
    def main(arguments):
        seen.append(arguments[arguments.index("--peers") + 1 : arguments.index("--device")])
        if "compiled" in seen[-1] and len(seen) > 2:
            raise RuntimeError("no compiler")
        Path(arguments[-1]).write_text(json.dumps({"peers": seen[-1]}))
        return 0

    seen: list[list[str]] = []
    run = Run(torch.device("cuda"), tmp_path / "section.json", time.monotonic() + 100)
    for name in ("step", "other"):
        sections_steps.script(run, name, main, [], 1.0, ("published", "compiled"))
    assert seen == [["published"], ["published", "compiled"]] * 2
    assert run.result["rows"] == [
        {"step": "step", "peers": ["published", "compiled"]},
        {"step": "other", "peers": ["published"]},
    ]
    assert run.result["red"] == ["other: RuntimeError: no compiler"]
    assert list(tmp_path.glob("*.json")) == [tmp_path / "section.json"]


def test_what_there_is_no_time_for_is_said(tmp_path):
    run = Run(CPU, tmp_path / "section.json", time.monotonic() - 1)
    sections.attention(run)
    assert run.result["rows"] == []
    assert "needs about 6 s, 0 s left" in run.result["skipped"][0]


def test_the_covering_has_every_case_of_every_model(tmp_path):
    run = Run(torch.device("cuda"), tmp_path / "section.json", 0.0)
    some = sections_models.covering(run)
    cases = {(ratio, views) for ratio in (0.5, 0.75, 0.9) for views in (1, 2, 4, 8)} | {(0.0, 1)}
    for size in ("small", "base", "large"):
        assert {(cell.ratio, cell.views) for cell in some if cell.size == size} == cases
        usual = {cell.clips for cell in some if (cell.size, cell.ratio, cell.views) == (size, 0.75, 2)}
        assert usual == {1, 4, 16, 43, 86}
    assert max(cell.tokens for cell in some) <= sections_models.MOST_TOKENS
    run.full = True
    assert set(some) < set(sections_models.covering(run))


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name.replace(",", ""))
def test_ops_have_a_right_provider(op):
    errors, raised = op.check()
    assert raised == {}
    assert errors["mmfast"] <= op.allowed(errors)


class Called(TorchDispatchMode):
    """Names of mmfast's own ops that were called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "mmfast":
            self.names.add(func._schema.name.removeprefix("mmfast::"))
        return func(*args, **(kwargs or {}))


@pytest.mark.interpret
def test_every_op_of_the_kernels_is_measured_beside_its_peers():
    for module in pkgutil.iter_modules(mmfast_kernels.__path__):
        if not module.name.endswith("_triton"):
            importlib.import_module(f"mmfast_kernels.{module.name}")
    known = {name.removeprefix("mmfast::") for name in torch._C._dispatch_get_all_op_names() if "mmfast::" in name}
    with Called() as mode:
        for op in [*ops.all_ops(TINY), *OPS]:
            inputs = op.make()
            with torch.no_grad():
                op.providers["mmfast"](*inputs)
    assert known - mode.names == IN_TED


def test_what_writes_over_its_inputs_is_checked_on_copies():
    op = ops_inference.add_linear_op(TINY, 64)
    inputs = op.make()
    before = [x.clone() for x in inputs]
    errors, raised = replace(op, make=lambda: inputs).check()
    assert raised == {}
    assert max(errors.values()) <= op.allowed(errors)
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))


def test_parts_are_balanced_by_swaps(monkeypatch):
    """Dealt out longest first, one half has 3, 2 and 2, the other 3 and 2."""
    monkeypatch.setattr(run_all, "LIMITS", {"gate": 0, "a": 3, "b": 2, "c": 2, "d": 2, "e": 3})
    monkeypatch.setattr(run_all, "START_SECONDS", 0.0)
    one, other = run_all.parts(2)
    assert run_all.seconds_of(one) == run_all.seconds_of(other) == 6
    assert one[0] == "gate"


def test_one_wrong_gradient_shows():
    op = ops_more.norm_training(TINY)[0]
    right = op.providers["mmfast"]

    def wrong(*inputs: Any) -> tuple[Any, ...]:
        dx, dweight, dbias = right(*inputs)
        return dx, dweight, 1.01 * dbias

    errors, _ = ops.Op(**{**vars(op), "providers": {**op.providers, "mmfast": wrong}}).check()
    assert errors["mmfast"] > op.allowed(errors)


def test_a_nan_in_one_of_several_results_shows():
    truth = (torch.ones(3), torch.ones(2))
    assert not ops.difference((torch.full((3,), float("nan")), torch.ones(2)), truth) <= 1


def test_kernels_of_a_call_are_named():
    a = torch.randn(64, 64)
    found = probes.kernels_of(lambda: torch.mm(a, a), CPU)
    assert any("mm" in one["name"] for one in found)
    assert [one["us"] for one in found] == sorted((one["us"] for one in found), reverse=True)


def test_a_first_call_that_fails_has_no_seconds():
    seconds = probes.first_call_seconds({"good": lambda: 1, "bad": lambda: 1 / 0}, CPU)
    assert seconds["bad"] is None
    assert seconds["good"] is not None


# -- the whole ---------------------------------------------------------------------------------------------------------


def fake_start(states: Mapping[str, Any]) -> Any:
    def start(name: str, *rest: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        if isinstance(states.get(name), Exception):
            raise states[name]
        return states.get(name, GREEN), {"rows": [{"product": "qkv 1x2x3", "tflop_s": 1.0}], "red": []}

    return start


def test_a_section_that_dies_is_recorded_and_the_rest_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(run_all, "start", fake_start({"ceilings": OSError("lost")}))
    assert run_all.main(["--out", str(tmp_path), "--device", "cpu"]) == 1
    saved = json.loads((tmp_path / "results.json").read_text())
    assert saved["sections"]["ceilings"]["state"] == "failed"
    assert saved["sections"]["kernels"]["state"] == "green"
    assert saved["gate"]["state"] == "skipped"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.txt", "results.json"]


def test_a_broken_process_leaves_what_it_had_and_its_last_words(tmp_path, monkeypatch):
    def dies(command: list[str], seconds: float, stderr: Any = None, **rest: Any) -> int:
        (tmp_path / "kernels.json").write_text(json.dumps({"rows": [{"op": "one"}], "red": []}))
        stderr.write("Traceback\nOSError: lost the GPU\n")
        return 1

    monkeypatch.setattr(run_all, "child", dies)
    options, log = run_all.parse(["--out", str(tmp_path), "--device", "cpu"]), io.StringIO()
    state, content = run_all.start("kernels", options, 60.0, tmp_path, log)
    assert (state["state"], state["why"]) == ("failed", "OSError: lost the GPU")
    assert content["rows"] == [{"op": "one"}]
    assert "Traceback" in log.getvalue()


def test_a_section_out_of_time_keeps_what_it_had(tmp_path, monkeypatch):
    def hangs(command: list[str], seconds: float, **rest: Any) -> int:
        (tmp_path / "grid.json").write_text(json.dumps({"rows": [{"clips": 1}], "red": []}))
        raise run_all.subprocess.TimeoutExpired(command, seconds)

    monkeypatch.setattr(run_all, "child", hangs)
    options = run_all.parse(["--out", str(tmp_path), "--device", "cpu"])
    state, content = run_all.start("grid", options, 60.0, tmp_path, io.StringIO())
    assert state["state"] == "stopped"
    assert content["rows"] == [{"clips": 1}]


def test_a_section_past_its_time_is_ended_with_its_children():
    with pytest.raises(run_all.subprocess.TimeoutExpired):
        run_all.child([sys.executable, "-c", "import time; time.sleep(60)"], 0.2)


def test_a_section_past_its_time_says_where_it_was(tmp_path):
    with open(tmp_path / "log", "w+") as log:
        with pytest.raises(run_all.subprocess.TimeoutExpired):
            run_all.child([sys.executable, "-c", "import time; time.sleep(60)"], 3, stderr=log)
        log.seek(0)
        assert "KeyboardInterrupt" in log.read()


def test_sections_without_time_are_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr(run_all, "start", fake_start({}))
    assert run_all.main(["--out", str(tmp_path), "--device", "cpu", "--minutes", "0.1", "--only", "ceilings"]) == 0
    saved = json.loads((tmp_path / "results.json").read_text())
    assert saved["sections"]["ceilings"]["state"] == "skipped"


@pytest.mark.parametrize("count", [1, 2, 4, 5])
def test_parts_have_every_section_once(count):
    parts = run_all.parts(count)
    assert sorted(name for part in parts for name in part) == sorted(run_all.LIMITS)
    assert parts[0][0] == run_all.GATE


def test_five_parts_end_within_nine_minutes():
    for part in run_all.parts(5):
        assert sum(run_all.LIMITS[name] + run_all.START_SECONDS for name in part) <= 9 * 60


@pytest.mark.parametrize(
    "arguments",
    [["--part", "0/4"], ["--part", "5/4"], ["--part", "half"], ["--minutes", "0"], ["--part", "1/2", "--only", "grid"]],
    ids=lambda arguments: " ".join(arguments),
)
def test_wrong_options_are_refused(arguments, tmp_path):
    with pytest.raises(SystemExit, match="2"):
        run_all.parse(["--out", str(tmp_path), *arguments])


# -- merging -----------------------------------------------------------------------------------------------------------


def part(folder: Path, date: str, content: Mapping[str, Any], state: Mapping[str, Any] = GREEN, **machine: str) -> Path:
    """A result whose sections hold the rows of `content`."""
    facts = {"gpu": "G", "commit": "abc", "date": date, **machine}
    result = results_file.empty(facts, mmfast="0", options={}, command="a command")
    for name, rows in content.items():
        results_file.add_section(result, name, {"rows": rows, "red": ["x"] if state is not GREEN else []}, state)
    folder.mkdir()
    harness.write_json(folder / "results.json", result)
    return folder


def merged(*folders: Path) -> list[dict[str, Any]]:
    return results_file.merged(results_file.read(folders))


def test_parts_become_one_file_of_a_machine_and_commit(tmp_path):
    a = part(tmp_path / "a", "1", {"attention": [{"op": "a"}], "latency": [{"clips": 1}]})
    b = part(tmp_path / "b", "2", {"kernels": [{"op": "b"}], "ladder_base": [{"model": "m"}]})
    other = part(tmp_path / "c", "3", {"kernels": [{"op": "c"}]}, commit="0123456789abcdef+changes")
    assert run_all.main(["--merge", str(a), str(b), str(other), "--out", str(tmp_path / "out")]) == 0
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["g_0123456789ab_changed.json", "g_abc.json"]
    whole = json.loads((tmp_path / "out" / "g_abc.json").read_text())
    assert [row["op"] for row in whole["rows"]] == ["a", "b"]
    assert [row["model"] for row in whole["ladders"]] == ["m"]
    assert [row["clips"] for row in whole["latency"]] == [1]
    assert len(whole["parts"]) == 2


def test_of_a_section_that_ran_twice_the_later_counts(tmp_path):
    late = part(tmp_path / "late", "2", {"kernels": [{"op": "late"}]})
    early = part(tmp_path / "early", "1", {"kernels": [{"op": "early"}, {"op": "more"}]})
    [whole] = merged(late, early)
    assert [row["op"] for row in whole["rows"]] == ["late"]


def test_a_green_section_is_not_replaced_by_one_that_failed(tmp_path):
    good = part(tmp_path / "good", "1", {"kernels": [{"op": "good"}]})
    bad = part(tmp_path / "bad", "2", {"kernels": []}, {"state": "red", "why": "x", "seconds": 1.0})
    [whole] = merged(good, bad)
    assert [row["op"] for row in whole["rows"]] == ["good"]
    assert whole["red"] == {}
    assert whole["sections"]["kernels"]["state"] == "green"


def test_clocks_before_and_after_a_section_are_kept(tmp_path):
    folder = part(tmp_path / "a", "1", {})
    content = json.loads((folder / "results.json").read_text())
    facts = {
        when: {"driver_clock_power": text} for when, text in (("machine", "1980 MHz"), ("machine_after", "1755 MHz"))
    }
    results_file.add_section(content, "grid", {"rows": [], **facts}, GREEN)
    harness.write_json(folder / "results.json", content)
    assert merged(folder)[0]["sections"]["grid"]["clocks"] == ["1980 MHz", "1755 MHz"]


def test_a_gate_that_ran_stays(tmp_path):
    first, second = (part(tmp_path / name, name, {}) for name in "ab")
    for folder, state in ((first, "green"), (second, "skipped")):
        content = json.loads((folder / "results.json").read_text())
        content["gate"] = {"state": state, "why": "", "seconds": 1.0}
        harness.write_json(folder / "results.json", content)
    [whole] = merged(first, second)
    assert whole["gate"]["state"] == "green"


def test_what_is_no_result_of_a_run_is_refused(tmp_path, capsys):
    (tmp_path / "a.json").write_text('{"machine": {}}')
    assert run_all.main(["--merge", str(tmp_path / "a.json"), "--out", str(tmp_path / "out")]) == 2
    assert "no result of run_all.py" in capsys.readouterr().err


def test_other_programs_read_the_merged_file(tmp_path):
    """roofline.py its ceilings, scaling.py its rates, the report everything."""
    ladder = {"model": "videomae_small_patch16_224", "clips": 4, "dtype": "torch.bfloat16", "floor_ms": 1.0}
    ladder |= {"case": {"views": 2, "kept": 49, "cells": 196, "slots": 8, "ratio": 0.75, "tokens": 392}}
    timing = {"median": 2.0, "q1": 1.9, "q3": 2.1, "least": 1.8, "samples": 5}
    known = {"timing": timing, "clips": 4, "clips_per_second": 2000.0, "gflop_true": 40.0, "peak_bytes": 1}
    ladder["rows"] = [{"name": name, **known} for name in ("published", "strong", "mmfast")]
    folder = part(tmp_path / "a", "1", {"ladder_small": [ladder]})
    content = json.loads((folder / "results.json").read_text())
    rows = [{"product": "qkv 10x384x1152", "tflop_s": 300.0}, {"copy": "pinned host to device", "gb_s": 50.0}]
    limits = {"copy_gb_s": 4000.0, "gemm_tflop_s": 700.0}
    results_file.add_section(content, "ceilings", {"rows": rows, **limits}, GREEN)
    file = tmp_path / "whole.json"
    harness.write_json(file, results_file.merged([(file, content)])[0])
    machine = machines.from_results(file)
    assert (machine.tflop_s, machine.tb_s, machine.pcie_gb_s) == (700.0, 4.0, 50.0)
    assert machine.products == {384: 300.0}
    [rate] = scaling_inputs.rates_in(file, harness.read_json(file))
    assert (rate.model, rate.clips_s) == ("small", 2000.0)
    assert [case.model for case in report_inputs.read([file]).cases] == [ladder["model"]]


def test_a_run_says_how_it_was_made(tmp_path, monkeypatch):
    monkeypatch.setattr(run_all, "start", fake_start({}))
    arguments = ["--out", str(tmp_path), "--device", "cpu", "--quick", "--only", "grid"]
    assert run_all.main(arguments) == 0
    saved = json.loads((tmp_path / "results.json").read_text())
    assert saved["quick"] is True
    assert saved["options"]["out"] == str(tmp_path)
    assert saved["command"].endswith("--quick --only grid")
