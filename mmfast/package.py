"""A model's probabilities as a file that torch loads by itself: neither mmfast nor, from C++, Python is needed to run it.

    program(video, clip_ids, seed) -> probs          the same masks and, to rounding, the same numbers as the model's own

The program is the model in torch's own operators (programs.py), weights folded as fused.py folds them; AOTInductor writes its
kernels. Classes that a CLIP knows by their texts are constants in it.
"""

import copy
import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .clip import CLIP
from .evl import EVL
from .m2clip import M2CLIP
from .multiview import text_features, text_scale
from .programs import Packaged, Program, TextProgram, program_of
from .vit import MaskedViT

KINDS = ("aoti", "export")
FRAMES = 8  # of a CLIP, which takes any number
TAILS = "enable_loop_tail_vec"  # vector code for what does not fill a vector: torch 2.13 makes it wrong in some graphs
BAR = 1e-4  # relative error of probabilities that a compiled program may have beside twice the model's own


def package_ensemble(
    model: Packaged,
    path: str | Path,
    *,
    views: int = 2,
    mask_ratio: float = 0.75,
    keep: int | None = None,
    batch: int = 1,
    pixels: torch.dtype = torch.uint8,
    kind: str = "aoti",
    classes: Sequence[str] | None = None,
    options: Mapping[str, Any] | None = None,
) -> Path:
    """Write model.ensemble to path (.pt2) as a program of (video, clip_ids, seed) for the device and dtype the model has.

    model: a MaskedViT, with or without adapters; an EVL; an M2CLIP, by its class head. video: [B, C, F, H, W] of the config's
    size, contiguous, of dtype `pixels`: uint8, or a floating one for normalised clips; B from 1 to `batch`. clip_ids: int64 [B].
    seed: int64 []. Returns fp32 [B, K]. views, mask_ratio, keep: as in ensemble; with mask_ratio 0 ids and seed do nothing.
    kind: "aoti", compiled for this kind of machine; torch._inductor.aoti_load_package(path) gives the program, and C++ loads
    it too. "export": a graph; torch.export.load(path).module(). classes: their names, kept with what else tells of the program:
    program.get_metadata(), or the extra file "mmfast" of a graph. options: of Inductor, beside its own.
    Raises ValueError for a quantised model or one without classes, one in training mode, or a wrong argument; TypeError.
    """
    if isinstance(model, CLIP):
        raise TypeError("package_ensemble takes a model with classes; a CLIP knows them by texts: package_zero_shot")
    if not isinstance(model, MaskedViT | EVL | M2CLIP):
        raise TypeError(f"package_ensemble takes a MaskedViT, an EVL or an M2CLIP, got {type(model).__name__}")
    _check(model, "package_ensemble", path, views, batch, kind, pixels)
    if model.config.num_classes == 0:
        raise ValueError("package_ensemble takes a classifier, got a model with num_classes=0")
    _check_names(classes, model.config.num_classes)
    program = program_of(model, views, mask_ratio, keep)
    about = {"model": type(model).__name__, "views": views, "mask_ratio": mask_ratio}
    return _write(program, path, batch, pixels, kind, about, classes, options)


def package_zero_shot(
    model: CLIP | M2CLIP,
    path: str | Path,
    class_token_ids: Tensor,
    *,
    num_frames: int | None = None,
    views: int = 1,
    mask_ratio: float = 0.0,
    keep: int | None = None,
    batch: int = 1,
    pixels: torch.dtype = torch.uint8,
    kind: str = "aoti",
    classes: Sequence[str] | None = None,
    options: Mapping[str, Any] | None = None,
) -> Path:
    """As package_ensemble, the classes known by their texts: the vision tower and the texts' features, without the text tower.

    class_token_ids: [K, context], or [R, K, context] for R prompts a class. num_frames: of a CLIP, 8 by default. The features
    of a clip are the mean of its frames'; probabilities are the softmax of their cosines with the texts, times class_scale or
    a CLIP's temperature. Adapters take part where they are enabled. Raises ValueError, TypeError.
    """
    if not isinstance(model, CLIP | M2CLIP):
        raise TypeError(f"package_zero_shot takes a CLIP or an M2CLIP, got {type(model).__name__}")
    _check(model, "package_zero_shot", path, views, batch, kind, pixels)
    if class_token_ids.dim() not in (2, 3) or class_token_ids.is_floating_point() or not class_token_ids.numel():
        raise ValueError(f"class_token_ids takes integers [K, context] or [R, K, context], got {class_token_ids.shape}")
    _check_names(classes, class_token_ids.shape[-2])
    frames = num_frames or (model.config.num_frames if isinstance(model, M2CLIP) else FRAMES)
    if isinstance(model, M2CLIP) and frames != model.config.num_frames:
        raise ValueError(
            f"num_frames takes {model.config.num_frames}, the frames of this model's adapters, got {num_frames}"
        )
    texts = text_features(model, class_token_ids)
    program = TextProgram(model, texts, text_scale(model), frames, views, mask_ratio, keep)
    about = {"model": type(model).__name__, "views": views, "mask_ratio": mask_ratio}
    return _write(program, path, batch, pixels, kind, about, classes, options)


def _write(
    program: Program,
    path: str | Path,
    batch: int,
    pixels: torch.dtype,
    kind: str,
    about: Mapping[str, Any],
    classes: Sequence[str] | None,
    options: Mapping[str, Any] | None,
) -> Path:
    path, device = Path(path), program.tower.positions.device
    shape = (batch, *program.shape)
    example = (
        torch.zeros(shape, dtype=pixels, device=device),
        torch.arange(batch, device=device),
        torch.zeros((), dtype=torch.int64, device=device),
    )
    clips = {0: torch.export.Dim("batch", min=1, max=batch)} if batch > 1 else None
    known = {**about, "keep": program.cut.kept, "batch": batch, "clip": list(shape[1:]), "pixels": str(pixels)}
    known |= {} if classes is None else {"classes": list(classes)}
    aside = path.with_name(f".{path.stem}.{os.getpid()}.pt2")
    with torch.no_grad():
        exported = torch.export.export(program, example, dynamic_shapes=(clips, clips, None))
        try:
            if kind == "export":
                torch.export.save(exported, aside, extra_files={"mmfast": json.dumps(known)})
            else:
                own = {name: value if isinstance(value, str) else json.dumps(value) for name, value in known.items()}
                _compile(program, exported, aside, example, {"aot_inductor.metadata": own, **(options or {})})
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)
    return path


def _compile(
    program: Program,
    exported: torch.export.ExportedProgram,
    path: Path,
    example: tuple[Tensor, ...],
    options: Mapping[str, Any],
) -> None:
    """Write the compiled program, held against the one it was made of: Inductor's vector code for the CPU has been wrong."""
    on_cpu = example[0].device.type == "cpu"
    # Frozen weights reach the CPU's library packed; without, its products took twice as long.
    ways: list[dict[str, Any]] = [{"freezing": on_cpu}]
    if on_cpu:
        if hasattr(torch._inductor.config.cpp, TAILS):
            ways[0][f"cpp.{TAILS}"] = False
        ways.append({"freezing": True, "cpp.simdlen": 1})
    probes = [_probe(example, count) for count in range(1, min(2, len(example[0])) + 1)]
    exact = copy.deepcopy(program).double()
    truths = [exact(*probe) for probe in probes]
    del exact
    allowed = [2 * error + BAR for error in _errors(program, probes, truths)]
    found: list[float] = []
    for way in ways:
        made = torch._inductor.aoti_compile_and_package(
            exported, package_path=str(path), inductor_configs={**way, **options}
        )
        assert Path(made) == path
        found = _errors(torch._inductor.aoti_load_package(str(path)), probes, truths)
        if all(error <= most for error, most in zip(found, allowed, strict=True)):
            return
        if way is not ways[-1]:
            warnings.warn(f"torch compiled wrongly, error {max(found):.1e}: again without vector code", stacklevel=4)
    raise RuntimeError(
        f"this torch compiles the model wrongly: the package's probabilities are off by {max(found):.1e}, "
        f'{max(allowed):.1e} at most are allowed; kind="export" needs no compiler'
    )


def _errors(run: Callable[..., Tensor], probes: Sequence[tuple[Tensor, ...]], truths: Sequence[Tensor]) -> list[float]:
    """Relative, of each probe's probabilities."""
    pairs = zip(probes, truths, strict=True)
    return [float((run(*probe).double() - truth).norm() / truth.norm()) for probe, truth in pairs]


def _probe(example: tuple[Tensor, ...], count: int) -> tuple[Tensor, ...]:
    """Noise in place of the first clips."""
    video, ids, seed = example
    draw = torch.Generator().manual_seed(0)
    shape = (count, *video.shape[1:])
    if video.dtype == torch.uint8:
        noise = torch.randint(0, 256, shape, dtype=torch.uint8, generator=draw)
    else:
        noise = torch.randn(shape, generator=draw).to(video.dtype)
    return noise.to(video.device), ids[:count].clone(), seed


def _check(
    model: nn.Module, name: str, path: str | Path, views: int, batch: int, kind: str, pixels: torch.dtype
) -> None:
    if model.training:
        raise ValueError(f"{name} takes a model in eval mode, got one in training mode: call eval() first")
    backbone = model.backbone if isinstance(model, EVL) else model
    if isinstance(backbone, MaskedViT):
        backbone.refuse_if_quantized(name)
    if kind not in KINDS:
        raise ValueError(f"kind takes one of {KINDS}, got {kind!r}")
    if Path(path).suffix != ".pt2":
        raise ValueError(f"path must end in .pt2, got {str(path)!r}")
    if pixels != torch.uint8 and not pixels.is_floating_point:
        raise ValueError(f"pixels takes torch.uint8 or a floating dtype, got {pixels}")
    for what, count in (("views", views), ("batch", batch)):
        if count < 1:
            raise ValueError(f"{what} must be at least 1, got {count}")


def _check_names(classes: Sequence[str] | None, count: int) -> None:
    if classes is not None and (isinstance(classes, str) or len(classes) != count):
        got = repr(classes) if isinstance(classes, str) else f"{len(classes)} of them"
        raise ValueError(f"classes takes {count} names, one a class, got {got}")
