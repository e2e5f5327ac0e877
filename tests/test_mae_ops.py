"""masked_patch_mse: kernel and CPU path against float64, and against the published loss restated."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from einops import rearrange
from lanes import BOTH, KERNEL, gpu
from numerics import assert_close_to_truth
from torch import Tensor, nn

from mmfast_kernels.mae import (
    masked_patch_mse,
    masked_patch_mse_backward_op,
    masked_patch_mse_op,
    masked_patch_targets,
)

LANES = [
    pytest.param("cpu", torch.float32, id="plain-fp32"),
    pytest.param("cpu", torch.bfloat16, id="plain-bf16"),
    *KERNEL,
]
# (channels, tubelet, patch): a block that pixels fill, 392 and 27 of them, 21 channels, one, and more than 512 pixels
PATCHES = {"rgb16": (3, 2, 16), "flow14": (2, 2, 14), "pose4": (21, 2, 4), "depth3": (1, 3, 3), "long16": (3, 4, 16)}


def patches(
    kind: str,
    pixels: str = "uint8",
    layout: str = "planar",
    normalize: bool = True,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> dict[str, Any]:
    """Two clips on a grid of 2 x 2 x 3, predictions for 7 of their tokens."""
    c, tubelet, patch = PATCHES[kind]
    g = torch.Generator().manual_seed(c)
    video = torch.randint(0, 256, (2, c, 2 * tubelet, 2 * patch, 3 * patch), dtype=torch.uint8, generator=g)
    scale, shift = torch.full((c,), 1 / 255), torch.zeros(c)
    if pixels == "float":
        scale, shift = torch.rand(c, generator=g) + 0.2, torch.rand(c, generator=g)
        video = (video / 255 - shift.view(-1, 1, 1, 1)) / scale.view(-1, 1, 1, 1)
    if layout == "interleaved":
        video = video.permute(0, 2, 3, 4, 1).contiguous().permute(0, 4, 1, 2, 3)
    elif layout == "strided":
        wide = torch.zeros((*video.shape[:3], 3 * patch, 6 * patch + 1), dtype=video.dtype)
        wide[:, :, :, patch:, 1::2] = video
        video = wide[:, :, :, patch:, 1::2]
    return {
        "pred": torch.randn(7, c * tubelet * patch * patch, generator=g).to(device, dtype),
        "video": video.to(device),
        "token_idx": torch.randint(0, 12, (7,), generator=g, dtype=torch.int32).to(device),
        "clip_idx": torch.randint(0, 2, (7,), generator=g, dtype=torch.int32).to(device),
        "scale": scale.to(device),
        "shift": shift.to(device),
        "tubelet": tubelet,
        "patch": patch,
        "normalize": normalize,
    }


def mse_ref(pred: Tensor, **args: Any) -> Tensor:
    target, _, _ = masked_patch_targets(**args)
    return nn.functional.mse_loss(pred.to(target.dtype), target)


def loss_and_gradient(op: Callable[..., Tensor], args: dict[str, Any]) -> tuple[Tensor, Tensor]:
    pred = args["pred"].detach().requires_grad_()
    loss = op(**(args | {"pred": pred}))
    return loss.detach(), torch.autograd.grad(loss, pred, torch.tensor(-0.7, dtype=loss.dtype, device=loss.device))[0]


def check(args: dict[str, Any]) -> None:
    got, dgot = loss_and_gradient(masked_patch_mse, args)
    plain, dplain = loss_and_gradient(mse_ref, args)
    wide = {"pred": args["pred"].double(), "video": args["video"].double()}
    truth, dtruth = loss_and_gradient(mse_ref, args | wide)
    assert got.dtype == torch.float32
    assert dgot.dtype == args["pred"].dtype
    assert_close_to_truth("loss", got, plain, truth)
    # A gradient is 2 / (R K) of an error: the bar is set where errors of the size of one are.
    n = args["pred"].numel() / 2
    assert_close_to_truth("dpred", dgot * n, dplain * n, dtruth * n)


@pytest.mark.parametrize("kind", PATCHES)
@pytest.mark.parametrize("normalize", [True, False], ids=["normalised", "raw"])
@pytest.mark.parametrize("pixels", ["uint8", "float"])
@pytest.mark.parametrize(("device", "dtype"), LANES)
def test_patches(
    kind: str, normalize: bool, pixels: str, device: str, dtype: torch.dtype, poisoned_empty: None
) -> None:
    check(patches(kind, pixels, "planar", normalize, dtype, device))


@pytest.mark.parametrize("kind", ["rgb16", "pose4"])
@pytest.mark.parametrize("layout", ["interleaved", "strided"])
@pytest.mark.parametrize(("device", "dtype"), LANES)
def test_patches_of_strided_videos(
    kind: str, layout: str, device: str, dtype: torch.dtype, poisoned_empty: None
) -> None:
    check(patches(kind, "uint8", layout, True, dtype, device))


@pytest.mark.parametrize("lane", BOTH)
def test_one_row(lane: str, poisoned_empty: None) -> None:
    args = patches("rgb16")
    check(args | {name: args[name][:1] for name in ("pred", "token_idx", "clip_idx")})


@pytest.mark.parametrize("lane", BOTH)
def test_more_rows_than_a_block(lane: str, poisoned_empty: None) -> None:
    args = patches("depth3")
    check(
        args | {name: args[name].repeat(*([19, 1][: args[name].dim()])) for name in ("pred", "token_idx", "clip_idx")}
    )


@pytest.mark.parametrize("lane", BOTH)
def test_without_scale(lane: str) -> None:
    check(patches("pose4", "float") | {"scale": None, "shift": None})


@pytest.mark.parametrize("lane", BOTH)
def test_negative_scale_turns_the_target_over(lane: str) -> None:
    args = patches("pose4", "float")
    check(args | {"scale": -args["scale"]})


@pytest.mark.parametrize("lane", BOTH)
def test_strided_prediction_and_ids(lane: str, poisoned_empty: None) -> None:
    args = patches("flow14")
    wide = torch.randn(7, 2 * args["pred"].shape[1], generator=torch.Generator().manual_seed(0))
    ids = {name: args[name].repeat_interleave(2)[::2] for name in ("token_idx", "clip_idx")}
    check(args | ids | {"pred": wide[:, 3 : 3 + args["pred"].shape[1]]})
    check(args | ids | {"pred": wide[:, ::2]})


@pytest.mark.parametrize("pixels", ["uint8", "float"])
@pytest.mark.parametrize("lane", BOTH)
def test_constant_patches_stay_finite(lane: str, pixels: str) -> None:
    args = patches("rgb16", pixels)
    args["video"] = torch.full_like(args["video"], 93 if pixels == "uint8" else 0.25)
    loss, dpred = loss_and_gradient(masked_patch_mse, args)
    torch.testing.assert_close(loss, args["pred"].square().mean())
    assert bool(dpred.isfinite().all())


@pytest.mark.parametrize("lane", BOTH)
def test_other_tokens_are_never_read(lane: str) -> None:
    args = patches("pose4", "float")
    want = loss_and_gradient(masked_patch_mse, args)
    read = torch.zeros(2, 12, dtype=torch.bool)
    read[args["clip_idx"].long(), args["token_idx"].long()] = True
    grid = read.view(2, 1, 2, 2, 3).repeat_interleave(2, 2).repeat_interleave(4, 3).repeat_interleave(4, 4)
    args["video"] = args["video"].masked_fill(~grid, float("nan"))
    for got, expected in zip(loss_and_gradient(masked_patch_mse, args), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)])
@pytest.mark.parametrize("lane", BOTH)
def test_loss_has_the_same_bits_every_time(lane: str, device: str) -> None:
    args = patches("rgb16", device=device)
    pred = args["pred"].requires_grad_()
    loss = masked_patch_mse(**args)
    first = torch.autograd.grad(loss, pred, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(loss, pred)[0])
    assert torch.equal(loss, masked_patch_mse(**args))


def published_loss(pred: Tensor, clip: Tensor, mask: Tensor, tubelet: int, patch: int, normalize: bool) -> Tensor:
    """VideoMAE's and MM-CDFSL's: targets of the whole un-normalised clip, then indexed by the mask.

    pred: [B, removed, K].   clip: [B, C, F, H, W] raw pixels.   mask: bool [B, N].
    """
    sizes = dict(p0=tubelet, p1=patch, p2=patch)
    if normalize:
        cubes = rearrange(clip, "b c (t p0) (h p1) (w p2) -> b (t h w) (p0 p1 p2) c", **sizes)
        centred = cubes - cubes.mean(dim=-2, keepdim=True)
        target = rearrange(
            centred / (cubes.var(dim=-2, unbiased=True, keepdim=True).sqrt() + 1e-6), "b n p c -> b n (p c)"
        )
    else:
        target = rearrange(clip, "b c (t p0) (h p1) (w p2) -> b (t h w) (p0 p1 p2 c)", **sizes)
    return nn.MSELoss()(pred, target[mask].reshape(pred.shape))


@pytest.mark.parametrize("kind", ["rgb16", "flow14", "pose4"])
@pytest.mark.parametrize("normalize", [True, False], ids=["normalised", "raw"])
@pytest.mark.parametrize("pixels", ["uint8", "float"])
@pytest.mark.parametrize("lane", BOTH)
def test_equals_the_published_loss(lane: str, kind: str, pixels: str, normalize: bool) -> None:
    args = patches(kind, pixels, normalize=normalize)
    g = torch.Generator().manual_seed(3)
    order = torch.rand(2, 12, generator=g).argsort(1)
    mask = torch.zeros(2, 12, dtype=torch.bool).scatter_(1, order[:, :9], True)
    clip_idx, token_idx = mask.nonzero(as_tuple=True)
    pred = torch.randn(18, args["pred"].shape[1], generator=g, requires_grad=True)
    args |= {"pred": pred, "token_idx": token_idx.int(), "clip_idx": clip_idx.int()}
    raw = args["video"].float() * args["scale"].view(-1, 1, 1, 1) + args["shift"].view(-1, 1, 1, 1)
    other = pred.detach().view(2, 9, -1).requires_grad_()
    want = published_loss(other, raw, mask, args["tubelet"], args["patch"], normalize)
    got = masked_patch_mse(**args)
    dwant, dgot = torch.autograd.grad(want, other)[0], torch.autograd.grad(got, pred)[0]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=0)
    assert float((dgot.view_as(dwant) - dwant).norm() / dwant.norm()) < 1e-5


@pytest.mark.parametrize("normalize", [True, False])
def test_targets_give_their_pixels_back(normalize: bool) -> None:
    args = patches("pose4", "uint8", normalize=normalize)
    del args["pred"]
    target, mean, deviation = masked_patch_targets(**args)
    raw = (target.view(7, -1, 21) * deviation.unsqueeze(1) + mean.unsqueeze(1)) * 255
    slot, y, x = (int(i) for i in torch.unravel_index(args["token_idx"][2], (2, 2, 3)))
    clip = args["video"][int(args["clip_idx"][2])]
    cube = clip[:, slot * 2 : slot * 2 + 2, y * 4 : y * 4 + 4, x * 4 : x * 4 + 4]
    torch.testing.assert_close(raw[2], cube.permute(1, 2, 3, 0).reshape(-1, 21).float(), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("lane", BOTH)
def test_loss_compiles_as_one_graph(lane: str, backend: str) -> None:
    args = patches("rgb16")
    compiled = torch.compile(masked_patch_mse, fullgraph=True, backend=backend)
    for got, want in zip(loss_and_gradient(compiled, args), loss_and_gradient(masked_patch_mse, args), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("lane", BOTH)
def test_loss_opcheck(lane: str) -> None:
    args = patches("pose4")
    given = tuple(args[n] for n in ("pred", "video", "token_idx", "clip_idx", "scale", "shift"))
    torch.library.opcheck(masked_patch_mse_op, (*given, 2, 4, True))
    torch.library.opcheck(masked_patch_mse_backward_op, (torch.tensor(0.5), *given, 2, 4, True))


def test_loss_gradcheck() -> None:
    args = patches("depth3")
    pred = args.pop("pred").double().requires_grad_()
    assert torch.autograd.gradcheck(lambda p: masked_patch_mse(p, **args), (pred,), fast_mode=True)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"pred": torch.zeros(7, 5)}, ValueError, r"pred takes \(7, 672\), got \(7, 5\)"),
        ({"pred": torch.zeros(7, 672, dtype=torch.int32)}, TypeError, "pred takes a floating dtype"),
        ({"video": torch.zeros(2, 21, 4, 8)}, ValueError, r"video takes \[B, C, F, H, W\]"),
        ({"video": torch.zeros(2, 21, 4, 9, 12)}, ValueError, "H and W of patch=4"),
        ({"video": torch.zeros(2, 21, 4, 8, 12, dtype=torch.int16)}, TypeError, "video takes uint8"),
        ({"tubelet": 1, "patch": 1}, ValueError, "normalize takes tokens of two pixels or more"),
        ({"scale": None}, ValueError, "scale and shift together"),
        ({"shift": torch.zeros(3)}, ValueError, r"shift takes \[21\], got \(3,\)"),
        ({"scale": torch.zeros(21).double()}, TypeError, "scale takes torch.float32"),
        ({"token_idx": torch.zeros(7)}, TypeError, "token_idx takes torch.int32"),
        ({"clip_idx": torch.zeros(6, dtype=torch.int32)}, ValueError, "clip_idx takes .R. as token_idx, got .6,."),
    ],
)
def test_wrong_patches(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        masked_patch_mse(**(patches("pose4") | change))


def test_nothing_removed() -> None:
    args = patches("pose4")
    with pytest.raises(ValueError, match="token_idx takes at least one token, got none: no clip, or nothing removed"):
        masked_patch_mse(**(args | {name: args[name][:0] for name in ("pred", "token_idx", "clip_idx")}))
