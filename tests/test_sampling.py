"""Mask sampling: the same bits from the C++ routine, the CUDA kernel and the reference."""

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmfast_kernels import sampling
from mmfast_kernels.native import _C
from mmfast_kernels.sampling import philox4x32_10, sample_keep, sample_keep_ref

ONES = 0xFFFFFFFF
# Known answers published with the authors' implementation (Random123, kat_vectors): counter, key, output.
KNOWN = {
    "zeros": ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    "ones": ([ONES] * 4, [ONES] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    "digits of pi": (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
}
CLIP_IDS = st.one_of(st.integers(-(2**63), 2**63 - 1), st.sampled_from([0, 1, 2**32 - 1, 2**32, 2**63 - 1, -1]))
SEEDS = st.one_of(st.integers(0, 2**64 - 1), st.sampled_from([0, 2**32, 2**63 - 1, 2**63, 2**64 - 1]))


def ids(*clips: int) -> Tensor:
    return torch.tensor(clips, dtype=torch.int64)


@pytest.mark.parametrize("name", KNOWN)
def test_known_answers_native(name: str) -> None:
    counter, key, output = KNOWN[name]
    assert list(_C.philox4x32_10(counter, key)) == output


@pytest.mark.parametrize("name", KNOWN)
def test_known_answers_reference(name: str) -> None:
    counter, key, output = KNOWN[name]
    c0, c1, c2, c3 = (torch.tensor(word) for word in counter)
    assert [int(word) for word in philox4x32_10((c0, c1, c2, c3), (key[0], key[1]))] == output


@settings(max_examples=150, deadline=None)
@given(data=st.data(), clips=st.lists(CLIP_IDS, max_size=4), seed=SEEDS, per_slot=st.booleans())
def test_native_equals_reference(data: st.DataObject, clips: list[int], seed: int, per_slot: bool) -> None:
    grid = tuple(data.draw(st.integers(1, limit)) for limit in (5, 9, 9))
    views, keep = data.draw(st.integers(0, 4)), data.draw(st.integers(0, grid[1] * grid[2]))
    got = sample_keep(ids(*clips), views, grid, keep, seed, per_slot)
    torch.testing.assert_close(got, sample_keep_ref(ids(*clips), views, grid, keep, seed, per_slot), rtol=0, atol=0)


@pytest.mark.parametrize("per_slot", [False, True])
@pytest.mark.usefixtures("poisoned_empty")
def test_ids_ascend_and_every_slot_keeps_the_same_number(per_slot: bool) -> None:
    keep = sample_keep(ids(3, 4, 5), 2, (4, 5, 7), 11, 9, per_slot)
    assert bool((keep.diff(dim=-1) > 0).all())
    slot = keep.view(3, 2, 4, 11) // 35
    assert torch.equal(slot, torch.arange(4).view(4, 1).expand(3, 2, 4, 11))


def test_tubes_keep_the_same_cells_in_every_slot() -> None:
    cells = sample_keep(ids(0, 1), 3, (8, 14, 14), 49, 1).view(2, 3, 8, 49) % 196
    assert bool((cells == cells[:, :, :1]).all())


def test_slots_of_random_masks_differ() -> None:
    cells = sample_keep(ids(0, 1), 3, (8, 14, 14), 49, 1, per_slot=True).view(48, 49) % 196
    assert cells.unique(dim=0).shape[0] == 48


def test_a_view_does_not_depend_on_what_else_is_drawn() -> None:
    alone = sample_keep(ids(2**40 + 3), 2, (4, 6, 6), 9, 5)
    among = sample_keep(ids(7, -2, 2**40 + 3, 7), 5, (4, 6, 6), 9, 5)
    assert torch.equal(alone[0], among[2, :2])
    assert torch.equal(among[0], among[3])


def test_seed_clip_and_view_all_matter() -> None:
    draws = [sample_keep(ids(0, 1, 2**32), 2, (1, 14, 14), 49, seed).view(6, 49) for seed in (0, 1, 2**32, 2**63)]
    assert torch.cat(draws).unique(dim=0).shape[0] == 24


def test_strided_clip_ids() -> None:
    clips = torch.arange(10)
    assert torch.equal(sample_keep(clips[::3], 2, (2, 3, 3), 4, 0), sample_keep(ids(0, 3, 6, 9), 2, (2, 3, 3), 4, 0))


def test_cells_are_kept_equally_often() -> None:
    """Counts of a cell, and of two cells together, over 4000 draws lie within 5 sigma of the binomial mean."""
    draws, cells, keep = 4000, 36, 9
    kept = sample_keep(torch.arange(draws), 1, (1, 6, 6), keep, 11).view(draws, keep).long()
    hot = torch.zeros(draws, cells).scatter_(1, kept, 1.0)
    p, pair = keep / cells, keep * (keep - 1) / (cells * (cells - 1))
    assert bool(((hot.sum(0) - draws * p).abs() < 5 * (draws * p * (1 - p)) ** 0.5).all())
    together = (hot.T @ hot)[~torch.eye(cells, dtype=torch.bool)]
    assert bool(((together - draws * pair).abs() < 5 * (draws * pair * (1 - pair)) ** 0.5).all())


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_number_of_threads_does_not_matter(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = sample_keep(torch.arange(64), 2, (4, 14, 14), 49, 3, per_slot=True)
    monkeypatch.setattr(sampling, "threads", lambda: threads)
    assert torch.equal(sample_keep(torch.arange(64), 2, (4, 14, 14), 49, 3, per_slot=True), expected)


def test_concurrent_callers() -> None:
    results: dict[int, Tensor] = {}

    def draw(seed: int) -> None:
        for _ in range(20):
            results[seed] = sample_keep(torch.arange(8), 2, (4, 6, 6), 9, seed)

    callers = [threading.Thread(target=draw, args=(seed,)) for seed in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    for seed in range(4):
        assert torch.equal(results[seed], sample_keep_ref(torch.arange(8), 2, (4, 6, 6), 9, seed))


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"clip_ids": torch.zeros(2)}, TypeError, "clip_ids"),
        ({"clip_ids": torch.zeros(2, 2, dtype=torch.int64)}, ValueError, "clip_ids"),
        ({"views": -1}, ValueError, "views"),
        ({"views": 65536}, ValueError, "views"),
        ({"grid": (2, 3)}, ValueError, "grid"),
        ({"grid": (0, 3, 3)}, ValueError, "grid"),
        ({"grid": (65535, 3, 3)}, ValueError, "grid"),
        ({"keep": 10}, ValueError, "keep"),
        ({"keep": -1}, ValueError, "keep"),
        ({"seed": 2**64}, ValueError, "seed"),
        ({"seed": -1}, ValueError, "seed"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_wrong_arguments_are_named(change: dict, error: type[Exception], text: str) -> None:
    right = {"clip_ids": ids(1), "views": 2, "grid": (2, 3, 3), "keep": 4, "seed": 0}
    with pytest.raises(error, match=text):
        sample_keep(**right | change)


def test_opcheck() -> None:
    for per_slot in (False, True):
        torch.library.opcheck(sampling._sample_op, (ids(0, 5), 2, [2, 3, 3], 4, -3, per_slot))


def test_compiled_once_for_all_seeds() -> None:
    torch._dynamo.reset()
    graphs = 0

    def count(graph: torch.fx.GraphModule, _: list) -> torch.fx.GraphModule:
        nonlocal graphs
        graphs += 1
        return graph

    compiled = torch.compile(lambda c, seed: sample_keep(c, 2, (2, 3, 3), 4, seed) + 1, backend=count, fullgraph=True)
    for seed in (5, 6, 7, 1234567):
        assert torch.equal(compiled(ids(0, 9), seed), sample_keep_ref(ids(0, 9), 2, (2, 3, 3), 4, seed) + 1)
    assert graphs <= 2


@pytest.mark.gpu
@pytest.mark.parametrize("per_slot", [False, True])
@pytest.mark.parametrize("grid", [(1, 1, 1), (8, 14, 14), (3, 16, 17), (2, 64, 64), (1, 128, 128)], ids=str)
def test_cuda_gives_the_bits_of_the_cpu(grid: tuple[int, int, int], per_slot: bool) -> None:
    clips, cells = ids(0, -5, 2**62, 77), grid[1] * grid[2]
    for keep in {0, 1, cells // 4, cells}:
        got = sample_keep(clips.cuda(), 3, grid, keep, 2**64 - 7, per_slot)
        assert torch.equal(got.cpu(), sample_keep(clips, 3, grid, keep, 2**64 - 7, per_slot))


@pytest.mark.gpu
def test_cuda_does_not_wait_for_the_device() -> None:
    clips = torch.arange(16, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        sample_keep(clips, 2, (8, 14, 14), 49, 0)
        sample_keep_ref(clips, 2, (8, 14, 14), 49, 0)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_cuda_runs_on_the_current_stream() -> None:
    stream = torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()
    clips = torch.arange(4, device="cuda")
    with torch.cuda.graph(graph, stream=stream):
        keep = sample_keep(clips, 2, (2, 4, 4), 5, 3)
    clips.add_(10)
    graph.replay()
    assert torch.equal(keep.cpu(), sample_keep(torch.arange(10, 14), 2, (2, 4, 4), 5, 3))
