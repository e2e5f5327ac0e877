"""Gradients of layer_norm and add_layer_norm: kernel and reference against float64."""

import pytest
import torch
from numerics import assert_close_to_truth
from torch import Tensor

from mmfast_kernels import norm
from mmfast_kernels.norm import add_layer_norm, add_layer_norm_ref, layer_norm, layer_norm_ref, norm_backward_op
from mmfast_kernels.tables import Row

gpu = pytest.mark.gpu
interpret = pytest.mark.interpret
LANES = [pytest.param("cpu", torch.float32, marks=interpret), pytest.param("cpu", torch.float16, marks=interpret)] + [
    pytest.param("cuda", dtype, marks=gpu) for dtype in (torch.float32, torch.float16, torch.bfloat16)
]
PLAIN_OR_KERNEL = ["plain", pytest.param("kernel", marks=interpret)]
NAMES = ["x", "branch", "weight", "bias", "gamma"]


def inputs(d: int, rows: int = 21, dtype: torch.dtype = torch.float32, device: str = "cpu") -> dict[str, Tensor]:
    """x far from zero mean, branch, weight, bias, gamma, and the cotangents of s and y."""
    g = torch.Generator().manual_seed(d)
    made = {
        "x": torch.randn(rows, d, generator=g) * 2 + 3,
        "branch": torch.randn(rows, d, generator=g),
        "weight": torch.randn(d, generator=g) + 1,
        "bias": torch.randn(d, generator=g),
        "gamma": torch.randn(d, generator=g),
        "ds": torch.randn(rows, d, generator=g),
        "dy": torch.randn(rows, d, generator=g),
    }
    return {name: t.to(device, dtype) for name, t in made.items()}


def check(
    given: dict[str, Tensor],
    names: list[str],
    outputs: str = "s y",
    dtype: torch.dtype | None = None,
    wanted: list[str] | None = None,
) -> list[Tensor]:
    """Compare the gradients of the named inputs, of those that add_layer_norm or, without a branch, layer_norm takes."""

    def gradients(inputs: dict[str, Tensor], reference: bool) -> list[Tensor]:
        leaves = {name: inputs[name].detach().requires_grad_(name in (wanted or names)) for name in names}
        width = None if inputs["x"].dtype == torch.float64 else dtype
        if "branch" in names:
            op = add_layer_norm_ref if reference else add_layer_norm
            made = dict(zip(("s", "y"), op(**leaves, dtype=width), strict=True))
        else:
            made = {"y": (layer_norm_ref if reference else layer_norm)(**leaves, dtype=width)}
        taken = [name for name in outputs.split() if made[name].requires_grad]
        assert taken
        cotangents = [inputs["d" + name].to(made[name].dtype) for name in taken]
        wants = [leaf for leaf in leaves.values() if leaf.requires_grad]
        return list(torch.autograd.grad([made[name] for name in taken], wants, cotangents))

    got = gradients(given, reference=False)
    plain = gradients(given, reference=True)
    truth = gradients({name: t.double() for name, t in given.items()}, reference=True)
    for name, mine, theirs, exact in zip(wanted or names, got, plain, truth, strict=True):
        assert mine.dtype == given[name].dtype
        assert_close_to_truth("d" + name, mine, theirs, exact)
    return got


@pytest.mark.parametrize("d", [1, 8, 100, 192, 300])
@pytest.mark.parametrize(("device", "dtype"), LANES)
def test_layer_norm_gradients(d: int, device: str, dtype: torch.dtype, poisoned_empty: None) -> None:
    check(inputs(d, dtype=dtype, device=device), ["x", "weight", "bias"], "y")


@pytest.mark.parametrize("d", [8, 100, 192])
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "layerscale"])
@pytest.mark.parametrize(("device", "dtype"), LANES)
def test_add_layer_norm_gradients(d: int, scaled: bool, device: str, dtype: torch.dtype, poisoned_empty: None) -> None:
    check(inputs(d, dtype=dtype, device=device), NAMES if scaled else NAMES[:4])


@pytest.mark.parametrize("outputs", ["s", "y"])
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "layerscale"])
@pytest.mark.parametrize(("device", "dtype"), LANES)
def test_one_output_used(outputs: str, scaled: bool, device: str, dtype: torch.dtype, poisoned_empty: None) -> None:
    given = inputs(40, dtype=dtype, device=device)
    wanted = [name for name in (NAMES if scaled else NAMES[:4]) if outputs == "y" or name not in ("weight", "bias")]
    check(given, NAMES if scaled else NAMES[:4], outputs, wanted=wanted)


@interpret
@pytest.mark.parametrize("rows", [0, 1, 5])
def test_row_counts(rows: int, poisoned_empty: None) -> None:
    check(inputs(40, rows), NAMES)


@interpret
@pytest.mark.parametrize("outputs", ["s", "y", "s y"])
def test_one_dimension(outputs: str, poisoned_empty: None) -> None:
    given = {name: t[0] if t.dim() == 2 else t for name, t in inputs(40).items()}
    check(given, NAMES, outputs, wanted=[n for n in NAMES if outputs != "s" or n not in ("weight", "bias")])


@interpret
@pytest.mark.parametrize(
    "wanted", [["x"], ["branch"], ["gamma"], ["bias"], ["weight", "gamma"], ["x", "branch"]], ids="-".join
)
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "layerscale"])
def test_only_what_is_wanted(wanted: list[str], scaled: bool, poisoned_empty: None) -> None:
    """Frozen inputs get no gradient, and those beside them are right."""
    if "gamma" in wanted and not scaled:
        pytest.skip("no gamma to differentiate")
    check(inputs(40, 7), NAMES if scaled else NAMES[:4], wanted=wanted)


MIXED = {
    "fp32-weights": (torch.float16, torch.float16, torch.float32, torch.float16),
    "autocast": (torch.float32, torch.float16, torch.float32, torch.float16),
    "fp32-y": (torch.float16, torch.float16, torch.float16, torch.float32),
    "fp16-weights": (torch.float32, torch.float32, torch.float16, torch.float32),
}


def mixed(
    kind: str, d: int, rows: int = 21, half: torch.dtype = torch.float16, device: str = "cpu"
) -> dict[str, Tensor]:
    given = inputs(d, rows)
    stream, branch, params, _ = (half if t == torch.float16 else t for t in MIXED[kind])
    dtypes = {"x": stream, "branch": branch, "ds": stream} | dict.fromkeys(("weight", "bias", "gamma"), params)
    return {name: t.to(device, dtypes.get(name, half)) for name, t in given.items()}


@interpret
@pytest.mark.parametrize("kind", MIXED)
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "layerscale"])
def test_mixed_dtypes(kind: str, scaled: bool, poisoned_empty: None) -> None:
    check(mixed(kind, 56), NAMES if scaled else NAMES[:4], dtype=MIXED[kind][3])


@gpu
@pytest.mark.parametrize("d", [384, 768, 1024])
@pytest.mark.parametrize("kind", ["bf16", "autocast"])
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "layerscale"])
def test_model_shapes_on_gpu(d: int, kind: str, scaled: bool, poisoned_empty: None) -> None:
    half = torch.bfloat16
    rows = 33712
    given = inputs(d, rows, half, "cuda") if kind == "bf16" else mixed(kind, d, rows, half, "cuda")
    check(given, NAMES if scaled else NAMES[:4], dtype=half)


@gpu
@pytest.mark.parametrize("d", [1280, 1408, 2000, 3000, 5000, 16384])
@pytest.mark.parametrize("kind", ["bf16", "autocast"])
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "layerscale"])
def test_wide_rows_on_gpu(d: int, kind: str, scaled: bool, poisoned_empty: None) -> None:
    half = torch.bfloat16
    given = inputs(d, 301, half, "cuda") if kind == "bf16" else mixed(kind, d, 301, half, "cuda")
    check(given, NAMES if scaled else NAMES[:4], dtype=half)


@interpret
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "layerscale"])
def test_parameters_in_a_launch_apart(scaled: bool, monkeypatch: pytest.MonkeyPatch, poisoned_empty: None) -> None:
    """As above 8192 columns."""
    config = {"num_warps": 4, "row_warps": 4, "programs": 2, "apart": True}
    monkeypatch.setattr(norm.tables, "lookup", lambda *_, **__: Row({}, config | {"elements": 8}, ()))
    check(inputs(40, 5), NAMES if scaled else NAMES[:4])
    for wanted in (["x", "weight"], ["branch"], *([["gamma"], ["branch", "gamma", "bias"]] if scaled else [])):
        check(inputs(40, 5), NAMES if scaled else NAMES[:4], wanted=wanted)


@interpret
def test_strided_inputs_and_cotangents(poisoned_empty: None) -> None:
    given = {name: t[:, 8:40] if t.dim() == 2 else t[::3] for name, t in inputs(96, 12).items()}
    check(given, NAMES)
    turned = {name: t.t().contiguous().t() if t.dim() == 2 else t for name, t in inputs(24, 7).items()}
    check(turned, NAMES)


@interpret
@pytest.mark.parametrize("outputs", ["s", "y", "s y"])
def test_expanded_cotangents(outputs: str, poisoned_empty: None) -> None:
    """y.sum().backward() sends one number with strides of 0."""
    given = inputs(40, 7)
    one = torch.ones(()).expand(7, 40)
    check(given | {"ds": one, "dy": one}, NAMES[:4], outputs, wanted=["x", "branch"])


@pytest.mark.parametrize("lane", PLAIN_OR_KERNEL)
def test_leading_dimensions(lane: str) -> None:
    given = inputs(24, 12)
    leaves = {name: given[name].clone().requires_grad_() for name in NAMES}
    flat = torch.autograd.grad(add_layer_norm(**leaves)[1], leaves.values(), given["dy"])
    folded = leaves | {name: leaves[name].view(3, 4, 24) for name in ("x", "branch")}
    got = torch.autograd.grad(add_layer_norm(**folded)[1], leaves.values(), given["dy"].view(3, 4, 24))
    for mine, want in zip(got, flat, strict=True):
        torch.testing.assert_close(mine, want)


@interpret
def test_same_bits_every_time() -> None:
    """Saved tensors are left as they were, and nothing depends on the order in which programs run."""
    given = inputs(100, 37)
    leaves = {name: given[name].clone().requires_grad_() for name in NAMES}
    s, y = add_layer_norm(**leaves)
    runs = [
        torch.autograd.grad((s, y), leaves.values(), (given["ds"], given["dy"]), retain_graph=True) for _ in range(2)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@interpret
@pytest.mark.parametrize("shape", [(6, 16), (2, 3, 16)], ids=str)
def test_gradients_accumulate_apart(shape: tuple[int, ...]) -> None:
    """x and branch share one gradient tensor; adding to one afterwards must not reach the other."""
    given = inputs(16, 6)
    x, branch = given["x"].view(shape).requires_grad_(), given["branch"].view(shape).requires_grad_()
    for _ in range(2):
        sum(add_layer_norm(x, branch, given["weight"], given["bias"])).sum().backward()
    once = torch.autograd.grad(sum(add_layer_norm(x, branch, given["weight"], given["bias"])).sum(), x)[0]
    torch.testing.assert_close(x.grad, 2 * once)
    torch.testing.assert_close(branch.grad, 2 * once)


@interpret
def test_what_is_saved() -> None:
    """The sum and two numbers a row; the branch only where gamma's gradient needs it."""
    given = {name: t.requires_grad_() for name, t in inputs(16, 3).items()}
    kept: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        add_layer_norm(*(given[name] for name in NAMES[:4]))
        assert sorted(kept) == [(3,), (3,), (3, 16), (16,)]
        kept.clear()
        add_layer_norm(*(given[name] for name in NAMES[:4]), gamma=given["gamma"])
        assert sorted(kept) == [(3,), (3,), (3, 16), (3, 16), (16,), (16,)]


def test_what_the_reference_saves() -> None:
    """On a CPU the same: neither x nor branch is kept beside their sum."""
    given = {name: t.requires_grad_() for name, t in inputs(16, 3).items()}
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        add_layer_norm_ref(*(given[name] for name in NAMES[:4]))
    assert sum(t.numel() == 48 for t in kept) == 1


@interpret
def test_no_second_derivative() -> None:
    given = {name: t.requires_grad_() for name, t in inputs(8, 2).items()}
    y = layer_norm(given["x"], given["weight"], given["bias"])
    (dx,) = torch.autograd.grad(y.square().sum(), given["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@pytest.mark.parametrize("lane", PLAIN_OR_KERNEL)
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "layerscale"])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=interpret)])
def test_compiles_as_one_graph(backend: str, scaled: bool, lane: str) -> None:
    given = inputs(24, 5)
    leaves = {name: given[name].clone().requires_grad_() for name in (NAMES if scaled else NAMES[:4])}

    def block(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, gamma: Tensor | None = None) -> Tensor:
        s, y = add_layer_norm(x, branch, weight, bias, gamma=gamma)
        return s + layer_norm(y, weight, bias)

    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend=backend)
    got = torch.autograd.grad(compiled(**leaves), leaves.values(), given["dy"])
    want = torch.autograd.grad(block(**leaves), leaves.values(), given["dy"])
    torch.testing.assert_close(got, want)


@interpret
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "layerscale"])
@pytest.mark.parametrize("params", [False, True])
def test_opcheck(scaled: bool, params: bool) -> None:
    t = inputs(16, 5)
    mean, rstd = t["x"].mean(1), t["x"].var(1, correction=0).rsqrt()
    extra = (t["branch"], t["gamma"]) if scaled else (None, None)
    args = (t["ds"], t["dy"], t["x"], *extra, t["weight"], mean, rstd, torch.float32, torch.float16, scaled, params)
    torch.library.opcheck(norm_backward_op, args)


@pytest.mark.parametrize("lane", PLAIN_OR_KERNEL)
def test_autocast(lane: str) -> None:
    """y comes in autocast's dtype, ready for the next product; the stream and every fp32 gradient stay fp32."""
    given = inputs(24, 6)
    leaves = {name: given[name].clone().requires_grad_() for name in NAMES[:4]}
    half = torch.float16 if lane == "kernel" else torch.bfloat16
    branch = leaves["branch"].detach().to(half).requires_grad_()
    with torch.autocast("cpu", half):
        s, y = add_layer_norm(leaves["x"], branch, leaves["weight"], leaves["bias"])
        alone = layer_norm(leaves["x"], leaves["weight"], leaves["bias"])
        wide = layer_norm(leaves["x"], leaves["weight"], leaves["bias"], dtype=torch.float32)
    assert (s.dtype, y.dtype, alone.dtype, wide.dtype) == (torch.float32, half, half, torch.float32)
    truth = layer_norm_ref(s.detach().double(), given["weight"].double(), given["bias"].double())
    assert_close_to_truth("y", y, layer_norm_ref(s, given["weight"], given["bias"]).to(half), truth)
    ((y.float() * given["dy"]).sum() + alone.float().sum()).backward()
    assert branch.grad is not None
    assert branch.grad.dtype == half
    assert leaves["x"].grad is not None
    assert leaves["x"].grad.dtype == torch.float32


def test_backward_pieces_cover_a_row() -> None:
    for d, row_warps in [(1, 1), (63, 1), (384, 1), (1024, 1), (1025, 4), (1408, 4), (2050, 8), (16384, 16)]:
        for fp32 in (False, True):
            made = norm.backward_geometry(d, fp32, {"num_warps": max(4, row_warps), "row_warps": row_warps})
            assert made["CHUNK"].bit_count() == made["ROWS"].bit_count() == 1
            assert -(-d // made["CHUNK"]) * made["CHUNK"] < 2 * max(d, 64)
