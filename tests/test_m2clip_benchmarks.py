"""The benchmarks of M2-CLIP as programs: the training step's check, and the synthetic study in a run of seconds."""

import json
import sys
from pathlib import Path

import pytest
import torch

from mmfast import clip_config
from mmfast.m2clip import M2CLIP

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import m2clip_step
import m2clip_ways
import synthetic_m2clip
import synthetic_motions
from train_variants import Setup

CPU = torch.device("cpu")
TINY = dict(
    embed_dim=32, image_size=16, patch_size=8, vision_width=32, vision_depth=2, vision_num_heads=2, context_length=20,
    vocab_size=60, text_width=32, text_depth=2, text_num_heads=2,
)  # fmt: skip
STEP = ["--model", "tiny", "--classes", "5", "--batch", "3", "--rounds", "2"]


@pytest.fixture
def tiny_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(clip_config._NAMES, "tiny", TINY)


def checked(*more: str, autocast: torch.dtype | None = None, device: torch.device = CPU) -> list[m2clip_ways.Check]:
    setup = Setup(device, autocast)
    work = m2clip_ways.prepare(m2clip_step.parse([*STEP, "--device", str(device), *more]), setup)
    return m2clip_ways.checked(work, setup)


@pytest.mark.parametrize("preset", ["k400", "ssv2", "paper"])
def test_every_step_has_the_published_losses_and_gradients(preset, tiny_name):
    [found] = checked("--preset", preset, "--peers", "published", "eager")
    assert found.wrong == []
    assert found.gate.crashed == {}
    assert {"published", "eager", "mmfast", "mmfast, lean mlp", "mmfast, lean blocks"} == set(found.losses)


def test_steps_under_autocast_are_checked_in_fp32_too(tiny_name):
    exact, lower = checked("--peers", "published", "eager", autocast=torch.bfloat16)
    assert exact.wrong == lower.wrong == []
    assert exact.gate.errors["mmfast"].gradient < 1e-4 < lower.gate.errors["mmfast"].gradient  # autocast was on


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["fp32", "bf16"])
def test_steps_on_a_gpu_are_the_published_ones(autocast, tiny_name, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    found = checked("--peers", "published", "eager", autocast=autocast, device=torch.device("cuda"))
    assert [line for one in found for line in one.wrong] == []


def test_a_wrong_loss_that_the_total_hides_is_told(tiny_name, monkeypatch):
    right = M2CLIP.losses

    def swapped(*args, **options):
        found = right(*args, **options)
        return found | {"cmc": found["vc"], "vc": found["cmc"]}

    monkeypatch.setattr(M2CLIP, "losses", swapped)
    [found] = checked("--peers", "published", "--no-recompute")
    assert found.gate.red == []
    assert [line.split(":")[0].strip() for line in found.wrong] == ["mmfast"] * 2


def test_a_wrong_gradient_ends_with_three_and_no_number(tiny_name, capsys, monkeypatch):
    right = M2CLIP.losses

    def wrong(self, *args, **options):
        found = right(self, *args, **options)
        extra = 0.001 * self.adapter_fc.weight.sum()
        return found | {"total": found["total"] + extra - extra.detach()}

    monkeypatch.setattr(M2CLIP, "losses", wrong)
    assert m2clip_step.main([*STEP, "--device", "cpu", "--peers", "published", "--no-recompute"]) == 3
    captured = capsys.readouterr()
    assert "mmfast: relative error" in captured.err
    assert captured.out == ""


def test_one_run_of_the_step_writes_table_json_and_figure(tiny_name, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out, figure = tmp_path / "out.json", tmp_path / "out.png"
    arguments = [*STEP, "--device", "cpu", "--peers", "published", "--no-recompute"]
    assert m2clip_step.main([*arguments, "--json", str(out), "--plot", str(figure)]) == 0
    printed = capsys.readouterr().out
    saved = json.loads(out.read_text())
    assert [row["name"] for row in saved["rows"]] == ["published", "mmfast"]
    reached, towers = saved["against_published"], saved["towers"]["text tower"]
    assert reached["text_tower_share"] == towers["mmfast"]["median"] / towers["published"]["median"]
    assert f"step_speedup: {reached['step_speedup']:.3f}" in printed
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_texts_have_the_length_that_was_asked_for(tiny_name):
    model = M2CLIP.from_name("tiny", "k400", num_classes=400)
    clips = m2clip_ways.draw_clips(model, 2, 2.0, 0, CPU)
    names = clips.class_token_ids.argmax(1) - 4  # start and three words before
    assert float(names.float().mean()) == pytest.approx(2.0, abs=0.15)
    changed = clips.token_ids != clips.class_token_ids[clips.labels]
    assert torch.equal(changed, clips.mlm_labels != m2clip_ways.IGNORED)


# -- the synthetic study -----------------------------------------------------------------------------------------------

SMALL = ["--still-steps", "2", "--still-batch", "4", "--steps", "2", "--batch", "2", "--train-clips", "2"]
SMALL += ["--test-clips", "1", "--jobs", "1"]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    pytest.importorskip("matplotlib")
    path = tmp_path_factory.mktemp("synthetic") / "report.json"
    outputs = ["--json", str(path), "--markdown", str(path.with_suffix(".md")), "--plot", str(path.with_suffix(".png"))]
    assert synthetic_m2clip.main([*SMALL, *outputs]) == 0
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    return json.loads(path.read_text()) | {"text": path.with_suffix(".md").read_text()}


def test_every_row_is_measured_and_told(report):
    assert [run["name"] for run in report["runs"]] == list(synthetic_m2clip.RUNS)
    for run in report["runs"]:
        assert set(run["zero_shot"]) == set(synthetic_m2clip.SWITCHES)
        assert run["curve"][-1]["step"] == 2
        assert f"| {run['name']} | {100 * run['supervised']['class head']:.1f}" in report["text"]
    assert set(report["probes"]) == {"mean of the frames", "all frames in order"}


def test_without_any_adapter_zero_shot_is_the_frozen_clips(report):
    for run in report["runs"]:
        assert run["zero_shot"]["off"] == report["frozen_zero_shot"]


def test_what_is_new_was_never_trained_but_each_word_was():
    sets = synthetic_motions.label_sets()
    seen = {label.motion for label in sets["seen"]}
    assert len({label for labels in sets.values() for label in labels}) == sum(map(len, sets.values())) == 48
    assert {label.motion for label in sets["new pairs"]} == seen
    assert not {label.motion for label in sets["new motions"]} & seen
    words = {word for label in sets["seen"] for word in label.name.split()}
    assert all(set(label.name.split()) <= words for labels in sets.values() for label in labels)


def test_captions_of_stills_tell_no_motion():
    _, captions = synthetic_motions.draw_stills(50, 0)
    motion = {*synthetic_motions.MANNERS, *synthetic_motions.DIRECTIONS}
    assert not motion & {word for caption in captions for word in caption.split()}


def test_frames_without_their_order_do_not_tell_the_direction():
    """Where the shape's centre is on average is the same for both ways; where it goes is opposite."""
    ways = [synthetic_motions.Label(0, 0, way) for way in (0, 1)]
    means, moves = [], []
    for way in ways:
        _, centre, _, _ = synthetic_motions._draw([way] * 400, 7)
        means.append(centre[..., 0].mean())
        moves.append((centre[:, -1, 0] - centre[:, 0, 0]).mean())
    assert float(means[0]) == pytest.approx(-float(means[1]), abs=1e-6)
    assert abs(float(means[0])) < 0.03
    assert float(moves[0]) < -0.5
    assert float(moves[1]) > 0.5


def test_train_and_test_clips_differ():
    labels = synthetic_motions.label_sets()["seen"]
    parts = [synthetic_m2clip.clips_of(labels, 1, seed)[0] for seed in (1, 2)]
    assert not torch.equal(*parts)


def test_a_caption_fits_the_context():
    words = synthetic_motions.tokenizer()
    _, captions = synthetic_motions.draw_stills(200, 1)
    for template in synthetic_motions.TEMPLATES:
        words([template.replace("{}", caption) for caption in captions])


@pytest.mark.parametrize("program", [m2clip_step, synthetic_m2clip])
def test_output_into_no_folder_is_refused_at_once(program, capsys):
    with pytest.raises(SystemExit):
        program.main(["--json", "/nowhere/at/all.json"])
    assert "is no folder" in capsys.readouterr().err
