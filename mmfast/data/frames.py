"""The pixels of one modality of one clip, from a video file, numbered files, a folder of them, or one array.

| source | rgb | flow, pose |
|---|---|---|
| path with a number field, `frames/P01/frame_{:010d}.jpg` | jpg, png, any picture | npy, npz, pt: one frame each, [H, W, C] |
| folder | its pictures | its npy, npz or pt files |
| file | a video | npy, npz or pt: the whole clip, [F, H, W, C] |

A frame's index is the number in its file's name, in a folder as in a path with a number field, so that modalities whose
files have gaps, or one frame less, still go together. In a video or an array it is the place, from 0.

A frame that is missing or damaged shows the frame before it (at the start of a clip, the one behind), and is counted; a
clip without a readable frame is a ClipError.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import re
import string
import zipfile
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mmfast.data.container import VideoError, VideoInfo, import_av, open_container, probe
from mmfast.data.records import ClipRecord
from mmfast.data.transforms import crop_resize
from mmfast.data.video import decode_frames, resize_frames

CHANNELS = {"rgb": 3, "flow": 2, "pose": 21}
PICTURES = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff"))
ARRAYS = frozenset((".npy", ".npz", ".pt", ".pth"))

Fit = Callable[[Tensor], Tensor]


class ClipError(ValueError):
    """A clip that cannot be used: `name` of its record, and `reason`."""

    def __init__(self, name: str, reason: str = "") -> None:
        super().__init__(
            name, reason
        )  # both, so that it survives pickling; a data loader rebuilds it from its text alone
        self.name = name
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}" if self.reason else self.name


class Frames(NamedTuple):
    """What `read_frames` found."""

    pixels: Tensor  # [C, F, h, w]: uint8 of RGB, float32 of the others
    missing: int  # frames that show another frame instead of their own
    size: tuple[int, int]  # height and width as stored


class _Unreadable(Exception):
    """One frame that is not there or damaged."""


def is_template(source: str | os.PathLike[str]) -> bool:
    """True for a path with a number field, as in "frame_{:010d}.jpg"; doubled braces are braces of the name."""
    return "{" in os.fspath(source).replace("{{", "")


def frame_path(source: str | os.PathLike[str], index: int) -> Path:
    """The file of one frame of a path with a number field. Raises ValueError for a field that takes no number."""
    try:
        return Path(os.fspath(source).format(index))
    except (ValueError, IndexError, KeyError, AttributeError) as error:
        raise ValueError(f"{source}: not a path with one number field such as {{:06d}} ({error})") from None


def _missing(path: Path, error: OSError) -> str:
    return f"{path}: {'no such file' if isinstance(error, FileNotFoundError) else error.strerror or error}"


# -- which frames there are --------------------------------------------------------------------------------------------


@lru_cache(maxsize=128)  # of a folder's or a video's frames; long videos and big folders take 10 MB each
def _numbered(folder: str, before: str, behind: str | None, kinds: frozenset[str], changed: int) -> dict[int, str]:
    """number -> file name, ascending; behind None: any file of these kinds, by the last number in its name."""
    found: dict[int, str] = {}
    for entry in os.scandir(folder):
        stem, kind = os.path.splitext(entry.name)
        if behind is None:
            match = re.search(r"(\d+)\D*$", stem) if kind.lower() in kinds and stem[:1] != "." else None
        else:
            match = re.fullmatch(rf"{re.escape(before)}(\d+){re.escape(behind)}", entry.name)
        if match is None:
            continue
        number = int(match[1])
        if number in found and behind is None:
            raise ValueError(f"{folder}: two frames have number {number}: {found[number]} and {entry.name}")
        found[number] = entry.name
    return dict(sorted(found.items()))


def _files(source: str | os.PathLike[str], modality: str) -> dict[int, str]:
    """number -> name of the frames of a folder, or of a path with a number field in its last part."""
    before: str = ""
    behind: str | None = None
    folder = Path(source)
    if is_template(source):
        if is_template(folder.parent):
            raise ValueError(f"{source}: frames can be counted only where the number stands in the file's own name")
        for literal, name, _, _ in string.Formatter().parse(folder.name):
            before, behind = (before + literal, behind) if behind is None else (before, behind + literal)
            behind = "" if name is not None else behind
        folder = Path(str(folder.parent).format())  # doubled braces are braces of the name
    kinds = PICTURES if modality == "rgb" else ARRAYS
    found = _numbered(str(folder), before, behind, kinds, os.stat(folder).st_mtime_ns)
    if not found:
        raise ValueError(f"{source}: no frames there")
    return found


@lru_cache(maxsize=128)
def _probed(path: str, size: int, changed: int) -> VideoInfo:
    return probe(path)


def _probe(path: str | os.PathLike[str]) -> VideoInfo:
    try:
        stat = os.stat(path)
    except OSError:
        return probe(path)  # which says what is wrong
    return _probed(str(path), stat.st_size, stat.st_mtime_ns)


def _source(record: ClipRecord, modality: str) -> str | os.PathLike[str]:
    if modality not in CHANNELS:
        raise ValueError(f"modality must be one of {', '.join(CHANNELS)}, got {modality!r}")
    if modality not in record.sources:
        raise ClipError(record.name, f"has no {modality}; it has {', '.join(record.sources) or 'nothing'}")
    return record.sources[modality]


def frame_range(record: ClipRecord, modality: str) -> tuple[int, int]:
    """Index of the first frame that is there, and one behind the last: of the whole source, not of the clip's part of it.

    Folders are listed and videos read once, and remembered. Raises ClipError for a source that cannot be read.
    """
    source = _source(record, modality)
    try:
        if is_template(source) or os.path.isdir(source):
            numbers = _files(source, modality)
            return next(iter(numbers)), next(reversed(numbers)) + 1
        if modality == "rgb":
            return 0, _probe(source).frames
        return 0, len(_array(Path(source), frames=True))
    except OSError as error:
        raise ClipError(record.name, f"{modality}: {_missing(Path(source), error)}") from None
    except (ValueError, _Unreadable) as error:  # VideoError is a ValueError
        raise ClipError(record.name, f"{modality}: {error}") from None


# -- one frame ---------------------------------------------------------------------------------------------------------


def _picture(path: Path) -> Tensor:
    """uint8 [H, W, 3] of a picture file, by Pillow, or by PyAV where that is not installed."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise _Unreadable(_missing(path, error)) from None
    try:
        from PIL import Image
    except ImportError:
        return _picture_by_av(path)
    try:
        with Image.open(io.BytesIO(data)) as image:
            return torch.from_numpy(np.array(image.convert("RGB")))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # broken PNGs: SyntaxError
        raise _Unreadable(f"{path}: not a picture, or damaged ({str(error) or type(error).__name__})") from None


def _picture_by_av(path: Path) -> Tensor:
    try:
        import_av()
    except ImportError as error:
        raise ImportError("reading picture files needs Pillow: pip install pillow") from error
    try:
        with open_container(path) as container:
            for frame in container.decode(video=0):
                return torch.from_numpy(frame.to_ndarray(format="rgb24"))
    except VideoError as error:
        raise _Unreadable(str(error)) from None
    raise _Unreadable(f"{path}: not a picture")


def _array(path: Path, frames: bool) -> np.ndarray:
    """A stored array, mapped into memory where the format allows: [F, H, W, C] when frames, else [H, W, C]."""
    try:
        if path.suffix in (".pt", ".pth"):
            stored: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            if not isinstance(stored, Tensor):
                raise ValueError(f"holds a {type(stored).__name__}, not a tensor")
            array = (stored.float() if stored.dtype == torch.bfloat16 else stored).numpy()
        else:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
            if isinstance(array, np.lib.npyio.NpzFile):
                with array as archive:
                    if len(archive.files) != 1:
                        raise ValueError(f"holds {len(archive.files)} arrays, not one")
                    array = archive[archive.files[0]]
    except FileNotFoundError as error:
        raise _Unreadable(_missing(path, error)) from None
    except (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, pickle.UnpicklingError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise _Unreadable(f"{path}: not an array, or damaged ({reason})") from None
    if array.ndim != 3 + frames or array.dtype.kind not in "fiu":
        wanted = "[F, H, W, C], the whole clip" if frames else "[H, W, C], one frame"
        raise ValueError(f"{path}: must hold numbers {wanted}; got {array.dtype} {array.shape}")
    return array


# -- a clip ------------------------------------------------------------------------------------------------------------


def _fill(clip: Tensor, good: Sequence[bool]) -> int:
    """Fills the rows of clip [F, ...] that are not good from the good one before (the first one: behind). Counts them."""
    last = good.index(True)
    for row, own in enumerate(good):
        if own:
            last = row
        else:
            clip[row] = clip[last]
    return len(good) - sum(good)


def _collect(indices: Sequence[int], read: Callable[[int], Tensor]) -> tuple[Tensor, int]:
    """(frames [F, ...], how many are missing) of frames read one by one; a repeated index is read once."""
    clip: Tensor | None = None
    good: list[bool] = []
    places: dict[int, int] = {}
    first_reason = ""
    for row, index in enumerate(indices):
        if index in places:
            good.append(good[places[index]])
            if clip is not None and good[-1]:
                clip[row] = clip[places[index]]
            continue
        places[index] = row
        try:
            frame = read(index)
        except _Unreadable as error:
            first_reason = first_reason or str(error)
            good.append(False)
            continue
        if clip is None:
            clip = torch.empty(len(indices), *frame.shape, dtype=frame.dtype)
        if frame.shape != clip.shape[1:]:
            raise ValueError(f"the frame size changes within the clip, at frame {index}: {tuple(frame.shape)}")
        clip[row] = frame
        good.append(True)
    if clip is None:
        what = f"none of its {len(places)} frames can be read" if len(places) > 1 else "its frame cannot be read"
        raise ValueError(f"{what}; {first_reason}")
    return clip, _fill(clip, good)


def _from_pictures(path_of: Callable[[int], Path], indices: Sequence[int], fit: Fit) -> Frames:
    stored = (0, 0)

    def read(index: int) -> Tensor:
        nonlocal stored
        picture = _picture(path_of(index))
        stored = (picture.shape[0], picture.shape[1])
        return fit(picture.permute(2, 0, 1)[:, None])[:, 0].permute(1, 2, 0)

    clip, missing = _collect(indices, read)
    return Frames(clip.permute(3, 0, 1, 2), missing, stored)


def _from_video(
    source: str | os.PathLike[str],
    indices: Sequence[int],
    size: tuple[int, int] | None,
    resize: str,
    fit: Fit | None,
    threads: int,
) -> Frames:
    info = _probe(source)
    good = [0 <= index < info.frames for index in indices]
    there = [index for index, own in zip(indices, good, strict=True) if own]
    if not there:
        raise ValueError(f"{source}: frames {indices[0]} to {indices[-1]} are past the end: {info.frames} frames")
    asked = [
        index if own else there[0] for index, own in zip(indices, good, strict=True)
    ]  # the others are filled below
    decoded = decode_frames(source, asked, None if fit else size, resize=resize, threads=threads, info=info)
    missing = _fill(decoded, good) if not all(good) else 0
    clip = decoded.permute(3, 0, 1, 2)
    stored = (decoded.shape[1], decoded.shape[2]) if fit or size is None else (info.height, info.width)
    return Frames(fit(clip) if fit else clip, missing, stored)


def _from_arrays(read_frame: Callable[[int], np.ndarray], channels: int, indices: Sequence[int]) -> Frames:
    def read(index: int) -> Tensor:
        array = read_frame(index)
        if array.shape[-1] != channels:
            raise ValueError(f"a frame must be [H, W, {channels}], got {array.shape} at frame {index}")
        frame = torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1), dtype=np.float32))
        if not math.isfinite(float(frame.sum())):
            raise _Unreadable(f"frame {index} holds NaN or infinity")
        return frame

    clip, missing = _collect(indices, read)
    return Frames(clip.transpose(0, 1), missing, (clip.shape[2], clip.shape[3]))


def read_frames(
    record: ClipRecord,
    modality: str,
    indices: Sequence[int],
    size: tuple[int, int] | None = None,
    *,
    resize: str = "squash",
    fit: Fit | None = None,
    threads: int = 1,
) -> Frames:
    """The frames of one modality, in the order asked for: uint8 [3, F, h, w] of RGB, float32 [C, F, h, w] of flow and pose.

    size: (h, w), None for the stored size. resize: of RGB, "squash" or "crop" as in `video.resize_frames`; flow and pose
    are always resampled whole. fit: what to do with pixels as stored, [3, F, H, W] uint8 -> [3, F, h, w], in place of
    size and resize; called on one frame at a time where frames are files, so that no clip of full frames is ever held.
    threads: of FFmpeg. RGB lies in memory as [F, h, w, 3], flow and pose as [F, C, h, w]. Raises ClipError.
    """
    if not indices:
        raise ValueError("indices must name at least one frame")
    source, channels = _source(record, modality), CHANNELS[modality]
    try:
        by_number: Callable[[int], Path] | None = None
        if is_template(source):
            by_number = lambda index: frame_path(source, index)
        elif os.path.isdir(source):
            names = _files(source, modality)
            by_number = lambda index: Path(source, names.get(index, f"(frame {index})"))
        if modality == "rgb":
            if by_number is None:
                return _from_video(source, indices, size, resize, fit, threads)
            return _from_pictures(by_number, indices, fit or _resize(size, resize))
        if by_number is not None:
            paths = by_number
            found = _from_arrays(lambda index: _array(paths(index), frames=False), channels, indices)
        else:
            clip = _array(Path(source), frames=True)
            found = _from_arrays(lambda index: _row(clip, index), channels, indices)
        return found._replace(pixels=crop_resize(found.pixels, size=size))
    except (ValueError, OSError, _Unreadable) as error:
        raise ClipError(record.name, f"{modality}: {error}") from None


def _row(clip: np.ndarray, index: int) -> np.ndarray:
    if not 0 <= index < len(clip):
        raise _Unreadable(f"frame {index} is past the end: {len(clip)} frames")
    return clip[index]


def _resize(size: tuple[int, int] | None, resize: str) -> Fit:
    if size is None:
        return lambda clip: clip
    return lambda clip: resize_frames(clip.permute(1, 2, 3, 0), size, resize).permute(3, 0, 1, 2)
