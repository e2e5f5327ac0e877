"""The synthetic benchmark as a program, in a run of seconds: every row is trained, scored and written."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import synthetic_cdfsl
import synthetic_lab
import synthetic_report

SMALL = ["--steps", "2", "--teacher-steps", "2", "--distill-steps", "2", "--batch", "2", "--jobs", "1"]
SMALL += ["--source-clips", "1", "--target-clips", "1", "--test-clips", "20", "--episodes", "4"]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    path = tmp_path_factory.mktemp("synthetic") / "report.json"
    assert synthetic_cdfsl.main([*SMALL, "--json", str(path), "--markdown", str(path.with_suffix(".md"))]) == 0
    return json.loads(path.read_text()) | {"text": path.with_suffix(".md").read_text()}


def test_every_row_of_the_ablation_is_scored_once_in_the_papers_order(report):
    assert [row["key"] for row in report["ablation"]] == list(synthetic_lab.ROWS)
    for row in report["ablation"]:
        assert 0 < row["1"]["mean"] < 1
        assert row["5"]["standard_error"] == pytest.approx(row["5"]["std"] / 4**0.5)
    trained = {row["key"]: row["curve"] for row in report["ablation"]}
    assert trained.pop("random") == []
    assert all(curve[-1]["step"] == 2 for curve in trained.values())


def test_sweep_has_every_ratio_and_number_of_views(report):
    found = [(row["mask_ratio"], row["views"]) for row in report["sweep"]]
    grid = [(ratio, views) for ratio in (0.5, 0.75, 0.9) for views in (1, 2, 3, 5)]
    assert sorted(found, key=str) == sorted([(0.0, 1), *grid, (0.75, "adaptive")], key=str)


def test_two_views_of_the_sweep_are_the_last_students_row(report):
    [row] = [row for row in report["ablation"] if row["key"] == "from both"]
    [same] = [row for row in report["sweep"] if (row["mask_ratio"], row["views"]) == (0.75, 2)]
    assert (same["1"], same["5"]) == (row["1"], row["5"])


def test_clips_in_order_score_as_in_the_ablation(report):
    [row] = [row for row in report["ablation"] if row["key"] == "from both"]
    ordered, shuffled, still = report["order"]
    assert [r["frames"] for r in report["order"]] == ["in order", "shuffled", "one frame repeated"]
    assert ordered["5"] == row["5"]
    assert len({r["5"]["mean"] for r in (ordered, shuffled, still)}) > 1


def test_table_says_what_was_measured(report):
    for row in report["ablation"]:
        score = row["5"]
        assert f"{100 * score['mean']:.2f} ± {100 * score['standard_error']:.2f}" in report["text"]


def test_figure_is_drawn(report, tmp_path):
    pytest.importorskip("matplotlib")
    synthetic_report.plot(report, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes()[:4] == b"\x89PNG"
    assert [p.name for p in tmp_path.iterdir()] == ["figure.png"]


def test_supervision_stays_within_the_source_classes():
    source = synthetic_lab.CrossDomain(*synthetic_lab.SPLITS["source"], 1)
    unlabelled = synthetic_lab.CrossDomain(*synthetic_lab.SPLITS["unlabelled"], 1)
    assert len(source.classes) == synthetic_lab.CLASSES
    assert set(unlabelled.labels) == {-1}
    assert not set(source.classes) & set(unlabelled.classes)


def test_clips_of_an_epoch_are_each_picked_once(report):
    lab = synthetic_lab.Lab.__new__(synthetic_lab.Lab)
    lab.options = synthetic_cdfsl.parse(["--batch", "4"])
    clips = {"label": torch.zeros(10)}
    picked = torch.cat([lab.pick(clips, step, 0) for step in range(5)])
    assert picked[:10].sort().values.tolist() == picked[10:].sort().values.tolist() == list(range(10))
    assert picked[:10].tolist() != picked[10:].tolist()


def test_output_into_no_folder_is_refused_at_once(capsys):
    with pytest.raises(SystemExit):
        synthetic_cdfsl.main(["--json", "/nowhere/at/all.json"])
    assert "is no folder" in capsys.readouterr().err
