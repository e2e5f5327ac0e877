"""Video files that cannot be read: one clear error for each, and streams that leave them out."""

import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import video_files
from hypothesis import given
from hypothesis import strategies as st

from mmfast.data import container, video
from mmfast.data.video import ClipStream, VideoError, decode_frames, find_videos, load_clip, probe


@pytest.fixture(scope="module")
def mp4(tmp_path_factory) -> Path:
    return video_files.write_clip(tmp_path_factory.mktemp("mp4") / "clip.mp4")


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
