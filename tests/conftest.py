"""Fresh memory is filled with NaN (integers with their largest value), so that an element never written shows."""

import os

import pytest
import torch

_EMPTY, _EMPTY_LIKE = torch.empty, torch.empty_like


def _poison(t: torch.Tensor) -> torch.Tensor:
    if t.device.type == "meta" or type(t) is not torch.Tensor:
        return t
    if t.is_floating_point():
        return t.fill_(float("nan"))
    return t if t.dtype == torch.bool else t.fill_(torch.iinfo(t.dtype).max)


@pytest.fixture
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "empty", lambda *a, **k: _poison(_EMPTY(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: _poison(_EMPTY_LIKE(*a, **k)))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    interpreting = os.environ.get("TRITON_INTERPRET") == "1"
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if "interpret" in item.keywords and not interpreting:
            item.add_marker(pytest.mark.skip(reason="needs TRITON_INTERPRET=1"))
