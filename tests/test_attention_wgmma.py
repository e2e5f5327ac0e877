"""The wgmma attention (csrc/cuda/attention_wgmma*): its source on emulated instructions, its machine code, and on a GPU.

tests/native/wgmma_emulated.h says what the emulation takes from the specification, and what it complains of.
"""

import ctypes
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from numerics import assert_close_to_truth
from torch import Tensor
from wgmma_code import Code, read

from mmfast_kernels import attention_wgmma, backends
from mmfast_kernels.attention import packed_attention, packed_attention_with_lse, packed_attention_with_lse_ref
from mmfast_kernels.backends import Case, Lengths

ROOT = Path(__file__).resolve().parent.parent
HALF = [torch.bfloat16, torch.float16]
LENGTHS = [1, 8, 63, 64, 65, 80, 157, 160, 196, 197, 201, 264, 320, 384, 391, 392, 400]
Attend = Callable[..., tuple[Tensor, Tensor]]


# -- the source, emulated --


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    made = str(tmp_path_factory.mktemp("wgmma") / "libattend.so")
    flags = ["-O2", "-std=c++17", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-shared", "-fPIC"]
    source = ROOT / "tests" / "native" / "attention_wgmma.cpp"
    subprocess.run(["g++", *flags, f"-I{ROOT / 'csrc'}", str(source), "-o", made], check=True)
    found = ctypes.CDLL(made)
    found.attend.restype, found.products_done.restype = ctypes.c_char_p, ctypes.c_int64
    return found


@pytest.fixture(scope="module")
def emulated(library: ctypes.CDLL) -> Attend:
    """attend(q, k, v, n_q, n_k, scale, slots, eager) -> out, lse. RuntimeError says what a thread did wrong."""
    at, size = ctypes.c_void_p, ctypes.c_int64

    def attend(
        q: Tensor, k: Tensor, v: Tensor, n_q: int, n_k: int, scale: float = 0.125, slots: int = 2, eager: bool = False
    ) -> tuple[Tensor, Tensor]:
        tokens, heads, d = q.shape
        out = torch.full((tokens + 2, heads, d), float("nan"), dtype=q.dtype)
        lse = torch.full((heads * tokens + 2,), float("nan"))
        layouts = (size * 6)(*(n for x in (q, k, v) for n in x.stride()[:2]))
        error = library.attend(
            at(q.data_ptr()), at(k.data_ptr()), at(v.data_ptr()), layouts, size(tokens // n_q), size(heads), size(n_q),
            size(n_k), ctypes.c_float(scale), int(q.dtype == torch.bfloat16), at(out[1:].data_ptr()),
            at(lse[1:].data_ptr()), size(slots), int(eager),
        )  # fmt: skip
        if error is not None:
            raise RuntimeError(error.decode())
        assert out[[0, -1]].isnan().all(), "out was written to outside of its rows"
        assert lse[[0, -1]].isnan().all(), "lse was written to outside of its rows"
        return out[1:-1], lse[1:-1].view(heads, tokens)

    return attend


def packed(tokens: int, heads: int, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, ...]:
    """q, k, v as views of a packed product that has NaNs before, behind and beside them."""
    product = torch.full((tokens + 2, 3, heads + 1, 64), float("nan"))
    product[1:-1, :, :heads] = torch.randn(tokens, 3, heads, 64, generator=torch.Generator().manual_seed(tokens))
    return product.to(device, dtype)[1:-1, :, :heads].unbind(1)


def assert_like_truth(got: tuple[Tensor, Tensor], q: Tensor, k: Tensor, v: Tensor, **options: Any) -> None:
    truth = packed_attention_with_lse_ref(q.double(), k.double(), v.double(), **options)
    plain = packed_attention_with_lse_ref(q, k, v, **options, dtype=q.dtype)
    fp32 = packed_attention_with_lse_ref(q, k, v, **options)
    assert_close_to_truth("out", got[0], plain[0], truth[0])
    assert_close_to_truth("lse", got[1], fp32[1], truth[1])


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("n", LENGTHS)
def test_source(emulated: Attend, n: int, dtype: torch.dtype) -> None:
    q, k, v = packed(n, 2, dtype)
    assert_like_truth(emulated(q, k, v, n, n, slots=1), q, k, v, length=n)


@pytest.mark.parametrize(
    ("n_q", "n_k", "sequences", "slots"),
    [
        pytest.param(70, 9, 3, 2, id="more queries than keys"),
        pytest.param(1, 200, 3, 4, id="one query"),
        pytest.param(200, 385, 1, 3, id="tiles of a pair shared by blocks"),
        pytest.param(300, 17, 2, 7, id="a last block with fewer tiles"),
        pytest.param(20, 300, 7, 4, id="pairs of one tile, one after another"),
    ],
)
def test_source_on_other_divisions(emulated: Attend, n_q: int, n_k: int, sequences: int, slots: int) -> None:
    q = packed(sequences * n_q, 3, torch.float16)[0]
    _, k, v = packed(sequences * n_k, 3, torch.float16)
    assert_like_truth(emulated(q, k, v, n_q, n_k, slots=slots), q, k, v, length=n_q, length_k=n_k)


@pytest.mark.parametrize("slots", [1, 2, 3, 7])
def test_no_tile_is_done_twice(emulated: Attend, library: ctypes.CDLL, slots: int) -> None:
    q, k, v = packed(2 * 200, 1, torch.float16)
    before = library.products_done()
    emulated(q, k, v, 200, 200, slots=slots)
    assert library.products_done() - before == 2 * 4 * (4 + 13), "8 tiles of 4 products for the scores and 13 with V"


@pytest.mark.parametrize("heads", [1, 2, 5, 6, 12])
def test_every_pair_of_a_sequence_and_a_head_is_found(emulated: Attend, heads: int) -> None:
    q, k, v = packed(5 * 3, heads, torch.float16)
    assert_like_truth(emulated(q, k, v, 3, 3, slots=2), q, k, v, length=3)


def rising(n: int, device: str = "cpu") -> tuple[Tensor, ...]:
    """Scores of some hundreds, that are largest among the last keys for half of the queries and among the first for half."""
    q, k, v = (x.contiguous() for x in packed(n, 1, torch.float16, device))
    return q, k + torch.linspace(0, 8, n, device=device)[:, None, None].half() * q.mean(0).sign(), v


@pytest.mark.parametrize("n", [200, 392])
def test_source_on_rising_scores(emulated: Attend, n: int) -> None:
    q, k, v = rising(n)
    assert_like_truth(emulated(q, k, v, n, n, 0.5), q, k, v, length=n, scale=0.5)


@pytest.mark.parametrize("n", [160, 264, 392])
def test_early_and_late_completion_are_the_same_bits(emulated: Attend, n: int) -> None:
    """An instruction in flight may end at once, or only when it is waited for."""
    q, k, v = packed(2 * n, 1, torch.bfloat16)
    (out, lse), (early, early_lse) = (emulated(q, k, v, n, n, slots=1, eager=eager) for eager in (False, True))
    assert torch.equal(out, early)
    assert torch.equal(lse, early_lse)


def test_emulation_refuses_rows_that_are_not_aligned(emulated: Attend) -> None:
    q, k, v = (torch.randn(8, 1, 68, dtype=torch.float32).half()[..., 1:65] for _ in range(3))
    with pytest.raises(RuntimeError, match="outside of the operands"):
        emulated(q, k, v, 8, 8)


# -- the machine code --


class Compiled(NamedTuple):
    said: str  # by ptxas
    code: dict[tuple[int, ...], Code]  # by the widths of a kernel's chunks, and 1 for bf16
    registers: dict[str, str]  # by kernel


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc")
    cubin = str(tmp_path_factory.mktemp("wgmma") / "attention.cubin")
    flags = ["-O3", "-std=c++17", "-Xptxas=-v,--warn-on-spills", "-gencode=arch=compute_90a,code=sm_90a", "-cubin"]
    source = str(ROOT / "csrc" / "cuda" / "attention_wgmma.cu")
    made = subprocess.run(["nvcc", *flags, source, "-o", cubin], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    registers = dict(re.findall(r"Compiling entry function '(\w+)'.*?Used (\d+) registers", made.stderr, re.DOTALL))
    code = {}
    for kernel in read(cubin):
        shape = re.search(r"WgmmaShapeILi\d+ELi(\d+)ELi(\d+)EEELb(\d)", kernel.name)
        assert shape is not None, kernel.name
        code[tuple(map(int, shape.groups()))] = kernel
    return Compiled(made.stderr, code, registers)


def test_nothing_is_spilled_or_waited_for_without_need(compiled: Compiled) -> None:
    """ptxas names products that it had to put one after another (C7510 and on), and what it spilled."""
    said = compiled.said
    assert "Potential Performance Loss" not in said, said
    assert {*re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", said)} == {"0"}
    assert "warning" not in said


def test_products_are_as_wide_as_the_chunks(compiled: Compiled) -> None:
    widths = {(80, 0), (160, 0), (200, 0), (136, 128), (160, 160), (192, 192), (200, 192), (208, 192)}
    assert compiled.code.keys() == {(*width, bf16) for width in widths for bf16 in (0, 1)}
    for (first, second, _), code in compiled.code.items():
        assert code.products["64x64x16"] == -(-(first + second) // 16), "one product with V for every 16 keys"
        expected = Counter({f"64x{first}x16": 4}) + Counter({f"64x{second}x16": 4 * bool(second)})
        assert code.products - Counter({"64x64x16": 100}) == expected
        assert code.instructions["HMMA"] == 0
        assert set(code.copies) == {"128"}


def test_registers_in_flight_are_left_alone(compiled: Compiled) -> None:
    assert {shape: touched for shape, code in compiled.code.items() if (touched := code.touched_in_flight())} == {}


@pytest.mark.parametrize(
    ("line", "wrong"),
    [("FADD R55, R60, R61", True), ("@P0 MUFU.EX2 R34, R34", True), ("FADD R56, R60, R61", False)],
    ids=["a result", "a weight", "another"],
)
def test_a_register_in_flight_is_seen(line: str, wrong: bool) -> None:
    product = "HGMMA.64x32x16.F32.BF16 R40, R32, gdesc[UR4].tnspB, R40, gsb0"
    code = [product, "@P0 BRA 0x30", "WARPGROUP.DEPBAR.LE gsb0, 0x0", line, "EXIT"]
    places = {16 * place: place for place in range(len(code))}
    assert Code("", code, places).touched_in_flight() == ({line} if wrong else set())
    waited = [product, "WARPGROUP.DEPBAR.LE gsb0, 0x0", line, "EXIT"]
    assert Code("", waited, places).touched_in_flight() == set()


def test_blocks_fit_their_multiprocessor(compiled: Compiled) -> None:
    for (first, second, bf16), code in compiled.code.items():
        keys = first + second
        blocks = 5 if keys <= 80 else 4 if keys <= 160 else 3 if keys <= 200 else 2
        shared = (2 * -(-keys // 16) * 16 + 64) * 128 + 1024  # of which one KB is the system's
        assert blocks * 128 * -(-int(compiled.registers[code.name]) // 8) * 8 <= 65536, (first, second, bf16)
        assert blocks * shared <= 228 * 1024, (first, second, bf16)


def test_instructions_a_score(compiled: Compiled) -> None:
    """A multiply-add, an exponential, a maximum, an addition each, half a conversion; and all there is besides, fixed."""
    for (first, second, bf16), code in compiled.code.items():
        scores = (first + second) // 2  # of a thread and tile
        assert code.instructions["MUFU"] <= scores + 10
        assert code.instructions["FMNMX"] <= scores + 12
        assert code.instructions["F2FP"] <= scores // 2 + 20
        assert sum(code.instructions.values()) <= 4.6 * scores + 1150, (first, second, bf16)


# -- on the GPU --


def by_wgmma(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    return packed_attention(q, k, v, **options, backend="wgmma")


@pytest.fixture
def on_hopper() -> None:
    reason = backends.refusal("wgmma", Case(torch.device("cuda", 0), torch.bfloat16, 64, 8, 8))
    if reason is not None:
        pytest.skip(reason)


needs_hopper = pytest.mark.usefixtures("on_hopper", "poisoned_empty")


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("n", LENGTHS)
def test_kernel(n: int, dtype: torch.dtype) -> None:
    q, k, v = packed(3 * n, 2, dtype, "cuda")
    got = attention_wgmma.forward(q, k, v, Lengths(None, None, n, n), 0.125, with_lse=True)
    assert_like_truth(got, q, k, v, length=n)


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize(("n_q", "n_k"), [(70, 9), (1, 200), (1568, 392), (392, 17)], ids=str)
def test_kernel_on_keys_of_another_length(n_q: int, n_k: int) -> None:
    q = packed(3 * n_q, 5, torch.bfloat16, "cuda")[0]
    _, k, v = packed(3 * n_k, 5, torch.bfloat16, "cuda")
    got = attention_wgmma.forward(q, k, v, Lengths(None, None, n_q, n_k), 0.125, with_lse=True)
    assert_like_truth(got, q, k, v, length=n_q, length_k=n_k)


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("n", [64, 160, 197, 392])
def test_kernel_on_more_pairs_than_run_at_once(n: int) -> None:
    """Blocks go on to a second and third pair, of which they copy the keys while they work on the one before."""
    q, k, v = packed(150 * n, 12, torch.bfloat16, "cuda")
    got, expected = by_wgmma(q, k, v, length=n), packed_attention(q, k, v, length=n, backend="triton")
    assert (got.float() - expected.float()).norm() <= 5e-3 * expected.float().norm()
    few = slice(149 * n, None)
    lse = packed_attention_with_lse(q[few], k[few], v[few], length=n)[1]
    assert_like_truth((got[few], lse), q[few], k[few], v[few], length=n)


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("n", [200, 392])
def test_kernel_on_rising_scores(n: int) -> None:
    q, k, v = rising(n, "cuda")
    got = attention_wgmma.forward(q, k, v, Lengths(None, None, n, n), 0.5, with_lse=True)
    assert_like_truth(got, q, k, v, length=n, scale=0.5)


@pytest.mark.gpu
@needs_hopper
def test_kernel_in_a_graph_and_on_another_stream() -> None:
    q, k, v = packed(4 * 392, 6, torch.bfloat16, "cuda")
    expected = by_wgmma(q, k, v, length=392)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        aside = by_wgmma(q, k, v, length=392)
    torch.cuda.current_stream().wait_stream(side)
    assert torch.equal(aside, expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = by_wgmma(q, k, v, length=392)
    captured.zero_()
    graph.replay()
    assert torch.equal(captured, expected)


@pytest.mark.gpu
@needs_hopper
def test_kernel_waits_for_no_device_and_repeats_its_bits() -> None:
    q, k, v = packed(4 * 392, 6, torch.float16, "cuda")
    expected = by_wgmma(q, k, v, length=392)
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = [by_wgmma(q, k, v, length=392) for _ in range(20)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(x, expected) for x in again)


@pytest.mark.gpu
@needs_hopper
def test_kernel_by_name_and_under_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = packed(2 * 392, 6, torch.bfloat16, "cuda")
    expected = by_wgmma(q, k, v, length=392)
    monkeypatch.setenv("MMFAST_ATTENTION", "wgmma")
    compiled_call = torch.compile(lambda *a: packed_attention(*a, length=392), fullgraph=True)
    assert torch.equal(compiled_call(q, k, v), expected)
    with pytest.raises(ValueError, match="no backward"):
        packed_attention(q.clone().requires_grad_(), k, v, length=392)


@pytest.mark.gpu
@needs_hopper
def test_rows_that_are_not_aligned_are_refused() -> None:
    product = torch.randn(64, 3, 1, 68, dtype=torch.bfloat16, device="cuda")
    q, k, v = product[..., 1:65].unbind(1)
    with pytest.raises(ValueError, match="multiples of 16 bytes"):
        by_wgmma(q, k, v, length=64)
    with pytest.raises(ValueError, match="q must have rows"):
        attention_wgmma.forward(q, k, v, Lengths(None, None, 64, 64), 0.125)


@pytest.mark.gpu
@needs_hopper
def test_nothing_to_do_on_the_gpu() -> None:
    q, k, v = packed(0, 2, torch.bfloat16, "cuda")
    assert by_wgmma(q, k, v, length=8).shape == (0, 2, 64)
