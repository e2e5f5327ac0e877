"""Small video files for the tests, made on the spot: the containers, codecs and damage that a reader may meet."""

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

av = pytest.importorskip("av", reason="needs PyAV: pip install mmfast[video]")

SIZE = (48, 80)


def moving_frames(count: int, size: tuple[int, int] = SIZE, seed: int = 0) -> np.ndarray:
    """uint8 [count, H, W, 3]: a smooth texture that shifts by two pixels a frame, so that no two frames are alike."""
    rng = np.random.default_rng(seed)
    height, width = size[0] + 2 * count, size[1] + 2 * count
    coarse = rng.integers(0, 256, (height // 8 + 2, width // 8 + 2, 3))
    texture = np.kron(coarse, np.ones((8, 8, 1), dtype=np.int64))
    texture = (texture + np.roll(texture, 3, 0) + np.roll(texture, 3, 1)) // 3
    return np.stack([texture[2 * i : 2 * i + size[0], 2 * i : 2 * i + size[1]] for i in range(count)]).astype(np.uint8)


def _add_video(container: Any, codec: str, frames: np.ndarray, gop: int, b_frames: int, options: dict[str, str]) -> Any:
    if codec == "libx264":
        options = {"mbtree": "0", **options}  # with it the same frames give different files from run to run
    stream = container.add_stream(codec, rate=25, options=options)
    stream.height, stream.width = frames.shape[1:3]
    stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    stream.codec_context.gop_size, stream.codec_context.max_b_frames = gop, b_frames
    stream.codec_context.thread_count = 1
    return stream


def _mux(container: Any, stream: Any, frames: np.ndarray, first_pts: int = 0) -> None:
    for i, pixels in enumerate(frames):
        frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
        frame.pts, frame.time_base = i + first_pts, Fraction(1, 25)
        container.mux(stream.encode(frame))
    container.mux(stream.encode(None))


def write_clip(
    path: Path,
    frames: np.ndarray | int = 24,
    codec: str = "libx264",
    gop: int = 8,
    b_frames: int = 2,
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    first_pts: int = 0,
    rotation: int = 0,
) -> Path:
    """A video file; the container follows from the name."""
    frames = moving_frames(frames) if isinstance(frames, int) else frames
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream = _add_video(container, codec, frames, gop, b_frames, options or {})
        if rotation:
            stream.set_display_rotation(rotation)
        _mux(container, stream, frames, first_pts)
    return path


def write_two_streams(path: Path, small: np.ndarray, large: np.ndarray) -> Path:
    """Two video streams; the larger one is second, and marked as the file's default."""
    with av.open(str(path), "w") as container:
        streams = [_add_video(container, "libx264", frames, 8, 2, {}) for frames in (small, large)]
        streams[1].disposition = av.stream.Disposition.default
        for stream, frames in zip(streams, (small, large), strict=True):
            _mux(container, stream, frames)
    return path


def _mux_tone(container: Any, stream: Any) -> None:
    for i in range(8):
        samples = (np.sin(np.arange(1024) * 0.05 + i) * 8000).astype(np.int16)[None]
        frame = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = 16000, i * 1024, Fraction(1, 16000)
        container.mux(stream.encode(frame))
    container.mux(stream.encode(None))


def write_audio(path: Path, codec: str) -> Path:
    """Sound without pictures."""
    with av.open(str(path), "w") as container:
        _mux_tone(container, container.add_stream(codec, rate=16000, layout="mono"))
    return path


def write_audio_with_cover(path: Path) -> Path:
    """Sound with a cover picture, which containers store as a video stream of one frame."""
    with av.open(str(path), "w", format="mp4") as container:
        sound = container.add_stream("aac", rate=16000, layout="mono")
        cover = container.add_stream("mjpeg", rate=25)
        cover.height, cover.width, cover.pix_fmt = 48, 80, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        _mux(container, cover, moving_frames(1))
        _mux_tone(container, sound)
    return path


def write_video_with_audio(path: Path, frames: np.ndarray) -> Path:
    """Sound as the first stream, pictures as the second."""
    with av.open(str(path), "w") as container:
        sound = container.add_stream("aac", rate=16000, layout="mono")
        stream = _add_video(container, "libx264", frames, 8, 2, {})
        _mux(container, stream, frames)
        _mux_tone(container, sound)
    return path


def cut(source: Path, target: Path, keep: float) -> Path:
    """The first part of a file."""
    data = source.read_bytes()
    target.write_bytes(data[: int(len(data) * keep)])
    return target


def damage(source: Path, target: Path, at: float, count: int = 1500) -> Path:
    """A file with random bytes in the middle of its pictures."""
    data = bytearray(source.read_bytes())
    start = int(len(data) * at)
    data[start : start + count] = np.random.default_rng(1).bytes(count)
    target.write_bytes(data)
    return target


def decode_all(path: Path) -> np.ndarray:
    """Every frame of the best video stream, in the decoder's order, by nothing but a plain loop."""
    with av.open(str(path)) as container:
        stream = container.streams.best("video")
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
