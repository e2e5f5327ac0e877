"""The fp8 accuracy benchmark as a program."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import fp8_accuracy
import int8_accuracy


def test_layers_rounded_in_plain_torch_give_what_fp8_gives(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", "videomae_small_patch16_224", "--img-size", "32", "--clips", "2", "--steps", "1"]
    arguments += ["--source-clips", "2", "--test-clips", "20", "--episodes", "2", "--json", str(tmp_path / "out.json")]
    assert fp8_accuracy.main(arguments) == 0
    saved = json.loads((tmp_path / "out.json").read_text())
    layers = {row["layer"]: row for row in saved["given"]["layers"]}
    assert layers["all"]["both"] == pytest.approx(saved["given"]["features"], rel=0.2)
    assert all(0 < layers[name]["weights"] < layers["all"]["both"] for name in int8_accuracy.LAYERS)
    assert 0 < saved["trained"]["shots"]["5"]["fp8"] <= 1
    assert "features in fp8" in capsys.readouterr().out
