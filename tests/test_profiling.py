"""Ranges cost nothing until switched on, and then name every stage."""

import sys

import pytest
import torch
from test_vit import clips, make

from mmfast import profiling


@pytest.fixture
def profiled():
    profiling.enable()
    yield
    profiling.enable(False)


def test_off_by_default() -> None:
    assert type(profiling.range("x")).__name__ == "nullcontext"


def test_every_stage_and_block_has_a_range(profiled) -> None:
    model = make()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as trace:
        model.ensemble(clips(model))
    names = {e.key for e in trace.key_averages()}
    wanted = ("micro_batch", "embed", "block0", "block2", "attention", "mlp", "pool")
    assert {f"mmfast::{n}" for n in wanted} <= names


def test_works_without_nvtx(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "nvtx", None)
    monkeypatch.setattr(profiling, "_domain", None)
    try:
        assert profiling.enable() is False
        with profiling.range("x"):
            pass
    finally:
        profiling.enable(False)


def test_a_range_is_closed_when_its_block_raises(profiled) -> None:
    with pytest.raises(KeyError), profiling.range("x"):
        raise KeyError
    with profiling.range("y"):
        pass
