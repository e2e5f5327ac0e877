"""Decoding of video files: frame counts, frame-exact access, sampling, resizing."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import video_files
from hypothesis import given
from hypothesis import strategies as st

from mmfast.data import container, video
from mmfast.data.video import VideoError, decode_frames, load_clip, probe, resize_frames
from mmfast.data.video import sample_indices as sample

FILES: dict[str, dict[str, Any]] = {
    "mp4": dict(name="a.mp4"),
    "mkv without a frame count": dict(name="a.mkv"),
    "avi with B-frames": dict(name="a.avi", codec="mpeg4"),
    "open gop": dict(name="a.mkv", options={"x264-params": "open-gop=1"}),
    "intra refresh": dict(name="a.mkv", options={"x264-params": "intra-refresh=1:keyint=8"}),
    "edit list": dict(name="a.mp4", first_pts=-5, container_options={"avoid_negative_ts": "disabled"}),
    "mpeg-ts": dict(name="a.ts"),
    "vp9": dict(name="a.webm", codec="libvpx-vp9", options={"lag-in-frames": "16", "cpu-used": "8"}),
    "hevc": dict(name="a.mp4", codec="libx265", options={"x265-params": "log-level=none:open-gop=0"}),
    "hevc open gop": dict(name="a.mp4", codec="libx265", options={"x265-params": "log-level=none:open-gop=1"}),
    "intra only": dict(name="a.mkv", codec="mjpeg", b_frames=0),
}


@pytest.fixture(scope="module", params=FILES)
def any_file(request, tmp_path_factory) -> Path:
    options = dict(FILES[request.param])
    return video_files.write_clip(tmp_path_factory.mktemp("files") / options.pop("name"), **options)


@pytest.fixture(scope="module")
def mp4(tmp_path_factory) -> Path:
    return video_files.write_clip(tmp_path_factory.mktemp("mp4") / "clip.mp4")


@pytest.fixture
def no_decoding_from_start(monkeypatch) -> None:
    """Frames must be found from key frames: reading everything up to them fails the test."""

    def refuse(*_):
        raise AssertionError("decoded from the start of the file")

    monkeypatch.setattr(video, "_from_start", refuse)


# -- frame counts and frame-exact access --


def test_frames_are_counted_without_decoding(any_file):
    assert probe(any_file).frames == len(video_files.decode_all(any_file))


@pytest.mark.parametrize("indices", [[0], [18], [3, 4, 5], [16, 1, 9], [7, 7, 7], [8, 15, 8, 0]], ids=str)
def test_frames_equal_a_full_decode(any_file, indices):
    truth = video_files.decode_all(any_file)
    assert np.array_equal(decode_frames(any_file, indices).numpy(), truth[indices])


@pytest.mark.parametrize("threads", [0, 1, 2])
def test_every_single_frame_equals_a_full_decode(any_file, threads):
    truth = video_files.decode_all(any_file)
    for i, expected in enumerate(truth):
        assert np.array_equal(decode_frames(any_file, [i], threads=threads)[0].numpy(), expected), i


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_index_is_the_place_in_the_source(tmp_path, name):
    source = video_files.moving_frames(24)
    path = video_files.write_clip(tmp_path / name, source, options={"crf": "10"})
    for i in (0, 5, 11, 23):
        error = np.abs(decode_frames(path, [i]).numpy().astype(float) - source).mean(axis=(1, 2, 3))
        assert error.argmin() == i


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_closed_gops_are_entered_at_their_key_frame(tmp_path, name, no_decoding_from_start):
    path = video_files.write_clip(tmp_path / name)
    assert probe(path).keyframes == (0, 8, 16)
    assert np.array_equal(decode_frames(path, [21, 9]).numpy(), video_files.decode_all(path)[[21, 9]])


def test_late_frame_needs_only_the_packets_of_its_own_gop(tmp_path):
    path = video_files.write_clip(tmp_path / "a.mp4")
    ((first, last),) = video._packet_spans(probe(path), [17])
    assert first == 16
    assert last < 24


@pytest.mark.parametrize(
    ("refresh", "b_frames"),
    [("open-gop=1", 2), ("intra-refresh=1:keyint=8", 2), ("intra-refresh=1:keyint=8", 0)],
)
def test_key_frames_that_do_not_reset_the_decoder_are_not_trusted(tmp_path, refresh, b_frames):
    path = video_files.write_clip(tmp_path / "a.mkv", b_frames=b_frames, options={"x264-params": refresh})
    with video_files.av.open(str(path)) as file:
        assert sum(packet.is_keyframe for packet in file.demux(video=0)) > 2
    assert probe(path).keyframes == (0,)


@pytest.mark.parametrize(("name", "codec"), [("a.avi", "libx264"), ("a.mp4", "mpeg4")], ids=["container", "codec"])
def test_containers_and_codecs_without_proof_are_not_trusted(tmp_path, name, codec):
    assert probe(video_files.write_clip(tmp_path / name, codec=codec)).keyframes == ()


@pytest.mark.parametrize(
    ("times", "keys", "closed"),
    [
        ([0, 2, 1, 3, 5, 4], [0, 3], [0, 3]),
        ([0, 2, 1, 5, 4, 3, 6, 7], [0, 3, 6], [0, 6]),
        ([0, 1, 2, 9, 3, 10], [0, 4], [0]),
    ],
    ids=["closed", "later packet shown before the key", "earlier packet shown after the key"],
)
def test_only_closed_groups_are_entered(times, keys, closed):
    assert list(container._closed_keyframes(times, keys)) == closed


@pytest.mark.parametrize(("kind", "resets"), [(19, True), (20, True), (21, False), (1, False)])
def test_hevc_packet_resets_the_decoder_only_with_an_idr_picture(kind, resets):
    unit = bytes([kind << 1, 1, 0x80])
    assert container._resets_decoder("hevc", b"", b"\0\0\1\x40\1\0\0\1" + unit) is resets
    assert container._resets_decoder("hevc", b"\1" + bytes(20) + b"\3", b"\0\0\0\3" + unit) is resets


@pytest.mark.parametrize("lie", ["landing", "frame", "keyframes"])
def test_packets_other_than_promised_fall_back_to_the_start(mp4, lie):
    info = probe(mp4)
    moved = {"landing": range(24), "frame": [14], "keyframes": []}[lie]
    times = tuple(t + 3 * (i in moved) for i, t in enumerate(info.timestamps))
    info = replace(info, timestamps=times, keyframes=(0, 5, 13) if lie == "keyframes" else info.keyframes)
    assert np.array_equal(decode_frames(mp4, [14, 19], info=info).numpy(), video_files.decode_all(mp4)[[14, 19]])


def test_larger_second_stream_is_decoded(tmp_path):
    large = video_files.moving_frames(12, (64, 96), seed=1)
    path = video_files.write_two_streams(tmp_path / "two.mp4", video_files.moving_frames(9, (32, 48)), large)
    info = probe(path)
    assert (info.stream, info.frames, info.height, info.width) == (1, 12, 64, 96)
    assert np.array_equal(decode_frames(path, [3, 11]).numpy(), video_files.decode_all(path)[[3, 11]])


def test_sound_beside_the_pictures_is_ignored(tmp_path):
    path = video_files.write_video_with_audio(tmp_path / "talk.mp4", video_files.moving_frames(12))
    assert np.array_equal(decode_frames(path, [2, 10]).numpy(), video_files.decode_all(path)[[2, 10]])


def test_rotation_of_the_file_is_applied(tmp_path):
    upright = video_files.write_clip(tmp_path / "a.mp4", 4)
    turned = video_files.write_clip(tmp_path / "b.mp4", 4, rotation=90)
    assert torch.equal(decode_frames(turned, [2])[0], torch.rot90(decode_frames(upright, [2])[0]))


def test_probe_describes_the_file(mp4):
    info = probe(mp4)
    assert (info.codec, info.fps, info.width, info.height) == ("h264", 25.0, 80, 48)
    assert info.duration == pytest.approx(24 / 25)


def test_no_indices_give_no_frames(mp4):
    assert decode_frames(mp4, []).shape == (0, 48, 80, 3)


def test_name_with_a_colon_is_a_file_name(tmp_path):
    assert probe(video_files.write_clip(tmp_path / "a.mp4", 4).rename(tmp_path / "http: clip.mp4")).frames == 4


# -- sampling --


@given(total=st.integers(1, 2000), frames=st.integers(1, 64))
def test_uniform_samples_are_the_middles_of_equal_segments(total, frames):
    if total < frames:
        with pytest.raises(VideoError, match=f"{frames} frames, the video has {total}"):
            sample(total, frames)
        return
    assert sample(total, frames) == [int(np.floor((i + 0.5) * total / frames + 1e-9)) for i in range(frames)]


@given(total=st.integers(1, 300), frames=st.integers(1, 32), stride=st.integers(1, 8))
def test_dense_samples_are_centred(total, frames, stride):
    span = (frames - 1) * stride + 1
    if total < span:
        with pytest.raises(VideoError, match=f"span {span}, the video has {total}"):
            sample(total, frames, stride)
        return
    indices = sample(total, frames, stride)
    assert np.diff(indices).tolist() == [stride] * (frames - 1)
    assert 0 <= (total - 1 - indices[-1]) - indices[0] <= 1


def test_dense_samples_from_a_start():
    assert sample(30, 4, stride=3, start=20) == [20, 23, 26, 29]


def test_dense_samples_past_the_end_say_where():
    with pytest.raises(VideoError, match="span 10, the video has 30, 9 from frame 21 on"):
        sample(30, 4, stride=3, start=21)


def test_uniform_samples_of_the_part_from_a_start():
    assert sample(30, 4, start=22) == [23, 25, 27, 29]


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [("num_frames", 0, ValueError), ("stride", 0, ValueError), ("start", -1, ValueError), ("stride", 1.5, TypeError)],
)
def test_senseless_sampling_names_the_argument(name, value, error):
    with pytest.raises(error, match=name):
        sample(100, **{name: value})


# -- resizing --


@pytest.mark.parametrize("size", [(32, 32), (96, 60), (17, 90)])
def test_squash_is_within_one_grey_level_of_pil(size):
    Image = pytest.importorskip("PIL.Image")
    frame = video_files.moving_frames(1)[0]
    truth = np.asarray(Image.fromarray(frame).resize((size[1], size[0]), Image.Resampling.BILINEAR)).astype(int)
    ours = resize_frames(torch.from_numpy(frame)[None], size)[0].numpy().astype(int)
    assert np.abs(ours - truth).max() <= 1


@pytest.mark.parametrize("shape", [(48, 80), (80, 48), (48, 48), (33, 77)])
def test_crop_keeps_the_aspect_and_takes_the_centre(shape):
    Image = pytest.importorskip("PIL.Image")
    frame = video_files.moving_frames(1, shape)[0]
    height, width = shape
    short = 32
    resized = (short * width // height, short) if width >= height else (short, short * height // width)
    left, top = round((resized[0] - short) / 2), round((resized[1] - short) / 2)
    whole = np.asarray(Image.fromarray(frame).resize(resized, Image.Resampling.BILINEAR)).astype(int)
    ours = resize_frames(torch.from_numpy(frame)[None], (short, short), "crop")[0].numpy().astype(int)
    assert np.abs(ours - whole[top : top + short, left : left + short]).max() <= 1


def test_decoding_to_a_size_equals_resizing_what_was_decoded(mp4):
    whole = decode_frames(mp4, [4, 20])
    assert torch.equal(decode_frames(mp4, [4, 20], (24, 40), resize="crop"), resize_frames(whole, (24, 40), "crop"))


def test_clip_is_a_view_of_the_decoded_buffer(mp4):
    clip = load_clip(mp4, num_frames=6, size=32)
    frames = decode_frames(mp4, sample(24, 6), (32, 32))
    assert torch.equal(clip, frames.permute(3, 0, 1, 2))
    assert clip.permute(1, 2, 3, 0).is_contiguous()


def test_unknown_resize_is_refused(mp4):
    with pytest.raises(ValueError, match="resize must be one of .*'stretch'"):
        load_clip(mp4, resize="stretch")
