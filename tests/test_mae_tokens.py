"""decoder_tokens: kernel and CPU path against float64."""

from collections.abc import Callable

import pytest
import torch
from lanes import BOTH, KERNEL, gpu, interpret
from numerics import assert_close_to_truth
from torch import Tensor

from mmfast_kernels.mae import decoder_tokens
from mmfast_kernels.mae_tokens import decoder_tokens_op, decoder_tokens_ref, masked_rows_sum_op

LANES = [
    pytest.param("cpu", torch.float32, id="plain-fp32"),
    pytest.param("cpu", torch.bfloat16, id="plain-bf16"),
    *KERNEL,
]


def tokens(
    d: int, n_rows: int = 23, n_visible: int = 9, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(d)
    place = torch.randperm(n_rows, generator=g)[:n_visible]
    source = torch.full((n_rows,), -1).index_put((place,), torch.arange(n_visible))
    made = {
        "visible": torch.randn(n_visible, d, generator=g).to(dtype),
        "mask_token": torch.randn(d, generator=g).to(dtype),
        "pos": torch.randn(12, d, generator=g),
        "source": source.int(),
        "token_idx": torch.randint(0, 12, (n_rows,), generator=g).int(),
        "place": place.int(),
    }
    return {name: t.to(device) for name, t in made.items()}


def rows_ref(place: Tensor, **args: Tensor) -> Tensor:
    return decoder_tokens_ref(**args)


def rows_and_gradients(op: Callable[..., Tensor], args: dict[str, Tensor], cotangent: Tensor) -> dict[str, Tensor]:
    leaves = {name: args[name].detach().requires_grad_() for name in ("visible", "mask_token")}
    y = op(**(args | leaves))
    grads = torch.autograd.grad(y, list(leaves.values()), cotangent.to(y.dtype))
    return {"y": y.detach()} | dict(zip(("dvisible", "dmask_token"), grads, strict=True))


def check_tokens(args: dict[str, Tensor], cotangent: Tensor | None = None) -> None:
    if cotangent is None:
        shape = (args["source"].shape[0], args["visible"].shape[1])
        cotangent = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(args["visible"])
    got, plain = (rows_and_gradients(op, args, cotangent) for op in (decoder_tokens, rows_ref))
    wide = {name: t.double() if t.is_floating_point() else t for name, t in args.items()}
    truth = rows_and_gradients(rows_ref, wide, cotangent.double())
    for name in got:
        assert got[name].dtype == args["mask_token" if name == "dmask_token" else "visible"].dtype
        assert_close_to_truth(name, got[name], plain[name], truth[name])


@pytest.mark.parametrize("d", [1, 33, 192, 384, 700])
@pytest.mark.parametrize(("device", "dtype"), LANES)
def test_tokens(d: int, device: str, dtype: torch.dtype, poisoned_empty: None) -> None:
    check_tokens(tokens(d, dtype=dtype, device=device))


@pytest.mark.parametrize(("rows", "visible"), [(0, 0), (1, 0), (1, 1), (300, 0), (300, 300), (300, 17)])
@pytest.mark.parametrize("lane", BOTH)
def test_counts_of_tokens(lane: str, rows: int, visible: int, poisoned_empty: None) -> None:
    check_tokens(tokens(33, rows, visible))


@pytest.mark.parametrize("lane", BOTH)
def test_strided_tokens(lane: str, poisoned_empty: None) -> None:
    args = tokens(40)
    args["visible"] = torch.randn(9, 80, generator=torch.Generator().manual_seed(0))[:, ::2]
    args["pos"] = args["pos"].t().contiguous().t()
    args["mask_token"] = torch.randn(80, generator=torch.Generator().manual_seed(0))[::2]
    args |= {name: args[name].repeat_interleave(2)[::2] for name in ("source", "token_idx", "place")}
    check_tokens(args)


@pytest.mark.parametrize("kind", ["expanded", "transposed"])
@pytest.mark.parametrize("lane", BOTH)
def test_strided_cotangent_of_tokens(lane: str, kind: str) -> None:
    made = {"expanded": torch.tensor(0.5).expand(23, 33), "transposed": torch.randn(33, 23).t()}
    check_tokens(tokens(33), made[kind])


@pytest.mark.parametrize(
    ("device", "dtype"),
    [
        pytest.param("cpu", torch.bfloat16, id="plain-bf16"),
        pytest.param("cpu", torch.float16, id="interpreter-fp16", marks=interpret),
        pytest.param("cuda", torch.bfloat16, marks=gpu),
    ],
)
def test_autocast_keeps_the_stream_in_fp32(device: str, dtype: torch.dtype) -> None:
    args = tokens(33, device=device) | {"visible": tokens(33, dtype=dtype, device=device)["visible"]}
    leaves = {name: args[name].requires_grad_() for name in ("visible", "mask_token")}
    with torch.autocast(device, dtype):
        y = decoder_tokens(**args)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, rows_ref(**(args | {"visible": args["visible"].float()})))
    grads = torch.autograd.grad(y.sum(), list(leaves.values()))
    assert [g.dtype for g in grads] == [dtype, torch.float32]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)])
@pytest.mark.parametrize("lane", BOTH)
def test_token_gradients_have_the_same_bits_every_time(lane: str, device: str) -> None:
    args = tokens(33, 900, 100, device=device)
    leaves = [args[name].requires_grad_() for name in ("visible", "mask_token")]
    y = decoder_tokens(**args)
    cotangent = torch.randn(y.shape, device=device)
    first = torch.autograd.grad(y, leaves, cotangent, retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(y, leaves, cotangent), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("lane", BOTH)
def test_tokens_compile_as_one_graph(lane: str, backend: str) -> None:
    args = tokens(33)
    compiled = torch.compile(decoder_tokens, fullgraph=True, backend=backend)
    cotangent = torch.randn(23, 33)
    got, want = (rows_and_gradients(op, args, cotangent) for op in (compiled, decoder_tokens))
    for name in want:
        torch.testing.assert_close(got[name], want[name], msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("lane", BOTH)
def test_tokens_opcheck(lane: str) -> None:
    args = tokens(33)
    names = ("visible", "mask_token", "pos", "source", "token_idx", "place")
    torch.library.opcheck(decoder_tokens_op, (*(args[n] for n in names), torch.float32))
    torch.library.opcheck(masked_rows_sum_op, (torch.randn(23, 33), args["source"], args["place"]))


def test_tokens_gradcheck() -> None:
    args = tokens(5)
    leaves = tuple(args[name].double().requires_grad_() for name in ("visible", "mask_token"))
    rest = tuple(args[name] for name in ("pos", "source", "token_idx", "place"))
    assert torch.autograd.gradcheck(lambda v, m: decoder_tokens(v, m, *rest), leaves, fast_mode=True)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"visible": torch.zeros(9)}, ValueError, r"visible takes \[Tv, D\], got \(9,\)"),
        ({"visible": torch.zeros(9, 5, dtype=torch.int32)}, TypeError, "visible takes a floating dtype"),
        ({"mask_token": torch.zeros(1, 1, 5)}, ValueError, r"mask_token takes \[5\], got \(1, 1, 5\)"),
        ({"pos": torch.zeros(12, 4)}, ValueError, r"pos takes \[N, 5\], got \(12, 4\)"),
        ({"pos": torch.zeros(12, 5, requires_grad=True)}, ValueError, "pos takes a constant"),
        ({"pos": torch.zeros(12, 5).half()}, TypeError, "pos takes torch.float32"),
        ({"source": torch.zeros(23)}, TypeError, "source takes torch.int32"),
        (
            {"token_idx": torch.zeros(22, dtype=torch.int32)},
            ValueError,
            r"token_idx takes \[R\] as source, got \(22,\)",
        ),
        ({"place": torch.zeros(8, dtype=torch.int32)}, ValueError, r"place takes \[9\], .* got \(8,\)"),
    ],
)
def test_wrong_tokens(change: dict[str, Tensor], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        decoder_tokens(**(tokens(5) | change))
