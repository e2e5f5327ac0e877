"""The TED-Adapter's benchmark as a program."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import ted_adapter

TINY = ["--dim", "16", "--hidden", "8", "--frames", "3", "--grid", "6", "5", "--batch", "2", "--device", "cpu"]
TINY += ["--rounds", "2", "--no-compile"]


def test_prints_a_table_and_counts_what_moves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ted_adapter.main([*TINY, "--json", str(tmp_path / "out.json")]) == 0
    assert "times the faster bare products" in capsys.readouterr().out
    saved = json.loads((tmp_path / "out.json").read_text())
    assert saved["errors"].keys() == saved["moved"].keys() == {"published", "depthwise convolutions", "mmfast"}
    assert saved["moved"]["mmfast"][0] < 9.1
    assert saved["moved"]["published"][0] > 18


@pytest.mark.interpret
def test_kernels_move_seven_rows_a_token() -> None:
    work = ted_adapter.Work(ted_adapter.parse(TINY))
    total, memory = ted_adapter.counted(lambda: work.variants["mmfast"](work.adapter, work.x), work.x, 8)
    assert total == memory == pytest.approx(7.0, abs=0.01)


def test_a_wrong_result_stops_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    right = ted_adapter.TEDAdapter.run
    monkeypatch.setattr(ted_adapter.TEDAdapter, "run", lambda self, x, layout: right(self, x * 1.001, layout))
    assert ted_adapter.main(TINY) == 3
    printed = capsys.readouterr().out
    assert "mmfast: relative error" in printed
    assert "ms" not in printed.split("nothing timed")[0].split("hidden")[-1]


def test_the_restatements_agree_in_float64() -> None:
    work = ted_adapter.Work(ted_adapter.parse(TINY))
    adapter, x = work.adapter.double(), work.x.detach().double()
    want = ted_adapter.published(adapter, x, 3, (6, 5))
    torch.testing.assert_close(ted_adapter.convolutions(adapter, x, 3, (6, 5)), want)
    torch.testing.assert_close(adapter(x, 3, (6, 5)), want)
