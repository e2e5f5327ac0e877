"""Predictions over folders of videos: each row once, resumable, and few-shot from labelled folders."""

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from makers import tiny_config
from torch import Tensor
from video_files import moving_frames, write_clip

from mmfast.data.dataset import ClipDataset
from mmfast.data.records import ClipRecord
from mmfast.data.video import load_clip
from mmfast.predict import clips_for, predict, video_records
from mmfast.vit import MaskedViT

QUIET: dict[str, Any] = dict(progress=False, rank=0, world=1)


def model(seed: int = 0, **overrides: Any) -> MaskedViT:
    torch.manual_seed(seed)
    net = MaskedViT(tiny_config(**overrides)).eval()
    if overrides.get("num_classes", 5):
        torch.nn.init.normal_(net.head.weight)  # spread, so that classes differ
    return net


def _videos(folder: Path, count: int = 5) -> Path:
    for i in range(count):
        path = folder / f"v{i}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_clip(path, moving_frames(9, seed=i))
    return folder


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _videos(tmp_path_factory.mktemp("videos"))


@pytest.fixture(scope="module")
def with_broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = _videos(tmp_path_factory.mktemp("broken"), 3)
    (folder / "v1.mp4").write_bytes(b"no video")
    return folder


def _table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_row_has_the_ensembles_probabilities(videos: Path, tmp_path: Path) -> None:
    net, names = model(), [f"class {k}" for k in "vwxyz"]
    result = predict(net, videos, tmp_path / "p.csv", classes=names, views=3, seed=5, top_k=2, **QUIET)
    assert result.complete
    rows = _table(tmp_path / "p.csv")
    assert [row["path"] for row in rows] == [str(videos / f"v{i}.mp4") for i in range(5)]
    records = video_records(videos)
    clips = torch.stack([load_clip(r.sources["rgb"], 4, 32) for r in records])
    expected = net.ensemble(clips, 3, 0.75, seed=5, clip_ids=[r.clip_id for r in records])
    for row, truth in zip(rows, expected, strict=True):
        got = torch.tensor([float(row[f"p({name})"]) for name in names])
        torch.testing.assert_close(got, truth, atol=2e-6, rtol=0)
        best = truth.topk(2)
        assert [row["label"], row["label_2"]] == [names[k] for k in best.indices]
        assert float(row["probability"]) == pytest.approx(float(best.values[0]), abs=2e-6)
    assert not list(tmp_path.glob("*.parts"))


def test_json_holds_the_same_as_csv(videos: Path, tmp_path: Path) -> None:
    for name in ("p.csv", "p.json"):
        predict(model(), videos, tmp_path / name, **QUIET)
    about = json.loads((tmp_path / "p.json").read_text())
    rows = _table(tmp_path / "p.csv")
    assert [c["path"] for c in about["clips"]] == [r["path"] for r in rows]
    for clip, row in zip(about["clips"], rows, strict=True):
        assert clip["label"] == row["label"] == clip["top"][0]["label"]
        assert clip["probabilities"]["3"] == pytest.approx(float(row["p(3)"]), abs=1e-9)
    assert about["settings"]["views"] == 2
    assert about["failed"] == []


def test_what_is_predicted_does_not_depend_on_the_folders_name_or_other_files(videos: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "v3.mp4").write_bytes((videos / "v3.mp4").read_bytes())
    predict(model(), videos, tmp_path / "a.csv", **QUIET)
    predict(model(), tmp_path / "elsewhere", tmp_path / "b.csv", **QUIET)
    [alone] = _table(tmp_path / "b.csv")
    among = _table(tmp_path / "a.csv")[3]
    assert {**alone, "path": ""} == {**among, "path": ""}


def test_an_interrupted_run_goes_on_and_writes_each_row_once(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, net = tmp_path / "p.csv", model()
    load, read = ClipDataset.__getitem__, list[int]()

    def interrupted(self: ClipDataset, place: int) -> dict[str, Any]:
        if place == 3:
            raise KeyboardInterrupt
        return load(self, place)

    options = {**QUIET, "batch": 1, "shard_size": 2, "workers": 0}
    with monkeypatch.context() as patch:
        patch.setattr(ClipDataset, "__getitem__", interrupted)
        with pytest.raises(KeyboardInterrupt):
            predict(net, videos, out, **options)
    assert not out.exists()
    monkeypatch.setattr(ClipDataset, "__getitem__", lambda self, place: (read.append(place), load(self, place))[1])
    assert predict(net, videos, out, **options).kept == 3
    assert read == [3, 4]
    predict(net, videos, tmp_path / "whole.csv", **QUIET)
    assert [r["path"] for r in _table(out)] == [r["path"] for r in _table(tmp_path / "whole.csv")]


def test_the_last_rank_writes_the_result(videos: Path, tmp_path: Path) -> None:
    out, options = tmp_path / "p.csv", {**QUIET, "world": 3}
    assert not predict(model(), videos, out, **{**options, "rank": 2}).complete
    assert not predict(model(), videos, out, **{**options, "rank": 0}).complete
    assert not out.exists()
    assert predict(model(), videos, out, **{**options, "rank": 1}).complete
    assert len(_table(out)) == 5


def test_unreadable_videos_are_left_out_and_named(with_broken: Path, tmp_path: Path) -> None:
    out = tmp_path / "p.csv"
    result = predict(model(), with_broken, out, **QUIET)
    assert [name for name, _ in result.failed.values()] == [str(with_broken / "v1.mp4")]
    assert "v1.mp4" in str(result)
    assert [Path(r["path"]).name for r in _table(out)] == ["v0.mp4", "v2.mp4"]
    write_clip(with_broken / "v1.mp4", moving_frames(9, seed=1))
    assert predict(model(), with_broken, out, **QUIET).failed
    result = predict(model(), with_broken, out, retry=True, **QUIET)
    assert (result.done, result.kept, result.failed) == (1, 2, {})
    assert len(_table(out)) == 3


def test_parts_of_another_model_are_refused(with_broken: Path, videos: Path, tmp_path: Path) -> None:
    predict(model(), videos, tmp_path / "p.csv", **{**QUIET, "world": 2})
    with pytest.raises(ValueError, match=re.escape("p.csv.parts") + ".*weights"):
        predict(model(seed=1), videos, tmp_path / "p.csv", **QUIET)


def _coloured(folder: Path, classes: dict[str, int], count: int) -> Path:
    """Videos of one brightness a class, with a little texture."""
    for name, level in classes.items():
        for i in range(count):
            path = folder / name / f"{i}.mp4"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_clip(path, moving_frames(6, seed=i) // 8 + level)  # uint8
    return folder


def test_few_shot_predictions_from_a_labelled_folder(tmp_path: Path) -> None:
    levels = {"bright": 200, "dark": 0, "grey": 100}
    support = _coloured(tmp_path / "support", levels, 2)
    query = _coloured(tmp_path / "query", levels, 3)
    out = tmp_path / "p.csv"
    predict(model(num_classes=0), query, out, support=support, views=2, **QUIET)
    rows = _table(out)
    assert len(rows) == 9
    assert [row["label"] for row in rows] == [Path(row["path"]).parent.name for row in rows]
    assert sum(float(rows[0][f"p({name})"]) for name in levels) == pytest.approx(1, abs=1e-5)


class _Spy:
    """A head that keeps what it was given."""

    def fit(self, support: Tensor, labels: Tensor) -> None:
        self.support, self.labels = support, labels

    def predict_proba(self, query: Tensor) -> Tensor:
        return query[..., :2].softmax(-1)


def test_the_head_is_fitted_to_one_masked_view_a_clip_and_averaged_over_views(videos: Path, tmp_path: Path) -> None:
    from mmfast import tube_masks

    net, head = model(num_classes=0), _Spy()
    records = [
        ClipRecord(i, f"v{i}", {"rgb": videos / f"v{i}.mp4"}, label=i % 2, label_name="ab"[i % 2]) for i in range(5)
    ]
    clips = clips_for(net.config, records)
    result = predict(net, clips, tmp_path / "p.json", support=clips, head=head, views=3, **QUIET)
    assert result.complete
    video = torch.stack([clips[i]["rgb"] for i in range(5)])
    with torch.no_grad():
        features = net.encode(video, tube_masks(5, 3, (2, 2, 2), 0.75, clip_ids=range(5)))
    torch.testing.assert_close(head.support, features[None, :, 0], rtol=1e-5, atol=1e-5)
    assert head.labels.tolist() == [[0, 1, 0, 1, 0]]
    about = json.loads((tmp_path / "p.json").read_text())
    got = torch.tensor([[clip["probabilities"][c] for c in "ab"] for clip in about["clips"]])
    torch.testing.assert_close(got, features[..., :2].softmax(-1).mean(1), rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"out": "p.txt"}, "out must end in .csv or .json"),
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"views": 0}, "views must be at least 1"),
        ({"mask_ratio": 1.5}, "mask_ratio must lie in"),
        ({"precision": "fp9"}, "precision must be one of"),
        ({"classes": ["a"]}, "classes must be 5 names, one a class of the model, got 1"),
    ],
)
def test_arguments_out_of_range_are_named(videos: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    out = tmp_path / options.pop("out", "p.csv")
    with pytest.raises(ValueError, match=message):
        predict(model(), videos, out, **options, **QUIET)


def test_a_model_without_classes_needs_support(videos: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the model has no classes.*give support"):
        predict(model(num_classes=0), videos, tmp_path / "p.csv", **QUIET)


def test_support_without_labels_is_refused(videos: Path, tmp_path: Path) -> None:
    bare = clips_for(tiny_config(), video_records(videos))
    with pytest.raises(ValueError, match="support must be labelled clips; 5 of 5 have no label"):
        predict(model(), videos, tmp_path / "p.csv", support=bare, **QUIET)


def test_a_class_whose_every_clip_is_broken_is_named(videos: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    paths = [videos / "v0.mp4", videos / "v1.mp4", tmp_path / "bad.mp4"]
    records = [ClipRecord(i, p.name, {"rgb": p}, label_name="abc"[i], label=i) for i, p in enumerate(paths)]
    with pytest.raises(ValueError, match=r"support has no clip that can be read of c; bad.mp4"):
        predict(model(), videos, tmp_path / "p.csv", support=clips_for(tiny_config(), records), **QUIET)


def test_a_manifest_is_a_source_of_videos(videos: Path, tmp_path: Path) -> None:
    manifest = tmp_path / "list.csv"
    manifest.write_text(f"path,start,stop\n{videos / 'v0.mp4'},0,4\n{videos / 'v0.mp4'},4,8\n")
    predict(model(), manifest, tmp_path / "p.csv", **QUIET)
    first, second = _table(tmp_path / "p.csv")
    assert first["p(0)"] != second["p(0)"]


def test_the_same_path_in_two_folders_is_two_clips(videos: Path, tmp_path: Path) -> None:
    (tmp_path / "v0.mp4").write_bytes((videos / "v0.mp4").read_bytes())
    predict(model(), [videos / "v0.mp4", tmp_path], tmp_path / "p.csv", **QUIET)
    assert len(_table(tmp_path / "p.csv")) == 2
