"""Multi-view tests of an EVL: every view scored alone, tube masks, and the command with a folder or a published decoder."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_runs import run
from evl_makers import FRAMES, tiny_model
from evl_makers import clips as clip_pixels
from fit_clip_makers import write_clip_model, write_labels, write_videos
from makers import tiny_config
from torch import Tensor
from video_files import write_clip

from mmfast import EVL, EVLConfig, MaskedViT
from mmfast.checkpoints.evl import decoder_state
from mmfast.data.records import ClipRecord
from mmfast.data.video import load_clip
from mmfast.data.video_lists import read_video_list
from mmfast.data.views import ViewClips
from mmfast.evl_ensemble import EVLEnsemble
from mmfast.masks import tube_masks
from mmfast.multiview import Accuracy, ViewScores, encode_views
from mmfast.predict import video_records

CROPS, PARTS = 3, 2


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[ClipRecord]:
    folder = tmp_path_factory.mktemp("videos")
    rng = np.random.default_rng(1)
    for i in range(3):
        write_clip(folder / f"{i}.mp4", rng.integers(0, 256, (10, 36 + 4 * i, 48, 3)).astype(np.uint8))
    return [ClipRecord(11 * i + 3, f"clip {i}", {"rgb": folder / f"{i}.mp4"}, label=i % 2) for i in range(3)]


def each(clips: ViewClips, place: int) -> list[Tensor]:
    """The views of a clip, [1, 3, F, H, W]."""
    return [view[None] for view in clips[place]["rgb"].split(clips.num_frames, 1)]


@torch.no_grad()
@pytest.mark.parametrize("masks", [None, (2, 0.5)], ids=["whole", "masked"])
@pytest.mark.parametrize("stride", [2, None], ids=["dense", "uniform"])
def test_a_clip_has_the_mean_of_its_views(stride: int | None, masks: Any, records: Any, tmp_path: Path) -> None:
    model = tiny_model()
    clips = ViewClips(records, num_frames=FRAMES, stride=stride, size=24, clips=PARTS, crops=CROPS)
    how = {} if masks is None else dict(masks=masks[0], mask_ratio=masks[1], seed=5)
    encode_views(model, clips, tmp_path, batch=2, progress=False, **how)  # type: ignore[arg-type]  # options by name
    found = ViewScores(tmp_path)
    for place, record in enumerate(records):
        views = each(clips, place)
        assert len(views) == CROPS * PARTS
        mask = None
        if masks is not None:
            mask = tube_masks(1, masks[0], (FRAMES, 3, 3), masks[1], seed=5, clip_ids=torch.tensor([record.clip_id]))
        looks = [model(view, mask).softmax(-1).reshape(-1, 5).mean(0) for view in views]
        torch.testing.assert_close(
            found.by_class([record.clip_id])[0], torch.stack(looks).mean(0), atol=1e-5, rtol=1e-4
        )


def test_another_decoder_is_another_run(records: list[ClipRecord], tmp_path: Path) -> None:
    clips = ViewClips(records[:1], num_frames=FRAMES, stride=2, size=24)
    model = tiny_model()
    encode_views(model, clips, tmp_path, progress=False)
    with torch.no_grad():
        model.decoder.cls_token.add_(1)
    with pytest.raises(ValueError, match="weights"):
        encode_views(model, clips, tmp_path, progress=False)


def test_views_are_of_rgb(records: list[ClipRecord], tmp_path: Path) -> None:
    config = tiny_config(in_chans=2, num_classes=0)
    model = EVL(EVLConfig(config, num_layers=1), MaskedViT(config))
    with pytest.raises(ValueError, match="the model takes 2 channels"):
        encode_views(model, ViewClips(records, num_frames=4, size=32), tmp_path, progress=False)


def test_videos_are_of_the_decoders_frames_and_cells() -> None:
    assert tiny_model().config.video_size == (FRAMES, 24, 24)
    assert tiny_model("vit").config.video_size == (6, 24, 16)


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a CLIP, a decoder on it as published, an EVL of both, and a list of videos."""
    folder = tmp_path_factory.mktemp("place")
    write_labels(folder / "labels.csv")
    write_videos(folder)
    write_clip_model(folder / "clip")
    torch.manual_seed(0)
    model = EVL.from_pretrained(None, folder / "clip", num_layers=2, num_frames=3, num_classes=3)
    model.save_pretrained(folder / "model")
    published = {f"module.{name}": tensor for name, tensor in decoder_state(model).items()}
    torch.save({"model": published, "optimizer": {}, "next_step": 5}, folder / "checkpoint-5.pth")
    return folder


def evaluated(place: Path, out: Path, *more: object, **changes: Any) -> int:
    given = {
        "checkpoint": place / "model",
        "root": place,
        "out": out,
        "stride": 1,
        "crops": 3,
        "clips": 2,
        "workers": 1,
    }
    flags = [t for name, value in (given | changes).items() for t in (f"--{name.replace('_', '-')}", value)]
    return run("evaluate", place / "list.txt", "--protocol", "multiview", *flags, *more, "--quiet")


def test_the_command_scores_a_folder_and_a_published_decoder_alike(place: Path, tmp_path: Path, capsys: Any) -> None:
    assert evaluated(place, tmp_path / "a.json") == 0
    two = dict(checkpoint=place / "clip", decoder=place / "checkpoint-5.pth", labels=place / "labels.csv")
    assert evaluated(place, tmp_path / "b.json", **two) == 0
    shown = capsys.readouterr()
    results = [json.loads((tmp_path / name).read_text())["results"] for name in ("a.json", "b.json")]
    assert results[0] == results[1]
    listed = read_video_list(place / "list.txt", place)
    clips = ViewClips(listed.records, num_frames=3, stride=1, size=32, clips=2, crops=3)
    encode_views(EVL.from_pretrained(place / "model"), clips, tmp_path / "o", progress=False)
    wanted = Accuracy.of(
        ViewScores(tmp_path / "o").by_class(range(12)), torch.tensor([r.label for r in listed.records])
    )
    assert results[0] == [{"scores": "class", "top1": wanted.top1, "top5": wanted.top5, "clips": 12}]
    assert "3 crops x 2 parts of 3 frames, 12 clips" in shown.out
    assert "checkpoint-5.pth on " in shown.err


def test_uniform_sampling_and_tube_masks(place: Path, tmp_path: Path) -> None:
    how = ("--sampling", "uniform", "--masks", 2, "--mask-ratio", 0.5, "--seed", 3)
    assert evaluated(place, tmp_path / "e.json", *how, crops=1) == 0
    about = json.loads((tmp_path / "e.json").read_text())["settings"]["encoding"]
    assert (about["masks"], about["mask_ratio"], about["views"]["stride"]) == (2, 0.5, None)


def test_a_decoder_of_a_masked_vit_at_more_frames(place: Path, tmp_path: Path, capsys: Any) -> None:
    config = tiny_config(num_classes=0)
    MaskedViT(config).save_pretrained(tmp_path / "vit")
    EVL(EVLConfig(config, num_layers=2, num_classes=3)).save_decoder(tmp_path / "decoder.pth")
    on = dict(checkpoint=tmp_path / "vit", decoder=tmp_path / "decoder.pth", crops=1, clips=1)
    assert evaluated(place, tmp_path / "e.json", **on) == 0
    on = dict(checkpoint=place / "clip", decoder=place / "checkpoint-5.pth", crops=1, clips=1, num_frames=5)
    assert evaluated(place, tmp_path / "f.json", **on) == 2
    assert "interpolate" in capsys.readouterr().err
    assert evaluated(place, tmp_path / "f.json", "--interpolate", **on) == 0
    assert json.loads((tmp_path / "f.json").read_text())["settings"]["encoding"]["frames"] == 5


@pytest.mark.parametrize(
    ("changes", "more", "message"),
    [
        (dict(checkpoint="checkpoint-5.pth"), (), "give it as --decoder, its backbone as --checkpoint"),
        (dict(checkpoint="clip", decoder="clip"), (), "holds no decoder of EVL"),
        (dict(decoder="checkpoint-5.pth"), (), "is an EVL with a decoder; --decoder goes on a CLIP or a MaskedViT"),
        (dict(adapters="x.pth"), (), "--adapters is of an M2CLIP"),
        (dict(checkpoint="clip"), ("--interpolate",), "--interpolate is of an EVL"),
        (dict(labels="labels.csv"), ("--scores", "text"), "an EVL knows no texts"),
    ],
    ids=str,
)
def test_what_is_wrong_is_one_line(
    changes: dict[str, str], more: tuple[str, ...], message: str, place: Path, tmp_path: Path, capsys: Any
) -> None:
    given = {name: place / value for name, value in changes.items()}
    assert evaluated(place, tmp_path / "e.json", *more, **given) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


# -- predict -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("backbone", ["clip", "vit"])
def test_an_ensemble_is_the_mean_over_masked_views(backbone: str) -> None:
    model = tiny_model(backbone)
    made, video, ids = EVLEnsemble(model), clip_pixels(model.config, 3), [9, 4, 30]
    mask = tube_masks(3, 2, model.check_video(video), 0.5, seed=6, clip_ids=ids)
    wanted = model(video, mask).softmax(-1).mean(1)
    torch.testing.assert_close(made.ensemble(video, 2, 0.5, seed=6, clip_ids=ids), wanted)
    assert made.ensemble(video[:0], 2, 0.5).shape == (0, 5)
    assert (made.config.num_frames, *made.config.frame_size) == tuple(video.shape[2:])


def test_predict_with_a_decoder_and_with_a_support(place: Path, tmp_path: Path) -> None:
    on = ("--checkpoint", place / "clip", "--decoder", place / "checkpoint-5.pth", "--quiet", "--mask-ratio", 0.5)
    assert run("predict", place, "--out", tmp_path / "p.csv", *on) == 0
    with (tmp_path / "p.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    records = video_records(place)
    made = EVLEnsemble(EVL.from_pretrained(place / "model"))
    pixels = torch.stack([load_clip(r.sources["rgb"], 3, 32) for r in records])
    wanted = made.ensemble(pixels, 2, 0.5, clip_ids=[r.clip_id for r in records])
    got = torch.tensor([[float(row[f"p({k})"]) for k in range(3)] for row in rows])
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=0)
    for label in (0, 1, 2):
        (tmp_path / "few" / str(label)).mkdir(parents=True)
        (tmp_path / "few" / str(label) / "a.mp4").symlink_to(place / f"clip {label} 0.mp4")
    by_class = ("--checkpoint", place / "model", "--support", tmp_path / "few", "--quiet")
    assert run("predict", place, "--out", tmp_path / "s.json", *by_class) == 0
    found = json.loads((tmp_path / "s.json").read_text())["clips"]
    assert all(Path(clip["path"]).stem.split()[1] == clip["label"] for clip in found)


def test_convert_joins_a_decoder_with_its_backbone_and_takes_it_apart(place: Path, tmp_path: Path, capsys: Any) -> None:
    file = place / "checkpoint-5.pth"
    assert run("convert", file, tmp_path / "evl", "--backbone", place / "clip") == 0
    joined, whole = (
        EVL.from_pretrained(tmp_path / "evl").state_dict(),
        EVL.from_pretrained(place / "model").state_dict(),
    )
    assert all(torch.equal(tensor, whole[name]) for name, tensor in joined.items())
    assert run("convert", tmp_path / "evl", tmp_path / "d.pth", "--to", "evl") == 0
    decoder = torch.load(tmp_path / "d.pth")["model"]
    assert all(torch.equal(tensor, decoder[name]) for name, tensor in torch.load(file)["model"].items())
    assert run("convert", place / "clip", tmp_path / "x", "--backbone", place / "clip") == 2
    assert "backbone is for EVL's decoder alone" in capsys.readouterr().err
    assert run("convert", place / "model", tmp_path / "x", "--to", "hf_videomae") == 2
    assert "--to must be mmfast or evl for an EVL" in capsys.readouterr().err


def test_zero_shot_needs_texts(place: Path, tmp_path: Path, capsys: Any) -> None:
    arguments = ["--checkpoint", place / "model", "--labels", place / "labels.csv", "--out", tmp_path / "e.json"]
    assert run("evaluate", place / "list.txt", "--protocol", "zero-shot", "--root", place, *arguments, "--quiet") == 2
    assert "needs a model that knows texts, a CLIP or an M2CLIP, got an EVL" in capsys.readouterr().err
