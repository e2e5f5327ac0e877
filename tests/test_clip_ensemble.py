"""A CLIP and an M2CLIP as classifiers of folders of videos: by texts, by a head, few-shot."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from clip_makers import clips, make, texts
from command_runs import run, write_checkpoint
from fit_clip_makers import COLOURS, HIDDEN, write_clip_model, write_labels, write_videos, write_vocabulary
from m2clip_makers import texts as m2clip_texts
from m2clip_makers import tiny_model

from mmfast import CLIP, M2CLIP, tube_masks
from mmfast.clip_ensemble import CLIPEnsemble
from mmfast.data.captions import class_prompts
from mmfast.data.tokenizer import ClipTokenizer
from mmfast.data.video import load_clip
from mmfast.multiview import text_features, text_scale
from mmfast.predict import video_records

PROMPTS = ["a {}", "the {} clip"]
NAMES = list(COLOURS)


@pytest.mark.parametrize(("views", "ratio"), [(2, 0.5), (1, 0.0)], ids=["masked", "whole"])
@torch.no_grad()
def test_a_clip_by_texts(views: int, ratio: float) -> None:
    model, video, ids = make(), clips(3), [9, 4, 30]
    own = text_features(model, texts())
    made = CLIPEnsemble(model, own, text_scale(model), 4)
    features = model.encode_image(video, tube_masks(3, views, (4, 3, 3), ratio, seed=6, clip_ids=ids)).mean(-2)
    unit = torch.nn.functional.normalize(features, dim=-1)
    wanted = (model.logit_scale.exp() * unit @ own.t()).softmax(-1).mean(1)
    torch.testing.assert_close(made.ensemble(video, views, ratio, seed=6, clip_ids=ids), wanted)
    assert made.ensemble(video[:0], views, ratio).shape == (0, 5)


@torch.no_grad()
def test_an_m2clip_by_its_head_and_by_texts() -> None:
    model, video = tiny_model("ssv2"), torch.randn(3, 3, 3, 32, 32)
    mask = tube_masks(3, 2, (3, 4, 4), 0.5, seed=1)
    head = CLIPEnsemble(model)
    torch.testing.assert_close(head.ensemble(video, 2, 0.5, seed=1), model(video, mask).softmax(-1).mean(1))
    ids = m2clip_texts([3, 5])
    made = CLIPEnsemble(model, text_features(model, ids), text_scale(model))
    torch.testing.assert_close(made.ensemble(video, 2, 0.5, seed=1), model.zero_shot(video, ids, mask).mean(1))
    assert (head.config.num_classes, made.config.num_classes) == (5, 2)


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(ValueError, match=r"texts takes \[K, 40\], got \(2, 3\)"):
        CLIPEnsemble(make(), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="num_frames takes 3, the frames of this model's adapters, got 5"):
        CLIPEnsemble(tiny_model(), num_frames=5)
    with pytest.raises(ValueError, match="a CLIP has no classes of its own"):
        CLIPEnsemble(make(), num_frames=4).ensemble(clips(1))


# -- predict -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Videos, a CLIP, an M2CLIP on it, names of classes and a vocabulary."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "videos").mkdir()
    write_videos(folder / "videos", per_class=2)
    write_vocabulary(folder)
    write_labels(folder / "labels.csv")
    write_clip_model(folder / "clip")
    M2CLIP.from_pretrained(folder / "clip", 3, num_classes=3, num_words=4, **HIDDEN).save_pretrained(folder / "m2clip")
    return folder


def predicted(path: Path) -> torch.Tensor:
    with path.open(newline="") as file:
        return torch.tensor([[float(row[f"p({name})"]) for name in NAMES] for row in csv.DictReader(file)])


def pixels(place: Path) -> torch.Tensor:
    return torch.stack([load_clip(r.sources["rgb"], 3, 32) for r in video_records(place / "videos")])


@pytest.mark.parametrize("kind", ["clip", "m2clip"])
@torch.no_grad()
def test_predict_by_texts(kind: str, place: Path, tmp_path: Path) -> None:
    about = ["--zero-shot", "--classes", place / "labels.csv", "--vocabulary", place / "merges.txt"]
    about += [flag for text in PROMPTS for flag in ("--prompt", text)]
    given = ["--checkpoint", place / kind, "--num-frames", 3, "--quiet", "--device", "cpu"]
    assert run("predict", place / "videos", "--out", tmp_path / "p.csv", *given, *about) == 0
    model = (CLIP if kind == "clip" else M2CLIP).from_pretrained(place / kind)
    ids = class_prompts(ClipTokenizer.load(place / "merges.txt"), NAMES, PROMPTS)
    made = CLIPEnsemble(model, text_features(model, ids), text_scale(model), 3)
    torch.testing.assert_close(predicted(tmp_path / "p.csv"), made.ensemble(pixels(place), 1, 0.0), atol=1e-5, rtol=0)


@torch.no_grad()
def test_predict_by_the_class_head_of_an_m2clip(place: Path, tmp_path: Path) -> None:
    given = ["--checkpoint", place / "m2clip", "--quiet", "--classes", place / "labels.csv", "--device", "cpu"]
    assert run("predict", place / "videos", "--out", tmp_path / "p.csv", *given) == 0
    wanted = M2CLIP.from_pretrained(place / "m2clip")(pixels(place)).softmax(-1)
    torch.testing.assert_close(predicted(tmp_path / "p.csv"), wanted, atol=1e-5, rtol=0)


def test_predict_few_shot_on_a_clips_features(place: Path, tmp_path: Path) -> None:
    for label in range(3):
        (tmp_path / "few" / str(label)).mkdir(parents=True)
        (tmp_path / "few" / str(label) / "a.mp4").symlink_to(place / "videos" / f"clip {label} 0.mp4")
    given = ["--checkpoint", place / "clip", "--num-frames", 3, "--quiet", "--support", tmp_path / "few"]
    assert run("predict", place / "videos", "--out", tmp_path / "s.json", *given, "--device", "cpu") == 0
    found = json.loads((tmp_path / "s.json").read_text())["clips"]
    assert all(Path(clip["path"]).stem.split()[1] == clip["label"] for clip in found)


@pytest.mark.parametrize(
    ("model", "flags", "message"),
    [
        ("clip", ["--zero-shot"], "--zero-shot needs --classes"),
        ("clip", [], "has no classes"),
        ("vit", ["--zero-shot", "--classes", "labels.csv"], "needs a model that knows texts"),
    ],
)
def test_what_predict_cannot_do(
    model: str, flags: list[str], message: str, place: Path, tmp_path: Path, capsys: Any
) -> None:
    checkpoint = write_checkpoint(tmp_path / "vit") if model == "vit" else place / model
    given = [place / flag if flag.endswith(".csv") else flag for flag in flags]
    out = tmp_path / "p.csv"
    assert run("predict", place / "videos", "--out", out, "--checkpoint", checkpoint, *given, "--device", "cpu") == 2
    assert message in capsys.readouterr().err
