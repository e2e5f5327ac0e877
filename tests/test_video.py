"""Decoding of video files: frame counts, frame-exact access, sampling, resizing, one clear error for each bad file."""

import pickle
import subprocess
import sys
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
from mmfast.data.video import ClipStream, VideoError, decode_frames, find_videos, load_clip, probe, resize_frames
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


# -- errors --


def _bad_files(folder: Path) -> dict[str, tuple[Path, str]]:
    """name -> (file, what the message says)."""
    good = video_files.write_clip(folder / "good.mp4", container_options={"movflags": "faststart"})
    plain = video_files.write_clip(folder / "plain.mp4")
    mkv = video_files.write_clip(folder / "good.mkv")
    avi = video_files.write_clip(folder / "good.avi", codec="mpeg4")
    text, empty = folder / "text.mp4", folder / "empty.mp4"
    text.write_text("not a video at all\n" * 50)
    empty.touch()
    playlist = folder / "playlist.mp4"
    playlist.write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{good}\n#EXT-X-ENDLIST\n")
    return {
        "missing": (folder / "nowhere.mp4", "no such file"),
        "folder": (folder, "is a folder"),
        "empty": (empty, "empty file"),
        "text": (text, "not a video"),
        "playlist": (playlist, "not a video"),
        "wav": (video_files.write_audio(folder / "a.wav", "pcm_s16le"), "audio only"),
        "m4a": (video_files.write_audio(folder / "a.m4a", "aac"), "audio only"),
        "cover": (video_files.write_audio_with_cover(folder / "cover.m4a"), "audio only"),
        "short": (video_files.write_clip(folder / "short.mp4", 5), "too short: 16 frames, the video has 5"),
        "mp4 cut before its index": (video_files.cut(plain, folder / "cut1.mp4", 0.6), "truncated"),
        "mp4 cut after its index": (video_files.cut(good, folder / "cut2.mp4", 0.6), "truncated"),
        "mkv cut": (video_files.cut(mkv, folder / "cut.mkv", 0.6), "truncated"),
        "avi cut": (video_files.cut(avi, folder / "cut.avi", 0.6), "truncated"),
        "mp4 of noise": (video_files.damage(good, folder / "noise.mp4", 0.5), "corrupt"),
        "mp4 with a broken header": (video_files.damage(good, folder / "header.mp4", 0.002), "corrupt"),
    }


@pytest.fixture(scope="module")
def bad_files(tmp_path_factory) -> dict[str, tuple[Path, str]]:
    return _bad_files(tmp_path_factory.mktemp("bad"))


BAD = [
    *("missing", "folder", "empty", "text", "playlist", "wav", "m4a", "cover", "short"),
    *("mp4 cut before its index", "mp4 cut after its index", "mkv cut", "avi cut", "mp4 of noise"),
    "mp4 with a broken header",
]


@pytest.mark.parametrize("name", BAD)
def test_bad_file_says_what_is_wrong_with_it(bad_files, name):
    path, reason = bad_files[name]
    with pytest.raises(VideoError, match=reason) as caught:
        load_clip(path)
    assert caught.value.path == path
    assert str(caught.value).startswith(str(path))


def test_mp4_cut_between_two_packets_is_truncated(tmp_path):
    path = video_files.write_clip(tmp_path / "a.mp4", container_options={"movflags": "faststart"})
    with video_files.av.open(str(path)) as file:
        end = [packet.pos + packet.size for packet in file.demux(video=0) if packet.size][12]
    path.write_bytes(path.read_bytes()[:end])
    with pytest.raises(VideoError, match="truncated: the header promises 24 frames, the data ends after 13"):
        probe(path)


def test_denied_permission_is_said(mp4, monkeypatch):
    def deny(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", deny)
    with pytest.raises(VideoError, match="permission denied"):
        probe(mp4)


def test_index_past_the_end_is_refused(mp4):
    with pytest.raises(VideoError, match="frame 24 is past the end: 24 frames"):
        decode_frames(mp4, [3, 24])


def test_fewer_frames_than_packets_is_an_error(mp4):
    info = replace(probe(mp4), frames=30, keyframes=())
    with pytest.raises(VideoError, match="30 frames in the container, only 24 decode"):
        decode_frames(mp4, [27], info=info)


def test_error_survives_pickling():
    error = pickle.loads(pickle.dumps(VideoError("a.mp4", "broken")))
    assert (str(error), error.path, error.reason) == ("a.mp4: broken", Path("a.mp4"), "broken")


def test_without_pyav_the_error_says_how_to_install_it(mp4, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match=r"pip install mmfast\[video\]"):
        probe(mp4)


def test_importing_the_reader_leaves_pyav_alone():
    code = "import sys, mmfast.data.video, mmfast.data.synthetic; sys.exit('av' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@given(data=st.binary(min_size=1, max_size=400))
def test_random_packets_never_break_the_nal_scan(data):
    for extradata in (b"", b"\x01d\x00\n\xff\xe1", bytes([1]) + bytes(22)):
        for codec in ("h264", "hevc"):
            assert container._resets_decoder(codec, extradata, data) in (True, False)


# -- many files --


def test_folders_are_searched_in_order_of_names(tmp_path):
    for name in ("b/2.MP4", "b/1.mkv", "a.avi", "notes.txt", "b/.hidden.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert find_videos(tmp_path) == [tmp_path / "a.avi", tmp_path / "b/1.mkv", tmp_path / "b/2.MP4"]


def test_named_file_is_taken_whatever_its_extension(tmp_path):
    (tmp_path / "clip.bin").touch()
    assert find_videos([str(tmp_path / "clip.bin")]) == [tmp_path / "clip.bin"]


def test_missing_path_is_named(tmp_path):
    with pytest.raises(VideoError, match="nowhere: no such file or folder"):
        find_videos(tmp_path / "nowhere")


def test_folder_without_videos_is_an_error(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(VideoError, match=r"no video in this folder.*\.mp4"):
        find_videos([tmp_path])


@pytest.mark.parametrize("workers", [1, 3])
def test_stream_gives_every_good_clip_in_order(mp4, bad_files, workers):
    paths = [mp4, bad_files["text"][0], mp4, bad_files["short"][0], bad_files["mkv cut"][0], mp4]
    stream = ClipStream(paths, size=32, workers=workers, prefetch=1)
    got = list(stream)
    assert [index for index, _, _ in got] == [0, 2, 5]
    assert all(torch.equal(clip, load_clip(mp4, size=32)) for _, _, clip in got)
    assert [path for path, _ in stream.failures] == [paths[1], paths[3], paths[4]]


def test_stream_sums_up_what_it_skipped(mp4, bad_files):
    stream = ClipStream([mp4, bad_files["empty"][0]], size=32)
    list(stream)
    assert stream.summary() == f"read 1 of 2 videos, skipped 1:\n  {bad_files['empty'][0]}: empty file (0 bytes)"


def test_second_pass_counts_its_own_failures(mp4, bad_files):
    stream = ClipStream([bad_files["empty"][0], mp4], size=32)
    list(stream)
    list(stream)
    assert len(stream.failures) == 1


def test_stream_reads_no_further_ahead_than_asked(mp4, monkeypatch):
    started, load = [], video.load_clip

    def noted(path, *options, **more):
        started.append(path)
        return load(path, *options, **more)

    monkeypatch.setattr(video, "load_clip", noted)
    clips_of = iter(ClipStream([mp4] * 12, size=32, workers=2, prefetch=1))
    next(clips_of)
    clips_of.close()
    assert len(started) <= 4


def test_wrong_option_fails_at_once_and_not_for_every_video(mp4):
    with pytest.raises(ValueError, match="workers"):
        ClipStream([mp4], workers=0)
    with pytest.raises(ValueError, match="num_frames"):
        ClipStream([mp4], num_frames=0)
