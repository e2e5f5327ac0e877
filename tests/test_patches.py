"""tube_embed: kernel and CPU path against float64, over dtypes, strides, grids and sets of tokens."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_close_to_truth
from torch import Tensor

from mmfast_kernels.patches import layout_of, tube_embed, tube_embed_op, tube_embed_ref

gpu = pytest.mark.gpu
interpret = pytest.mark.interpret
# (channels, tubelet, patch, width): K = 1536 and 672, 588 and 64 that a block does not divide, one channel
PATCHES = {"video16": (3, 2, 16, 40), "image14": (3, 1, 14, 20), "video4": (2, 2, 4, 33), "depth16": (1, 2, 16, 8)}


def inputs(
    kind: str, pixels: str = "uint8", layout: str = "planar", dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> dict[str, Any]:
    """Two clips on a grid of 2 x 2 x 3 and 13 tokens, some of them twice."""
    c, tubelet, patch, d = PATCHES[kind]
    g = torch.Generator().manual_seed(d)
    video = torch.randint(0, 256, (2, c, 2 * tubelet, 2 * patch, 3 * patch), dtype=torch.uint8, generator=g)
    scale, shift = torch.rand(c, generator=g) / 100 + 0.01, torch.randn(c, generator=g)
    made = {
        "video": video,
        "weight": torch.randn(d, c, tubelet, patch, patch, generator=g) / (c * tubelet * patch * patch) ** 0.5,
        "bias": torch.randn(d, generator=g),
        "pos": torch.randn(12, d, generator=g),
        "token_idx": torch.randint(0, 12, (13,), generator=g, dtype=torch.int32),
        "clip_idx": torch.randint(0, 2, (13,), generator=g, dtype=torch.int32),
        "scale": scale,
        "shift": shift,
    }
    if pixels == "float":
        made |= {"video": video * scale.view(-1, 1, 1, 1) + shift.view(-1, 1, 1, 1), "scale": None, "shift": None}
    if layout == "interleaved":
        made["video"] = made["video"].permute(0, 2, 3, 4, 1).contiguous().permute(0, 4, 1, 2, 3)
    elif layout == "strided":
        video = made["video"]
        wide = torch.zeros((*video.shape[:3], 3 * patch, 6 * patch + 1), dtype=video.dtype)
        wide[:, :, :, patch:, 1::2] = video
        made["video"] = wide[:, :, :, patch:, 1::2]
    made = {name: t if t is None else t.to(device) for name, t in made.items()}
    return made | {name: made[name].to(dtype) for name in ("weight", "bias")}


def truth_of(args: dict[str, Any]) -> Tensor:
    """In float64 from the pixels as the op sees them: rounded to the weight's dtype."""
    dtype = args["weight"].dtype
    video = args["video"]
    if args["scale"] is not None:
        video = video.float() * args["scale"].view(-1, 1, 1, 1) + args["shift"].view(-1, 1, 1, 1)
    wide = {name: None if args[name] is None else args[name].double() for name in ("weight", "bias", "pos")}
    return tube_embed_ref(**(args | wide | {"video": video.to(dtype).double(), "scale": None, "shift": None}))


def check(args: dict[str, Any]) -> None:
    assert_close_to_truth("tokens", tube_embed(**args), tube_embed_ref(**args), truth_of(args))


LANES = [
    pytest.param("cpu", torch.float32, id="cpu-fp32"),
    pytest.param("cpu", torch.float16, id="interpreter-fp16", marks=interpret),
    *[pytest.param("cuda", t, marks=gpu) for t in (torch.float32, torch.float16, torch.bfloat16)],
]


@pytest.mark.parametrize("kind", PATCHES)
@pytest.mark.parametrize("layout", ["planar", "interleaved", "strided"])
@pytest.mark.parametrize("pixels", ["uint8", "float"])
@pytest.mark.parametrize(("device", "dtype"), LANES)
def test_videos(kind: str, layout: str, pixels: str, device: str, dtype: torch.dtype, poisoned_empty: None) -> None:
    """In the plain lane the CPU path, under the interpreter and on a GPU the kernel."""
    check(inputs(kind, pixels, layout, dtype, device))


@pytest.mark.parametrize("pixels", ["uint8", "float"])
@pytest.mark.parametrize("kind", ["video16", "image14"])
@pytest.mark.parametrize(("device", "dtype"), LANES)
def test_gathered_rows(kind: str, pixels: str, device: str, dtype: torch.dtype, poisoned_empty: None) -> None:
    """Rows seen as videos of one token each embed to what their tokens in the video do."""
    args = inputs(kind, pixels, "planar", dtype, device)
    want, plain = truth_of(args), tube_embed_ref(**args)
    _, _, tubelet, patch, _ = args["weight"].shape
    tokens = args["video"].unfold(2, tubelet, tubelet).unfold(3, patch, patch).unfold(4, patch, patch)
    tokens = tokens.permute(0, 2, 3, 4, 1, 5, 6, 7).flatten(1, 3)
    rows = tokens[args["clip_idx"], args["token_idx"]].contiguous()
    assert layout_of(rows, tubelet, patch) == "rows"
    ids = {"token_idx": torch.zeros_like(args["token_idx"]), "pos_idx": args["token_idx"]}
    count = torch.arange(13, dtype=torch.int32, device=device)
    assert_close_to_truth("tokens", tube_embed(**(args | ids | {"video": rows, "clip_idx": count})), plain, want)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["planar", "interleaved"])
@pytest.mark.parametrize("d", [384, 1024])
def test_model_shapes_on_gpu(layout: str, d: int) -> None:
    g = torch.Generator("cuda").manual_seed(0)
    video = torch.randint(0, 256, (3, 16, 224, 224, 3), dtype=torch.uint8, generator=g, device="cuda")
    video = video.permute(0, 4, 1, 2, 3)
    args = {
        "video": video.contiguous() if layout == "planar" else video,
        "weight": torch.randn(d, 3, 2, 16, 16, generator=g, device="cuda").bfloat16() / 39,
        "bias": torch.randn(d, generator=g, device="cuda").bfloat16(),
        "pos": torch.randn(1568, d, generator=g, device="cuda"),
        "token_idx": torch.randint(0, 1568, (1001,), generator=g, dtype=torch.int32, device="cuda"),
        "clip_idx": torch.randint(0, 3, (1001,), generator=g, dtype=torch.int32, device="cuda"),
        "scale": torch.tensor([0.017, 0.0175, 0.0174], device="cuda"),
        "shift": torch.tensor([-2.1, -2.0, -1.8], device="cuda"),
    }
    check(args)


@pytest.mark.parametrize("count", [0, 1])
def test_few_tokens(count: int, poisoned_empty: None) -> None:
    args = inputs("video4")
    check(args | {name: args[name][:count] for name in ("token_idx", "clip_idx")})


def test_more_tokens_than_a_block_of_rows(monkeypatch: Any) -> None:
    monkeypatch.setattr("mmfast_kernels.patches.CPU_ROWS", 4)
    check(inputs("video4"))


@pytest.mark.parametrize("left_out", ["bias", "pos"])
def test_left_out(left_out: str) -> None:
    check(inputs("video4") | {left_out: None})


def test_strided_weight_position_and_ids() -> None:
    args = inputs("video4")
    args["weight"] = args["weight"].permute(0, 2, 3, 4, 1).contiguous().permute(0, 4, 1, 2, 3)
    args["pos"] = args["pos"].t().contiguous().t()
    args["token_idx"], args["clip_idx"] = args["token_idx"][::2], args["clip_idx"][::2]
    check(args)


def test_removed_tokens_are_never_read() -> None:
    args = inputs("video4", "float")
    keep = torch.tensor([1, 5, 6], dtype=torch.int32)
    args |= {"token_idx": keep, "clip_idx": torch.zeros_like(keep)}
    want = tube_embed(**args)
    removed = torch.ones(2, 12, dtype=torch.bool)
    removed[0, keep.long()] = False
    grid = removed.view(2, 1, 2, 2, 3).repeat_interleave(2, 2).repeat_interleave(4, 3).repeat_interleave(4, 4)
    poisoned = args["video"].masked_fill(grid, float("nan"))
    torch.testing.assert_close(tube_embed(**(args | {"video": poisoned})), want, rtol=0, atol=0)


def test_reference_is_conv3d() -> None:
    args = inputs("video4", "float")
    grid = F.conv3d(args["video"], args["weight"], args["bias"], stride=(2, 4, 4)).flatten(2).transpose(1, 2)
    clip, token = args["clip_idx"].long(), args["token_idx"].long()
    torch.testing.assert_close(tube_embed_ref(**args), grid[clip, token] + args["pos"][token])


@pytest.mark.parametrize("lane", ["plain", pytest.param("kernel", marks=interpret)])
@pytest.mark.parametrize("pixels", ["uint8", "float"])
def test_gradients(lane: str, pixels: str) -> None:
    args = inputs("video4", pixels)
    wanted = ["weight", "bias", "pos"] + (["video"] if pixels == "float" else [])
    leaves = {name: args[name].double().requires_grad_() for name in wanted}
    args |= leaves
    cotangent = torch.randn(13, 33, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    got = torch.autograd.grad(tube_embed(**args), list(leaves.values()), cotangent)
    want = torch.autograd.grad(tube_embed_ref(**args), list(leaves.values()), cotangent)
    for name, mine, theirs in zip(wanted, got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("left_out", [None, "bias", "pos"])
@pytest.mark.parametrize(
    ("device", "dtype"),
    [
        pytest.param("cpu", torch.bfloat16, id="cpu-bf16"),
        pytest.param("cpu", torch.float16, id="interpreter-fp16", marks=interpret),
        pytest.param("cuda", torch.bfloat16, marks=gpu),
    ],
)
def test_autocast_rounds_the_product_and_not_the_stream(
    left_out: str | None, device: str, dtype: torch.dtype, poisoned_empty: None
) -> None:
    args = inputs("video4", device=device)
    if left_out is not None:
        args[left_out] = None
    half = truth_of(args | {"weight": args["weight"].to(dtype)})
    with torch.autocast(device, dtype):
        got, plain = tube_embed(**args), tube_embed_ref(**args)
    assert got.dtype == torch.float32
    assert_close_to_truth("tokens", got, plain.float(), half)
    assert not torch.equal(got, got.to(dtype).float()) or left_out == "pos"


@pytest.mark.parametrize("lane", ["plain", pytest.param("kernel", marks=interpret)])
def test_compiles_as_one_graph(lane: str) -> None:
    args = inputs("video4")
    compiled = torch.compile(tube_embed, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**args), tube_embed(**args))


@interpret
@pytest.mark.parametrize("layout", ["planar", "interleaved"])
def test_opcheck(layout: str) -> None:
    a = inputs("video4", layout=layout)
    ids = (a["token_idx"], a["clip_idx"], a["token_idx"])
    given = (a["video"], a["weight"], a["bias"], a["pos"], *ids, a["scale"], a["shift"], torch.float16)
    torch.library.opcheck(tube_embed_op, given)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"scale": None}, ValueError, "scale and shift together"),
        ({"scale": None, "shift": None}, ValueError, "needs them for a uint8 video"),
        ({"video": torch.zeros(1, 3, 4, 8, 8)}, ValueError, r"video takes \[B, 2, F, H, W\], got \(1, 3, 4, 8, 8\)"),
        ({"video": torch.zeros(1, 2, 4, 9, 8)}, ValueError, "H and W of 4"),
        ({"video": torch.zeros(1, 2, 4, 8, 8, dtype=torch.int16)}, TypeError, "video takes uint8"),
        ({"weight": torch.zeros(3, 2, 2, 4, 5)}, ValueError, r"weight takes \[D, C, tt, p, p\]"),
        ({"token_idx": torch.zeros(13, dtype=torch.int64)}, TypeError, "token_idx takes torch.int32"),
        ({"clip_idx": torch.zeros(2, dtype=torch.int32)}, ValueError, r"clip_idx takes \[T\] .* got \(2,\)"),
        ({"pos": torch.zeros(12, 3)}, ValueError, r"pos takes \[N, 33\]"),
        ({"bias": torch.zeros(3)}, ValueError, r"bias takes \[33\]"),
        ({"shift": torch.zeros(1)}, ValueError, r"shift takes \[2\]"),
        ({"scale": torch.ones(2, requires_grad=True)}, ValueError, "scale takes a constant"),
    ],
)
def test_wrong_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        tube_embed(**(inputs("video4") | change))
