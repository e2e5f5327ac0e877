"""Kernels, host routines and models take what the baselines say: no clock, so any machine can tell."""

import importlib.util
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import perf_guard
import perf_kernels
import perf_models
import perf_native
import pytest
import torch
from aot import needs_compiler
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from mmfast.config import from_name, mae_from_name
from mmfast.layers import Block
from mmfast.mae import MaskedAutoencoder
from mmfast.masks import full_pack, sample_pack
from mmfast.vit import MaskedViT
from mmfast_kernels.dispatch import HAVE_TRITON

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import workloads

needs_triton = pytest.mark.skipif(not HAVE_TRITON, reason="needs triton")
not_interpreting = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter's lane runs kernels, not guards"
)
PLAIN, FUSED = "ViT-S inference, ratio 0.75, 2 views", "ViT-S inference, ratio 0.75, 2 views, fused"


def check(part: str, case: str) -> None:
    try:
        perf_guard.check(part, case)
    except perf_guard.NothingToCompare as reason:
        pytest.skip(str(reason))


# -- the guards --


@pytest.mark.aot
@needs_triton
@needs_compiler
@pytest.mark.parametrize("case", perf_kernels.CASES)
def test_machine_code(case: str) -> None:
    check("kernels", case)


@needs_triton
@not_interpreting
@pytest.mark.parametrize("case", perf_models.CASES)
def test_work_of_a_model(case: str) -> None:
    check("models", case)


@pytest.mark.parametrize("case", perf_guard.PARTS["roofline"].cases)
def test_counts_of_the_roofline(case: str) -> None:
    check("roofline", case)


def test_host_routines() -> None:
    """One test: the driver is compiled once."""
    moved = []
    for case in perf_native.CASES:
        try:
            check("native", case)
        except AssertionError as error:
            moved.append(str(error))
    assert not moved, "\n".join(moved)


@pytest.mark.parametrize("part", perf_guard.PARTS)
def test_every_baseline_has_every_case(part: str) -> None:
    known = perf_guard.load(part)
    assert known, perf_guard.command(part)
    for version, figures in known.items():
        assert figures.keys() == perf_guard.PARTS[part].cases, f"{version}: {perf_guard.command(part)}"


# -- what a layer may take --


@needs_triton
@not_interpreting
@pytest.mark.parametrize("case", [PLAIN, FUSED])
def test_a_layer_launches_seven_kernels_at_most(case: str) -> None:
    layer, _ = perf_models.layer_and_rest(case)
    assert layer.ops.total() <= 7, layer.ops


@needs_triton
@not_interpreting
@pytest.mark.parametrize("case", [PLAIN, FUSED])
def test_a_model_computes_what_the_roofline_counts(case: str) -> None:
    config = from_name("videomae_small_patch16_224", num_classes=perf_models.CLASSES, depth=1)
    ops = workloads.inference(config, 8 * 49, views=2, clips=4)
    layer, rest = perf_models.layer_and_rest(case)
    # The last product of the last layer is made of a view's mean alone.
    spared = 2 * config.embed_dim * config.mlp_dim * 4 * 2 * (8 * 49 - 1)
    assert layer.operations + rest.operations == workloads.flops_of(ops) - spared
    if case == FUSED:
        in_layer = workloads.repeat(workloads.blocks(config, "encoder", 8, 8 * 49, workloads.Rules()), 1)
        least = sum(op.least for op in in_layer)
        assert least <= layer.bytes <= 1.001 * least, (layer.bytes, least)


# -- the guard itself --


@pytest.mark.parametrize(
    ("before", "now", "said"),
    [
        ({"a": 100}, {"a": 103}, []),
        ({"a": 100}, {"a": 97}, []),
        ({"a": 100, "b": 1}, {"a": 104, "b": 1}, ["  a: 100 in the baseline, 104 now (+4.0 %)"]),
        ({"a": 100}, {"a": 96}, ["  a: 100 in the baseline, 96 now (-4.0 %)"]),
        ({}, {"spills": 1}, ["  spills: 0 in the baseline, 1 now (new)"]),
        ({"a": 7}, {}, ["  a: 7 in the baseline, 0 now (-100.0 %)"]),
        (None, {"a": 1}, ["  is not in the baseline"]),
    ],
)
def test_differences(before: dict[str, float] | None, now: dict[str, float], said: list[str]) -> None:
    assert perf_guard.differences(before, now) == said


@pytest.fixture
def made_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A part whose version and figure a test sets, with baselines in a folder of its own."""
    state: dict[str, Any] = {"version": "compiler 1", "count": 100}
    part = perf_guard.Part(["case"], lambda: state["version"], lambda _: {"count": state["count"]})
    monkeypatch.setattr(perf_guard, "PARTS", {"part": part})
    monkeypatch.setattr(perf_guard, "FOLDER", tmp_path)
    return state


def test_a_change_fails_until_the_baseline_is_updated(
    made_up: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert perf_guard.main(["--update"]) == perf_guard.main([]) == 0
    made_up["count"] = 110
    assert perf_guard.main([]) == 1
    said = capsys.readouterr().out
    assert "count: 100 in the baseline, 110 now (+10.0 %)" in said
    assert "python tests/perf_guard.py --update part" in said
    assert perf_guard.main(["--update", "part"]) == perf_guard.main(["part"]) == 0


def test_another_version_is_not_compared(made_up: dict[str, Any]) -> None:
    perf_guard.update("part")
    made_up |= {"version": "compiler 2", "count": 200}
    with pytest.raises(perf_guard.NothingToCompare, match=r"'compiler 2', only of compiler 1; .*--update part"):
        perf_guard.check("part", "case")
    perf_guard.update("part")
    assert {version: figures["case"]["count"] for version, figures in perf_guard.load("part").items()} == {
        "compiler 1": 100,
        "compiler 2": 200,
    }


def test_what_is_missing_is_said(made_up: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> str:
        raise FileNotFoundError("valgrind is not installed")

    part = perf_guard.Part(["case"], absent, lambda _: {})
    monkeypatch.setattr(perf_guard, "PARTS", {"part": part})
    with pytest.raises(perf_guard.NothingToCompare, match="valgrind is not installed"):
        perf_guard.check("part", "case")


def test_inner_loop() -> None:
    """The innermost loop with the most matrix products, not the one around it nor a longer one without any."""
    step = "        /*0010*/              @!P0 FFMA.FTZ R1, R2, R3, R1 ;\n"
    sass = (
        f".L_x_0:\n{step}.L_x_1:\n{step}        /*0020*/  HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24, gsb0 ;\n"
        "        /*0030*/              @P0 BRA `(.L_x_1) ;\n        /*0040*/  @UP1 BRA `(.L_x_0) ;\n"
        f".L_x_2:\n{step * 9}        /*00f0*/              @P2 BRA `(.L_x_2) ;\n"
        ".L_x_3:\n        /*0100*/                   BRA `(.L_x_3);\n"
    )
    assert perf_kernels.inner_loop(sass) == Counter({"FFMA": 1, "HGMMA": 1, "BRA": 1})
    assert perf_kernels.inner_loop(step) is None


@pytest.mark.aot
@needs_triton
@needs_compiler
def test_an_extra_load_is_found(tmp_path: Path) -> None:
    """In a copy of a kernel."""
    from mmfast_kernels import standardise_triton

    source, at = Path(str(standardise_triton.__file__)).read_text(), "pieces[i] - mean[:, None]"
    assert source.count(at) == 1
    (tmp_path / "changed_kernel.py").write_text(source.replace(at, f"{at} + tl.load(x_ptr)"))
    spec = importlib.util.spec_from_file_location("changed_kernel", tmp_path / "changed_kernel.py")
    assert spec is not None
    assert spec.loader is not None
    changed = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(changed)
    before = perf_kernels.figures(perf_kernels.standardise(384))
    with mock.patch.object(standardise_triton, "standardise_kernel", changed.standardise_kernel):
        moved = perf_guard.differences(before, perf_kernels.figures(perf_kernels.standardise(384)))
    assert any(line.startswith("  loads of 16 bits: 0 in the baseline") for line in moved), moved


@needs_triton
@not_interpreting
def test_an_extra_op_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    before = perf_models.measure(PLAIN)
    scaled = Block._scaled
    monkeypatch.setattr(Block, "_scaled", lambda self, branch, *rest: scaled(self, branch * 1.0, *rest))
    perf_models.layer_and_rest.cache_clear()
    try:
        moved = perf_guard.differences(before, perf_models.measure(PLAIN))
    finally:
        perf_models.layer_and_rest.cache_clear()
    assert "  a layer: mul: 0 in the baseline, 2 now (new)" in moved


# -- on a GPU --


def kernels(run: Callable[[], object]) -> Counter[str]:
    """What a call launches, once it has been compiled; copies and fills by the driver are not kernels."""
    for _ in range(2):
        run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        run()
        torch.cuda.synchronize()
    events = (e for e in profiled.events() if e.device_type == DeviceType.CUDA)
    return Counter(e.name for e in events if not e.name.startswith(("Memcpy", "Memset")))


@pytest.mark.gpu
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_kernels_a_layer_launches(fused: bool) -> None:
    """As many as ops were counted, at most: torch may leave one out (a fill by the driver), none may come on top."""
    clips, by_depth = 43, {}
    video = torch.randint(256, (clips, *perf_models.VIDEO), dtype=torch.uint8, device="cuda")
    pack = sample_pack(clips, 2, perf_models.GRID, 0.75, device="cuda")
    for depth in (1, 2):
        config = from_name("videomae_small_patch16_224", num_classes=perf_models.CLASSES, depth=depth)
        model = MaskedViT(config).eval().to("cuda", torch.bfloat16)
        if fused:
            model.fuse_for_inference()
        with torch.no_grad():
            by_depth[depth] = kernels(lambda m=model: m.logits(m.embed(video, pack), pack, perf_models.GRID))  # type: ignore[misc]
    layer = by_depth[2] - by_depth[1]
    counted, _ = perf_models.layer_and_rest(FUSED if fused else PLAIN)
    assert 0 < layer.total() <= counted.ops.total(), (layer, counted.ops)


def without_waiting(run: Callable[[], object]) -> None:
    """Run it, warm; an error where anything waits for the device."""
    for _ in range(2):
        run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_a_forward_pass_waits_for_nothing(fused: bool) -> None:
    config = from_name("videomae_small_patch16_224", num_classes=5, depth=2)
    model = MaskedViT(config).eval().to("cuda", torch.bfloat16)
    if fused:
        model.fuse_for_inference()
    video = torch.randint(256, (2, *perf_models.VIDEO), dtype=torch.uint8, device="cuda")
    with torch.no_grad():
        without_waiting(lambda: model(video, sample_pack(2, 3, perf_models.GRID, 0.75, device="cuda")))
        without_waiting(lambda: model(video, full_pack(2, config.num_tokens, "cuda")))


@pytest.mark.gpu
def test_a_training_step_waits_for_nothing() -> None:
    model = MaskedAutoencoder(mae_from_name("pretrain_videomae_small_patch16_224", depth=2, decoder_depth=1)).cuda()
    video = torch.randint(256, (2, *perf_models.VIDEO), dtype=torch.uint8, device="cuda")

    def step() -> None:
        pack = sample_pack(2, 1, perf_models.GRID, 0.9, device="cuda")
        with torch.autocast("cuda", torch.bfloat16):
            loss = model.reconstruction_loss(video, pack)
        loss.backward()

    without_waiting(step)
