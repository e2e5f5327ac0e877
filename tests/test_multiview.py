"""Multi-view tests of a classifier: every view scored alone in plain torch, shards, ranks, and the command."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_runs import MAIN, run
from fit_clip_makers import COLOURS, HIDDEN, write_clip_model, write_labels, write_videos, write_vocabulary
from m2clip_makers import CLASSES, FRAMES, texts, tiny_model
from makers import canonical, tiny_config
from torch import Tensor
from torch.nn import functional as F
from video_files import write_clip

from mmfast import CLIP, M2CLIP, CLIPConfig, MaskedViT
from mmfast.data.records import ClipRecord
from mmfast.data.video_lists import read_video_list
from mmfast.data.views import ViewClips
from mmfast.masks import tube_masks
from mmfast.multiview import Accuracy, ViewScores, encode_views, label_ranks, text_features

# -- ranks and shares --------------------------------------------------------------------------------------------------


def test_a_rank_is_how_many_classes_come_before_the_clips_own() -> None:
    scores = torch.tensor([[0.1, 0.5, 0.3], [0.1, 0.5, 0.3], [0.1, 0.5, 0.3]])
    assert label_ranks(scores, torch.tensor([0, 1, 2])).tolist() == [2, 0, 1]


def test_of_equal_scores_the_first_comes_first_and_nan_is_wrong() -> None:
    scores = torch.tensor([[0.5, 0.5, 0.0], [0.5, 0.5, 0.0], [float("nan"), 1.0, 0.0]])
    assert label_ranks(scores, torch.tensor([0, 1, 1])).tolist() == [0, 1, 3]


def test_accuracy_is_the_share_of_small_ranks() -> None:
    scores = torch.eye(7)[[0, 1, 2, 3]]
    assert Accuracy.of(scores, torch.tensor([0, 6, 2, 5])) == Accuracy(0.5, 0.5, 4)
    scores[1, 6] = 0.5
    assert Accuracy.of(scores, torch.tensor([0, 6, 2, 5])) == Accuracy(0.5, 0.75, 4)
    with pytest.raises(ValueError, match="at least one clip"):
        Accuracy.of(scores[:0], torch.tensor([], dtype=torch.int64))


# -- against plain loops -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[ClipRecord]:
    folder = tmp_path_factory.mktemp("videos")
    rng = np.random.default_rng(1)
    for i in range(3):
        write_clip(folder / f"{i}.mp4", rng.integers(0, 256, (8, 36 + 4 * i, 48, 3)).astype(np.uint8))
    return [ClipRecord(11 * i + 3, f"clip {i}", {"rgb": folder / f"{i}.mp4"}, label=i % 2) for i in range(3)]


def views_of(records: list[ClipRecord], num_frames: int = FRAMES, size: int = 32) -> ViewClips:
    return ViewClips(records, num_frames=num_frames, stride=2, size=size, clips=2, crops=3)


def each(clips: ViewClips, place: int) -> list[Tensor]:
    """The views of a clip, [1, 3, F, H, W]."""
    return [view[None] for view in clips[place]["rgb"].split(clips.num_frames, 1)]


def assert_near(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_an_m2clip_is_scored_view_by_view_by_head_and_by_text(records: list[ClipRecord], tmp_path: Path) -> None:
    model, clips, ids = tiny_model(), views_of(records), [r.clip_id for r in records]
    report = encode_views(model, clips, tmp_path, batch=2, progress=False)
    assert (report.done, report.failed) == (3, {})
    found, classes = ViewScores(tmp_path), texts([2, 5, 3, 1, 10][:CLASSES])
    unit = text_features(model, classes)
    for place, clip_id in enumerate(ids):
        views = [model.encode_video(view) for view in each(clips, place)]
        assert_near(found.by_class([clip_id])[0], torch.stack([v.class_logits[0].softmax(-1) for v in views]).mean(0))
        cosines = torch.stack([F.normalize(v.features[0], dim=-1) @ unit.t() for v in views])
        assert_near(found.by_text([clip_id], unit)[0], (100 * cosines).softmax(-1).mean(0))


@torch.no_grad()
def test_a_masked_vit_is_scored_view_by_view_whole_or_masked(records: list[ClipRecord], tmp_path: Path) -> None:
    config = tiny_config()
    model = MaskedViT(config)
    model.load_state_dict(canonical(config))
    model.train()
    clips = views_of(records, config.num_frames, config.frame_size[0])
    encode_views(model, clips, tmp_path / "whole", progress=False)
    encode_views(model, clips, tmp_path / "masked", masks=2, mask_ratio=0.5, seed=5, progress=False)
    assert model.training
    model.eval()
    for place, record in enumerate(records):
        views = each(clips, place)
        wanted = torch.stack([model(view)[0].softmax(-1) for view in views]).mean(0)
        assert_near(ViewScores(tmp_path / "whole").by_class([record.clip_id])[0], wanted)
        mask = tube_masks(1, 2, model.check_video(views[0]), 0.5, seed=5, clip_ids=torch.tensor([record.clip_id]))
        wanted = torch.stack([model(view, mask)[0].softmax(-1).mean(0) for view in views]).mean(0)
        assert_near(ViewScores(tmp_path / "masked").by_class([record.clip_id])[0], wanted)


@torch.no_grad()
def test_an_m2clip_under_tube_masks(records: list[ClipRecord], tmp_path: Path) -> None:
    model, clips = tiny_model(), views_of(records)
    encode_views(model, clips, tmp_path, masks=2, mask_ratio=0.5, progress=False)
    for place, record in enumerate(records):
        mask = tube_masks(1, 2, (FRAMES, 4, 4), 0.5, clip_ids=torch.tensor([record.clip_id]))
        wanted = torch.stack([model(view, mask)[0].softmax(-1).mean(0) for view in each(clips, place)]).mean(0)
        assert_near(ViewScores(tmp_path).by_class([record.clip_id])[0], wanted)


@torch.no_grad()
def test_a_clip_has_the_mean_of_its_frames(records: list[ClipRecord], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = CLIP(CLIPConfig(embed_dim=24, image_size=32, patch_size=8, vision_width=32, vision_depth=1, vision_num_heads=2,
                            text_width=32, text_depth=1, text_num_heads=2, vocab_size=50)).eval()  # fmt: skip
    clips = views_of(records)
    encode_views(model, clips, tmp_path, progress=False)
    unit = F.normalize(torch.randn(4, 24), dim=-1)
    features = [model.encode_image(view)[0].mean(0) for view in each(clips, 1)]
    wanted = torch.stack([(20 * F.normalize(f, dim=-1) @ unit.t()).softmax(-1) for f in features]).mean(0)
    assert_near(ViewScores(tmp_path).by_text([records[1].clip_id], unit, 20.0)[0], wanted)


@torch.no_grad()
def test_features_without_the_vision_adapters_are_kept_beside(records: list[ClipRecord], tmp_path: Path) -> None:
    model, clips, unit = tiny_model(), views_of(records[:1]), F.normalize(torch.randn(4, 32), dim=-1)
    encode_views(model, clips, tmp_path, without_adapters=True, progress=False)
    found, i = ViewScores(tmp_path), [records[0].clip_id]
    assert not torch.allclose(found.by_text(i, unit), found.by_text(i, unit, adapters=False))
    model.enable_adapters(vision=False)
    encode_views(model, clips, tmp_path / "plain", progress=False)
    assert_near(found.by_text(i, unit, adapters=False), ViewScores(tmp_path / "plain").by_text(i, unit))


def test_ranks_share_the_clips_and_a_broken_one_is_reported(records: list[ClipRecord], tmp_path: Path) -> None:
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    clips = views_of([*records, ClipRecord(99, "bad", {"rgb": tmp_path / "bad.mp4"})])
    model = tiny_model()
    reports = [encode_views(model, clips, tmp_path / "o", rank=r, world=2, progress=False) for r in range(2)]
    assert [report.done for report in reports] == [2, 1]
    found = ViewScores(tmp_path / "o")
    assert found.ids == [r.clip_id for r in records]
    assert "no container format" in found.failed[99][1]
    encode_views(model, views_of(records), tmp_path / "one", progress=False)
    assert torch.equal(found.by_class(found.ids), ViewScores(tmp_path / "one").by_class(found.ids))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(masks=0), "masks must be at least 1, got 0"),
        (dict(masks=2), "masks must be 1 where mask_ratio is 0"),
        (dict(precision="fp8"), "precision must be one of"),
        (dict(mask_ratio=1.0), r"mask_ratio must lie in \[0, 1\)"),
    ],
    ids=str,
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str, records: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        encode_views(tiny_model(), views_of(records), tmp_path, progress=False, **settings)


def test_models_that_nothing_scores_are_refused(records: list[ClipRecord], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no classes"):
        encode_views(MaskedViT(tiny_config(num_classes=0)), views_of(records), tmp_path)
    with pytest.raises(ValueError, match="a MaskedViT has no adapters to leave out"):
        encode_views(MaskedViT(tiny_config()), views_of(records), tmp_path, without_adapters=True)
    with pytest.raises(ValueError, match="the model takes 2 channels"):
        encode_views(MaskedViT(tiny_config(in_chans=2)), views_of(records), tmp_path)


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an M2CLIP, its vocabulary, the names of its classes, and a list of videos."""
    folder = tmp_path_factory.mktemp("place")
    write_vocabulary(folder)
    write_labels(folder / "labels.csv")
    write_videos(folder)
    write_clip_model(folder / "clip")
    torch.manual_seed(0)
    M2CLIP.from_pretrained(folder / "clip", 3, num_classes=3, num_words=4, **HIDDEN).save_pretrained(folder / "model")
    return folder


def arguments(place: Path, out: Path, **changes: Any) -> list[Any]:
    given = {"checkpoint": place / "model", "vocabulary": place / "merges.txt", "root": place, "out": out, "stride": 1}
    given |= {"labels": place / "labels.csv", "crops": 3, "clips": 2, "workers": 1, **changes}
    flags = [t for name, value in given.items() if value is not None for t in (f"--{name.replace('_', '-')}", value)]
    return [place / "list.txt", "--protocol", "multiview", *flags, "--quiet"]


def test_the_command_writes_table_and_json(place: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "e.json"
    assert run("evaluate", *arguments(place, out)) == 0
    about = json.loads(out.read_text())
    assert [row["scores"] for row in about["results"]] == ["class", "text"]
    model = M2CLIP.from_pretrained(place / "model")
    listed = read_video_list(place / "list.txt", place)
    encode_views(
        model, ViewClips(listed.records, num_frames=3, stride=1, size=32, clips=2, crops=3), tmp_path / "o", progress=False
    )  # fmt: skip
    labels = torch.tensor([r.label for r in listed.records])
    wanted = Accuracy.of(ViewScores(tmp_path / "o").by_class(range(12)), labels)
    assert about["results"][0] == {"scores": "class", "top1": wanted.top1, "top5": wanted.top5, "clips": 12}
    shown = capsys.readouterr().out
    assert "3 crops x 2 parts of 3 frames, 12 clips" in shown
    assert f"class head   {100 * wanted.top1:>7.2f} %" in shown


def test_without_names_the_class_head_alone_is_scored(place: Path, tmp_path: Path) -> None:
    given = arguments(place, tmp_path / "e.json", labels=None, vocabulary=None, crops=1, clips=1)
    assert run("evaluate", *given, "--sampling", "uniform") == 0
    assert [row["scores"] for row in json.loads((tmp_path / "e.json").read_text())["results"]] == ["class"]


def test_names_that_lie_beside_the_model_are_found(place: Path, tmp_path: Path) -> None:
    M2CLIP.from_pretrained(place / "model").save_pretrained(tmp_path / "model")
    write_labels(tmp_path / "model" / "labels.csv")
    given = arguments(place, tmp_path / "e.json", labels=None, checkpoint=tmp_path / "model", crops=1, clips=1)
    assert run("evaluate", *given, "--scores", "text") == 0
    assert [row["scores"] for row in json.loads((tmp_path / "e.json").read_text())["results"]] == ["text"]


def test_a_masked_vit_of_class_folders(place: Path, tmp_path: Path) -> None:
    MaskedViT(tiny_config(num_classes=3)).save_pretrained(tmp_path / "vit")
    for label, name in enumerate(COLOURS):
        folder = tmp_path / "data" / name.replace(" ", "_")
        folder.mkdir(parents=True)
        (folder / "a.mp4").symlink_to(place / f"clip {label} 0.mp4")
    given = arguments(place, tmp_path / "e.json", checkpoint=tmp_path / "vit", vocabulary=None, root=None)
    assert run("evaluate", tmp_path / "data", *given[1:], "--masks", 2, "--mask-ratio", 0.5) == 0
    assert json.loads((tmp_path / "e.json").read_text())["results"][0]["clips"] == 3


def test_broken_clips_take_no_part_and_the_exit_code_is_1(place: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    (tmp_path / "list.txt").write_text(f"{tmp_path}/bad.mp4 1\n{(place / 'list.txt').read_text()}")
    given = arguments(place, tmp_path / "e.json", crops=1, clips=1)
    assert run("evaluate", tmp_path / "list.txt", *given[1:], "--scores", "class") == 1
    about = json.loads((tmp_path / "e.json").read_text())
    assert about["results"][0]["clips"] == 12
    assert [one["clip"] for one in about["failed"]] == [f"{tmp_path}/bad.mp4"]
    assert "1 clips could not be read and took no part" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "extra", "message"),
    [
        (dict(vocabulary=None), [], "open_clip"),
        (dict(labels="SHORT"), [], "--labels must name the 3 classes of the model's head, got 2 names"),
        (dict(labels=None), ["--scores", "text"], "need --labels"),
        (dict(checkpoint="CLIP"), ["--scores", "class"], "this CLIP has no class head"),
        (dict(checkpoint="CLIP", labels=None), [], "need --labels"),
        ({}, ["--first-label", "1"], "label must be 1 to 3, got 0"),
        (dict(labels=None, vocabulary=None), ["--columns", "path"], "give --labels, which says the number of each"),
        ({}, ["--columns", "path"], "clip 0 0.mp4 0 has no class"),
        (dict(crops=2), [], "invalid choice: 2"),
        (dict(protocol="zeroshot"), [], "invalid choice: 'zeroshot'"),
        ({}, ["--k-shot", "5"], "unrecognized arguments: --k-shot 5"),
    ],
    ids=str,
)
def test_what_is_wrong_is_one_line(
    changes: dict[str, Any], extra: list[str], message: str, place: Path, tmp_path: Path, capsys: Any
) -> None:
    write_labels(tmp_path / "short.csv", ["a", "b"])
    places = {"SHORT": tmp_path / "short.csv", "CLIP": place / "clip"}
    given = {name: places.get(str(value), value) for name, value in changes.items()}
    code = run("evaluate", *arguments(place, tmp_path / "e.json", **given), *extra)
    error = capsys.readouterr().err
    assert (code, not (tmp_path / "e.json").exists()) == (2, True)
    assert message in error.splitlines()[-1]


def test_two_processes_share_the_clips_and_give_the_table_of_one(place: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {
        **os.environ,
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-c", MAIN, "evaluate", *map(str, arguments(place, tmp_path / "two.json"))]
    ranks = [
        subprocess.Popen(
            command, env={**env, "RANK": str(r)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for r in range(2)
    ]
    said = [rank.communicate(timeout=300) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    assert said[1][0] == ""
    assert run("evaluate", *arguments(place, tmp_path / "one.json")) == 0
    one, two = (json.loads((tmp_path / f"{name}.json").read_text())["results"] for name in ("one", "two"))
    assert one == two
