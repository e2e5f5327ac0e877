"""Pixels of a record: video files, numbered pictures and arrays, folders; frames that are not there, and clips that are not."""

import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from frame_files import Image, array_frame, scene, write_frame, write_record

from mmfast.data.frames import ClipError, frame_path, frame_range, is_template, read_frames
from mmfast.data.records import ClipRecord
from mmfast.data.video import resize_frames


def _record(modality: str, source: Path | str) -> ClipRecord:
    return ClipRecord(4, "the clip", {modality: source})


def _scenes(*numbers: int) -> torch.Tensor:
    return torch.from_numpy(np.stack([scene(n) for n in numbers])).permute(3, 0, 1, 2)


# -- pictures ----------------------------------------------------------------------------------------------------------


def test_numbered_pictures_in_the_order_asked_for(tmp_path: Path) -> None:
    record = write_record(tmp_path)
    found = read_frames(record, "rgb", [3, 1, 8, 1])
    assert torch.equal(found.pixels, _scenes(3, 1, 8, 1))
    assert (found.missing, found.size) == (0, (48, 80))


@pytest.mark.parametrize("resize", ["squash", "crop"])
def test_pictures_are_resized_as_by_the_video_reader(tmp_path: Path, resize: str) -> None:
    found = read_frames(write_record(tmp_path), "rgb", [2, 5], (32, 32), resize=resize)
    wanted = resize_frames(_scenes(2, 5).permute(1, 2, 3, 0), (32, 32), resize)
    assert torch.equal(found.pixels, wanted.permute(3, 0, 1, 2))
    assert found.pixels.permute(1, 2, 3, 0).is_contiguous()


def test_squashed_pictures_match_pillow(tmp_path: Path) -> None:
    found = read_frames(write_record(tmp_path), "rgb", [2], (32, 32)).pixels[:, 0].permute(1, 2, 0)
    by_pillow = np.asarray(Image.fromarray(scene(2)).resize((32, 32), Image.Resampling.BILINEAR))
    assert int((found.int() - torch.from_numpy(by_pillow.copy()).int()).abs().max()) <= 1


def test_jpegs_and_grey_pictures_become_rgb(tmp_path: Path) -> None:
    record = write_record(tmp_path, kind="jpg")
    Image.fromarray(scene(2)).convert("L").save(frame_path(record.sources["rgb"], 2))
    pixels = read_frames(record, "rgb", [1, 2]).pixels
    assert int((pixels[:, 0].int() - _scenes(1)[:, 0].int()).abs().max()) < 40
    assert torch.equal(pixels[0, 1], pixels[2, 1])


def test_a_folder_goes_by_the_numbers_in_its_names(tmp_path: Path) -> None:
    for number in (9, 10, 11, 13):
        write_frame(tmp_path / f"img2_{number}.png", "rgb", number)
    (tmp_path / "notes.txt").write_text("no frame")
    (tmp_path / ".img2_99.png").write_bytes(b"hidden")
    record = _record("rgb", tmp_path)
    assert frame_range(record, "rgb") == (9, 14)
    found = read_frames(record, "rgb", [10, 11, 12, 13])
    assert torch.equal(found.pixels, _scenes(10, 11, 11, 13))
    assert found.missing == 1


def test_fit_sees_one_stored_frame_at_a_time(tmp_path: Path) -> None:
    seen = []

    def fit(clip: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(clip.shape))
        return clip[:, :, 3:20, 5:30]

    found = read_frames(write_record(tmp_path), "rgb", [1, 4], (7, 7), fit=fit)
    assert torch.equal(found.pixels, _scenes(1, 4)[:, :, 3:20, 5:30])
    assert seen == [(3, 1, 48, 80)] * 2


def test_pyav_reads_pictures_where_pillow_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("av")
    record = write_record(tmp_path)
    frame_path(record.sources["rgb"], 3).write_bytes(b"no picture")
    monkeypatch.setitem(sys.modules, "PIL", None)
    found = read_frames(record, "rgb", [2, 3])
    assert int((found.pixels.int() - _scenes(2, 2).int()).abs().max()) <= 2
    assert found.missing == 1


def test_neither_pillow_nor_pyav_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = write_record(tmp_path)
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match="pip install pillow"):
        read_frames(record, "rgb", [2])


# -- frames that are not there -----------------------------------------------------------------------------------------


def test_a_missing_frame_repeats_the_one_before(tmp_path: Path) -> None:
    record = write_record(tmp_path, numbers=[1, 2, 5])
    found = read_frames(record, "rgb", [1, 2, 3, 4, 5, 6])
    assert torch.equal(found.pixels, _scenes(1, 2, 2, 2, 5, 5))
    assert found.missing == 3


@pytest.mark.usefixtures("poisoned_empty")
def test_missing_at_the_start_shows_the_first_that_is_there(tmp_path: Path) -> None:
    record = write_record(tmp_path, modalities=("rgb", "flow"), numbers=[3, 4])
    for modality in ("rgb", "flow"):
        found = read_frames(record, modality, [1, 2, 3, 4])
        assert torch.equal(found.pixels[:, :2], found.pixels[:, 2:3].expand_as(found.pixels[:, :2]))
        assert bool(found.pixels.float().isfinite().all())
        assert found.missing == 2


def test_a_missing_frame_asked_for_twice(tmp_path: Path) -> None:
    record = write_record(tmp_path, numbers=[1, 2])
    found = read_frames(record, "rgb", [1, 1, 7, 7, 2, 1])
    assert torch.equal(found.pixels, _scenes(1, 1, 1, 1, 2, 1))
    assert found.missing == 2


@pytest.mark.parametrize("damage", [b"", b"no picture", None], ids=["empty", "text", "cut"])
def test_a_damaged_picture_counts_as_missing(tmp_path: Path, damage: bytes | None) -> None:
    record = write_record(tmp_path, kind="jpg")
    path = frame_path(record.sources["rgb"], 3)
    path.write_bytes(path.read_bytes()[:200] if damage is None else damage)
    found = read_frames(record, "rgb", [2, 3, 4])
    assert found.missing == 1
    assert torch.equal(found.pixels[:, 1], found.pixels[:, 0])


@pytest.mark.parametrize("damage", ["cut", "text", "nan", "infinite"])
def test_a_damaged_array_counts_as_missing(tmp_path: Path, damage: str) -> None:
    record = write_record(tmp_path, modalities=["flow"])
    path = frame_path(record.sources["flow"], 3)
    if damage in ("nan", "infinite"):
        np.save(path, np.full((28, 28, 2), np.nan if damage == "nan" else np.inf, dtype=np.float32))
    else:
        path.write_bytes(path.read_bytes()[:600] if damage == "cut" else b"not numpy's")
    found = read_frames(record, "flow", [2, 3, 4])
    assert found.missing == 1
    assert torch.equal(found.pixels[:, 1], found.pixels[:, 0])


def test_a_clip_without_a_frame_is_an_error_that_says_the_first_path(tmp_path: Path) -> None:
    record = write_record(tmp_path)
    with pytest.raises(
        ClipError, match=r"clip-0: rgb: none of its 2 frames can be read; .*frame_000030.png: no such file"
    ):
        read_frames(record, "rgb", [30, 31, 31])


def test_the_error_survives_processes(tmp_path: Path) -> None:
    error = ClipError("the clip", "the reason")
    again = pickle.loads(pickle.dumps(error))
    assert (again.name, again.reason, str(again)) == ("the clip", "the reason", "the clip: the reason")
    assert str(ClipError("text of a data loader")) == "text of a data loader"  # it rebuilds errors from one argument


# -- arrays ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("modality", ["flow", "pose"])
def test_numbered_arrays(tmp_path: Path, modality: str) -> None:
    record = write_record(tmp_path, modalities=[modality])
    found = read_frames(record, modality, [4, 2])
    wanted = np.stack([array_frame(modality, n) for n in (4, 2)]).transpose(3, 0, 1, 2)
    assert torch.equal(found.pixels, torch.from_numpy(wanted.copy()))
    assert found.size == wanted.shape[2:]


@pytest.mark.parametrize("kind", ["npy", "npz", "pt"])
def test_a_whole_clip_in_one_array(tmp_path: Path, kind: str) -> None:
    clip = np.stack([array_frame("flow", n) for n in range(6)]).astype(np.float16)
    path = tmp_path / f"flow.{kind}"
    if kind == "npy":
        np.save(path, clip)
    elif kind == "npz":
        np.savez_compressed(path, flow=clip)
    else:
        torch.save(torch.from_numpy(clip), path)
    record = _record("flow", path)
    found = read_frames(record, "flow", [0, 5, 6])
    assert found.pixels.dtype == torch.float32
    assert torch.equal(found.pixels, torch.from_numpy(clip[[0, 5, 5]].astype(np.float32)).permute(3, 0, 1, 2))
    assert found.missing == 1
    assert frame_range(record, "flow") == (0, 6)


def test_arrays_are_resized(tmp_path: Path) -> None:
    record = write_record(tmp_path, modalities=["pose"])
    found = read_frames(record, "pose", [1, 2], (7, 7))
    stored = read_frames(record, "pose", [1, 2]).pixels
    wanted = torch.nn.functional.interpolate(stored, (7, 7), mode="bilinear", antialias=True)
    torch.testing.assert_close(found.pixels, wanted)


def test_a_folder_of_arrays(tmp_path: Path) -> None:
    for number in (5, 6):
        write_frame(tmp_path / f"{number:06d}.npy", "flow", number)
    assert frame_range(_record("flow", tmp_path), "flow") == (5, 7)
    found = read_frames(_record("flow", tmp_path), "flow", [6])
    assert torch.equal(found.pixels[:, 0], torch.from_numpy(array_frame("flow", 6)).permute(2, 0, 1))


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        (np.zeros((28, 28, 3), np.float32), r"must be \[H, W, 2\], got \(28, 28, 3\)"),
        (np.zeros((28, 28), np.float32), r"must hold numbers \[H, W, C\], one frame; got float32 \(28, 28\)"),
        (np.full((2, 2, 2), "text"), "must hold numbers"),
    ],
)
def test_an_array_of_another_kind_is_an_error(tmp_path: Path, stored: np.ndarray, message: str) -> None:
    np.save(tmp_path / "000001.npy", stored)
    with pytest.raises(ClipError, match=message):
        read_frames(_record("flow", f"{tmp_path}/{{:06d}}.npy"), "flow", [1, 1])


def test_arrays_that_change_size_are_an_error(tmp_path: Path) -> None:
    record = write_record(tmp_path, modalities=["flow"])
    np.save(frame_path(record.sources["flow"], 3), np.zeros((14, 14, 2), np.float32))
    with pytest.raises(ClipError, match="frame size changes within the clip, at frame 3"):
        read_frames(record, "flow", [2, 3])


def test_pickled_arrays_are_not_opened(tmp_path: Path) -> None:
    np.save(tmp_path / "000001.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ClipError, match="damaged"):
        read_frames(_record("flow", f"{tmp_path}/{{:06d}}.npy"), "flow", [1])


# -- videos ------------------------------------------------------------------------------------------------------------


def _video(tmp_path: Path, frames: int = 12) -> tuple[Path, torch.Tensor]:
    pytest.importorskip("av")
    from video_files import decode_all, write_clip

    path = write_clip(tmp_path / "clip.mp4", frames)
    return path, torch.from_numpy(decode_all(path))


def test_a_video_gives_its_frames(tmp_path: Path) -> None:
    path, frames = _video(tmp_path)
    record = _record("rgb", path)
    found = read_frames(record, "rgb", [7, 2], (32, 32))
    assert torch.equal(found.pixels, resize_frames(frames[[7, 2]], (32, 32)).permute(3, 0, 1, 2))
    assert (frame_range(record, "rgb"), found.size) == ((0, 12), (48, 80))


def test_past_a_videos_end_repeats_and_counts(tmp_path: Path) -> None:
    path, frames = _video(tmp_path)
    found = read_frames(_record("rgb", path), "rgb", [8, 10, 12, 14])
    assert torch.equal(found.pixels, frames[[8, 10, 10, 10]].permute(3, 0, 1, 2))
    assert found.missing == 2


def test_fit_sees_a_videos_stored_frames(tmp_path: Path) -> None:
    path, frames = _video(tmp_path)
    found = read_frames(_record("rgb", path), "rgb", [1, 3], (8, 8), fit=lambda clip: clip[:, :, ::2, 5:9])
    assert torch.equal(found.pixels, frames[[1, 3]].permute(3, 0, 1, 2)[:, :, ::2, 5:9])
    assert found.size == (48, 80)


def test_a_video_that_is_replaced_is_read_anew(tmp_path: Path) -> None:
    path, _ = _video(tmp_path)
    record = _record("rgb", path)
    assert frame_range(record, "rgb") == (0, 12)
    _video(tmp_path, 17)
    assert frame_range(record, "rgb") == (0, 17)


@pytest.mark.parametrize("what", ["absent", "text", "past"])
def test_a_video_that_cannot_be_read(tmp_path: Path, what: str) -> None:
    path, _ = _video(tmp_path)
    if what == "text":
        path.write_text("no video")
    record = _record("rgb", tmp_path / "absent.mp4" if what == "absent" else path)
    reason = {"absent": "no such file", "text": "not a video", "past": "frames 20 to 22 are past the end: 12 frames"}[
        what
    ]
    with pytest.raises(ClipError, match=f"the clip: rgb: .*{reason}"):
        read_frames(record, "rgb", [20, 22])


# -- sources -----------------------------------------------------------------------------------------------------------


def test_the_range_of_numbered_files(tmp_path: Path) -> None:
    folder = tmp_path / "take {1}"
    for number in (2, 3, 40):
        write_frame(folder / f"f_{number:04d}_x.png", "rgb", number)
    write_frame(folder / "f_0099.png", "rgb", 99)  # another name
    source = str(folder).replace("{", "{{").replace("}", "}}") + "/f_{:04d}_x.png"
    assert frame_range(_record("rgb", source), "rgb") == (2, 41)
    assert torch.equal(read_frames(_record("rgb", source), "rgb", [40]).pixels, _scenes(40))
    assert not is_template(str(folder).replace("{", "{{").replace("}", "}}"))


@pytest.mark.parametrize("source", ["nowhere/{:06d}.png", "nowhere", "empty", "{:03d}/x.png", "two"])
def test_the_range_of_nothing_is_an_error(tmp_path: Path, source: str) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("a_1.png", "b_1.png"):
        write_frame(tmp_path / "two" / name, "rgb", 1)
    message = {
        "empty": "no frames there",
        "{:03d}/x.png": "own name",
        "two": "two frames have number 1",
    }.get(source, "no such file")
    with pytest.raises(ClipError, match=f"the clip: rgb: .*{message}"):
        frame_range(_record("rgb", str(tmp_path / source)), "rgb")


def test_new_files_in_a_folder_are_seen(tmp_path: Path) -> None:
    write_frame(tmp_path / "1.png", "rgb", 1)
    assert frame_range(_record("rgb", tmp_path), "rgb") == (1, 2)
    write_frame(tmp_path / "2.png", "rgb", 2)
    assert frame_range(_record("rgb", tmp_path), "rgb") == (1, 3)


@pytest.mark.parametrize("source", ["x/{name}.png", "x/{:06d}_{:06d}.png", "x/{:06q}.png"])
def test_a_template_that_takes_no_number_is_an_error(source: str) -> None:
    with pytest.raises(ClipError, match="number field"):
        read_frames(_record("rgb", source), "rgb", [1])


def test_a_modality_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ClipError, match="clip-0: has no flow; it has rgb"):
        read_frames(write_record(tmp_path), "flow", [1])


@pytest.mark.parametrize(
    ("arguments", "message"), [(("depth", [1]), "modality must be one of"), (("rgb", []), "indices must name")]
)
def test_senseless_calls_are_refused(tmp_path: Path, arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        read_frames(write_record(tmp_path), *arguments)
    assert not isinstance(caught.value, ClipError)
