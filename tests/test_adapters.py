"""The adapters of M2-CLIP as modules: exact against the published equations, masked, packed, and with bad input."""

import pytest
import torch
import torch.nn.functional as F
from lanes import BOTH
from ted_makers import published, random_adapter, tube_pack
from torch import Tensor

from mmfast import masks
from mmfast.adapters import FrameLayout, TEDAdapter, TemporalAdapter, TextAdapter
from mmfast_kernels.ted import NO_SITE


def with_gradients(adapter: torch.nn.Module, x: Tensor, y: Tensor, dy: Tensor) -> dict[str, Tensor]:
    named = {"x": x} | dict(adapter.named_parameters())
    return {"y": y} | dict(zip(named, torch.autograd.grad(y, list(named.values()), dy), strict=True))


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, truth in want.items():  # of one frame the difference is 0, and so is a gradient
        assert float((got[name] - truth).detach().norm()) <= 1e-5 * float(truth.detach().norm()), name


@pytest.mark.parametrize("lane", BOTH)
@pytest.mark.parametrize(("frames", "grid"), [(3, (4, 5)), (1, (2, 2)), (2, (1, 7))])
def test_equals_the_dense_adapter(frames: int, grid: tuple[int, int], lane: str, poisoned_empty: None) -> None:
    """Output and all gradients; the biases give frame 0 an offset too."""
    adapter = random_adapter(20, 12)
    x = torch.randn(2 * frames, 1 + grid[0] * grid[1], 20, requires_grad=True)
    dy = torch.randn(x.shape)
    got = with_gradients(adapter, x, adapter(x, num_frames=frames, grid=grid), dy)
    want = with_gradients(adapter, x, published(adapter, x, frames, grid), dy)
    assert_same(got, want)
    offset = (want["y"] - x).detach().view(2, frames, -1, 20)[:, 0, 1:]
    assert float(offset.abs().max()) > 0.1


@pytest.mark.parametrize("lane", BOTH)
@pytest.mark.parametrize("class_tokens", [False, True], ids=["cells", "class"])
def test_masked_equals_the_dense_adapter_with_removed_positions_zeroed(
    class_tokens: bool, lane: str, poisoned_empty: None
) -> None:
    """Views that keep different numbers of tubes, in one pack."""
    grid = (3, 4, 5)
    pack = tube_pack(2, 2, grid, [7, 1, 20, 12], seed=3)
    adapter = random_adapter(16, 12, num_frames=3, grid=(4, 5))
    keep = torch.zeros(4, 60, dtype=torch.bool)
    of = pack.per_token(torch.arange(4))
    keep[of, pack.keep_idx.long()] = True
    x = torch.randn(4 * 3, 21, 16, requires_grad=True)
    kept = torch.cat((torch.full((12, 1), class_tokens), keep.view(12, 20)), 1)
    dy = torch.randn(int(kept.sum()), 16)
    tokens = x[kept]
    got = with_gradients(adapter, x, adapter(tokens, pack=pack), dy)
    if class_tokens:
        want = published(adapter, x, 3, (4, 5), keep.view(4, 3, 20)[:, 0])
        assert_same(got, with_gradients(adapter, x, want[kept], dy))
    else:  # without class tokens the cells are as with them
        want = published(adapter, F.pad(x[:, 1:], (0, 0, 1, 0)), 3, (4, 5), keep.view(4, 3, 20)[:, 0])
        assert_same(got, with_gradients(adapter, x, want[kept], dy))


@pytest.mark.parametrize("lane", BOTH)
def test_joint_tokens_are_frames_without_class_tokens(lane: str) -> None:
    adapter = random_adapter(16, 8)
    x = torch.randn(2, 3 * 6, 16)
    joint = adapter(x, num_frames=3, grid=(2, 3), class_tokens=False)
    frames = adapter(x.view(6, 6, 16), num_frames=3, grid=(2, 3), class_tokens=False)
    packed = adapter(x.flatten(0, 1), 3, (2, 3), pack=masks.full_pack(2, 18))
    torch.testing.assert_close(joint.view(6, 6, 16), frames, rtol=0, atol=0)
    torch.testing.assert_close(joint.flatten(0, 1), packed, rtol=0, atol=0)


def test_a_new_adapter_is_the_identity() -> None:
    x = torch.randn(4, 5, 16)
    assert torch.equal(TEDAdapter(16, 8)(x, num_frames=2, grid=(2, 2)), x)
    assert torch.equal(TemporalAdapter(16, 8)(x[:, 0], 2), x[:, 0])
    assert not torch.equal(TextAdapter(16, 8)(x), x)


def test_published_names_go_in_and_out() -> None:
    adapter = random_adapter(16, 8)
    names = ["fc1", "conv", "fc2", "offset_adapter.fc1", "offset_adapter.conv", "offset_adapter.fc2"]
    assert sorted(adapter.state_dict()) == sorted(f"{n}.{what}" for n in names for what in ("weight", "bias"))
    assert adapter.conv.weight.shape == (8, 1, 3)
    assert adapter.offset_adapter.conv.weight.shape == (8, 1, 1, 3, 3)
    again = TEDAdapter.from_pretrained(adapter.state_dict())
    x = torch.randn(4, 5, 16)
    assert torch.equal(again(x, 2, (2, 2)), adapter(x, 2, (2, 2)))
    text = TextAdapter(16, 8).state_dict()
    assert sorted(text) == sorted(f"textad_fc{i}.{what}" for i in (1, 2) for what in ("weight", "bias"))


def test_temporal_adapter() -> None:
    torch.manual_seed(0)
    adapter = TemporalAdapter(16, 8)
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(3 * 4, 16, requires_grad=True)
    dy = torch.randn(x.shape)
    h = F.conv1d(adapter.fc1(x).view(3, 4, 8).mT, adapter.conv.weight, adapter.conv.bias, padding=1, groups=8)
    want = with_gradients(adapter, x, x + adapter.fc2(h.mT.reshape(12, 8)), dy)
    assert_same(with_gradients(adapter, x, adapter(x, 4), dy), want)


def test_text_adapter() -> None:
    adapter = TextAdapter(16, 8)
    x = torch.randn(3, 5, 16)
    fc1, fc2 = adapter.textad_fc1, adapter.textad_fc2
    want = x + F.linear(F.gelu(F.linear(x, fc1.weight, fc1.bias)), fc2.weight, fc2.bias)
    torch.testing.assert_close(adapter(x), want)


@pytest.mark.parametrize("class_tokens", [False, True], ids=["cells", "class"])
def test_table_of_a_pack_equals_that_of_plain_loops(class_tokens: bool) -> None:
    grid = (2, 3, 4)
    pack = tube_pack(2, 2, grid, [5, 12, 1])
    layout = FrameLayout.of_pack(pack, grid, class_tokens)
    at, rows, class_rows = 0, 0, []
    for s in range(4):
        ids = pack.keep_idx[int(pack.cu_seqlens[s]) : int(pack.cu_seqlens[s + 1])].tolist()
        cells = [i for i in ids if i < 12]
        sites = ([None] if class_tokens else []) + cells
        class_rows += [rows + t * len(sites) for t in range(2)] if class_tokens else []
        for place, cell in enumerate(sites):
            near = []
            for dy in (-1, 0, 1):
                for dx in (-1, 0, 1):
                    y, x = (-9, -9) if cell is None else (cell // 4 + dy, cell % 4 + dx)
                    there = 0 <= y < 3 and 0 <= x < 4 and y * 4 + x in cells
                    near.append(sites.index(y * 4 + x) - place if there else NO_SITE)
            assert layout.sites.table[at].tolist() == [*near, rows + place, len(sites), 0]
            at += 1
        rows += 2 * len(sites)
    assert at == layout.sites.table.shape[0]
    assert rows == layout.rows
    assert (layout.class_rows.tolist() if layout.class_rows is not None else []) == class_rows


def test_layouts_are_made_once() -> None:
    pack = tube_pack(1, 2, (2, 3, 3), [4])
    assert FrameLayout.of_pack(pack, (2, 3, 3)) is FrameLayout.of_pack(pack, (2, 3, 3))
    assert FrameLayout.of_pack(pack, (2, 3, 3), True) is not FrameLayout.of_pack(pack, (2, 3, 3))
    assert FrameLayout.dense(2, 3, (2, 2)) is FrameLayout.dense(2, 3, (2, 2))


def test_frozen_backbone_trains_the_adapter_alone() -> None:
    adapter = random_adapter(16, 8)
    x = torch.randn(4, 5, 16)
    adapter(x, 2, (2, 2)).square().sum().backward()
    assert all(p.grad is not None and float(p.grad.abs().max()) > 0 for p in adapter.parameters())


def test_where_class_tokens_alone_are_read_the_bias_of_cells_gets_nothing() -> None:
    """Not even what rounding leaves of a difference: Adam would make whole steps of it."""
    adapter = random_adapter(16, 8)
    adapter(torch.randn(4, 5, 16), 2, (2, 2))[:, 0].square().sum().backward()
    for name, parameter in adapter.offset_adapter.named_parameters():
        assert parameter.grad is not None
        assert float(parameter.grad.abs().max()) == 0, name


def test_compiles_as_one_graph() -> None:
    adapter = random_adapter(16, 8)
    x = torch.randn(4, 5, 16, requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: adapter(x, 2, (2, 2)), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), adapter(x, 2, (2, 2)))
    got, want = (torch.autograd.grad(f(x).sum(), x)[0] for f in (compiled, lambda x: adapter(x, 2, (2, 2))))
    torch.testing.assert_close(got, want)


GRID = (2, 3, 3)


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((6, 5, 16), {"num_frames": 4}, r"x must be \[B\*4, 10, D\] for 4 frames of 3 x 3 cells and a class token"),
        ((6, 10, 16), {"num_frames": 4}, r"got \(6, 10, 16\)"),
        ((6, 10, 16), {"num_frames": 0}, "num_frames must be at least 1, got 0"),
        ((6, 10, 16), {"grid": (9,)}, r"grid must be two positive sizes \(h, w\), got \(9,\)"),
        ((6, 10, 16), {"grid": (0, 9)}, "grid must be two positive sizes"),
        ((6, 10, 17), {}, r"x must have the adapter's width 16, got \(6, 10, 17\)"),
        ((60, 16), {}, "or come with a pack"),
        ((20, 16), {"pack": tube_pack(1, 1, GRID, [4])}, r"x must be the pack's \[8, D\], or \[10, D\]"),
        ((8, 16), {"pack": tube_pack(1, 1, GRID, [4]), "class_tokens": True}, r"x must be the pack's"),
        ((8, 16), {"pack": tube_pack(1, 1, GRID, [4]), "num_frames": 3}, "3 frames a view, got views of"),
    ],
)
def test_bad_input(shape: tuple[int, ...], options: dict, message: str) -> None:
    adapter = TEDAdapter(16, 8, num_frames=2, grid=(3, 3))
    with pytest.raises(ValueError, match=message):
        adapter(torch.zeros(shape), **options)


def test_other_bad_input() -> None:
    adapter = TEDAdapter(16, 8, num_frames=2, grid=(3, 3))
    mask = torch.ones(1, 1, 18, dtype=torch.bool)
    mask[..., [0, 1, 9, 11]] = False  # as many cells in each frame, but not the same
    with pytest.raises(ValueError, match="the same cells in all 2 frames of a 3 x 3 grid"):
        adapter(torch.zeros(4, 16), pack=masks.pack_masks(mask))
    with pytest.raises(ValueError, match=r"grid must be \(frames, h, w\)"):
        FrameLayout.of_pack(masks.full_pack(1, 4), (2, 2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="state must be of one adapter and hold 'fc1.weight'"):
        TEDAdapter.from_pretrained({"adapter.fc1.weight": torch.zeros(8, 16)})
    with pytest.raises(RuntimeError, match="offset_adapter"):
        TEDAdapter.from_pretrained({k: v for k, v in adapter.state_dict().items() if "offset" not in k})
    with pytest.raises(ValueError, match=r"x must be \[B\*3, D\], got \(4, 16\)"):
        TemporalAdapter(16, 8)(torch.zeros(4, 16), 3)
