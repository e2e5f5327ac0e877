"""The benchmark of the CPU's routines: it checks before it times, and counts the lines that pixels lie in."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import host_kernels


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"copy_gb_s": 1.0, "gemm_tflop_s": 1.0, "gemm_size": 1.0}
    monkeypatch.setattr(host_kernels.harness, "ceilings", lambda *_: found)


def test_every_routine_has_its_share(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    given = [
        "--clips",
        "1",
        "--mask-ratio",
        "0.9",
        "--hidden",
        "4",
        "--rounds",
        "2",
        "--threads",
        "1",
        "--json",
        str(out),
    ]
    assert host_kernels.main(given) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["routine"].split()[0] for row in rows] == ["gather"] * 4 + ["stencil"]
    for row in rows:
        assert row["share"] == pytest.approx(row["copy"]["median"] / row["timing"]["median"])
        assert row["moved_bytes"] >= row["wanted_bytes"]
        assert (row["share_read_only"] is None) == (row["read"] is None)
    assert "gather interleaved, ratio 0.9, to uint8" in capsys.readouterr().out


def test_a_wrong_routine_is_not_timed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(host_kernels, "gather_into", lambda out, *_: out.zero_())
    assert host_kernels.main(["--clips", "1", "--mask-ratio", "0.9", "--rounds", "2"]) == 3
    assert "differs from its reference; nothing timed" in capsys.readouterr().err


@pytest.mark.parametrize("together", [True, False], ids=["interleaved", "planes"])
def test_lines_hold_the_pixels_of_kept_tokens(together: bool) -> None:
    pixels = torch.zeros(1, 16, 224, 224, 3, dtype=torch.uint8)
    video = pixels.permute(0, 4, 1, 2, 3) if together else pixels.permute(0, 4, 1, 2, 3).contiguous()
    every = torch.arange(8 * 196, dtype=torch.int32)
    spare = video.data_ptr() % 64 != 0
    assert sorted(host_kernels.lines_of(video, every, 0)) == list(range(video.numel() // 64 + spare))
    first = {x // 64 for dt in range(2) for dy in range(16) for x in _pieces(video, dt, dy)}
    assert sorted(host_kernels.lines_of(video, every[:1], 0)) == sorted(first)


@pytest.mark.parametrize("threads", [1, 2])
def test_reading_alone_reads_the_lines(threads: int) -> None:
    library = host_kernels.compiled()
    if library is None:
        pytest.skip("no C++ compiler")
    words = torch.arange(20_008, dtype=torch.int64)
    start = -(words.data_ptr() // 8) % 8  # of the first whole line
    lines = np.random.default_rng(0).permutation(2500).astype(np.int32)[:2400]
    total = library.read_lines(words.data_ptr() + 8 * start, lines.ctypes.data, len(lines), threads)
    assert total == int(words[start::8][lines].sum())


def test_without_a_compiler_the_reading_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/nowhere/c++")
    host_kernels.compiled.cache_clear()
    assert host_kernels.reading(torch.zeros(64, dtype=torch.uint8), np.zeros(1, dtype=np.int32)) is None
    host_kernels.compiled.cache_clear()


def _pieces(video: torch.Tensor, dt: int, dy: int) -> list[int]:
    """Addresses of the pixels of a line of the first patch, from the start of a line of memory on."""
    _, channel, frame, row, pixel = video.stride()
    start = video.data_ptr() % 64 + dt * frame + dy * row
    return [start + c * channel + x * pixel for c in range(3) for x in range(16)]
