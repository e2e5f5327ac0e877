"""Programmatic dependent launch: who decides it, and that results stay what they were."""

from collections.abc import Iterator

import pytest
import torch

from mmfast import MaskedViT
from mmfast.config import from_name
from mmfast.masks import sample_pack
from mmfast_kernels import overlap, tables

GPU = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """What the process chose before, and what these tests make it choose."""
    overlap.overlaps.cache_clear()
    yield
    overlap.overlaps.cache_clear()


@pytest.mark.parametrize(
    ("arch", "wanted", "expected"),
    [(90, None, False), (90, "1", True), (90, "0", False), (80, "1", False), (0, "1", False), (100, "1", True)],
)
def test_the_variable_decides_from_sm_90_on(
    arch: int, wanted: str | None, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "arch_of", lambda device: arch)
    monkeypatch.delenv("MMFAST_OVERLAP", raising=False)
    if wanted is not None:
        monkeypatch.setenv("MMFAST_OVERLAP", wanted)
    assert overlap.overlaps(GPU) == expected
    assert overlap.launch_options(GPU) == ({"OVERLAP": True, "launch_pdl": True} if expected else {"OVERLAP": False})


def test_another_value_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMFAST_OVERLAP", "yes")
    with pytest.raises(ValueError, match="MMFAST_OVERLAP takes 0 or 1, got 'yes'"):
        overlap.overlaps(torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_results_stay_bit_for_bit_also_in_a_graph(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small passes, many times over: a kernel that read too early would read what the pass before left."""
    torch.manual_seed(0)
    model = MaskedViT(from_name("videomae_small_patch16_224", num_classes=5, depth=4)).eval().to("cuda", torch.bfloat16)
    if fused:
        model.fuse_for_inference()
    grid = model.config.grid
    videos = torch.randint(256, (8, 1, 3, 16, 224, 224), dtype=torch.uint8, device="cuda")
    pack = sample_pack(1, 2, grid, 0.9, device="cuda")
    given = torch.empty_like(videos[0])

    def passes() -> torch.Tensor:
        with torch.no_grad():
            found = [model.logits(model.embed(given.copy_(video), pack), pack, grid) for video in videos]
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = model.logits(model.embed(given, pack), pack, grid)
            for video in (*videos, *videos):
                given.copy_(video)
                graph.replay()
                found.append(out.clone())
        return torch.stack(found)

    by_choice = {}
    for wanted in ("0", "1"):
        monkeypatch.setenv("MMFAST_OVERLAP", wanted)
        overlap.overlaps.cache_clear()
        by_choice[wanted] = passes()
    assert by_choice["0"].isfinite().all()
    assert torch.equal(by_choice["0"], by_choice["1"])
