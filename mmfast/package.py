"""`ensemble` of one model as a file that torch loads by itself: neither mmfast nor, from C++, Python is needed to run it.

    program(video, clip_ids, seed) -> probs          the same masks and, to rounding, the same numbers as model.ensemble

The program is the model in torch's own operators, weights folded as fused.py folds them; AOTInductor writes its kernels. The
masks are drawn inside by the reference of the sampler, so that they are the same bits on every device.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmfast_kernels.gather import gather_tubes_ref
from mmfast_kernels.norm import layer_norm_ref
from mmfast_kernels.pool import ensemble_probs_ref, segment_mean_norm_ref
from mmfast_kernels.sampling import sample_keep_ref

from .fused import FusedBlock, FusedBlocks
from .layers import LayerNorm
from .masks import kept_per_slot
from .vit import MaskedViT

KINDS = ("aoti", "export")


class EnsembleProgram(nn.Module):
    """model.ensemble on clips of the model's own size, with equally long views, in torch's operators alone."""

    positions: Tensor
    affine: Tensor

    def __init__(self, model: MaskedViT, views: int, mask_ratio: float, keep: int | None) -> None:
        super().__init__()
        config = model.config
        self.config, self.views, self.grid = config, views, config.grid
        self.kept = kept_per_slot(config.grid, mask_ratio, keep)
        with torch.no_grad():
            self.fused = FusedBlocks(list(model.blocks), None)
        self.patches, self.norm, self.fc_norm, self.head = model.patch_embed.proj, model.norm, model.fc_norm, model.head
        self.register_buffer("positions", model._positions_of(config.grid).clone(), persistent=False)
        self.register_buffer("affine", model._pixel_affine().clone(), persistent=False)
        self.eval()

    def forward(self, video: Tensor, clip_ids: Tensor, seed: Tensor) -> Tensor:
        """video: [B, C, F, H, W] as model.ensemble's.   clip_ids: int64 [B].   seed: int64 [].   Returns fp32 [B, K]."""
        length = self.grid[0] * self.kept
        # The reference takes a seed on the device as it takes a number.
        ids = sample_keep_ref(clip_ids, self.views, self.grid, self.kept, seed).flatten().long()  # type: ignore[arg-type]  # a seed that is a tensor
        clips = torch.arange(video.shape[0], device=video.device).repeat_interleave(self.views * length)
        x = self._embed(video, ids, clips).unflatten(0, (-1, length))
        for block in self.fused.blocks:
            assert isinstance(block, FusedBlock)
            x = _block(block, x)
        return ensemble_probs_ref(self.head(self._pool(x)).unflatten(0, (-1, self.views)))

    def _embed(self, video: Tensor, ids: Tensor, clips: Tensor) -> Tensor:
        weight, bias = self.patches.weight, self.patches.bias
        scale, shift = self.affine if video.dtype == torch.uint8 else (None, None)
        tubelet, patch = self.config.tubelet_size, self.config.patch_size
        wide = torch.promote_types(weight.dtype, torch.float32)
        rows = gather_tubes_ref(video, ids, clips, tubelet, patch, scale, shift, wide).to(weight.dtype)
        return (F.linear(rows, weight.flatten(1), bias) + self.positions[ids]).to(weight.dtype)

    def _pool(self, x: Tensor) -> Tensor:
        if self.config.pool == "first":
            x = x[:, 0]
            for norm in (self.norm, self.fc_norm):
                x = x if norm is None else layer_norm_ref(x, norm.weight, norm.bias, norm.eps)
            return x
        norms = _of("", self.fc_norm) | _of("token_", self.norm)
        return segment_mean_norm_ref(x.flatten(0, 1), None, length=x.shape[1], **norms)


def _block(block: FusedBlock, x: Tensor) -> Tensor:
    """x [S, n, D] after a block."""
    own = block._block[0]
    heads = own.attn.num_heads
    h = F.layer_norm(x, x.shape[-1:], eps=own.norm1.eps)
    q, k, v = F.linear(h, block.qkv.weight, block.qkv.bias).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    x = x + F.linear(out, block.proj.weight, block.proj.bias)
    h = F.linear(F.layer_norm(x, x.shape[-1:], eps=own.norm2.eps), block.fc1.weight, block.fc1.bias)
    h = h * torch.sigmoid(1.702 * h) if block.gelu == "quick" else F.gelu(h)
    return x + F.linear(h, block.fc2.weight, block.fc2.bias)


def _of(prefix: str, norm: LayerNorm | None) -> dict[str, Any]:
    return {} if norm is None else {f"{prefix}{name}": getattr(norm, name) for name in ("weight", "bias", "eps")}


def package_ensemble(
    model: MaskedViT,
    path: str | Path,
    *,
    views: int = 2,
    mask_ratio: float = 0.75,
    keep: int | None = None,
    batch: int = 1,
    pixels: torch.dtype = torch.uint8,
    kind: str = "aoti",
    options: Mapping[str, Any] | None = None,
) -> Path:
    """Write model.ensemble to path (.pt2) as a program of (video, clip_ids, seed) for the device and dtype the model has.

    video: [B, C, F, H, W] of the config's size, contiguous, of dtype `pixels`: uint8, or a floating one for normalised clips;
    B from 1 to `batch`. clip_ids: int64 [B]. seed: int64 []. Returns fp32 [B, K]. views, mask_ratio, keep: as in ensemble.
    kind: "aoti", compiled for this kind of machine; torch._inductor.aoti_load_package(path) gives the program, and C++ loads
    it too. "export": a graph; torch.export.load(path).module(). options: of Inductor, beside its own.
    Raises ValueError for a model with adapters or without classes, one in training mode, or a wrong argument.
    """
    path = Path(path)
    _check(model, path, views, batch, kind)
    config, weight = model.config, model.patch_embed.proj.weight
    if pixels != torch.uint8 and not pixels.is_floating_point:
        raise ValueError(f"pixels takes torch.uint8 or a floating dtype, got {pixels}")
    program = EnsembleProgram(model, views, mask_ratio, keep)
    shape = (batch, config.in_chans, config.num_frames, *config.frame_size)
    example = (
        torch.zeros(shape, dtype=pixels, device=weight.device),
        torch.arange(batch, device=weight.device),
        torch.zeros((), dtype=torch.int64, device=weight.device),
    )
    clips = {0: torch.export.Dim("batch", min=1, max=batch)} if batch > 1 else None
    about = {"views": views, "mask_ratio": mask_ratio, "keep": program.kept, "batch": batch, "pixels": str(pixels)}
    aside = path.with_name(f".{path.stem}.{os.getpid()}.pt2")
    with torch.no_grad():
        exported = torch.export.export(program, example, dynamic_shapes=(clips, clips, None))
        try:
            if kind == "export":
                torch.export.save(exported, aside, extra_files={"mmfast": str(about)})
            else:
                # Frozen weights reach the CPU's library packed; without, its products took twice as long.
                own = {
                    "freezing": weight.device.type == "cpu",
                    "aot_inductor.metadata": {name: str(value) for name, value in about.items()},
                }
                made = torch._inductor.aoti_compile_and_package(
                    exported, package_path=str(aside), inductor_configs={**own, **(options or {})}
                )
                assert Path(made) == aside
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)
    return path


def _check(model: MaskedViT, path: Path, views: int, batch: int, kind: str) -> None:
    if model.training:
        raise ValueError("package_ensemble takes a model in eval mode, got one in training mode: call eval() first")
    model.refuse_if_quantized("package_ensemble")
    if model.config.num_classes == 0:
        raise ValueError("package_ensemble takes a classifier, got a model with num_classes=0")
    if model.config.adapter_hidden:
        raise ValueError("package_ensemble takes a model without adapters, got one with them")
    if kind not in KINDS:
        raise ValueError(f"kind takes one of {KINDS}, got {kind!r}")
    if path.suffix != ".pt2":
        raise ValueError(f"path must end in .pt2, got {str(path)!r}")
    for name, count in (("views", views), ("batch", batch)):
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")
