"""What a video file holds, found from its packets without decoding: how many frames, and where decoding may start.

A frame's index is its place in the order a decoder gives frames out when it reads the file from the start. Containers'
own counts and timestamps are no substitute: Matroska stores no count and rounds times to 1 ms, AVI has no presentation
times at all.

Decoding may start at a key frame whose index is certain. That needs three things:
1. the container stores presentation times (MP4 and Matroska families), all present, none twice: frame i is then the
   packet with the i-th smallest time;
2. the group of pictures is closed: every earlier packet is shown before the key frame, every later one after it;
3. the key frame resets the decoder. Open-GOP and intra-refresh streams flag key frames that do not (H.264 recovery
   points, HEVC CRA pictures), so the packet must hold an IDR picture.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_TIMED_CONTAINERS = ("mov", "mp4", "matroska", "webm")
_INDEPENDENT_KEYS = ("vp8", "vp9", "av1", "mjpeg")  # codecs whose every key frame resets the decoder
_H264_IDR = (5,)
_HEVC_IDR = (19, 20)
_SIGNATURES = (b"ftyp", b"moov", b"mdat", b"RIFF", b"\x1a\x45\xdf\xa3")


class VideoError(ValueError):
    """A video that cannot be used: `path` (None where only counts are known) and `reason`."""

    def __init__(self, path: str | os.PathLike[str] | None, reason: str) -> None:
        super().__init__(path, reason)  # both arguments, so that the error survives pickling between processes
        self.path = None if path is None else Path(path)
        self.reason = reason

    def __str__(self) -> str:
        return self.reason if self.path is None else f"{self.path}: {self.reason}"


@dataclass(frozen=True)
class VideoInfo:
    """What `probe` found. Frame indices count frames in the order a decoder gives them out."""

    path: Path
    frames: int
    width: int  # as stored: before any rotation that the file asks for
    height: int
    fps: float  # 0.0 when the container does not say
    duration: float  # seconds from the first frame to the end of the last; 0.0 when unknown
    codec: str
    container: str
    stream: int  # index of the video stream among all streams of the file
    keyframes: tuple[int, ...] = field(repr=False)  # frames where decoding may start; () when nothing is certain
    timestamps: tuple[int, ...] = field(repr=False)  # presentation time of frame i, or () when they prove nothing
    packets: tuple[int, ...] = field(repr=False)  # place in the file of the packet of frame i, or ()


def import_av() -> Any:
    """PyAV, or an ImportError that says how to install it."""
    try:
        import av
    except ImportError as error:
        raise ImportError("reading and writing video files needs PyAV: pip install mmfast[video]") from error
    return av


def _check_file(path: Path) -> bytes:
    """First bytes of a file that can be read; VideoError otherwise."""
    try:
        if path.is_dir():
            raise VideoError(path, "is a folder, not a video file")
        with path.open("rb") as file:
            head = file.read(64)
    except FileNotFoundError:
        raise VideoError(path, "no such file") from None
    except PermissionError:
        raise VideoError(path, "permission denied") from None
    except OSError as error:
        raise VideoError(path, f"cannot be read: {error.strerror}") from None
    if not head:
        raise VideoError(path, "empty file (0 bytes)")
    return head


@contextmanager
def open_container(path: Path) -> Iterator[Any]:
    """Opens a video file with PyAV; whatever PyAV raises inside the block leaves it as a VideoError."""
    av = import_av()
    head = _check_file(path)
    # PyAV 19 has no such argument and never fails on a tag's encoding; before it the default was to raise.
    lenient = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}
    opened = False
    try:
        # "file:" and the whitelist: a name with a colon is a name, and a playlist in a file opens no network address.
        with av.open(f"file:{path}", options={"protocol_whitelist": "file"}, **lenient) as container:
            opened = True
            yield container
    except (av.error.FFmpegError, OSError, EOFError) as error:
        if opened:
            reason = f"corrupt: decoding fails ({getattr(error, 'strerror', None) or error})"
        elif any(mark in head[:12] for mark in _SIGNATURES):
            reason = "corrupt or truncated: the container's header or index is missing or damaged"
        else:
            reason = "not a video: no container format recognised"
        raise VideoError(path, reason) from None


def _resets_decoder(codec: str, extradata: bytes, data: bytes) -> bool:
    """True when a packet flagged as a key frame makes the decoder forget everything before it."""
    if codec in _INDEPENDENT_KEYS:
        return True
    if codec not in ("h264", "hevc"):
        return False
    for unit in _nal_units(extradata, data, length_at=4 if codec == "h264" else 21):
        kind = unit & 0x1F if codec == "h264" else unit >> 1 & 0x3F
        if kind in (_H264_IDR if codec == "h264" else _HEVC_IDR):
            return True
    return False


def _nal_units(extradata: bytes, data: bytes, length_at: int) -> Iterator[int]:
    """First byte of every NAL unit of an H.264 or HEVC packet, with start codes or length prefixes."""
    if extradata[:1] == b"\x01" and len(extradata) > length_at:
        width, at = (extradata[length_at] & 3) + 1, 0
        while at + width < len(data):
            yield data[at + width]
            at += width + int.from_bytes(data[at : at + width], "big")
        return
    at = data.find(b"\x00\x00\x01")
    while 0 <= at < len(data) - 3:
        yield data[at + 3]
        at = data.find(b"\x00\x00\x01", at + 3)


def _closed_keyframes(times: list[int], resets: list[int]) -> Iterator[int]:
    """Packet numbers in `resets` that every earlier packet precedes in time, and no later one does."""
    earliest_after = list(times)
    for n in range(len(times) - 2, -1, -1):
        earliest_after[n] = min(times[n], earliest_after[n + 1])
    resets_at, latest = set(resets), None
    for n, time in enumerate(times):
        if n in resets_at and earliest_after[n] == time and (latest is None or latest < time):
            yield n
        latest = time if latest is None else max(latest, time)


def _frame_index(times: list[Any], hidden: set[int], resets: list[int]) -> tuple[list[int], list[int], list[int]]:
    """(keyframes, timestamps, packets) as in VideoInfo; three empty lists when the times prove nothing."""
    if not resets or None in times or len(set(times)) < len(times):
        return [], [], []
    packets = sorted((n for n in range(len(times)) if n not in hidden), key=times.__getitem__)
    place = {n: i for i, n in enumerate(packets)}
    keys = [place[n] for n in _closed_keyframes(times, resets) if n in place]
    return keys, [times[n] for n in packets], packets


def _is_cover_picture(av: Any, stream: Any) -> bool:
    return bool(stream.disposition & av.stream.Disposition.attached_pic)


def probe(path: str | os.PathLike[str]) -> VideoInfo:
    """Counts the frames of a file's best video stream from its packets, without decoding.

    Raises VideoError for a file that is missing, unreadable, empty, no video, without a video stream, or truncated.
    """
    path, av = Path(path), import_av()
    with open_container(path) as container:
        stream = container.streams.best("video")
        if stream is None or _is_cover_picture(av, stream):
            kind = "audio only" if len(container.streams.audio) else "no video stream"
            raise VideoError(path, f"{kind}: nothing to decode")
        codec, extradata = stream.codec_context.name, bytes(stream.codec_context.extradata or b"")
        timed = any(name in container.format.name.split(",") for name in _TIMED_CONTAINERS)
        times: list[Any] = []
        hidden: set[int] = set()  # packets that an edit list cuts off: decoded for others' sake, never shown
        resets: list[int] = []
        cut, end = False, 0
        for packet in container.demux(stream):
            if not packet.size:
                continue
            if packet.is_discard:
                hidden.add(len(times))
            if packet.is_keyframe and timed and _resets_decoder(codec, extradata, bytes(packet)):
                resets.append(len(times))
            times.append(packet.pts)
            cut = packet.is_corrupt
            end = max(end, (packet.pts or 0) + (packet.duration or 0))
        frames = len(times) - len(hidden)
        listed = len(stream.index_entries) if "mov" in container.format.name else 0
        time_base, start = float(stream.time_base or 0), stream.start_time or 0
        if cut or listed > len(times):
            promised = f"{max(listed, stream.frames)} frames" if max(listed, stream.frames) else "more"
            raise VideoError(path, f"truncated: the header promises {promised}, the data ends after {len(times)}")
        if "matroska" in container.format.name and len(container.streams) == 1 and container.duration:
            promised_s, end_s = container.duration / av.time_base, end * time_base
            if end_s < 0.9 * promised_s:
                raise VideoError(
                    path, f"truncated: the header promises {promised_s:.2f} s, the data ends at {end_s:.2f} s"
                )
        if not frames:
            raise VideoError(path, "no frames in the video stream")
        keyframes, timestamps, packets = _frame_index(times, hidden, resets)
        fps = float(stream.average_rate or stream.guessed_rate or 0)
        return VideoInfo(
            path=path,
            frames=frames,
            width=stream.codec_context.width,
            height=stream.codec_context.height,
            fps=fps,
            duration=max((end - start) * time_base, 0.0) if timed else (frames / fps if fps else 0.0),
            codec=codec,
            container=container.format.name,
            stream=stream.index,
            keyframes=tuple(keyframes),
            timestamps=tuple(timestamps),
            packets=tuple(packets),
        )
