"""The data doctor: every kind of fault is found, counted and named, and one fault hides no other."""

import builtins
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mmfast.data import doctor
from mmfast.data.dataset import ClipDataset
from mmfast.data.doctor import check_records
from mmfast.data.records import AnnotationSet, ClipRecord

Image = pytest.importorskip("PIL.Image", reason="needs Pillow: pip install pillow")

SHAPES = {"flow": (8, 8, 2), "pose": (4, 4, 21)}
FRAMES = range(1, 33)


@pytest.fixture
def frames(tmp_path):
    """Frames 1 to 32 of one video: jpg, and npy of flow and heatmaps."""
    for folder in ("rgb", "flow", "pose"):
        (tmp_path / folder).mkdir()
    for n in FRAMES:
        Image.new("RGB", (8, 8), (n, 0, 0)).save(tmp_path / "rgb" / f"{n:04d}.jpg")
        np.save(tmp_path / "flow" / f"{n:04d}.npy", np.zeros(SHAPES["flow"], np.float32))
        np.save(tmp_path / "pose" / f"{n:04d}.npy", np.zeros(SHAPES["pose"], np.float32))
    return tmp_path


def _clip(folder: Path, start: int = 1, stop: int | None = None, name: str = "clip", **kinds: str) -> ClipRecord:
    kinds = kinds or {"rgb": "jpg", "flow": "npy", "pose": "npy"}
    return ClipRecord(0, name, {m: f"{folder}/{m}/{{:04d}}.{ext}" for m, ext in kinds.items()}, start, stop)


def _check(*records: ClipRecord, modalities=None, stride=2, decode=True, **options):
    return check_records(records, modalities, stride=stride, decode=decode, shapes=SHAPES, **options)


def _rgb(*records: ClipRecord, **options):
    report = _check(*records, modalities=("rgb",), **options)
    return report, report.modalities["rgb"]


# -- a clean set --


def test_a_clean_set_has_no_faults(frames):
    report = _check(_clip(frames, 1, 32), _clip(frames, 2))
    assert (report.ok, report.exit_status, report.usable) == (True, 0, 2)
    assert list(report.modalities) == ["rgb", "flow", "pose"]
    assert str(report) == (
        "2 clips, 16 frames 2 apart; files opened\n"
        "  rgb   2 of 2 clips fine\n"
        "  flow  2 of 2 clips fine\n"
        "  pose  2 of 2 clips fine\n"
        "  2 clips without a label\n"
        "no faults"
    )


def test_the_set_s_own_stride_is_taken(frames):
    records = AnnotationSet([_clip(frames)], stride=3, dataset="mine")
    report = check_records(records, ("rgb",))
    assert (report.stride, report.dataset) == (3, "mine")
    assert report.modalities["rgb"].absent_frames == 5


# -- missing and short --


@pytest.mark.parametrize("decode", [False, True])
def test_frames_without_a_file_make_a_clip_short(frames, decode):
    report, found = _rgb(_clip(frames, 21), _clip(frames, 1), decode=decode)
    assert (found.counts, found.absent_frames) == ({"short": 1}, 10)
    assert report.exit_status == 1
    assert "10 of 16 frames, from 21 on, cannot be found" in str(report)


@pytest.mark.parametrize("decode", [False, True])
def test_a_clip_without_any_frame_is_missing(frames, decode):
    _, found = _rgb(_clip(frames, 100), decode=decode)
    assert (found.counts, found.absent_frames) == ({"missing": 1}, 0)


def test_a_folder_called_otherwise_shows_in_the_report(frames):
    record = ClipRecord(0, "x", {"pose": f"{frames}/hand-pose/heatmap/{{:06d}}.npy"}, 1)
    text = str(_check(record))
    assert f"x: none of frames 1 to 31 is there: {frames}/hand-pose/heatmap/000001.npy" in text
    assert f"{frames} holds flow, pose, rgb, no hand-pose" in text


def test_names_of_another_length_show_in_the_report(frames):
    text = str(_check(ClipRecord(0, "x", {"rgb": f"{frames}/rgb/{{:06d}}.jpg"}, 1)))
    assert "rgb holds 0001.jpg, 0002.jpg, 0003.jpg, ..., no 000001.jpg" in text


def test_samples_past_the_clip_s_end_are_counted_as_repeats(frames):
    _, found = _rgb(_clip(frames, 1, 21))
    assert (found.counts, found.past_end_frames, found.absent_frames) == ({"short": 1}, 6, 0)


def test_samples_past_the_end_of_a_whole_clip_are_counted_as_repeats(frames):
    _, found = _rgb(_clip(frames, 0), stride=3)
    assert (found.counts, found.past_end_frames) == ({"short": 1}, 5)


def test_a_clip_of_fewer_frames_than_samples_is_short_when_spread(frames):
    _, found = _rgb(_clip(frames, 1, 11), _clip(frames, 0), _clip(frames, 1, 17), stride=None)
    assert (found.counts, found.past_end_frames) == ({"short": 1}, 6)


def test_a_clip_without_an_end_cannot_be_spread(frames):
    report, found = _rgb(_clip(frames, 3), stride=None)
    assert found.counts == {"unreadable": 1}
    assert "has no stop: a stride is needed" in str(report)


def test_a_modality_that_a_record_lacks_is_missing(frames):
    report = _check(_clip(frames, rgb="jpg"), modalities=("rgb", "flow"))
    assert report.modalities["flow"].examples["missing"] == ["clip: has no flow; it has rgb"]
    assert report.usable == 0


def test_a_missing_clip_is_not_short_as_well(frames):
    _, found = _rgb(_clip(frames, 100, 105))
    assert (found.counts, found.past_end_frames) == ({"missing": 1}, 0)


def test_the_doctor_counts_what_training_finds(frames):
    for n in (4, 9, 10, 11, 27):
        (frames / "rgb" / f"{n:04d}.jpg").unlink()
    bounds = [(1, None), (1, 20), (0, None), (3, 5), (21, None), (100, None), (9, 12), (30, 60)]
    records = [replace(_clip(frames, *b, name=str(i)), clip_id=i) for i, b in enumerate(bounds)]
    trained = ClipDataset(records, stride=2, size=8, on_broken="skip")
    for i in range(len(trained)):
        trained[i]
    _, found = _rgb(*records, examples=10)
    assert found.absent_frames == trained.faults.missing_frames > 0
    assert found.past_end_frames == trained.faults.clamped_frames > 0
    assert [example.split(":")[0] for example in found.examples["missing"]] == list(trained.faults.broken)


# -- folders --


def test_a_folder_of_frames_goes_by_their_numbers(frames):
    (frames / "rgb" / "0005.jpg").unlink()
    _, found = _rgb(ClipRecord(0, "x", {"rgb": frames / "rgb"}), stride=1)
    assert (found.counts, found.absent_frames) == ({"short": 1}, 1)


@pytest.mark.parametrize("source", ["empty", "empty/{:04d}.jpg", "none/{:04d}.jpg", "none"])
def test_a_folder_without_frames_is_missing(tmp_path, source):
    (tmp_path / "empty").mkdir()
    _, found = _rgb(ClipRecord(0, "x", {"rgb": f"{tmp_path}/{source}"}))
    assert found.counts == {"missing": 1}


def test_a_folder_that_cannot_be_read_does_not_stop_the_check(frames, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied", "rgb")

    monkeypatch.setattr(doctor, "_numbered", refuse)
    _, found = _rgb(ClipRecord(0, "x", {"rgb": frames / "rgb"}), _clip(frames))
    assert (found.counts, found.clips) == ({"unreadable": 1}, 2)


# -- unreadable and odd --


def test_a_damaged_picture_is_unreadable_only_when_opened(frames):
    path = frames / "rgb" / "0003.jpg"
    path.write_bytes(path.read_bytes()[:200])
    assert _rgb(_clip(frames), decode=False)[0].ok
    report, found = _rgb(_clip(frames))
    assert found.counts == {"unreadable": 1}
    assert "0003.jpg" in str(report)


def test_a_picture_is_opened_without_pillow_too(frames, monkeypatch):
    pytest.importorskip("av", reason="needs PyAV: pip install mmfast[video]")
    real = builtins.__import__

    def without_pillow(name, *args, **kwargs):
        if name.split(".")[0] == "PIL":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_pillow)
    (frames / "rgb" / "0003.jpg").write_bytes(b"this is not a picture")
    assert _rgb(_clip(frames, 4))[1].counts == {"short": 1}
    assert _rgb(_clip(frames, 1))[1].counts == {"unreadable": 1}


def test_an_empty_file_is_unreadable_without_opening(frames):
    (frames / "rgb" / "0003.jpg").write_bytes(b"")
    report, found = _rgb(_clip(frames), decode=False)
    assert found.counts == {"unreadable": 1, "short": 1}
    assert "0003.jpg: empty file (0 bytes)" in str(report)


@pytest.mark.parametrize(
    ("array", "kind", "said"),
    [
        (np.zeros((9, 8, 2), np.float32), "odd", r"is \(9, 8, 2\), published are \(8, 8, 2\)"),
        (np.zeros((8, 8, 2), np.uint8), "odd", "holds uint8, published are floats"),
        (np.zeros((2, 8, 8), np.float32), "unreadable", r"\[H, W, 2\]"),
        (np.zeros((8, 8), np.float32), "unreadable", "must hold numbers"),
        (np.full((8, 8, 2), np.nan, np.float32), "unreadable", "NaN"),
        (np.array([None]), "unreadable", "not an array, or damaged"),
    ],
    ids=["size", "dtype", "channels first", "two dimensions", "nan", "pickled"],
)
def test_an_array_of_another_kind_is_found(frames, array, kind, said):
    np.save(frames / "flow" / "0003.npy", array, allow_pickle=True)
    found = _check(_clip(frames), modalities=("flow",)).modalities["flow"]
    assert found.counts == {kind: 1}
    assert re.search(said, found.examples[kind][0])


def test_a_truncated_array_is_unreadable(frames):
    path = frames / "pose" / "0003.npy"
    path.write_bytes(path.read_bytes()[:-8])
    assert _check(_clip(frames)).modalities["pose"].counts == {"unreadable": 1}


def test_shapes_may_be_one_s_own(frames):
    report = check_records([_clip(frames)], ("flow",), stride=1, decode=True, shapes={})
    assert report.ok


def test_an_array_of_the_whole_clip_is_measured(tmp_path):
    np.save(tmp_path / "flow.npy", np.zeros((20, *SHAPES["flow"]), np.float32))
    record = ClipRecord(0, "x", {"flow": tmp_path / "flow.npy"})
    assert _check(record, stride=1).ok
    assert _check(record).modalities["flow"].past_end_frames == 6
    assert _check(record, decode=False).ok


# -- videos --


@pytest.fixture(scope="module")
def video(tmp_path_factory) -> Path:
    video_files = pytest.importorskip("video_files")
    return video_files.write_clip(tmp_path_factory.mktemp("video") / "clip.mp4", 24)


def test_a_video_s_frames_are_counted_when_opened(video):
    records = [ClipRecord(i, f"from {i}", {"rgb": video}, i, i + 20) for i in (0, 9, 30)]
    assert _rgb(*records, stride=1, decode=False)[0].ok
    report, found = _rgb(*records, stride=1)
    assert (found.counts, found.absent_frames) == ({"short": 1, "missing": 1}, 1)
    assert "from 30: none of frames 30 to 45 is there" in str(report)


def test_a_whole_video_that_is_too_short_is_short(video):
    assert _rgb(ClipRecord(0, "x", {"rgb": video}), stride=2)[1].past_end_frames == 4


def test_a_clip_s_end_is_looked_at_without_opening_its_video(video):
    assert _rgb(ClipRecord(0, "x", {"rgb": video}, 2, 12), stride=1, decode=False)[1].past_end_frames == 6


def test_damaged_and_missing_videos_are_told_apart(video, tmp_path):
    (tmp_path / "cut.mp4").write_bytes(video.read_bytes()[:900])
    (tmp_path / "empty.mp4").write_bytes(b"")
    records = [ClipRecord(i, n, {"rgb": tmp_path / n}) for i, n in enumerate(("cut.mp4", "none.mp4", "empty.mp4"))]
    report, found = _rgb(*records, ClipRecord(3, "clip", {"rgb": video}), stride=1)
    assert found.counts == {"unreadable": 2, "missing": 1}
    assert report.usable == 1
    assert "none.mp4: no such file" in str(report)


# -- the report --


def test_only_the_first_examples_are_named(frames):
    report, _ = _rgb(*(_clip(frames, 100 + i, name=f"clip {i}") for i in range(70)), examples=2)
    text = str(report)
    assert "missing: clip 0: " in text
    assert "missing: clip 1: " in text
    assert "clip 2: " not in text
    assert "missing: and 68 more" in text


def test_the_smallest_class_is_named(frames):
    records = [
        ClipRecord(i, str(i), _clip(frames).sources, 1, label=n, label_name="ab"[n]) for i, n in enumerate((1, 0, 1))
    ]
    report = _check(*records)
    assert report.classes == {"a": 1, "b": 2}
    assert "2 classes, the smallest, 'a', with 1 clips" in str(report)


def test_the_report_goes_into_json(frames):
    report = json.loads(json.dumps(_check(_clip(frames, 21)).as_dict()))
    assert report["modalities"]["rgb"]["short"] == 1
    assert report["usable"] == 0


def test_a_bar_counts_every_clip(frames, capfd):
    _check(*[_clip(frames)] * 40, progress=True)
    assert "40/40" in capfd.readouterr().err


def test_an_interrupt_ends_the_check(frames, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor.Findings, "_add", interrupt)
    with pytest.raises(KeyboardInterrupt):
        _check(*[_clip(frames)] * 100, workers=2)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"modalities": ("depth",)}, "modalities must be some of rgb, flow, pose, got depth"),
        ({"num_frames": 0}, "num_frames must be at least 1, got 0"),
        ({"stride": 0}, "stride must be at least 1"),
        ({"workers": 0}, "workers must be at least 1"),
    ],
)
def test_a_wrong_argument_is_refused(frames, options, match):
    with pytest.raises(ValueError, match=match):
        check_records([_clip(frames)], **options)


def test_no_records_are_refused():
    with pytest.raises(ValueError, match="records must hold at least one clip"):
        check_records([])
