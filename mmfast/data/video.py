"""Video files to uint8 clips: sample frame numbers first, then decode only what they need.

Pixels are decoded at their stored size and resized in torch (bilinear, antialiased: within one grey level of PIL),
because decoders' own scalers differ from one another. A rotation that the file asks for is applied.
Two ways to a square clip: "squash" resizes straight to size x size whatever the aspect (MM-CDFSL's evaluation);
"crop" brings the short side to size and takes the centre (VideoMAE's evaluation).
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfast.data.container import VideoError, VideoInfo, import_av, open_container, probe

__all__ = [
    "ClipStream",
    "VideoError",
    "VideoInfo",
    "decode_frames",
    "find_videos",
    "load_clip",
    "probe",
    "resize_frames",
    "sample_indices",
]

EXTENSIONS = frozenset(
    (
        ".mp4",
        ".m4v",
        ".mov",
        ".mkv",
        ".webm",
        ".avi",
        ".mpg",
        ".mpeg",
        ".ts",
        ".m2ts",
        ".mts",
        ".flv",
        ".wmv",
        ".3gp",
        ".ogv",
    )
)
RESIZE_MODES = ("squash", "crop")


class _Unproven(Exception):
    """Decoding from a key frame met something other than what the packets promised."""


def _check_whole(name: str, value: Any, least: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return value


def _check_resize(resize: str) -> None:
    if resize not in RESIZE_MODES:
        raise ValueError(f"resize must be one of {RESIZE_MODES}, got {resize!r}")


def resize_frames(frames: Tensor, size: tuple[int, int], resize: str = "squash") -> Tensor:
    """Resizes uint8 frames with an antialiased bilinear filter.

    frames: uint8 [F, H, W, C] -> uint8 [F, h, w, C] for size (h, w). resize: "squash" ignores the aspect ratio; "crop"
    keeps it, makes the frame just cover (h, w), and takes the centre. Raises ValueError for another mode.
    """
    _check_resize(resize)
    height, width = frames.shape[1:3]
    target, top, left = size, 0, 0
    if resize == "crop":
        if size[0] * width >= size[1] * height:
            target = (size[0], size[0] * width // height)
        else:
            target = (size[1] * height // width, size[1])
        top, left = round((target[0] - size[0]) / 2), round((target[1] - size[1]) / 2)
    if target != (height, width):
        pixels = frames.permute(0, 3, 1, 2)
        frames = F.interpolate(pixels, target, mode="bilinear", antialias=True).permute(0, 2, 3, 1)
    return frames[:, top : top + size[0], left : left + size[1]]


def sample_indices(total: int, num_frames: int = 16, stride: int | None = None, start: int | None = None) -> list[int]:
    """Frame numbers of a clip, ascending.

    stride None: the middle frame of each of num_frames equal segments (TSN) of the video, or of its part from start on.
    Otherwise num_frames frames, stride apart, from start, or centred when start is None. Raises VideoError (path None)
    when the video is too short, saying both counts; ValueError or TypeError for numbers that make no sense.
    """
    _check_whole("total", total, 0)
    _check_whole("num_frames", num_frames, 1)
    first = 0 if start is None else _check_whole("start", start, 0)
    span = num_frames if stride is None else (num_frames - 1) * _check_whole("stride", stride, 1) + 1
    if total - first < span:
        asked = f"{num_frames} frames" + ("" if stride is None else f" {stride} apart span {span}")
        after = f", {max(total - first, 0)} from frame {first} on" if first else ""
        raise VideoError(None, f"too short: {asked}, the video has {total}{after}")
    if stride is None:
        return [first + (2 * i + 1) * (total - first) // (2 * num_frames) for i in range(num_frames)]
    if start is None:
        first = (total - span) // 2
    return [first + i * stride for i in range(num_frames)]


def _decoding(stream: Any, threads: int) -> None:
    stream.thread_type = "NONE" if threads == 1 else "AUTO"
    stream.codec_context.thread_count = threads


def _from_start(info: VideoInfo, wanted: Sequence[int], threads: int) -> Iterator[tuple[int, Tensor]]:
    """(index, pixels) of the wanted frames, decoding everything up to the last of them."""
    decoded, needed = 0, set(wanted)
    with open_container(info.path) as container:
        stream = container.streams[info.stream]
        _decoding(stream, threads)
        for index, frame in enumerate(container.decode(stream)):
            if frame.is_corrupt:
                raise VideoError(info.path, f"corrupt: frame {index} of {info.frames} is damaged")
            if index in needed:
                yield index, _pixels(frame)
            if index == wanted[-1]:
                return
            decoded = index + 1
    raise VideoError(info.path, f"truncated or corrupt: {info.frames} frames in the container, only {decoded} decode")


def _keyframe_before(info: VideoInfo, index: int) -> int:
    return info.keyframes[bisect_right(info.keyframes, index) - 1]


def _packet_spans(info: VideoInfo, wanted: Sequence[int]) -> list[tuple[int, int]]:
    """(first, last) packets to decode: from the key frame before each wanted frame up to it, merged by key frame."""
    spans: dict[int, int] = {}
    for index in wanted:
        key = info.packets[_keyframe_before(info, index)]
        spans[key] = max(spans.get(key, key), info.packets[index])
    return sorted(spans.items())


def _from_keyframes(info: VideoInfo, wanted: Sequence[int], threads: int) -> Iterator[tuple[int, Tensor]]:
    """(index, pixels) of the wanted frames, decoding only what leads from key frames up to each.

    Every frame is recognised by its timestamp, and so is the packet a seek lands on: else _Unproven.
    """
    av = import_av()
    spans = _packet_spans(info, wanted)
    needed = {number for first, last in spans for number in range(first, last + 1)}
    landings = {info.timestamps[key]: info.packets[key] for key in info.keyframes}
    missing = {info.timestamps[index]: index for index in wanted}
    number = -1
    with open_container(info.path) as container:
        stream = container.streams[info.stream]
        _decoding(stream, threads)
        try:
            if spans[0][0] > 0:
                container.seek(info.timestamps[_keyframe_before(info, wanted[0])], stream=stream)
            for packet in container.demux(stream):
                if packet.size:
                    number = landings.get(packet.pts, -1) if number < 0 else number + 1
                    if number < 0:
                        raise _Unproven
                    if number not in needed and number <= spans[-1][1]:
                        continue
                flush = not packet.size or number > spans[-1][1]
                for frame in stream.codec_context.decode(None if flush else packet):
                    if frame.is_corrupt:
                        raise _Unproven
                    if frame.pts in missing:
                        yield missing.pop(frame.pts), _pixels(frame)
                if flush or not missing:
                    break
        except av.error.FFmpegError:
            raise _Unproven from None
    if missing:
        raise _Unproven


def _pixels(frame: Any) -> Tensor:
    """uint8 [H, W, 3] of a decoded frame, upright."""
    pixels = torch.from_numpy(frame.to_ndarray(format="rgb24"))
    return torch.rot90(pixels, round(frame.rotation / 90)) if frame.rotation else pixels


def decode_frames(
    path: str | os.PathLike[str],
    indices: Iterable[int],
    size: tuple[int, int] | None = None,
    *,
    resize: str = "squash",
    threads: int = 1,
    info: VideoInfo | None = None,
) -> Tensor:
    """Decodes the frames of the given indices, in the order asked for, repeats included.

    size: (h, w), or None for the stored size; resize as in `resize_frames`. threads: of FFmpeg, 0 lets it choose.
    info: what `probe` returned, to save reading the file again. Returns uint8 [F, H, W, 3] RGB. Raises VideoError for a
    file that `probe` refuses, an index past the end, or a frame that cannot be decoded.
    """
    _check_resize(resize)
    info = probe(path) if info is None else info
    asked = [_check_whole("indices", index, 0) for index in indices]
    wanted = sorted(set(asked))
    if not wanted:
        height, width = size or (info.height, info.width)
        return torch.empty(0, height, width, 3, dtype=torch.uint8)
    if wanted[-1] >= info.frames:
        raise VideoError(info.path, f"frame {wanted[-1]} is past the end: {info.frames} frames")
    places: dict[int, list[int]] = {}
    for place, index in enumerate(asked):
        places.setdefault(index, []).append(place)
    proven = bool(info.keyframes) and info.keyframes[0] <= wanted[0]
    for walk in (_from_keyframes, _from_start) if proven else (_from_start,):
        clip: Tensor | None = None
        try:
            for index, pixels in walk(info, wanted, threads):
                frame = pixels if size is None else resize_frames(pixels[None], size, resize)[0]
                if clip is None:
                    clip = torch.empty(len(asked), *frame.shape, dtype=torch.uint8)
                if frame.shape != clip.shape[1:]:
                    change = f"from {tuple(clip.shape[1:3])} to {tuple(frame.shape[:2])} at frame {index}"
                    raise VideoError(info.path, f"the frame size changes {change}: pass a size")
                clip[places[index]] = frame
        except _Unproven:
            continue
        if clip is not None:
            return clip
    raise VideoError(info.path, "corrupt: no frame could be decoded")


def load_clip(
    path: str | os.PathLike[str],
    num_frames: int = 16,
    size: int = 224,
    stride: int | None = None,
    resize: str = "squash",
    *,
    start: int | None = None,
    threads: int = 1,
) -> Tensor:
    """One clip of a video file, sampled as by `sample_indices` and resized as by `resize_frames`.

    Returns uint8 [3, num_frames, size, size], a permuted view of a [F, H, W, C] buffer. Raises VideoError, always with
    the path, for a video that is broken or too short.
    """
    _check_whole("size", size, 1)
    info = probe(path)
    try:
        indices = sample_indices(info.frames, num_frames, stride, start)
    except VideoError as error:
        raise VideoError(info.path, error.reason) from None
    frames = decode_frames(path, indices, (size, size), resize=resize, threads=threads, info=info)
    return frames.permute(3, 0, 1, 2)


def find_videos(paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> list[Path]:
    """Video files among files and folders, in the order given.

    A file is taken whatever its name; a folder gives the files below it that have a video's extension (EXTENSIONS),
    sorted by path, hidden ones left out. Raises VideoError for a path that does not exist, or a folder without a video.
    """
    if isinstance(paths, (str, os.PathLike)):
        paths = [paths]
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(_videos_below(path))
            if not inside:
                raise VideoError(path, f"no video in this folder: looked for {' '.join(sorted(EXTENSIONS))}")
            found += inside
        elif path.exists():
            found.append(path)
        else:
            raise VideoError(path, "no such file or folder")
    return found


def _videos_below(folder: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise VideoError(error.filename, f"cannot be read: {error.strerror}")

    for parent, _, names in os.walk(folder, onerror=refuse):
        for name in names:
            if not name.startswith(".") and Path(name).suffix.lower() in EXTENSIONS:
                yield Path(parent, name)


class ClipStream:
    """Iterates over (index, path, clip) of many videos in order, decoding ahead in threads.

    paths as in `find_videos`; the clip options as in `load_clip`. At most workers + prefetch clips are decoded or being
    decoded ahead of the one in use. A video that cannot be read is skipped and kept in `failures`; index counts all
    videos, skipped ones included. Every iteration starts afresh, `failures` too.
    """

    def __init__(
        self,
        paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
        num_frames: int = 16,
        size: int = 224,
        stride: int | None = None,
        resize: str = "squash",
        *,
        workers: int = 2,
        prefetch: int = 2,
    ) -> None:
        import_av()
        # A wrong option must fail here, once, and not as a failure of every video.
        _check_whole("size", size, 1)
        _check_resize(resize)
        sample_indices(1 << 40, num_frames, stride)
        self.workers = _check_whole("workers", workers, 1)
        self.prefetch = _check_whole("prefetch", prefetch, 0)
        self.paths = find_videos(paths)
        self.failures: list[tuple[Path, str]] = []
        self._options = (num_frames, size, stride, resize)
        self._read = 0

    def __len__(self) -> int:
        """Number of videos, readable or not."""
        return len(self.paths)

    def _load(self, path: Path) -> Tensor | VideoError:
        try:
            return load_clip(path, *self._options)
        except VideoError as error:
            return error

    def __iter__(self) -> Generator[tuple[int, Path, Tensor]]:
        self.failures, self._read = [], 0
        pending: deque[tuple[int, Path, Future[Tensor | VideoError]]] = deque()
        todo = enumerate(self.paths)
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="mmfast-decode")
        try:
            while True:
                while len(pending) < self.workers + self.prefetch and (item := next(todo, None)):
                    pending.append((*item, pool.submit(self._load, item[1])))
                if not pending:
                    return
                index, path, future = pending.popleft()
                clip = future.result()
                if isinstance(clip, VideoError):
                    self.failures.append((path, clip.reason))
                    continue
                self._read += 1
                yield index, path, clip
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def summary(self) -> str:
        """What the last iteration read and skipped, and why."""
        done = f"read {self._read} of {len(self.paths)} videos"
        if not self.failures:
            return done
        return "\n".join([f"{done}, skipped {len(self.failures)}:", *(f"  {p}: {why}" for p, why in self.failures)])
