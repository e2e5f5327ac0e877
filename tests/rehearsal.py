"""What rehearse.py runs for test_rehearsal.py: models on "cuda" at their usual sizes, two blocks deep.

python tests/rehearse.py tests/rehearsal.py NAME...
"""

import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fake_tensors
import torch

import mmfast
from mmfast.cli import main
from mmfast.clip_config import CLIPConfig
from mmfast.evl_config import EVLConfig
from mmfast.m2clip_config import M2CLIPConfig
from mmfast.masks import sample_pack

SMALL = "videomae_small_patch16_224"


def clips(count: int, device: str = "cuda") -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, 16, 224, 224), dtype=torch.uint8, device=device)


def small(dtype: torch.dtype = torch.bfloat16) -> mmfast.MaskedViT:
    return mmfast.MaskedViT.from_name(SMALL, num_classes=7, depth=2).eval().to("cuda", dtype)


def waiting_for_nothing(call: Callable[..., object], *args: Any, **options: Any) -> None:
    before = fake_tensors.waits.copy()
    call(*args, **options)
    assert fake_tensors.waits == before, f"waited for the device: {fake_tensors.waits - before}"


def ensemble() -> None:
    """Resident clips in large batches and as graphs; each dtype; fused; micro-batches in L2."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        model = small(dtype)
        large, few = clips(43), clips(3)
        for mask_ratio in (0.75, 0.9, 0.0):
            for _ in range(3):
                waiting_for_nothing(model.ensemble, few, views=2, mask_ratio=mask_ratio)
        waiting_for_nothing(model.ensemble, large)
        for gelu in (None, "tanh"):
            model.fuse_for_inference(gelu)
            for micro_batch in (None, "l2", 5):
                waiting_for_nothing(model.ensemble, large, micro_batch=micro_batch)
            model.unfuse()


def host() -> None:
    """Clips in host memory, and masks of two ratios."""
    model = small()
    for _ in range(3):
        model.ensemble(clips(3, "cpu"))
    masks = [mmfast.tube_masks(2, 1, mask_ratio=ratio, device="cuda") for ratio in (0.75, 0.9)]
    model.ensemble(clips(2), masks=torch.cat(masks, 1))


def training() -> None:
    """A step of classification, with each way to save memory."""
    model = small(torch.float32).train()
    for what in (None, "mlp", "block"):
        model.set_grad_checkpointing(what is not None, what or "block")
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
                loss = model(clips(32), sample_pack(32, 1, model.config.grid, device="cuda")).float().sum()
            waiting_for_nothing(loss.backward)


def pretraining() -> None:
    model = mmfast.MaskedAutoencoder.from_name(f"pretrain_{SMALL}", num_classes=7, depth=2, decoder_depth=2).to("cuda")
    mask = mmfast.tube_masks(32, 1, device="cuda")[:, 0]
    with torch.autocast("cuda", torch.bfloat16):
        loss = model.reconstruction_loss(clips(32), mask)
        made = model(clips(32), mask)
    waiting_for_nothing(loss.backward)
    assert made.logits is not None
    (made.pred.float().sum() + made.logits.float().sum()).backward()


def fp8() -> None:
    model = small()
    model.quantize_fp8()
    for count in (43, 3, 3, 3):
        waiting_for_nothing(model.ensemble, clips(count))


def evl() -> None:
    towers = CLIPConfig.from_name("clip_vit_b16", vision_depth=2, text_depth=1)
    model = mmfast.EVL(EVLConfig(towers, num_layers=2, num_classes=7, num_frames=4)).to("cuda").train()
    video = torch.randn(4, 3, 4, 224, 224, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        model(video).float().sum().backward()
    model.eval()
    with torch.no_grad(), torch.autocast("cuda", torch.float16):
        model(video)


def m2clip() -> None:
    towers = CLIPConfig.from_name("clip_vit_b16", vision_depth=2, text_depth=2)
    model = mmfast.M2CLIP(M2CLIPConfig.preset("paper", towers, num_classes=7, num_frames=4)).to("cuda").train()
    ids = torch.zeros(7, 77, dtype=torch.int64)
    ids[:, 0], ids[:, 5] = 49406, 49407
    labels = torch.arange(4, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        losses = model.losses(torch.randn(4, 3, 4, 224, 224, device="cuda"), ids[:4], labels, ids)
    losses["total"].backward()


def measured_tables() -> None:
    """mmfast tune, its timer too."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MMFAST_TABLES"] = folder
        flags = ["--model", SMALL, "--mask-ratio", "0.9", "--batch", "2", "--train", "--quiet"]
        assert main(["tune", *flags, "--warm"]) == 0
        assert main(["tune", *flags]) == 0
        assert list(Path(folder).rglob("packed_attention.json"))


def adapter() -> None:
    """TED, dense, forward and backward."""
    for dtype in (torch.bfloat16, torch.float32):
        ted = mmfast.adapters.TEDAdapter(768, 384).to("cuda", dtype)
        x = torch.randn(16, 197, 768, device="cuda", dtype=dtype).requires_grad_()
        ted(x, num_frames=8, grid=(14, 14)).sum().backward()


if __name__ == "__main__":
    failed = []
    for name in sys.argv[1:]:
        try:
            globals()[name]()
        except Exception:
            traceback.print_exc()
            failed.append(name)
    sys.exit(f"failed: {failed}" if failed else 0)
