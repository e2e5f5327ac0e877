"""Class probabilities of many videos, by a classifier's ensemble or by a head fitted to a few labelled clips.

    p(y | clip) = 1/P  sum_v  p(y | clip under mask v)

Work goes into shards beside the result first, so it can be split over ranks and taken up again where it was killed; the
result, one row a video, is written when the last clip is done.
"""

import csv
import hashlib
import io
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from .config import ViTConfig
from .data.dataset import ClipDataset
from .data.manifest import folder_manifest, read_manifest
from .data.records import ClipRecord
from .data.video import find_videos
from .extract import (
    Report,
    amp_of,
    autocast,
    encoder,
    encoding_settings,
    run_sharded,
)
from .loading import Clips, Encoder, describe, loaded_batches
from .masks import kept_per_slot
from .shards import ShardReader, place_in_world, write_aside

MANIFESTS = (".csv", ".tsv", ".json")
Paths = str | os.PathLike[str] | Iterable[str | os.PathLike[str]]


class Classifier(Encoder, Protocol):
    """What predict needs of a model: MaskedViT has it."""

    def ensemble(
        self, video: Tensor, views: int = 2, mask_ratio: float = 0.75, *, seed: int = 0, clip_ids: Any = None
    ) -> Tensor: ...


class Head(Protocol):
    """A few-shot head, such as fewshot.LogisticRegression."""

    def fit(self, support: Tensor, labels: Tensor) -> Any: ...
    def predict_proba(self, query: Tensor) -> Tensor: ...


@dataclass
class Predictions(Report):
    """As Report. complete: the result has been written; without it other ranks are still at work."""

    out: Path = field(default_factory=Path)
    complete: bool = False


def video_records(paths: Paths) -> list[ClipRecord]:
    """Clips of video files, of all videos below folders, or of a manifest (.csv, .tsv or .json), in order.

    A video's clip id, from which its masks are drawn, follows from its path below the folder: a folder may grow, or be
    called by another name, without a change in what is predicted. Raises ValueError for what is not there.
    """
    if isinstance(paths, (str, os.PathLike)):
        if Path(paths).suffix.lower() in MANIFESTS:
            return list(read_manifest(paths))
        paths = [paths]
    records: list[ClipRecord] = []
    seen: Counter[str] = Counter()
    for given in map(Path, paths):
        for video in find_videos(given):
            inside = video.relative_to(given).as_posix() if given.is_dir() else video.name
            digest = hashlib.sha256(f"{inside}#{seen[inside]}".encode(errors="surrogateescape")).digest()
            seen[inside] += 1
            records.append(ClipRecord(int.from_bytes(digest[:8]) >> 1, str(video), {"rgb": video}))
    return records


def clips_for(
    config: ViTConfig,
    records: Sequence[ClipRecord],
    modality: str = "rgb",
    *,
    stride: int | None = None,
    resize: str = "squash",
) -> ClipDataset:
    """The records' clips as a model of this config takes them; one that cannot be read raises ClipError."""
    height, width = config.frame_size
    side = 4 if modality == "pose" else 1  # a heatmap's side is a quarter of a frame's
    return ClipDataset(
        records,
        (modality,),
        num_frames=config.num_frames,
        stride=stride,
        size=(side * height, side * width),
        resize=resize,
        position="centre",
        on_broken="raise",
    )


def predict(
    model: Classifier,
    videos: Paths | Clips,
    out: str | os.PathLike[str],
    *,
    support: str | os.PathLike[str] | Clips | None = None,
    head: Head | None = None,
    classes: Sequence[str] | None = None,
    top_k: int = 5,
    views: int = 2,
    mask_ratio: float = 0.75,
    seed: int = 0,
    stride: int | None = None,
    resize: str = "squash",
    modality: str = "rgb",
    precision: str = "fp32",
    shard_size: int = 4096,
    batch: int = 16,
    workers: int = 2,
    rank: int | None = None,
    world: int | None = None,
    retry: bool = False,
    progress: bool = True,
) -> Predictions:
    """Class probabilities of every video, averaged over `views` masked views, into a .csv or .json file.

    videos: files and folders, a manifest, or a collection of clips. stride, resize: how clips are cut from files (as in
    ClipDataset; stride None spreads the frames over the video). Without support the model is the classifier, with names
    `classes`. support: a folder of class folders, or a collection of labelled clips: `head`, by default
    LogisticRegression, is fitted to one masked view of each, as MM-CDFSL does, and predicts the rest.
    Other options as in `extract`; `out`.parts holds unfinished work.

    Raises ValueError for arguments out of range, a model without classes and no support, and parts of another run.
    """
    out = Path(out)
    if out.suffix.lower() not in (".csv", ".json"):
        raise ValueError(f"out must end in .csv or .json, got {str(out)!r}")
    if top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    if views < 1:
        raise ValueError(f"views must be at least 1, got {views}")
    kept_per_slot(model.config.grid, mask_ratio)
    amp = amp_of(model, precision)
    clips = _collection(model, videos, modality, stride, resize, labelled=False)
    settings = encoding_settings(model, views, mask_ratio, seed, modality, precision)
    settings["about"] = {"stride": stride, "resize": resize}
    device = next(iter(model.parameters())).device
    compute: Callable[[Tensor, Tensor], dict[str, Tensor]]
    if support is None:
        names = _class_names(model.config.num_classes, classes)
        settings["what"] = "predictions"

        def compute(ids: Tensor, video: Tensor) -> dict[str, Tensor]:
            with autocast(device, amp):
                probabilities = model.ensemble(video, views, mask_ratio, seed=seed, clip_ids=ids)
            return {"probabilities": probabilities.float()}

    else:
        if classes is not None:
            raise ValueError("classes come from support; give one of the two")
        head = _default_head() if head is None else head
        settings["head"] = _described(head)
        encode = encoder(model, views, mask_ratio, seed, precision)
        labelled = _collection(model, support, modality, stride, resize, labelled=True)
        names, settings["support"] = _fit(head, encode, model, labelled, modality, batch, workers, progress)
        settings["what"] = "few-shot predictions"

        def compute(ids: Tensor, video: Tensor) -> dict[str, Tensor]:
            features = encode(video, ids).float()
            each = head.predict_proba(features.flatten(0, 1)[None])[0]
            return {"probabilities": each.unflatten(0, (-1, views)).mean(1).float()}

    settings["classes"] = names
    rank, world = place_in_world() if rank is None or world is None else (rank, world)
    parts = out.with_name(out.name + ".parts")
    report = run_sharded(
        compute, model, clips, parts, "predictions", settings, modality=modality, shard_size=shard_size, batch=batch,
        workers=workers, rank=rank, world=world, retry=retry, progress=progress,
    )  # fmt: skip
    result = Predictions(**vars(report), out=out)
    # Each rank looks after its own index is written, so the last one to finish finds the work complete.
    reader = ShardReader(parts)
    ids, paths, _ = describe(clips)
    if all(i in reader or i in reader.failed for i in ids):
        done = [(i, path) for i, path in zip(ids, paths, strict=True) if i in reader]
        write = _csv if out.suffix.lower() == ".csv" else _json
        write_aside(out, write(reader, done, names, min(top_k, len(names))))
        result.complete = True
        result.failed = {i: reader.failed[i] for i in ids if i in reader.failed}
        if world == 1 and not result.failed:
            _remove(parts)
    return result


def _collection(
    model: Encoder, source: Any, modality: str, stride: int | None, resize: str, *, labelled: bool
) -> Clips:
    if hasattr(source, "__getitem__") and not isinstance(source, (str, list, tuple)):
        return source
    if not labelled:
        records = video_records(source)
    elif Path(source).suffix.lower() in MANIFESTS:
        records = list(read_manifest(source))
    else:
        records = list(folder_manifest(source))
    return clips_for(model.config, records, modality, stride=stride, resize=resize)


def _class_names(count: int, given: Sequence[str] | None) -> list[str]:
    if count == 0:
        raise ValueError("the model has no classes (num_classes=0); give support, a folder of labelled clips")
    if given is None:
        return [str(k) for k in range(count)]
    if len(given) != count:
        raise ValueError(f"classes must be {count} names, one a class of the model, got {len(given)}")
    return list(given)


def _default_head() -> Head:
    from .fewshot import LogisticRegression

    return LogisticRegression()


def _described(head: Head) -> str:
    """The head's class and options, before it is fitted."""
    plain = {k: v for k, v in vars(head).items() if v is None or isinstance(v, (bool, int, float, str))}
    return f"{type(head).__name__}({', '.join(f'{k}={v!r}' for k, v in plain.items())})"


def _fit(
    head: Head,
    encode: Callable[[Tensor, Tensor], Tensor],
    model: Encoder,
    support: Clips,
    modality: str,
    batch: int,
    workers: int,
    progress: bool,
) -> tuple[list[str], str]:
    """Fit the head to the first view of every support clip. Returns the classes' names and a fingerprint of the support."""
    ids, names, labels = describe(support)
    bare = [name for name, label in zip(names, labels, strict=True) if label is None]
    if bare or not names:
        raise ValueError(f"support must be labelled clips; {len(bare)} of {len(names)} have no label{_first(bare)}")
    features, used, failed = [], list[int](), list[str]()
    groups = loaded_batches(model, support, range(len(ids)), ids, modality, workers, batch)
    for places, video in groups:
        if isinstance(video, str):
            failed += [f"{names[places[0]]}: {video}"]
            continue
        features.append(encode(video, torch.tensor([ids[p] for p in places]))[:, 0].float())
        used += places
    classes = sorted({str(label) for label in labels})
    left = Counter(str(labels[p]) for p in used)
    if empty := [name for name in classes if not left[name]]:
        raise ValueError(f"support has no clip that can be read of {', '.join(empty)}; {'; '.join(failed[:3])}")
    if len(classes) < 2:
        raise ValueError(f"support must show at least 2 classes, got {', '.join(classes)}")
    target = torch.tensor([classes.index(str(labels[p])) for p in used], device=features[0].device)
    head.fit(torch.cat(features)[None], target[None])
    about = json.dumps(sorted((names[p], str(labels[p]), ids[p]) for p in used))
    return classes, hashlib.sha256(about.encode()).hexdigest()


def _first(names: Sequence[str]) -> str:
    return f", {names[0]} first" if names else ""


def _csv(reader: ShardReader, clips: Sequence[tuple[int, str]], names: Sequence[str], top_k: int) -> Iterator[bytes]:
    """Columns: path, label, probability, then label_k and probability_k of the runners-up, then one a class."""
    ranked = [text for k in range(2, top_k + 1) for text in (f"label_{k}", f"probability_{k}")]
    yield _line(["path", "label", "probability", *ranked, *(f"p({name})" for name in names)])
    for path, best, row in _rows(reader, clips, top_k):
        tops = [text for k in best for text in (names[k], f"{row[k]:.6f}")]
        yield _line([path, *tops, *(f"{p:.6f}" for p in row)])


def _line(cells: Sequence[str]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue().encode(errors="surrogateescape")


def _json(reader: ShardReader, clips: Sequence[tuple[int, str]], names: Sequence[str], top_k: int) -> Iterator[bytes]:
    failed = [{"path": name, "reason": reason} for name, reason in reader.failed.values()]
    about = {"settings": reader.settings, "classes": list(names), "failed": failed}
    yield json.dumps(about, indent=1)[:-2].encode() + b',\n "clips": ['
    between = "\n"
    for path, best, row in _rows(reader, clips, top_k):
        top: list[Mapping[str, Any]] = [{"label": names[k], "probability": round(row[k], 6)} for k in best]
        each = {name: round(p, 6) for name, p in zip(names, row, strict=True)}
        clip = {"path": path, **top[0], "top": top, "probabilities": each}
        yield f"{between}  {json.dumps(clip)}".encode()
        between = ",\n"
    yield b"\n ]\n}\n"


def _rows(
    reader: ShardReader, clips: Sequence[tuple[int, str]], top_k: int
) -> Iterator[tuple[str, list[int], list[float]]]:
    """(path, the best classes, all probabilities) of every clip."""
    found = reader.iterate("probabilities", (clip_id for clip_id, _ in clips))
    for (_, path), (_, row) in zip(clips, found, strict=True):
        yield path, row.topk(top_k).indices.tolist(), row.tolist()


def _remove(parts: Path) -> None:
    for pattern in ("index-*.json", "predictions-*.safetensors", ".lock-*"):
        for path in parts.glob(pattern):
            path.unlink()
    if not any(parts.iterdir()):
        parts.rmdir()
