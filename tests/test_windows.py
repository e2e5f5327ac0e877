"""Several clips of one video."""

import json
from pathlib import Path

import pytest
from command_runs import run, write_checkpoint, write_labelled

from mmfast.data.records import AnnotationSet, ClipRecord
from mmfast.data.windows import cut_windows


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "frames").mkdir()
    for i in range(5, 22):
        (tmp_path / "frames" / f"{i:03d}.png").touch()
    return tmp_path / "frames"


def record(source: Path, **fields: object) -> ClipRecord:
    return ClipRecord(7, "hand", {"rgb": source}, **fields)  # type: ignore[arg-type]  # fields of one record


def test_windows_cover_the_frames_that_are_there_once(folder: Path) -> None:
    cut = cut_windows([record(folder, label=3, label_name="wave")], 4)
    assert [(w.start, w.stop) for w in cut] == [(5, 9), (9, 13), (13, 17), (17, 22)]
    assert [w.name for w in cut] == ["hand#0", "hand#1", "hand#2", "hand#3"]
    assert {(w.label, w.label_name) for w in cut} == {(3, "wave")}
    assert len({w.clip_id for w in cut}) == 4


def test_windows_keep_to_the_clip(folder: Path) -> None:
    cut = cut_windows([record(folder, start=8, stop=12)], 2)
    assert [(w.start, w.stop) for w in cut] == [(8, 10), (10, 12)]


def test_videos_without_labels_are_a_class_each(folder: Path) -> None:
    other = ClipRecord(8, "foot", {"rgb": folder})
    assert [(w.label, w.label_name) for w in cut_windows([record(folder), other], 2)] == [
        (0, "hand"), (0, "hand"), (1, "foot"), (1, "foot"),
    ]  # fmt: skip


def test_annotations_keep_their_stride(folder: Path) -> None:
    cut = cut_windows(AnnotationSet([record(folder, label=0)], stride=4), 2)
    assert isinstance(cut, AnnotationSet)
    assert cut.stride == 4
    assert len(cut) == 2


def test_a_clip_that_cannot_be_read_stays_whole(folder: Path, tmp_path: Path) -> None:
    broken = record(tmp_path / "gone", label=0)
    assert list(cut_windows([broken], 3)) == [broken]


@pytest.mark.parametrize("count", [0, 18])
def test_impossible_counts(count: int, folder: Path) -> None:
    with pytest.raises(ValueError, match=f"windows must be at .*got {count}"):
        cut_windows([record(folder)], count)


def test_episodes_of_windows(tmp_path: Path) -> None:
    (tmp_path / "labelled").mkdir()
    (tmp_path / "videos").mkdir()
    for kind in sorted(write_labelled(tmp_path / "labelled").iterdir()):
        (kind / "0.mp4").rename(tmp_path / "videos" / f"{kind.name}.mp4")
    out, checkpoint = tmp_path / "e.json", write_checkpoint(tmp_path)
    arguments = ("--checkpoint", checkpoint, "--out", out, "--k-shot", 1, "--windows", 3, "--n-way", 3, "--n-query", 2)
    assert run("evaluate", tmp_path / "videos", *arguments, "--episodes", 10, "--quiet") == 0
    about = json.loads(out.read_text())
    assert about["settings"]["features"]["about"]["windows"] == 3
    assert about["results"][0]["accuracy"] > 0.8
