"""The synthetic study of EVL's temporal modules: a run of seconds, its labels, its cached features, its tables."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from mmfast.clip import CLIP
from mmfast.clip_config import CLIPConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import synthetic_evl
import synthetic_evl_report
import synthetic_m2clip
import synthetic_motions

SMALL = ["--still-steps", "2", "--still-batch", "4", "--steps", "2", "--batch", "2", "--train-clips", "2"]
SMALL += ["--test-clips", "1", "--jobs", "1", "--seeds", "2"]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    pytest.importorskip("matplotlib")
    path = tmp_path_factory.mktemp("synthetic") / "report.json"
    outputs = ["--json", str(path), "--markdown", str(path.with_suffix(".md")), "--plot", str(path.with_suffix(".png"))]
    assert synthetic_evl.main([*SMALL, *outputs]) == 0
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    return json.loads(path.read_text()) | {"text": path.with_suffix(".md").read_text()}


@pytest.fixture
def model(tmp_path: Path) -> synthetic_evl.EVL:
    torch.manual_seed(0)
    clip = CLIP(CLIPConfig(vocab_size=len(synthetic_motions.tokenizer()), **synthetic_m2clip.TOWERS)).eval()
    clip.save_pretrained(tmp_path / "clip")
    return synthetic_evl.evl(tmp_path, synthetic_evl.parse([]), classes=16)


def test_every_decoder_is_trained_on_both_sets_of_labels_for_every_seed(report: dict[str, Any]) -> None:
    done = [(run["seed"], run["decoder"], run["labels"]) for run in report["runs"]]
    assert done == [
        (seed, name, kind) for seed in (0, 1) for name in synthetic_evl.DECODERS for kind in ("appearance", "motion")
    ]
    assert [frozen["seed"] for frozen in report["frozen"]] == [0, 1]


def test_table_tells_the_mean_and_the_standard_error_that_were_measured(report: dict[str, Any]) -> None:
    for kind in ("appearance", "motion"):
        found = [r["scores"]["in order"]["class"] for r in report["runs"] if r["labels"] == kind][: 2 * 6 : 6]
        mean, error = sum(found) / 2, abs(found[0] - found[1]) / 2
        row = next(line for line in report["text"].splitlines() if line.startswith("| EVL, no temporal module"))
        assert f" {100 * mean:.1f} ± {100 * error:.1f} " in row


def test_gains_are_paired_seed_by_seed() -> None:
    rows = [("a", 0.5), ("b", 0.4), ("a", 0.9), ("b", 0.7)]
    runs = [{"decoder": d, "labels": "motion", "scores": {"in order": {"class": s}}} for d, s in rows]
    gains = synthetic_evl_report.gains({"runs": runs}, "a", "b", "motion")
    assert gains == pytest.approx([0.1, 0.2])
    assert synthetic_evl_report.spread(gains) == pytest.approx((0.15, 0.05))


def test_a_module_that_starts_at_zero_has_its_parameters_counted(report: dict[str, Any]) -> None:
    counts = {run["decoder"]: run["parameters"] for run in report["runs"] if run["labels"] == "motion"}
    more = counts["positions alone"] - counts["no temporal module"]
    assert more == 2 * synthetic_motions.FRAMES * 128
    assert counts["cross-attention alone"] - counts["no temporal module"] == 2 * 2 * 49 * 128
    assert counts["+ convolution"] - counts["no temporal module"] == 2 * 4 * 128


def test_both_sets_of_labels_are_of_the_same_clips_and_independent() -> None:
    clips, classes = synthetic_evl.draw(10, 3)
    assert len(clips) == len(classes["appearance"]) == len(classes["motion"]) == 480
    assert torch.equal(classes["motion"].bincount(minlength=16), torch.full((16,), 30))
    together = torch.zeros(15, 16).index_put((classes["appearance"], classes["motion"]), torch.ones(480), True)
    assert float((together / 480 - 1 / 240).abs().max()) < 0.02


def test_the_colour_told_is_the_colour_painted() -> None:
    labels = [synthetic_motions.Label(1, 0, way) for way in range(4)] * 8
    clips, colours = synthetic_motions.draw_coloured(labels, 5)
    assert torch.equal(clips, synthetic_motions.draw_clips(labels, 5))
    # Of all walls the mean is grey: what red, green and blue shapes add stands out in their own channel.
    excess = clips.float().amax((2, 3, 4))
    for number, channel in (("red", 0), ("green", 1), ("blue", 2)):
        of_colour = excess[colours == synthetic_motions.COLOURS.index(number)]
        assert len(of_colour)
        assert float(of_colour[:, channel].min()) > float(of_colour.mean())


def test_cached_features_give_what_the_video_gives(model: synthetic_evl.EVL) -> None:
    clips, classes = synthetic_evl.draw(1, 3)
    with torch.no_grad():
        for table in model.decoder.cross_attention:
            torch.nn.init.normal_(table.w1)
        found = synthetic_evl.features_of(model, clips[:6], classes)
        rows = torch.tensor([4, 1])
        cached = model.proj(model.decode(synthetic_evl.layers(model, found, rows)))
        direct = model(clips[rows])
    assert float((cached - direct).abs().max()) <= 5e-3 * float(direct.abs().max())


def test_shuffled_features_are_those_of_the_shuffled_video(model: synthetic_evl.EVL) -> None:
    clips, classes = synthetic_evl.draw(1, 3)
    order = synthetic_evl.orders(2, 7)["shuffled"]
    assert order is not None
    rows = torch.tensor([4, 1])
    with torch.no_grad():
        torch.nn.init.normal_(model.decoder.temporal_pos_embed[0])
        found = synthetic_evl.features_of(model, clips[:6], classes)
        cached = model.proj(model.decode(synthetic_evl.layers(model, found, rows, order)))
        shuffled = torch.stack([clips[row][:, places] for row, places in zip(rows, order, strict=True)])
        direct, plain = model(shuffled), model(clips[rows])
    assert float((cached - direct).abs().max()) <= 5e-3 * float(direct.abs().max())
    assert float((plain - direct).abs().max()) > 0.05 * float(direct.abs().max())


@pytest.mark.parametrize("name", list(synthetic_evl.DECODERS))
def test_every_decoder_but_that_without_temporal_modules_sees_the_order(
    model: synthetic_evl.EVL, tmp_path: Path, name: str
) -> None:
    clips, classes = synthetic_evl.draw(1, 3)
    found = synthetic_evl.features_of(model, clips[:6], classes)
    decoder = synthetic_evl.evl(tmp_path, synthetic_evl.parse([]), name)
    with torch.no_grad():
        for parameter_name, parameter in decoder.decoder.named_parameters():
            if parameter_name.startswith(("temporal", "cross")):
                torch.nn.init.normal_(parameter)
        plain, shuffled = (
            decoder.decode(synthetic_evl.layers(decoder, found, torch.arange(6), order))
            for order in synthetic_evl.orders(6, 7).values()
        )
    apart = float((plain - shuffled).abs().max()) / float(plain.abs().max())
    assert apart < 1e-4 if name == "no temporal module" else apart > 1e-3


def test_output_into_no_folder_is_refused_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        synthetic_evl.main(["--json", "/nowhere/at/all.json"])
    assert "is no folder" in capsys.readouterr().err


def test_parts_of_a_class_are_scored_by_themselves() -> None:
    truth = torch.tensor([0, 5, 10, 15])  # manner 0 to 3, direction 0 to 3
    said = F.one_hot(torch.tensor([1, 5, 6, 15]), 16).float()
    model: Any = SimpleNamespace(decode=lambda features: None, proj=lambda query: said)
    clips: dict[str, Any] = {"motion": truth, "out": [], "q": [], "k": []}
    assert synthetic_evl.score(model, clips, "motion", None) == {"class": 0.5, "manner": 0.75, "direction": 0.75}
