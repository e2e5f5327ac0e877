"""A small EVL through the Triton kernels, in the interpreter and on a GPU: logits and gradients against the restatement."""

import pytest
import torch
from evl_makers import FRAMES, clips, kept_cells, plain_logits, tiny_model
from lanes import gpu
from numerics import assert_close_to_truth
from torch import Tensor
from torch.nn import functional as F

from mmfast import sample_pack, tube_masks


def _check(device: str, masked: bool) -> None:
    model = tiny_model(mlp_dropout=0.0, class_dropout=0.0).to(device)
    video, labels = clips(model.config).to(device), torch.tensor([1, 3], device=device)
    mask = tube_masks(2, 1, (model.config.num_frames, *model.config.grid), keep=5)[:, 0].to(device)
    kept = kept_cells(mask, model.config) if masked else _all_cells(model.config.grid, device)
    got = model(video, mask if masked else None)
    F.cross_entropy(got, labels).backward()
    results = []
    for dtype in (torch.float32, torch.float64):
        state = {
            n: t.detach().to(dtype).requires_grad_(not n.startswith("backbone.")) for n, t in model.state_dict().items()
        }
        logits = plain_logits(model.config, state, video.to(dtype), kept)
        F.cross_entropy(logits, labels).backward()
        results.append((logits.detach(), state))
    (plain, by_torch), (truth, exact) = results
    assert_close_to_truth("logits", got.detach(), plain, truth)
    for name, parameter in model.decoder.named_parameters(prefix="decoder"):
        grads = parameter.grad, by_torch[name].grad, exact[name].grad
        assert all(g is not None for g in grads), name
        assert_close_to_truth(name, *grads)  # type: ignore[arg-type]  # none is None


def _all_cells(grid: tuple[int, int], device: str) -> Tensor:
    return torch.arange(grid[0] * grid[1], device=device).expand(2, -1)


@pytest.mark.interpret
@pytest.mark.parametrize("masked", [False, True])
def test_through_the_kernels(masked: bool) -> None:
    _check("cpu", masked)


@gpu
@pytest.mark.parametrize("masked", [False, True])
def test_on_a_gpu(masked: bool) -> None:
    _check("cuda", masked)


@gpu
def test_training_of_a_bf16_backbone_under_autocast_on_a_gpu() -> None:
    model = tiny_model(mlp_dropout=0.0, class_dropout=0.0).cuda()
    state = {n: t.detach().double() for n, t in model.state_dict().items()}
    video, labels = clips(model.config).cuda(), torch.tensor([1, 3], device="cuda")
    truth = F.cross_entropy(
        plain_logits(model.config, state, video.double(), _all_cells(model.config.grid, "cuda")), labels
    )
    model.backbone.to(torch.bfloat16)
    with torch.autocast("cuda", torch.bfloat16):
        loss = F.cross_entropy(model(video), labels)
    loss.backward()
    assert abs(float(loss - truth)) < 0.1 * float(truth)
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.decoder.parameters())


@gpu
def test_nothing_waits_for_the_device() -> None:
    model, raw = tiny_model().cuda(), torch.randint(0, 256, (2, 3, FRAMES, 24, 24), dtype=torch.uint8, device="cuda")
    pack = sample_pack(2, 2, (FRAMES, 3, 3), keep=5, device="cuda")
    run = lambda: (model(raw).sum() + model(raw, pack).sum()).backward()
    run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
