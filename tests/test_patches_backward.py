"""Gradients of tube_embed against float64: kernel and CPU path, over dtypes, strides, grids and sets of tokens."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lanes import BOTH, KERNEL, gpu, interpret
from numerics import assert_close_to_truth
from test_patches import PATCHES, inputs
from torch import Tensor

from mmfast_kernels.patches import tube_embed, tube_embed_ref
from mmfast_kernels.patches_backward import tube_embed_dweight_op

LANES = [
    pytest.param("cpu", torch.float32, id="plain-fp32"),
    *KERNEL,
]
Op = Callable[..., Tensor]


def wanted(args: dict[str, Any]) -> list[str]:
    names = ["weight", "bias", "pos"] + (["video"] if args["video"].is_floating_point() else [])
    return [name for name in names if args[name] is not None]


def gradients(op: Op, args: dict[str, Any], cotangent: Tensor) -> dict[str, Tensor]:
    leaves = {name: args[name].detach().requires_grad_() for name in wanted(args)}
    y = op(**(args | leaves))
    return dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), cotangent.to(y.dtype)), strict=True))


def truth_of(args: dict[str, Any], cotangent: Tensor) -> dict[str, Tensor]:
    """In float64 from the pixels as the product sees them: rounded to the weight's dtype."""
    video, dtype = args["video"], args["weight"].dtype
    if video.dtype == torch.uint8:
        video = video.float() * args["scale"].view(-1, 1, 1, 1) + args["shift"].view(-1, 1, 1, 1)
        args = args | {"scale": None, "shift": None}
    wide = {n: None if args[n] is None else args[n].double() for n in ("weight", "bias", "pos", "scale", "shift")}
    if args["scale"] is None:
        video = video.to(dtype)
    return gradients(tube_embed_ref, args | wide | {"video": video.double()}, cotangent.double())


def cotangent_of(args: dict[str, Any]) -> Tensor:
    shape = (args["token_idx"].shape[0], args["weight"].shape[0])
    made = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    return made.to(args["weight"].device, args["weight"].dtype)


def check(args: dict[str, Any], cotangent: Tensor | None = None) -> None:
    cotangent = cotangent_of(args) if cotangent is None else cotangent
    got, plain = gradients(tube_embed, args, cotangent), gradients(tube_embed_ref, args, cotangent)
    truth = truth_of(args, cotangent)
    for name in got:
        assert got[name].dtype == args[name].dtype, name
        assert_close_to_truth(f"d{name}", got[name], plain[name], truth[name])


@pytest.mark.parametrize("kind", PATCHES)
@pytest.mark.parametrize("layout", ["planar", "interleaved", "strided"])
@pytest.mark.parametrize("pixels", ["uint8", "float"])
@pytest.mark.parametrize(("device", "dtype"), LANES)
def test_videos(kind: str, layout: str, pixels: str, device: str, dtype: torch.dtype, poisoned_empty: None) -> None:
    check(inputs(kind, pixels, layout, dtype, device))


@pytest.mark.parametrize(("device", "dtype"), LANES)
def test_float_video_with_scale(device: str, dtype: torch.dtype, poisoned_empty: None) -> None:
    args = inputs("video4", "float", dtype=dtype, device=device)
    made = inputs("video4", dtype=dtype, device=device)
    check(args | {"scale": made["scale"] * 100, "shift": made["shift"]})


@pytest.mark.parametrize("pixels", ["uint8", "float"])
@pytest.mark.parametrize(("device", "dtype"), LANES)
def test_gathered_rows(pixels: str, device: str, dtype: torch.dtype, poisoned_empty: None) -> None:
    """Rows that stand for their tokens: the layout "rows", and positions named apart from places."""
    args = inputs("image14", pixels, "planar", dtype, device)
    c, tubelet, patch, _ = PATCHES["image14"]
    rows = args["video"].reshape(-1, c, tubelet, patch, patch)[:7].contiguous()
    ids = {"token_idx": torch.zeros(13, dtype=torch.int32, device=device), "pos_idx": args["token_idx"]}
    check(args | ids | {"video": rows, "clip_idx": torch.arange(13, dtype=torch.int32, device=device) % 7})


@pytest.mark.parametrize("count", [0, 1])
@pytest.mark.parametrize("lane", BOTH)
def test_few_tokens(lane: str, count: int, poisoned_empty: None) -> None:
    args = inputs("video4", "float")
    check(args | {name: args[name][:count] for name in ("token_idx", "clip_idx")})


@pytest.mark.parametrize("lane", BOTH)
def test_more_tokens_than_a_block(lane: str, monkeypatch: Any, poisoned_empty: None) -> None:
    monkeypatch.setattr("mmfast_kernels.patches_backward.CPU_ROWS", 8)
    args = inputs("video4", "float")
    check(args | {name: args[name].repeat(8) for name in ("token_idx", "clip_idx")})


@pytest.mark.parametrize("left_out", ["bias", "pos"])
@pytest.mark.parametrize("lane", BOTH)
def test_left_out(lane: str, left_out: str) -> None:
    check(inputs("video4") | {left_out: None})


@pytest.mark.parametrize("kind", ["expanded", "transposed", "every second column"])
@pytest.mark.parametrize("lane", BOTH)
def test_strided_cotangent(lane: str, kind: str) -> None:
    args = inputs("video4")
    g = torch.Generator().manual_seed(2)
    made = {
        "expanded": torch.tensor(0.5).expand(13, 33),
        "transposed": torch.randn(33, 13, generator=g).t(),
        "every second column": torch.randn(13, 66, generator=g)[:, ::2],
    }
    check(args, made[kind])


@pytest.mark.parametrize("lane", BOTH)
def test_strided_weight_position_and_ids(lane: str) -> None:
    args = inputs("video4")
    args["weight"] = args["weight"].permute(0, 2, 3, 4, 1).contiguous().permute(0, 4, 1, 2, 3)
    args["pos"] = args["pos"].t().contiguous().t()
    args["token_idx"], args["clip_idx"] = args["token_idx"][::2], args["clip_idx"][::2]
    check(args)


@pytest.mark.parametrize("name", ["weight", "bias", "pos", "video"])
@pytest.mark.parametrize("lane", BOTH)
def test_one_gradient_alone(lane: str, name: str) -> None:
    args = inputs("video4", "float")
    cotangent = cotangent_of(args)
    want = gradients(tube_embed, args, cotangent)[name]
    leaf = args[name].clone().requires_grad_()
    y = tube_embed(**(args | {name: leaf}))
    torch.testing.assert_close(torch.autograd.grad(y, leaf, cotangent)[0], want, rtol=0, atol=0)


@pytest.mark.parametrize("lane", BOTH)
def test_places_never_embedded_get_zero(lane: str, poisoned_empty: None) -> None:
    args = inputs("video4", "float")
    keep = torch.tensor([1, 5, 5], dtype=torch.int32)
    args |= {"token_idx": keep, "clip_idx": torch.zeros_like(keep)}
    got = gradients(tube_embed, args, cotangent_of(args))
    removed = torch.ones(2, 12, dtype=torch.bool)
    removed[0, keep.long()] = False
    grid = removed.view(2, 1, 2, 2, 3).repeat_interleave(2, 2).repeat_interleave(4, 3).repeat_interleave(4, 4)
    assert not got["video"].masked_select(grid).any()
    assert bool((got["video"].masked_select(~grid) != 0).all())
    assert not got["pos"][[0, 2, 3, 4]].any()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)])
@pytest.mark.parametrize("lane", BOTH)
def test_same_bits_every_time(lane: str, device: str) -> None:
    """Also from a second backward of one graph, and with tokens in several views."""
    args = inputs("video4", "float", device=device)
    args |= {name: args[name].repeat(40) for name in ("token_idx", "clip_idx")}
    leaves = {name: args[name].requires_grad_() for name in wanted(args)}
    y = tube_embed(**args)
    cotangent = cotangent_of(args)
    first = torch.autograd.grad(y, list(leaves.values()), cotangent, retain_graph=True)
    again = torch.autograd.grad(y, list(leaves.values()), cotangent)
    other = torch.autograd.grad(tube_embed(**args), list(leaves.values()), cotangent)
    for name, a, b, c in zip(leaves, first, again, other, strict=True):
        assert torch.equal(a, b), name
        assert torch.equal(a, c), name


@pytest.mark.parametrize("lane", BOTH)
def test_no_row_of_pixels_is_saved(lane: str) -> None:
    args = inputs("video4")
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        tube_embed(**(args | {"weight": args["weight"].requires_grad_()}))
    own = {t.data_ptr() for t in args.values() if t is not None}
    assert saved
    assert {t.data_ptr() for t in saved} <= own


@pytest.mark.parametrize(
    ("device", "dtype"),
    [
        pytest.param("cpu", torch.bfloat16, id="plain-bf16"),
        pytest.param("cpu", torch.float16, id="interpreter-fp16", marks=interpret),
        pytest.param("cuda", torch.bfloat16, marks=gpu),
        pytest.param("cuda", torch.float16, marks=gpu),
    ],
)
def test_autocast(device: str, dtype: torch.dtype, poisoned_empty: None) -> None:
    """fp32 parameters get fp32 gradients, no further from the truth than torch's under the same autocast."""
    args = inputs("video4", "float", device=device)
    cotangent = cotangent_of(args)

    def cast(op: Op) -> Op:
        def run(**kwargs: Any) -> Tensor:
            with torch.autocast(device, dtype):
                return op(**kwargs)

        return run

    got, plain = gradients(cast(tube_embed), args, cotangent), gradients(cast(tube_embed_ref), args, cotangent)
    truth = truth_of(args, cotangent)
    for name in got:
        assert got[name].dtype == torch.float32
        assert_close_to_truth(f"d{name}", got[name], plain[name], truth[name])


def test_gradcheck() -> None:
    args = inputs("depth16", "float")
    few = {"weight": args["weight"][:2, :, :, :4, :4], "bias": args["bias"][:2], "pos": args["pos"][:, :2]}
    few["video"] = args["video"][:, :, :, :8, :12]
    leaves = {name: t.double().requires_grad_() for name, t in few.items()}
    ids = args["token_idx"][:4], args["clip_idx"][:4]

    def run(*tensors: Tensor) -> Tensor:
        named = dict(zip(leaves, tensors, strict=True))
        return tube_embed(**named, token_idx=ids[0], clip_idx=ids[1])

    assert torch.autograd.gradcheck(run, tuple(leaves.values()), fast_mode=True)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("lane", BOTH)
def test_compiles_as_one_graph(lane: str, backend: str) -> None:
    args = inputs("video4")
    compiled = torch.compile(tube_embed, fullgraph=True, backend=backend)
    cotangent = cotangent_of(args)
    got, want = gradients(compiled, args, cotangent), gradients(tube_embed, args, cotangent)
    for name in want:
        torch.testing.assert_close(got[name], want[name], msg=lambda m, name=name: f"d{name}: {m}")


@pytest.mark.parametrize("layout", ["planar", "interleaved"])
@pytest.mark.parametrize("lane", BOTH)
def test_opcheck(lane: str, layout: str) -> None:
    a = inputs("video4", layout=layout)
    pixels = (a["video"], a["token_idx"], a["clip_idx"], a["scale"], a["shift"], 2, 4)
    torch.library.opcheck(tube_embed_dweight_op, (cotangent_of(a), *pixels, torch.float16, torch.float32))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("layout", ["planar", "interleaved"])
@pytest.mark.parametrize("d", [384, 1024])
def test_model_shapes_on_gpu(layout: str, d: int, dtype: torch.dtype) -> None:
    g = torch.Generator("cuda").manual_seed(0)
    video = torch.randint(0, 256, (3, 16, 224, 224, 3), dtype=torch.uint8, generator=g, device="cuda")
    video = video.permute(0, 4, 1, 2, 3)
    check(
        {
            "video": video.contiguous() if layout == "planar" else video,
            "weight": torch.randn(d, 3, 2, 16, 16, generator=g, device="cuda").to(dtype) / 39,
            "bias": torch.randn(d, generator=g, device="cuda").to(dtype),
            "pos": torch.randn(1568, d, generator=g, device="cuda"),
            "token_idx": torch.randint(0, 1568, (1001,), generator=g, dtype=torch.int32, device="cuda"),
            "clip_idx": torch.randint(0, 3, (1001,), generator=g, dtype=torch.int32, device="cuda"),
            "scale": torch.tensor([0.017, 0.0175, 0.0174], device="cuda"),
            "shift": torch.tensor([-2.1, -2.0, -1.8], device="cuda"),
        }
    )
