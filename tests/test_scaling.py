"""The scaling page: what is measured, what is arithmetic, and where a node's bottleneck is."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import machines
import scaling
import scaling_inputs

CPU_FILE = Path(__file__).parents[1] / "benchmarks" / "results" / "cpu_epyc_2threads.json"
RATE = scaling_inputs.Rate("small", 0.75, 2, 10_000.0, "measured", "a file")
WHOLE = 16 * 224 * 224 * 3
KEPT = WHOLE * (1 - 0.75**2)


def node(**changes: Any) -> scaling.Node:
    own = dict(gpus=8, cores=128, decode=50.0, file_bytes=200_000.0, bus=50.0, network=12.5, storage=5.0)
    return scaling.Node(**{**own, **changes})  # type: ignore[arg-type]  # a dict of several types


def gpu_folder(folder: Path, clips_s: float = 9000.0) -> Path:
    """As run_all.py leaves one."""
    about = {"device": "cuda", "gpu": "G", "commit": "abcdef0123456789"}
    rows = [{"name": "published", "clips_per_second": 900.0}, {"name": "mmfast", "clips_per_second": clips_s}]
    case = {"views": 2, "kept": 49, "cells": 196, "slots": 8, "ratio": 0.75, "tokens": 392}
    ladder = {"model": "videomae_small_patch16_224", "clips": 43, "case": case, "rows": rows}
    (folder / "ladder_small.json").write_text(json.dumps({"machine": about, "rows": [ladder]}))
    bus = {"copy": "pinned host to device", "gb_s": 54.0}
    limits = {"copy_gb_s": 4000.0, "gemm_tflop_s": 700.0}
    (folder / "results.json").write_text(json.dumps({"machine": about, "rows": [bus], **limits}))
    return folder


def figures(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    out, page = tmp_path / "out.json", tmp_path / "page.md"
    assert scaling.main([*arguments, "--json", str(out), "--out", str(page)]) == 0
    return json.loads(out.read_text()) | {"page": page.read_text()}


def test_what_one_gpu_needs_by_hand():
    found = scaling.needs(RATE, node())
    assert found["decode_cores"] == 200.0
    assert found["clips_day_all"] == 8 * 10_000 * 86400
    assert found["bus_whole_gb_s"] == pytest.approx(10_000 * WHOLE / 1e9)
    assert found["bus_kept_gb_s"] == pytest.approx(10_000 * KEPT / 1e9)
    assert found["files_gb_s"] == 2.0
    assert found["network_decoded_gbit_s"] == pytest.approx(10_000 * WHOLE * 8 / 1e9)


@pytest.mark.parametrize(
    ("changes", "part", "clips_s"),
    [
        pytest.param({}, "decoding", 128 * 50.0, id="few cores"),
        pytest.param({"cores": 10_000}, "storage", 25_000.0, id="slow storage"),
        pytest.param({"cores": 10_000, "storage": 100.0, "network": 4.0}, "network", 20_000.0, id="slow network"),
        pytest.param(
            {"cores": 10_000, "storage": 100.0, "bus": 5.0, "network": 99.0},
            "bus, kept cells",
            40e9 / KEPT,
            id="slow bus",
        ),
        pytest.param({"cores": 10_000, "storage": 100.0, "network": 99.0}, "GPUs", 80_000.0, id="fed"),
    ],
)
def test_bottleneck_of_a_node(changes, part, clips_s):
    found = scaling.limits(RATE, node(**changes))
    assert scaling.bottlenecks(found)["decoded on the node"] == part
    assert found[part] == pytest.approx(clips_s)


def test_clips_decoded_elsewhere_fill_the_network():
    found = scaling.limits(RATE, node())
    assert scaling.bottlenecks(found)["decoded elsewhere, sent whole"] == "network, decoded clips"
    assert found["network, decoded clips"] == pytest.approx(12.5e9 / WHOLE)


def test_parts_that_are_not_known_limit_nothing():
    found = scaling.limits(RATE, node(decode=None, file_bytes=None, bus=None))
    assert set(found) == {"GPUs", "network, decoded clips"}


def test_a_billion_clips_by_hand():
    found = scaling.billion(RATE, node(), 3.0, 0.05)
    assert found["gpu_hours"] == pytest.approx(1e9 / 10_000 / 3600)
    assert found["core_hours"] == pytest.approx(1e9 / 50 / 3600)
    assert found["cost"] == pytest.approx(3.0 * found["gpu_hours"] + 0.05 * found["core_hours"])
    assert scaling.billion(RATE, node(decode=None), None, 0.05)["cost"] is None


def test_a_measured_gpu_takes_the_place_of_the_prediction(tmp_path):
    result = figures(tmp_path, "--results", str(gpu_folder(tmp_path)))
    ours = next(r for r in result["rates"] if (r["model"], r["mask_ratio"], r["views"]) == ("small", 0.75, 2))
    assert (ours["clips_s"], ours["kind"]) == (9000.0, "measured")
    assert ours["source"] == "ladder_small.json, commit abcdef012345"
    assert sum(r["kind"] == "measured" for r in result["rates"]) == 1
    assert next(i for i in result["inputs"] if i["name"] == "host to one GPU")["value"] == 54.0
    assert result["machine"]["tflop_s"] == 700.0


def test_fastest_of_several_batches_counts(tmp_path):
    slow, fast = tmp_path / "a", tmp_path / "b"
    for folder, clips_s in ((slow, 5000.0), (fast, 9000.0)):
        folder.mkdir()
        gpu_folder(folder, clips_s)
    rates = [r for f, c in scaling_inputs.results_in([fast, slow]) for r in scaling_inputs.rates_in(f, c)]
    assert scaling_inputs.best(rates, "cuda")["small", 0.75, 2].clips_s == 9000.0


def test_without_a_gpu_result_everything_on_it_is_called_predicted(tmp_path):
    result = figures(tmp_path, "--results", str(CPU_FILE))
    assert {r["kind"] for r in result["rates"]} == {"arithmetic"}
    assert "0 were measured" in result["page"]
    assert "**predictions** for H200" in result["page"]
    assert {c["source"] for c in result["cpu"]} == {"cpu_epyc_2threads.json, commit 872312bc1374"}


def test_what_was_not_measured_is_absent(tmp_path):
    result = figures(tmp_path)
    kinds = {i["name"]: i["kind"] for i in result["inputs"]}
    assert kinds["decoding, one core"] == kinds["file read for a clip"] == kinds["price of a GPU"] == "absent"
    assert "decoding, file sizes: absent" in result["page"]
    assert "e+" not in result["page"]


def test_decoding_is_measured_and_read_again(tmp_path):
    pytest.importorskip("av")
    small = ("--decode-videos", "1", "--decode-frames", "16", "--decode-height", "48")
    first = figures(tmp_path, "--decode", *small)
    (tmp_path / "decode.json").write_text(json.dumps(first))
    again = figures(tmp_path, "--decode-from", str(tmp_path / "decode.json"))
    decode = [next(i for i in run["inputs"] if i["name"] == "decoding, one core") for run in (first, again)]
    assert decode[0]["value"] == decode[1]["value"] > 0
    assert decode[0]["kind"] == "measured"
    assert first["decode"]["file_bytes"] > 0


def test_slower_bus_is_a_given_input(tmp_path):
    result = figures(tmp_path, "--pcie", "20")
    bus = next(i for i in result["inputs"] if i["name"] == "host to one GPU")
    assert (bus["value"], bus["kind"]) == (20.0, "given")
    assert result["rates"][0]["limits"]["bus, whole clips"] == pytest.approx(8 * 20e9 / WHOLE)


@pytest.mark.parametrize("content", ["{", "{}"])
def test_a_file_without_decoding_is_refused(tmp_path, capsys, content):
    (tmp_path / "bad.json").write_text(content)
    assert scaling.main(["--decode-from", str(tmp_path / "bad.json")]) == 2
    assert "bad.json" in capsys.readouterr().err


def test_prices_must_be_above_zero(capsys):
    with pytest.raises(SystemExit):
        scaling.main(["--gpu-price", "0"])
    assert "above 0" in capsys.readouterr().err


def test_presets_are_the_machines_of_the_roofline():
    assert scaling_inputs.machine_of([], "a100") is machines.PRESETS["a100"]
