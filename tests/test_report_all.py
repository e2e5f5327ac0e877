"""The report on results: what it reads, the README's table, the page and its figures. GPU results in here are made up."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import report_all
import report_figures
import report_inputs
import results_file

ROOT = Path(__file__).parents[1]
# Of single programs, so that a run of the whole suite beside them changes nothing here.
COMMITTED = sorted((ROOT / "benchmarks" / "results").glob("cpu_epyc_2threads*.json"))
SMALL, BASE = "videomae_small_patch16_224", "videomae_base_patch16_224"


def timing(ms: float) -> dict[str, float]:
    return {"median": ms, "q1": 0.98 * ms, "q3": 1.02 * ms, "least": 0.97 * ms, "samples": 5}


def case(kept: int, views: int) -> dict[str, Any]:
    return {"views": views, "kept": kept, "cells": 196, "slots": 8, "ratio": 1 - kept / 196, "tokens": 8 * kept}


def ladder_row(name: str, ms: float, clips: int) -> dict[str, Any]:
    return {"name": name, "timing": timing(ms), "clips": clips, "peak_bytes": 1 << 20, "gflop_true": 40.0}


def gpu_result(**changes: Any) -> dict[str, Any]:
    """As run_all.py would write one."""
    machine = {"gpu": "Made up", "commit": "0123456789abcdef", "date": "2026-01-02", "torch": "2.11", "device": "cuda"}
    result = results_file.empty(machine, mmfast="0", options={}, command="python benchmarks/run_all.py --part 1/5")
    ways = {"published, fp32": 80.0, "published": 16.0, "strong": 12.0, "mmfast": 6.0, "mmfast, fused": 5.0}
    ladder = {"model": SMALL, "clips": 10, "dtype": "torch.bfloat16", "case": case(49, 2), "floor_ms": 4.0}
    ladder |= {"rows": [ladder_row(name, ms, 10) for name, ms in ways.items()]}
    ladder |= {"compile_seconds": {"strong, max-autotune": 42.0}}
    ladder |= {"kernels": {"mmfast": [{"name": "_fwd_kernel", "calls": 12, "us": 100.0}]}}
    grid = [
        {"model": model, "clips": clips, "case": case(kept, views), "dtype": "torch.bfloat16", "timings": {
            "published": timing(size * views * kept * clips**0.8 / 20),
            "strong, CUDA graph": timing(size * views * kept * clips**0.9 / 40),
            "mmfast": timing(size * views * kept * clips**0.9 / 70),
        }}
        for model, size in ((SMALL, 1), (BASE, 3))
        for kept, views in ((196, 1), (98, 1), (98, 2), (49, 1), (49, 2), (20, 2))
        for clips in (1, 16, 86)
    ]  # fmt: skip
    op = {"op": "layer_norm", "shape": "33712x384", "dtype": "torch.bfloat16", "error": 1e-3, "bytes": 10**8}
    op |= {"flops": 10**8, "kernels": [{"name": "norm_kernel", "calls": 1, "us": 30.0}]}
    rates = {"gb_s": 10**8 / 0.03 / 1e6, "tflop_s": 10**8 / 0.03 / 1e9}
    ops = [op | rates | {"provider": name, "timing": timing(0.03)} for name in ("mmfast", "torch")]
    ops += [
        {**row, "op": "attention", "flops": 10**11, "tflop_s": 10**11 / 0.03 / 1e9 / 10, "timing": timing(0.3)}
        for row in ops
    ]
    product = {"product": "qkv 33712x384x1152", "timing": timing(0.1), "tflop_s": 400.0}
    latency = {
        "model": SMALL,
        "clips": 1,
        "case": case(49, 2),
        "timings": {"strong": timing(2.0), "mmfast": timing(0.5)},
    }
    host = {
        "model": SMALL,
        "clips": 172,
        "case": case(49, 2),
        "timings": {"strong": timing(30.0), "mmfast": timing(20.0)},
    }
    step = {"step": "pretrain", "title": "pretrain step of pretrain_videomae_small_patch16_224", "machine": machine}
    step |= {
        "rows": [ladder_row(name, ms, 64) for name, ms in (("published", 640.0), ("eager", 128.0), ("mmfast", 64.0))]
    }
    for name, rows in (("ceilings", [product]), ("ladder_small", [ladder]), ("grid", grid), ("attention", ops)):
        limits = {"copy_gb_s": 4000.0, "gemm_tflop_s": 700.0} if name == "ceilings" else {}
        results_file.add_section(result, name, {"rows": rows, **limits}, {"state": "green", "why": "", "seconds": 1.0})
    for name, rows in (("latency", [latency]), ("host", [host]), ("training", [step])):
        results_file.add_section(result, name, {"rows": rows}, {"state": "green", "why": "", "seconds": 1.0})
    return result | changes


@pytest.fixture
def gpu_file(tmp_path: Path) -> Path:
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps(gpu_result()))
    return path


def cells_of(lines: list[str], start: str) -> list[str]:
    [line] = [line for line in lines if line.startswith(f"| {start}")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_without_a_gpu_result_its_column_says_so():
    lines = report_all.readme_table(report_inputs.read(COMMITTED), "a command")
    assert cells_of(lines, "milliseconds")[-1] == "GPU"
    rows = [line for line in lines if line.startswith("| ViT-S")]
    assert len(rows) == 4
    assert all(row.endswith("| not measured yet |") for row in rows)
    assert any("GPU: not measured yet." in line for line in lines)


def test_the_committed_table_is_what_the_files_hold():
    saved = json.loads((ROOT / "benchmarks/results/cpu_epyc_2threads.json").read_text())
    [ladder] = [one for one in saved["ladders"] if (one["case"]["kept"], one["case"]["views"]) == (49, 2)]
    medians = {row["name"]: row["timing"]["median"] for row in ladder["rows"]}
    lines = report_all.readme_table(report_inputs.read(COMMITTED), "a command")
    cells = cells_of(lines, "ViT-S, mask ratio 0.75, 2 views")
    assert cells[1] == f"{medians['published'] / 4:.0f}"
    assert cells[3] == f"**{medians['mmfast'] / 4:.0f}**"
    assert cells[4] == f"{medians['published'] / medians['mmfast']:.2f}"
    peer = min(ms for name, ms in medians.items() if name != "mmfast")
    assert cells[5] == f"{peer / medians['mmfast']:.2f}"
    assert any(saved["machine"]["commit"][:12] in line for line in lines)


def test_every_way_counts_at_its_own_best_batch(gpu_file):
    found = report_inputs.lines(report_inputs.read([gpu_file]), "GPU")
    line = found[BASE, 49, 2]
    grid = [row for row in gpu_result()["grid"] if row["model"] == BASE and row["case"] == case(49, 2)]
    ms = [{name: t["median"] / row["clips"] for name, t in row["timings"].items()} for row in grid]
    assert line.ours.ms == min(one["mmfast"] for one in ms)
    assert line.over_peer == min(one["strong, CUDA graph"] for one in ms) / line.ours.ms
    assert line.ours.clips == 86


def test_published_is_fp32_where_it_was_run_and_says_where_not(gpu_file):
    results = report_inputs.read([gpu_file])
    lines = report_all.readme_table(results, "a command")
    small, base = (cells_of(lines, f"{name}, mask ratio 0.75, 2 views") for name in ("ViT-S", "ViT-B"))
    assert small[2] == "8.00"  # 80 ms of 10 clips
    assert small[4] == "**0.500**"  # fused, at 10 clips; the grid's is slower
    assert small[5] == "16.00"
    assert base[2].endswith(", bf16")


def test_training_steps_are_per_clip(gpu_file):
    lines = report_all.readme_table(report_inputs.read([gpu_file, *COMMITTED]), "a command")
    cells = cells_of(lines, "pre-training step")
    assert cells[6:] == ["10.0, bf16", "2.00", "**1.00**", "10.00", "2.00"]
    saved = json.loads((ROOT / "benchmarks/results/cpu_epyc_2threads_pretrain.json").read_text())
    own = next(row for row in saved["rows"] if row["name"] == "mmfast")
    assert cells[3] == f"**{own['timing']['median'] / own['clips']:.0f}**"


def test_lean_variants_are_neither_ours_nor_peers():
    source = report_inputs.Source("f", "CPU", "m", "c", "d", "t", "")
    ways = {"published": timing(9.0), "mmfast": timing(3.0), "mmfast, lean mlp": timing(2.0)}
    line = report_inputs.line_of([(source, ways, 1)])
    assert line is not None
    assert (line.ours.ms, line.over_peer) == (3.0, 3.0)


def test_the_newest_commit_of_a_machine_is_shown(tmp_path):
    for name, date, factor in (("old", "2026-01-01", 1.0), ("new", "2026-02-01", 2.0)):
        result = gpu_result(grid=[])
        result["machine"] |= {"date": date, "commit": name}
        for row in result["ladders"][0]["rows"]:
            row["timing"] = timing(row["timing"]["median"] * factor)
        (tmp_path / f"{name}.json").write_text(json.dumps(result))
    found = report_inputs.lines(report_inputs.read(sorted(tmp_path.glob("*.json"))), "GPU")
    assert found[SMALL, 49, 2].ours.ms == 1.0
    assert [source.commit for source in found[SMALL, 49, 2].sources] == ["new"]


def test_the_page_has_every_part(gpu_file, tmp_path):
    assert report_all.main([str(gpu_file), *map(str, COMMITTED), "--out", str(tmp_path / "out"), "--no-figures"]) == 0
    text = (tmp_path / "out" / "report.md").read_text()
    for heading in ("Ladders", "Ratio and views", "Latency", "From pinned clips", "Training steps", "Ops"):
        assert f"## {heading}" in text
    assert "12 x `_fwd_kernel` 100 us" in text
    assert "strong, max-autotune 42 s" in text
    assert "not measured yet" not in text
    assert (
        cells_of(text.splitlines(), "layer_norm 33712x384 | mmfast")[5] == "83%"
    )  # 25 us of copying at 4 TB/s in 30 us


def test_what_was_skipped_or_wrong_is_said(tmp_path):
    result = gpu_result()
    state = {"state": "stopped", "why": "not done within 5 s", "seconds": 5.0}
    results_file.add_section(result, "evl", {"rows": [], "skipped": ["evl: no time"]}, state)
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps(result))
    assert report_all.main([str(path), "--out", str(tmp_path), "--no-figures"]) == 0
    text = (tmp_path / "report.md").read_text()
    assert "- gpu.json, evl, skipped: evl: no time" in text
    assert "- gpu.json, evl: stopped: not done within 5 s" in text


def test_figures_are_those_that_there_are_measurements_for(gpu_file, tmp_path):
    pytest.importorskip("matplotlib")
    drawn = report_figures.draw(report_inputs.read(COMMITTED), tmp_path)
    assert list(drawn) == ["ladder", "heat"]
    drawn = report_figures.draw(report_inputs.read([gpu_file]), tmp_path)
    assert list(drawn) == ["ladder", "heat", "latency", "roofline"]
    for name in drawn:
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_the_readme_changes_between_its_markers_alone(gpu_file, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n\n{report_all.BEGIN}\nold\n{report_all.END}\n\nafter\n")
    assert report_all.main([str(gpu_file), "--readme", str(readme)]) == 0
    text = readme.read_text()
    assert text.startswith(f"before\n\n{report_all.BEGIN}\n|")
    assert text.endswith(f"\n{report_all.END}\n\nafter\n")
    assert "old" not in text
    again = text
    assert report_all.main([str(gpu_file), "--readme", str(readme)]) == 0
    assert readme.read_text() == again


def test_a_readme_without_markers_is_left_alone(gpu_file, tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text("no markers\n")
    assert report_all.main([str(gpu_file), "--readme", str(readme)]) == 2
    assert report_all.BEGIN in capsys.readouterr().err
    assert readme.read_text() == "no markers\n"


@pytest.mark.parametrize(
    ("content", "said"),
    [('{"quick": true}', "--quick"), ("[]", "no JSON object"), ("{", "cannot be read")],
    ids=["quick", "list", "broken"],
)
def test_what_is_no_result_is_refused(content, said, tmp_path, capsys):
    path = tmp_path / "a.json"
    path.write_text(content)
    assert report_all.main([str(path), "--out", str(tmp_path)]) == 2
    assert said in capsys.readouterr().err
