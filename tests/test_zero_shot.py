"""Zero-shot: classes known by texts alone, on several splits, with the adapters of either tower on and off."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command_runs import run
from fit_clip_makers import COLOURS, HIDDEN, write_clip_model, write_labels, write_videos, write_vocabulary
from makers import tiny_config
from torch.nn import functional as F

from mmfast import CLIP, M2CLIP, MaskedViT
from mmfast.data.captions import class_prompts
from mmfast.data.tokenizer import ClipTokenizer
from mmfast.data.video_lists import read_video_list
from mmfast.data.views import ViewClips
from mmfast.multiview import Accuracy, ViewScores, adapters_off, encode_views, text_features, zero_shot

NAMES = list(COLOURS)
PROMPTS = ("A video of {}", "{} on the table")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a CLIP, an M2CLIP on it with adapters that count, and three splits of the videos."""
    folder = tmp_path_factory.mktemp("place")
    write_vocabulary(folder)
    write_labels(folder / "labels.csv")
    lines = write_videos(folder).read_text().splitlines()
    for i in range(3):
        (folder / f"split{i}.txt").write_text("\n".join(lines[i::3] + lines[:2]) + "\n")
    write_clip_model(folder / "clip")
    torch.manual_seed(0)
    model = M2CLIP.from_pretrained(folder / "clip", 3, num_classes=7, num_words=4, **HIDDEN)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "adapter" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder / "model")
    model.save_adapters(folder / "adapters.pth")
    return folder


def arguments(place: Path, out: Path, **changes: Any) -> list[Any]:
    given = {"checkpoint": place / "model", "labels": place / "labels.csv", "vocabulary": place / "merges.txt"}
    given |= {"root": place, "out": out, "stride": 1, "workers": 1, **changes}
    flags = [t for name, value in given.items() if value is not None for t in (f"--{name.replace('_', '-')}", value)]
    return [*(place / f"split{i}.txt" for i in range(3)), "--protocol", "zero-shot", *flags, "--quiet"]


def token_ids(place: Path) -> torch.Tensor:
    return class_prompts(ClipTokenizer.load(place / "merges.txt"), NAMES, PROMPTS)


@torch.no_grad()
def test_texts_are_the_mean_of_unit_features_and_equal_the_models_own(place: Path) -> None:
    model, ids = M2CLIP.from_pretrained(place / "model"), token_ids(place)
    units = torch.stack([F.normalize(model.clip.encode_text(one), dim=-1) for one in ids])
    torch.testing.assert_close(text_features(model, ids, batch=2), F.normalize(units.mean(0), dim=-1))
    torch.testing.assert_close(text_features(model, ids), model.label_features(ids))


@torch.no_grad()
def test_all_four_ways_equal_the_models_own_zero_shot(place: Path, tmp_path: Path) -> None:
    model, ids = M2CLIP.from_pretrained(place / "model"), token_ids(place)
    listed = read_video_list(place / "list.txt", place)
    clips = ViewClips(listed.records, num_frames=3, stride=1, size=32)
    encode_views(model, clips, tmp_path, without_adapters=True, progress=False)
    video = torch.stack([clips[i]["rgb"] for i in range(len(clips))])
    labels = [r.label for r in listed.records if r.label is not None]
    splits = {"even": (list(range(0, 12, 2)), labels[::2]), "odd": (list(range(1, 12, 2)), labels[1::2])}
    ways = zero_shot(model, ViewScores(tmp_path), splits, ids)
    towers = [(way.vision_adapters, way.text_adapters) for way in ways]
    assert towers == [(True, True), (True, False), (False, True), (False, False)]
    found = []
    for way in ways:
        model.enable_adapters(vision=way.vision_adapters, text=way.text_adapters)
        wanted = model.zero_shot(video, ids)
        model.enable_adapters(vision=True, text=True)
        scores = ViewScores(tmp_path)
        with adapters_off(model, text=not way.text_adapters):
            texts = text_features(model, ids)
        found.append(scores.by_text(range(12), texts, adapters=way.vision_adapters is True))
        torch.testing.assert_close(found[-1], wanted, atol=1e-4, rtol=1e-3)
        for name, (own, numbers) in splits.items():
            assert way.splits[name] == Accuracy.of(wanted[own], torch.tensor(numbers))
        assert way.mean.top1 == pytest.approx((way.splits["even"].top1 + way.splits["odd"].top1) / 2)
    assert all(not torch.allclose(a, b, atol=1e-3) for i, a in enumerate(found) for b in found[:i])


def test_adapters_are_on_again_behind_an_error(place: Path) -> None:
    model = M2CLIP.from_pretrained(place / "model")

    def fail() -> None:
        with adapters_off(model, vision=True, text=True):
            assert not model.use_vision_adapters
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert model.use_vision_adapters
    assert all(block.use_adapters for block in model.clip.text.transformer.resblocks)


def test_three_splits_are_scored_apart_and_their_clips_encoded_once(place: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "e.json"
    prompts = [flag for text in PROMPTS for flag in ("--prompt", text)]
    assert run("evaluate", *arguments(place, out), "--crops", 3, *prompts) == 0
    about = json.loads(out.read_text())
    assert len(ViewScores(f"{out}.views").ids) == 12
    assert [list(row["splits"]) for row in about["results"]] == [["split0", "split1", "split2"]] * 4
    first = about["results"][0]
    assert {name: split["clips"] for name, split in first["splits"].items()} == dict.fromkeys(first["splits"], 6)
    tops = [split["top1"] for split in first["splits"].values()]
    assert first["mean"]["top1"] == pytest.approx(sum(tops) / 3)
    assert first["mean"]["top1_std"] == pytest.approx(float(torch.tensor(tops).std(correction=0)))
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith("zero-shot, 3 classes, 2 prompts a class")
    assert [line.split()[:2] for line in shown[2:]] == [
        ["adapted", "adapted"], ["adapted", "plain"], ["plain", "adapted"], ["plain", "plain"],
    ]  # fmt: skip


def test_a_clip_without_adapters_has_one_row_that_of_m2clip_without_its_own(place: Path, tmp_path: Path) -> None:
    """Adapters on top of a CLIP file, all off, are the CLIP."""
    given = arguments(
        place, tmp_path / "a.json", checkpoint=place / "clip", adapters=place / "adapters.pth", num_frames=3
    )
    assert run("evaluate", *given) == 0
    assert run("evaluate", *arguments(place, tmp_path / "b.json", checkpoint=place / "clip", num_frames=3)) == 0
    adapted, plain = (json.loads((tmp_path / f"{name}.json").read_text())["results"] for name in "ab")
    assert [(row["vision_adapters"], row["text_adapters"]) for row in plain] == [(None, None)]
    assert isinstance(CLIP.from_pretrained(place / "clip"), CLIP)
    assert plain[0]["splits"] == adapted[-1]["splits"]


def test_classes_by_the_folders_of_a_list_without_numbers(place: Path, tmp_path: Path) -> None:
    """As UCF101's test lists are: the folder is the class, written another way than its name."""
    lines = []
    for label, name in enumerate(NAMES):
        folder = tmp_path / name.title().replace(" ", "").replace(",", "")
        folder.mkdir()
        (folder / "v.mp4").symlink_to(place / f"clip {label} 0.mp4")
        lines.append(f"{folder.name}/v.mp4")
    (tmp_path / "testlist01.txt").write_text("\n".join(reversed(lines)) + "\n")
    (tmp_path / "names.txt").write_text("\n".join(NAMES) + "\n")
    given = arguments(place, tmp_path / "e.json", root=tmp_path, labels=tmp_path / "names.txt", columns="path")
    assert run("evaluate", tmp_path / "testlist01.txt", *given[3:]) == 0
    model, records = (
        M2CLIP.from_pretrained(place / "model"),
        read_video_list(tmp_path / "testlist01.txt", tmp_path, columns="path"),
    )
    clips = ViewClips(records.records, num_frames=3, stride=1, size=32)
    with torch.no_grad():
        video = torch.stack([clips[i]["rgb"] for i in range(3)])
        wanted = model.zero_shot(video, class_prompts(ClipTokenizer.load(place / "merges.txt"), NAMES))
    found = json.loads((tmp_path / "e.json").read_text())["results"][0]["splits"]["testlist01"]
    assert found == {"top1": Accuracy.of(wanted, torch.tensor([2, 1, 0])).top1, "top5": 1.0, "clips": 3}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(labels=None), "zero-shot needs --labels"),
        (dict(vocabulary="OTHER"), "vocabulary must be that of the CLIP, which has 521 tokens, got one of 514"),
        (dict(checkpoint="VIT"), "needs a model that knows texts, a CLIP or an M2CLIP, got a MaskedViT"),
        (dict(prompt="A video"), "template must hold"),
        (dict(labels="SHORT"), "label must be 0 to 1, got 2"),
        (dict(checkpoint="ADAPTERS"), "give the CLIP file as source and this one as adapters"),
        (dict(scores="class"), "unrecognized arguments: --scores class"),
        (dict(columns="path label", first_label=2), "label must be 2 to 4, got 0"),
    ],
    ids=str,
)
def test_what_is_wrong_is_one_line(
    changes: dict[str, Any], message: str, place: Path, tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "other.txt").write_text("#version\n")
    MaskedViT(tiny_config()).save_pretrained(tmp_path / "vit")
    write_labels(tmp_path / "short.csv", NAMES[:2])
    places = {"OTHER": tmp_path / "other.txt", "VIT": tmp_path / "vit", "SHORT": tmp_path / "short.csv"}
    places["ADAPTERS"] = place / "adapters.pth"
    given = {name: places.get(str(value), value) for name, value in changes.items()}
    assert run("evaluate", *arguments(place, tmp_path / "e.json", **given)) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "e.json").exists()


def test_a_split_of_which_nothing_can_be_read_is_an_error(place: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    (tmp_path / "none.txt").write_text(f"{tmp_path}/bad.mp4 1\n")
    assert run("evaluate", tmp_path / "none.txt", *arguments(place, tmp_path / "e.json")) == 2
    assert "none: none of its 1 clips could be read" in capsys.readouterr().err
