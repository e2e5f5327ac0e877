"""Configurations that were measured on a machine: which win, where they are kept, and where they are used."""

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmfast import MaskedViT, ViTConfig
from mmfast import tune as tuning
from mmfast.cli import main
from mmfast.tune import Found, Job, Workload, best, tune
from mmfast_kernels import backends, overlap, tables, tuned
from mmfast_kernels.tables import Timed

MACHINE = {"gpu": "NVIDIA H200", "triton": "3.6.0"}
CPU = torch.device("cpu")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A machine with a GPU, and the folder of its tables."""
    monkeypatch.setattr(tuned, "machine", lambda: MACHINE)
    monkeypatch.setenv("MMFAST_TABLES", str(tmp_path))
    folder = tmp_path / "nvidia-h200-triton3.6.0"
    folder.mkdir()
    tables.reload()
    yield folder
    monkeypatch.undo()
    tables.reload()
    backends._choose.cache_clear()


def put(folder: Path, op: str, rows: list[dict[str, Any]], **made: str) -> None:
    (folder / f"{op}.json").write_text(json.dumps({"made": {**MACHINE, **made}, "rows": rows}))
    tables.reload()


def tiny() -> MaskedViT:
    config = ViTConfig(img_size=32, num_frames=4, embed_dim=32, depth=1, num_heads=2, num_classes=3)
    return MaskedViT(config)


def test_a_measured_case_comes_before_the_shipped_row(here: Path) -> None:
    shipped = tables.lookup("norm", d=384).config
    put(here, "norm", [{"when": {"d": 384}, "config": {"num_warps": 7, "elements": 1}}])
    assert tables.lookup("norm", d=384).config == {"num_warps": 7, "elements": 1}
    assert tables.lookup("norm", d=768).config == shipped


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "no table of mmfast"),
        ("[]", "no table of mmfast"),
        (json.dumps({"made": MACHINE, "rows": [{"when": 1, "config": {}}]}), "must be objects"),
        (json.dumps({"made": MACHINE, "rows": [{"config": {}}]}), "KeyError: 'when'"),
        (json.dumps({"made": {**MACHINE, "gpu": "B200"}, "rows": []}), "with gpu B200, here is NVIDIA H200"),
        (json.dumps({"made": {**MACHINE, "triton": "3.7.1"}, "rows": []}), "with triton 3.7.1, here is 3.6.0"),
    ],
)
def test_a_table_that_does_not_hold_is_left_out_by_name(here: Path, text: str, said: str) -> None:
    shipped = tables.shipped("norm")
    (here / "norm.json").write_text(text)
    tables.reload()
    with pytest.warns(UserWarning, match=said) as caught:
        assert [tables.rows("norm") for _ in range(2)] == [shipped] * 2
    assert len(caught) == 1
    assert "norm.json" in str(caught[0].message)


def test_without_a_gpu_there_are_no_measured_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuned, "machine", lambda: None)
    assert tuned.folder() is None
    assert tuned.rows("norm") == ()


@pytest.mark.parametrize(
    ("others", "winner"),
    [
        ([Timed({"B": 2}, 0.9, 0.0)], 2),
        ([Timed({"B": 2}, 0.9, 0.3)], 1),  # within what both spread
        ([Timed({"B": 2}, 0.9, 0.0), Timed({"B": 3}, 0.8, 0.0)], 3),
        ([Timed({"B": 2}, math.inf)], 1),
        ([], 1),
    ],
    ids=str,
)
def test_the_shipped_configuration_stays_unless_another_is_faster_by_more_than_the_spread(
    others: list[Timed], winner: int
) -> None:
    assert best([Timed({"B": 1}, 1.0, 0.1), *others]).config == {"B": winner}


def test_recording_times_each_case_once_and_changes_nothing(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[Any] = []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(tables, "measure", lambda run, config: ran.append(config) or Timed(config, 1.0))
    with tables.recording() as found:
        configs = [tables.config("norm", print, d=d) for d in (384, 384, 768)]
    assert configs == [tables.lookup("norm", d=d).config for d in (384, 384, 768)]
    row = tables.shipped("norm")[0]
    assert ran == 2 * [row.config, *row.alternatives]
    assert found.timed.keys() == {("norm", (("d", 384),)), ("norm", (("d", 768),))}


def test_a_failed_recording_is_over() -> None:
    with pytest.raises(ZeroDivisionError), tables.recording():
        raise ZeroDivisionError
    with tables.recording(), pytest.raises(RuntimeError, match="timed already"), tables.recording():
        pass


def by_name(run: Any, config: Mapping[str, Any]) -> Timed:
    """torch's attention is the quickest."""
    run(config)
    return Timed(config, 1.0 if config["order"][0] == "torch" else 2.0)


def test_backends_of_attention_are_ordered_by_what_they_take(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "measure", by_name)
    found = tune([Workload("tiny", mask_ratio=0.5, batch=2)], torch.float32, CPU, tiny(), progress=False)
    (row,) = found.rows["attention_backends"]
    assert row["config"]["order"][0] == "torch"
    assert row["when"] | {"n": 0} == {
        "arch": 0, "dtype": "fp32", "d": 16, "n": 0, "dense": True, "needs_grad": False, "with_lse": False
    }  # fmt: skip
    assert [one["config"]["order"][0] for one in row["timed"]] == ["cpp", "torch"]
    assert found.won == 1
    put(here, "attention_backends", found.rows["attention_backends"])
    backends._choose.cache_clear()
    case = backends.Case(CPU, torch.float32, 16, row["when"]["n"], row["when"]["n"])
    assert backends.choose(case)[0] == "torch"
    assert backends.choose(case._replace(n_q=99, n_k=99))[0] == "cpp"


def test_overlap_is_measured_on_whole_passes_without_it_and_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Graph:
        def __init__(self) -> None:
            self.on = overlap.overlaps(torch.device("cuda", 0))

        def replay(self) -> None:
            replayed.append(self.on)

    def measured(run: Any, config: Mapping[str, Any]) -> Timed:
        run(config)
        run(config)
        return Timed(config, 1.0 if config["on"] else 2.0, 0.1)

    replayed: list[bool] = []
    monkeypatch.setattr(tables, "arch_of", lambda device: 90)
    monkeypatch.setattr(tables, "measure", measured)
    monkeypatch.setattr(tuning, "_captured", lambda jobs: Graph())
    timed = tuning.time_overlap([])
    assert replayed == [False, False, True, True]
    assert best(timed).config == {"on": True}


def test_a_backend_that_is_wrong_never_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    true = tuning.packed_self_attention

    def off(qkv: Tensor, *, length: int, backend: str) -> Tensor:
        return true(qkv, length=length, backend=backend) * (1.5 if backend == "torch" else 1)

    monkeypatch.setattr(tuning, "packed_self_attention", off)
    monkeypatch.setattr(tables, "measure", by_name)
    case = dict(arch=0, dtype="fp32", d=16, n=4, dense=True, needs_grad=True, with_lse=False)
    cpp, torchs = tuning.time_backends(case, CPU)
    assert (cpp.ms, torchs.ms) == (2.0, math.inf)


def test_a_backend_in_no_shipped_order_is_timed_where_it_takes_the_case(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "refusal", lambda name, case: None if name in ("torch", "wgmma") else "not here")
    run = tuning.packed_self_attention
    monkeypatch.setattr(tuning, "packed_self_attention", lambda qkv, length, backend: run(qkv, length=length))
    monkeypatch.setattr(tables, "measure", by_name)
    case = dict(arch=0, dtype="fp32", d=16, n=4, dense=True, needs_grad=False, with_lse=False)
    assert [timed.config["order"][0] for timed in tuning.time_backends(case, CPU)] == ["torch", "wgmma"]


def test_a_training_step_is_measured_too(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "measure", by_name)
    model = tiny()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    found = tune([Workload("tiny", batch=2, train=True)], torch.float32, CPU, model, progress=False)
    assert {row["when"]["needs_grad"] for row in found.rows["attention_backends"]} == {False, True}
    assert not model.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert all(p.grad is None for p in model.parameters())


def test_rows_that_change_results_are_dropped_and_named(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "measure", by_name)
    true = Job.results

    def results(job: Job) -> list[Tensor]:
        return [x + bool(tuned.rows("attention_backends")) for x in true(job)]

    monkeypatch.setattr(Job, "results", results)
    found = tune([Workload("tiny", batch=2)], torch.float32, CPU, tiny(), progress=False)
    assert found.rows == {}
    assert "results differ" in found.dropped["attention_backends"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--views", "0"], "views must be at least 1, got 0"),
        (["--batch", "0"], "batch must be at least 1, got 0"),
        (["--mask-ratio", "1"], r"mask_ratio must lie in \[0, 1\), got 1"),
        (["--device", "cpu"], "tune measures Triton kernels on a CUDA GPU"),
    ],
)
def test_wrong_arguments_are_named(flags: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", *flags]) == 2
    assert re.search(said, capsys.readouterr().err)


def test_list_and_show_need_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", "--list", "--views", "2", "4", "--train"]) == 0
    said = capsys.readouterr().out
    assert said.count("videomae_small_patch16_224") == 4
    assert "norm: up to 3 configurations a case" in said
    assert main(["tune", "--show"]) == 0
    assert "rows shipped" in capsys.readouterr().out


def test_what_was_measured_is_written_beside_what_was_there(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = [{"when": {"d": d}, "config": {"num_warps": 7, "elements": d}} for d in (384, 768)]
    put(here, "norm", [old, new])
    timed = [{"config": {"num_warps": w, "elements": 48}, "ms": ms, "spread": 0.1} for w, ms in ((1, 2.0), (2, 1.0))]
    row = {"when": {"d": 768}, "config": {"num_warps": 2, "elements": 48}, "timed": timed}
    monkeypatch.setattr("mmfast.commands.tune.tune", lambda *_, **__: Found({"norm": [row]}, {"pool": "it is off"}))
    monkeypatch.setattr("mmfast.commands.common.device_of", lambda _: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: MACHINE["gpu"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert main(["tune"]) == 0
    said = capsys.readouterr()
    assert "norm (d 768): 2.00 times the shipped one, 2 timed" in said.out
    assert "1 cases measured, 1 better than shipped" in said.out
    assert "pool left as shipped: it is off" in said.err
    table = json.loads((here / "norm.json").read_text())
    assert table["rows"] == [row, old]
    assert table["made"] | MACHINE == table["made"]
    assert table["made"]["arch"] == "sm_90"


@pytest.mark.gpu
def test_a_gpu_is_measured_and_its_tables_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MMFAST_TABLES", str(tmp_path))
    flags = ["--model", "videomae_small_patch16_224", "--mask-ratio", "0.9", "--batch", "2", "--quiet"]
    try:
        assert main(["tune", *flags, "--warm"]) == 0
        assert main(["tune", *flags]) == 0
        folder = tuned.folder()
        assert folder is not None
        assert (folder / "packed_attention.json").is_file()
        assert "cases measured" in capsys.readouterr().out
        tables.reload()
        assert len(tables.rows("packed_attention")) > len(tables.shipped("packed_attention"))
    finally:
        monkeypatch.undo()
        tables.reload()
        backends._choose.cache_clear()
