"""The int8 benchmarks as programs, and --precision int8 of the commands."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from command_runs import run, write_checkpoint, write_labelled

from mmfast import MaskedViT
from mmfast.extract import FeatureStore, extract

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import int8 as bench
import int8_accuracy

TINY = ["--model", "videomae_small_patch16_224", "--img-size", "32", "--clips", "2"]


def test_timing_prints_every_variant_and_keeps_its_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main([*TINY, "--rounds", "2", "--json", str(tmp_path / "out.json")]) == 0
    cases = json.loads((tmp_path / "out.json").read_text())["cases"]
    assert {case["full"] for case in cases.values()} == {True, False}
    for case in cases.values():
        assert case["errors"].keys() == case["times"].keys() == case["peaks"].keys()
        assert case["errors"]["mmfast fused"]["relative"] < 1e-5 < case["errors"]["mmfast int8"]["relative"] < 0.05
        assert any(name.startswith("torch.ao int8") for name in case["times"])
    assert "int8 is x" in capsys.readouterr().out


def test_a_wrong_result_is_not_timed(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main([*TINY, "--rounds", "2", "--bar", "1e-6"]) == 3
    printed = capsys.readouterr().out
    assert "mmfast int8: relative error" in printed
    assert "ms a clip" not in printed


def test_layers_rounded_in_plain_torch_give_what_int8_gives(tmp_path: Path) -> None:
    arguments = [*TINY, "--steps", "1", "--source-clips", "2", "--test-clips", "20", "--episodes", "2"]
    assert int8_accuracy.main([*arguments, "--json", str(tmp_path / "out.json")]) == 0
    saved = json.loads((tmp_path / "out.json").read_text())
    layers = {row["layer"]: row for row in saved["given"]["layers"]}
    assert layers["all"]["both"] == pytest.approx(saved["given"]["features"], rel=0.1)
    assert all(0 < layers[name]["weights"] < layers["all"]["both"] for name in int8_accuracy.LAYERS)
    assert saved["trained"]["shots"]["5"]["queries"] == 2 * 75


def test_rounding_is_undone() -> None:
    model = MaskedViT.from_name("videomae_small_patch16_224", img_size=32, depth=1, num_classes=3)
    plain = int8_accuracy.PlainViT(model.state_dict(), model.config)
    before = {name: t.clone() for name, t in plain.state_dict().items()}
    with int8_accuracy.rounding(plain, int8_accuracy.LAYERS, weights=True, rows=True):
        assert not torch.equal(plain.blocks[0].fc1.weight, before["blocks.0.fc1.weight"])
    assert all(torch.equal(t, before[name]) for name, t in plain.state_dict().items())
    assert not plain.blocks[0].fc1._forward_pre_hooks


# -- the commands --


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("labelled")
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "net"), write_labelled(folder)


def test_extract_in_int8(given: tuple[Path, Path], tmp_path: Path) -> None:
    checkpoint, labelled = given
    options = ("--checkpoint", checkpoint, "--device", "cpu", "--quiet")
    for precision in ("fp32", "int8"):
        assert run("extract", labelled, "--out", tmp_path / precision, "--precision", precision, *options) == 0
    exact, near = (FeatureStore(tmp_path / p) for p in ("fp32", "int8"))
    assert near.settings["precision"] == "int8"
    difference = (near.features() - exact.features()).norm() / exact.features().norm()
    assert 0 < difference < 0.02


def test_predict_and_evaluate_in_int8(given: tuple[Path, Path], tmp_path: Path) -> None:
    checkpoint, labelled = given
    options = ("--checkpoint", checkpoint, "--device", "cpu", "--precision", "int8", "--quiet")
    assert run("predict", labelled, "--out", tmp_path / "p.csv", *options) == 0
    episodes = ("--n-way", 3, "--k-shot", 1, "--n-query", 2, "--episodes", 3)
    for more in ((), ("--fresh",)):
        assert run("evaluate", labelled, "--out", tmp_path / f"e{len(more)}", *episodes, *options, *more) == 0


def test_training_heads_refuse_int8(
    given: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, labelled = given
    options = ("--checkpoint", checkpoint, "--precision", "int8", "--out", tmp_path)
    assert run("evaluate", labelled, "--head", "ted", *options) == 2
    assert (
        "--head ted trains on the supports of every episode: it does not take --precision int8"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize("quantized", [False, True])
def test_a_precision_that_is_not_the_models_is_refused(
    given: tuple[Path, Path], tmp_path: Path, quantized: bool
) -> None:
    model: Any = MaskedViT.from_pretrained(given[0])
    if quantized:
        model.quantize_int8()
    with pytest.raises(ValueError, match='precision must be "int8" after quantize_int8 and only then'):
        extract(model, [], tmp_path, precision="fp32" if quantized else "int8")  # type: ignore[arg-type]
