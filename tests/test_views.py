"""The views of a clip: which frames, which crops, in which order; and what training draws in their place."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from video_files import write_clip

from mmfast.data import frames as frames_module
from mmfast.data.dataset import ClipDataset
from mmfast.data.frames import ClipError
from mmfast.data.records import ClipRecord
from mmfast.data.transforms import Augmentation, Crop
from mmfast.data.views import ViewClips

Image = pytest.importorskip("PIL.Image", reason="needs Pillow: pip install pillow")


def record(folder: Path, count: int = 20, size: tuple[int, int] = (16, 36), stop: int | None = None) -> ClipRecord:
    """Frames 0, 1, ... of which every pixel tells frame, row and column."""
    folder.mkdir(exist_ok=True)
    rows, columns = np.mgrid[: size[0], : size[1]]
    for i in range(count):
        Image.fromarray(np.stack([np.full(size, 3 * i), rows, columns], 2).astype(np.uint8)).save(folder / f"{i}.png")
    return ClipRecord(7, "clip", {"rgb": f"{folder}/{{}}.png"}, 0, stop, 2)


def seen(item: dict[str, Any], frames: int) -> list[tuple[list[int], int, int]]:
    """Of each view its frames, and the row and column of its corner."""
    views = item["rgb"].split(frames, 1)
    return [((view[0, :, 0, 0] // 3).tolist(), int(view[1, 0, 0, 0]), int(view[2, 0, 0, 0])) for view in views]


@pytest.mark.parametrize(
    ("crops", "places"), [(1, [10]), (3, [0, 10, 20]), (4, [0, 5, 10, 20])], ids=["one", "three", "four"]
)
def test_crops_lie_along_the_long_side_as_published(crops: int, places: list[int], tmp_path: Path) -> None:
    wide = ViewClips([record(tmp_path / "a")], num_frames=2, stride=1, size=16, crops=crops)[0]
    assert [(top, left) for _, top, left in seen(wide, 2)] == [(0, place) for place in places]
    tall = ViewClips([record(tmp_path / "b", size=(36, 16))], num_frames=2, stride=1, size=16, crops=crops)[0]
    assert [(top, left) for _, top, left in seen(tall, 2)] == [(place, 0) for place in places]


@pytest.mark.parametrize(
    ("clips", "starts"), [(1, [7]), (2, [0, 15]), (3, [0, 8, 15]), (4, [0, 5, 10, 15])], ids=lambda v: str(v)
)
def test_dense_parts_reach_from_the_first_frame_to_the_last(clips: int, starts: list[int], tmp_path: Path) -> None:
    item = ViewClips([record(tmp_path / "a")], num_frames=3, stride=2, size=16, clips=clips)[0]
    assert [frames for frames, *_ in seen(item, 3)] == [[s, s + 2, s + 4] for s in starts]


def test_uniform_parts_share_the_clip_out(tmp_path: Path) -> None:
    def frames(clips: int) -> list[list[int]]:
        item = ViewClips([record(tmp_path / "a")], num_frames=4, stride=None, size=16, clips=clips)[0]
        return [own for own, *_ in seen(item, 4)]

    assert frames(1) == [[2, 7, 12, 17]]
    assert frames(2) == [[1, 6, 11, 16], [3, 8, 13, 18]]


def test_the_crops_of_a_part_come_together(tmp_path: Path) -> None:
    item = ViewClips([record(tmp_path / "a")], num_frames=2, stride=1, size=16, clips=2, crops=3)[0]
    found = [(frames[0], left) for frames, _, left in seen(item, 2)]
    assert found == [(0, 0), (0, 10), (0, 20), (18, 0), (18, 10), (18, 20)]


def test_a_clip_that_is_too_short_shows_its_last_frame_and_is_counted(tmp_path: Path) -> None:
    clips = ViewClips([record(tmp_path / "a", stop=5)], num_frames=4, stride=3, size=16)
    assert [frames for frames, *_ in seen(clips[0], 4)] == [[0, 3, 4, 4]]
    assert clips.faults.clamped_frames == 2


def test_frames_are_resized_by_their_short_side(tmp_path: Path) -> None:
    item = ViewClips([record(tmp_path / "a", size=(32, 72))], num_frames=1, stride=1, size=16, crops=3)[0]
    left = item["rgb"][2, :, 8, 0].float()
    assert torch.allclose(left, torch.tensor([0.5, 20.5, 40.5]), atol=1)
    assert item["rgb"].shape == (3, 3, 16, 16)


def test_a_video_file_is_cut_as_its_frames_are(tmp_path: Path) -> None:
    write_clip(tmp_path / "a.mp4", 12)
    own = ViewClips([ClipRecord(0, "a", {"rgb": tmp_path / "a.mp4"})], num_frames=2, stride=3, size=24, crops=4)[0]
    whole = frames_module.read_frames(ClipRecord(0, "a", {"rgb": tmp_path / "a.mp4"}), "rgb", [4, 7], (24, 40)).pixels
    for view, left in zip(own["rgb"].split(2, 1), (0, 4, 8, 16), strict=True):
        assert torch.equal(view, whole[..., left : left + 24])


def test_what_cannot_be_read_or_makes_no_sense_is_said(tmp_path: Path) -> None:
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    with pytest.raises(ClipError, match="no container format"):
        ViewClips([ClipRecord(0, "bad", {"rgb": tmp_path / "bad.mp4"})])[0]
    with pytest.raises(ValueError, match="crops must be one of 1, 3, 4, got 2"):
        ViewClips([], crops=2)
    with pytest.raises(ValueError, match="clips must be at least 1, got 0"):
        ViewClips([], clips=0)


# -- what training draws -----------------------------------------------------------------------------------------------


def test_frames_are_drawn_from_every_part_of_a_clip(tmp_path: Path) -> None:
    clips = ClipDataset(
        [record(tmp_path / "a")], num_frames=4, stride=None, train=True, size=16, position="parts", augment="none"
    )
    drawn = []
    for epoch in range(60):
        clips.set_epoch(epoch)
        drawn.append((clips[0]["rgb"][0, :, 0, 0] // 3).tolist())
    for part in range(4):
        assert {frames[part] for frames in drawn} == set(range(5 * part, 5 * part + 5))
    still = ClipDataset([record(tmp_path / "a")], num_frames=4, stride=None, size=16, position="parts")
    assert (still[0]["rgb"][0, :, 0, 0] // 3).tolist() == [2, 7, 12, 17]


def test_parts_and_a_stride_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="stride must be None, got 4"):
        ClipDataset([], stride=4, position="parts")


def test_a_jittered_short_side_gives_square_crops_of_every_size_and_place() -> None:
    augmentation = Augmentation(short_side=(1.0, 1.25), flip=0.5)
    crops = [augmentation.draw(torch.Generator().manual_seed(i)).crop(100, 180) for i in range(300)]
    sides = [round(crop.height * 100) for crop in crops]
    assert sides == [round(crop.width * 180) for crop in crops]
    assert (min(sides), max(sides)) == (80, 100)
    lefts = [crop.left + crop.width / 2 for crop in crops]
    assert min(lefts) < 0.25
    assert max(lefts) > 0.75
    assert 100 < sum(crop.flip for crop in crops) < 200


def test_without_jitter_the_crop_is_the_short_side() -> None:
    crop = Augmentation(short_side=(1.0, 1.0), flip=0.0).draw(torch.Generator().manual_seed(0)).crop(90, 60)
    assert (crop.height, crop.width, crop.left) == (60 / 90, 1.0, 0.0)
    assert isinstance(crop, Crop)


@pytest.mark.parametrize("range_", [(0.9, 1.0), (1.2, 1.1), (1.0, float("inf"))], ids=str)
def test_a_jitter_that_makes_no_sense_is_refused(range_: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="short_side must be"):
        Augmentation(short_side=range_)
