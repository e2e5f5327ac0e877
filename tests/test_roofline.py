"""Operations and bytes of every configuration, against torch's counter and the traffic of plain models; floors."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import m2clip_makers
import m2clip_plain
import plain
import plain_evl
import pytest
import torch
from evl_makers import tiny_model as tiny_evl
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from mmfast.config import MAEConfig, ViTConfig, from_name
from mmfast.evl import EVL
from mmfast.mae import MaskedAutoencoder
from mmfast.vit import MaskedViT

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import machines
import ops as timed_ops
import ops_inference
import ops_training
import peers
import predictions
import roofline
import roofline_measured
import workloads
import workloads_clip

PLAIN = workloads.Rules(item=4, pixel=4, recompute_scores=False, causal=False, rows_only=False)
SIZES: dict[str, Any] = dict(img_size=12, patch_size=4, num_frames=4, embed_dim=24, depth=2, num_heads=3, num_classes=5)
PLAN = machines.Machine("plan", 788.0, 4.3, 55.0, "of the plan")  # what performance figures were first worked out for


def counted(call: Callable[[], object], *, convolutions: bool = True) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    ops = counter.get_flop_counts()["Global"]
    return sum(n for op, n in ops.items() if convolutions or "convolution" not in str(op))


def weights(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def tube_mask(clips: int, slots: int, cells: int, kept: int) -> Tensor:
    mask = torch.ones(clips, slots, cells, dtype=torch.bool)
    mask[..., :kept] = False
    return mask.flatten(1)


# -- operations --------------------------------------------------------------------------------------------------------


def test_forward_and_backward_of_the_classifier():
    config = ViTConfig(**SIZES, mlp_ratio=2.0)
    state = {k: v.requires_grad_() for k, v in weights(MaskedViT(config)).items()}
    video, mask = torch.randn(3, 3, 4, 12, 12), tube_mask(3, 2, 9, 4)
    clips, n, N = 3, 8, config.num_tokens
    rules, stage = PLAIN, "encoder"
    ops = workloads.encoder(config, stage, clips, n, rules, workloads.TRAINED, embedded=N)
    ops.append(workloads.linear(stage, "head", clips, 24, 5, rules, workloads.TRAINED))
    assert counted(lambda: plain.logits(config, state, video, mask).sum().backward()) == workloads.flops_of(ops)


def test_flash_attention_backward_computes_the_scores_again():
    q, k, v = (torch.randn(2, 3, 40, 8, requires_grad=True) for _ in range(3))

    def materialised() -> None:
        ((q @ k.transpose(-1, -2)).softmax(-1) @ v).sum().backward()

    own = [
        workloads.attention("", 2, 40, 40, 24, rules, workloads.TRAINED).flops for rules in (PLAIN, workloads.Rules())
    ]
    assert counted(materialised) == own[0]
    assert own[1] - own[0] == 2 * 2 * 40 * 40 * 24  # one product more


def test_forward_and_backward_of_pretraining():
    config = MAEConfig(**SIZES, mlp_ratio=2.0, decoder_embed_dim=16, decoder_depth=2, decoder_num_heads=2)
    state = {k: v.requires_grad_() for k, v in weights(MaskedAutoencoder(config)).items()}
    video, mask = torch.randn(3, 3, 4, 12, 12), tube_mask(3, 2, 9, 2)
    targets = plain.patch_targets(config, video, mask)

    def step() -> None:
        pred, logits = plain.autoencoder(config, state, video, mask)
        assert logits is not None
        ((pred - targets).square().mean() + logits.sum()).backward()

    ops = workloads.pretraining(config, visible=4, source=3, rules=PLAIN)
    # The plain model embeds every token.
    more = 2 * 2 * 3 * (config.num_tokens - 4) * config.patch_dim * 24
    assert counted(step) == workloads.flops_of(ops) + more


def test_forward_and_backward_of_distillation():
    student = ViTConfig(**SIZES | {"num_classes": 0})
    teacher = ViTConfig(**SIZES | {"num_classes": 0, "in_chans": 2})
    own = {k: v.requires_grad_() for k, v in weights(MaskedViT(student)).items()}
    frozen = weights(MaskedViT(teacher))
    mlp = torch.nn.Sequential(torch.nn.Linear(24, 24), torch.nn.ReLU(), torch.nn.Linear(24, 24))
    rgb, flow = torch.randn(3, 3, 4, 12, 12), torch.randn(3, 2, 4, 12, 12)

    def step() -> None:
        said = mlp(plain.tokens(student, own, rgb).mean(1))
        (said - plain.tokens(teacher, frozen, flow).mean(1)).square().mean().backward()

    ops = workloads.distillation(student, {"flow": teacher}, student.num_tokens, 3, PLAIN)
    assert counted(step) == workloads.flops_of(ops)


@pytest.mark.parametrize("preset", ["k400", "ssv2", "paper"])
def test_forward_and_backward_of_m2clip(preset):
    model = m2clip_makers.tiny_model(preset)
    own = {k: v.requires_grad_("adapter" in k) for k, v in m2clip_makers.published(model).items()}
    given = m2clip_makers.batch()
    ids = (given[name] for name in ("token_ids", "labels", "class_token_ids", "mlm_labels"))

    def step() -> None:
        m2clip_plain.losses(model.config, own, given["video"], *ids)["total"].backward()

    clips, context = given["token_ids"].shape
    texts = clips + len(given["class_token_ids"])
    ops = workloads_clip.m2clip(model.config, clips, texts, context, context, PLAIN)
    embed = workloads.flops_of(ops, "embed")  # a convolution in the plain model, like the stencils
    assert counted(step, convolutions=False) == workloads.flops_of(ops) - embed


def evl_step(model: EVL, video: Tensor) -> Callable[[], object]:
    state = {k: v.requires_grad_(not k.startswith("backbone.")) for k, v in weights(model).items()}
    config = model.config
    own = plain.part(state, "backbone.")

    def step() -> None:
        if isinstance(config.backbone, ViTConfig):
            layers = plain_evl.vit_layers(config.backbone, own, video)
        else:
            layers = plain_evl.clip_layers(config.backbone, own, video)
        plain_evl.logits(config, state, layers[-config.num_layers :]).sum().backward()

    return step


@pytest.mark.parametrize("backbone", ["clip", "vit"])
def test_forward_and_backward_of_evl(backbone):
    model = tiny_evl(backbone)
    b = model.config.backbone
    shape = (6, 24, 16) if backbone == "vit" else (4, 24, 24)
    ops = workloads_clip.evl(model.config, clips=2, folded=False, rules=PLAIN)
    embed = workloads.flops_of(ops, "embed")
    # The restatement projects q and k of every block a second time.
    width, tokens = model.config.width, 2 * (shape[0] * 10 if backbone == "clip" else 18)
    again = 3 * 2 * tokens * width * 3 * width
    assert b is not None
    found = counted(evl_step(model, torch.randn(2, 3, *shape)), convolutions=False)
    assert found == workloads.flops_of(ops) - embed + again


def test_folded_query_attention_is_what_the_decoder_multiplies():
    config = tiny_evl("clip").config
    D, inner, heads, J = config.width, config.decoder_dim, config.decoder_num_heads, 40
    x, z = torch.randn(3, D, requires_grad=True), torch.randn(3, J, D, requires_grad=True)
    w = [torch.randn(inner, D, requires_grad=True) for _ in range(3)]
    out = torch.randn(D, inner, requires_grad=True)

    def step() -> None:
        w_q, w_k, w_v = w
        q = (x @ w_q.t()).unflatten(1, (heads, -1)).transpose(0, 1)
        turned = torch.bmm(q, w_k.unflatten(0, (heads, -1))).transpose(0, 1)
        pooled = torch.bmm(torch.bmm(turned, z.transpose(1, 2)).softmax(-1), z)
        mixed = torch.bmm(pooled.transpose(0, 1), w_v.unflatten(0, (heads, -1)).transpose(1, 2))
        (mixed.transpose(0, 1).flatten(1) @ out.t()).sum().backward()

    ops = workloads_clip._query_attention(config, 3, J, PLAIN, True)
    assert counted(step) == workloads.flops_of(ops)


def test_last_block_of_a_tower_that_is_read_at_one_token():
    """Queries, projection and MLP of one token of each sequence; keys and values of all."""
    ops = workloads.attention_half("", 5, 30, 16, PLAIN, rows=1)
    by_hand = 2 * 5 * (30 * 16 * 32 + 16 * 16 + 2 * 30 * 16 + 16 * 16)
    assert workloads.flops_of(ops) == by_hand


# -- bytes -------------------------------------------------------------------------------------------------------------


class Traffic(TorchDispatchMode):
    """Bytes of the tensors that each function reads and writes; views move nothing.

    smallest: elements of the smallest weight; what has fewer, vectors and statistics, is not counted.
    """

    def __init__(self, smallest: int) -> None:
        super().__init__()
        self.bytes, self.smallest = 0, smallest

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if not func.is_view and "_unsafe_view" not in str(func):
            seen = [t for t in torch.utils._pytree.tree_leaves((args, kwargs, made)) if isinstance(t, Tensor)]
            self.bytes += sum(t.numel() * t.element_size() for t in seen if t.numel() >= self.smallest)
        return made


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "and backward"])
def test_unfused_bytes_are_the_traffic_of_a_plain_block(backward):
    block, x = peers.Block(24, 48, 3, 1e-6), torch.randn(2, 30, 24, requires_grad=True)
    dy = torch.ones(2, 30, 24)
    with Traffic(24 * 24) as mode, torch.set_grad_enabled(backward):
        y = block(x, peers.sdpa)
        if backward:
            y.backward(dy)
    grad = workloads.TRAINED if backward else workloads.FROZEN
    ops = workloads.attention_half("", 2, 30, 24, PLAIN, grad) + workloads.mlp_half("", 60, 24, 48, PLAIN, grad)
    assert mode.bytes == sum(op.unfused for op in ops)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("norm", "layer_norm"),
        ("attention", "packed_attention"),
        ("proj", "add_linear_"),
        ("fc1", "linear_gelu"),
        ("embed", "tube_embed"),
    ],
)
def test_bytes_are_those_that_the_kernels_are_timed_with(kind, name):
    bench = timed_ops.Bench(torch.device("cpu"), torch.float32, sequences=2, n=16, dim=384)
    listed = [*timed_ops.all_ops(bench), ops_inference.add_linear_op(bench, 384)]
    timed = next(op for op in listed if op.name == name)
    config = ViTConfig(embed_dim=384, depth=1, num_heads=6)
    rules = workloads.Rules(item=4)
    own = next(op for op in workloads.inference(config, 16, 2, rules=rules) if op.kind == kind)
    assert own.least / own.calls == pytest.approx(timed.bytes, rel=0.01)


def test_bytes_of_the_decoders_tokens_are_those_they_are_timed_with():
    config = MAEConfig(**SIZES | {"num_classes": 0}, decoder_embed_dim=64, decoder_depth=1, decoder_num_heads=2)
    counted = next(op for op in workloads.pretraining(config, 8, 3, rules=PLAIN) if op.kind == "tokens")
    bench = timed_ops.Bench(torch.device("cpu"), torch.float32, sequences=2, n=16, dim=64)
    forward, both = ops_training.decoder_ops(bench, 3, 64, config.grid, 4)
    positions = 4 * config.num_tokens * 64
    assert counted.least == both.bytes - positions
    assert counted.least == 2 * (forward.bytes - positions)


def test_least_bytes_of_training_by_hand():
    """Elements of width D for each token of a block at mlp_ratio 4: 30 forward and 43 backward."""
    rules = workloads.Rules(item=1, master=0)
    one, two = (
        sum(
            op.least
            for op in workloads.attention_half("", S, 50, 64, rules, workloads.TRAINED)
            + workloads.mlp_half("", S * 50, 64, 256, rules, workloads.TRAINED)
        )
        for S in (1, 2)
    )
    assert two - one == 50 * 64 * (30 + 43)


def test_optimizer_moves_seven_numbers_a_weight():
    config = MAEConfig(**SIZES | {"num_classes": 0}, decoder_embed_dim=16, decoder_depth=2, decoder_num_heads=2)
    matrices = sum(p.numel() for p in MaskedAutoencoder(config).parameters() if p.dim() > 1 and p.shape[0] > 1)
    ops = workloads.pretraining(config, 4, 3)
    assert next(op for op in ops if op.kind == "optimizer").least == 7 * 4 * matrices


# -- floors, predictions, the program ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "by_op", "ideal"), [("small", 59.0, 50.6), ("base", 199.5, 186.0), ("large", 679.0, 642.5)]
)
def test_floors_worked_out_by_hand(size, by_op, ideal):
    """Microseconds a clip at ratio 0.75, 2 views, 788 TFLOP/s and 4.3 TB/s."""
    found = roofline.ladder(size, 49, 2, PLAN)
    assert found["floor, bf16, an op at a time"] == pytest.approx(by_op, rel=0.005)
    assert found["floor, bf16, ideal"] == pytest.approx(ideal, rel=0.005)


@pytest.mark.parametrize("preset", list(machines.PRESETS))
def test_predicted_ladder_goes_down_to_the_floors(preset):
    for size in roofline.SIZES:
        times = roofline.ladder(size, 49, 2, machines.PRESETS[preset])
        assert times.pop("mmfast, in L2, fp8") < times["mmfast, activations in L2"]  # the floors are bf16's
        assert list(times.values()) == sorted(times.values(), reverse=True)


def test_an_op_takes_the_longer_of_its_two_limits():
    slow = machines.Machine("", 1.0, 1.0, None, "")
    op = workloads.Op("", "qkv", 3_000_000_000, 5_000_000_000, 0)
    floor = machines.floor_of([op], slow)
    assert (floor.ideal, floor.by_op) == (3.0, 5.0)


def test_measured_product_rates_replace_the_assumed_ones():
    machine = machines.Machine("", 800.0, 4.0, None, "", {384: 400.0, 1536: 800.0})
    assert predictions.product_share(384, machine) == 0.5
    assert predictions.product_share(768, machine) == pytest.approx(0.75)
    assert predictions.product_share(4096, machine) == 1.0


def test_kept_cells_of_two_random_views_overlap():
    whole, union = roofline.pcie_bytes(from_name("videomae_small_patch16_224"), 49, 2)
    assert whole == 16 * 224 * 224 * 3
    assert union / whole == pytest.approx(1 - 0.75**2)


def test_rates_of_a_results_folder(tmp_path):
    ceilings = {
        "copy_gb_s": 4000.0,
        "gemm_tflop_s": 700.0,
        "machine": {"gpu": "G", "device": "cuda", "commit": "c" * 40},
    }
    rows = [
        {"product": "qkv 33712x384x1152", "tflop_s": 400.0},
        {"product": "fc1 33712x384x1536", "tflop_s": 500.0},
        {"copy": "pinned host to device", "gb_s": 54.0},
    ]
    (tmp_path / "results.json").write_text(json.dumps(ceilings | {"rows": rows}))
    machine = machines.from_results(tmp_path)
    assert (machine.tflop_s, machine.tb_s, machine.pcie_gb_s, machine.cpu) == (700.0, 4.0, 54.0, False)
    assert machine.products == {384: 450.0}
    assert "cccccccccccc" in machine.source


def test_measured_kernels_and_ladders_stand_beside_their_floors(tmp_path):
    about = {"gpu": "G", "device": "cuda", "commit": "c" * 40 + "+changes"}
    limits = {"copy_gb_s": 4000.0, "gemm_tflop_s": 700.0, "machine": about, "rows": []}
    op = {"op": "add_layer_norm", "shape": "9 x 9", "dtype": "bf16", "gb_s": 2000.0, "tflop_s": 1.0, "error": 0.0}
    timed = op | {"provider": "mmfast", "timing": {"median": 0.02}, "bytes": 40_000_000, "flops": 10}
    case = {"views": 2, "kept": 49, "cells": 196, "slots": 8, "ratio": 0.75, "tokens": 392}
    ways = [{"name": name, "clips": 43, "timing": {"median": ms}} for name, ms in (("mmfast", 5.0), ("peer", 8.0))]
    ladder = {
        "model": "videomae_small_patch16_224",
        "dtype": "torch.bfloat16",
        "case": case,
        "rows": ways,
        "best_peer": "peer",
    }
    contents = {"results": limits, "kernels": {"machine": about, "rows": [timed, timed | {"provider": "torch"}]}}
    for name, content in (contents | {"ladder_small": {"machine": about, "rows": [ladder]}}).items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    kernel = roofline_measured.measured_kernels(roofline_measured.read([tmp_path]))
    assert [(row["op"], row["us_floor"], row["share"]) for row in kernel] == [("add_layer_norm", 10.0, 0.5)]
    row = roofline_measured.measured_rows(roofline_measured.read([tmp_path]))[0]
    assert row["commit"] == "cccccccccccc+changes"
    assert row["share_of_ideal"] == pytest.approx(43 * 39.884e9 / 700e12 / 5e-3, rel=1e-3)
    assert (
        roofline.main(["--measured", str(tmp_path), "--results", str(tmp_path), "--out", str(tmp_path / "page.md")])
        == 0
    )
    assert "add_layer_norm 9 x 9" in (tmp_path / "page.md").read_text()


def test_rate_of_a_cpu_is_that_of_the_models_own_products():
    path = Path(__file__).parents[1] / "benchmarks" / "results" / "cpu_epyc_2threads.json"
    machine = machines.from_results(path)
    content = json.loads(path.read_text())
    assert machine.cpu
    assert machine.tflop_s > content["ceilings"]["gemm_tflop_s"]
    rows = roofline_measured.measured_rows(roofline_measured.read([path]))
    assert len(rows) == len(content["ladders"])
    assert all(0.5 < row["share_of_ideal"] < 1.05 for row in rows)


def test_training_steps_stand_beside_the_floor_of_the_same_machine():
    folder = Path(__file__).parents[1] / "benchmarks" / "results"
    machine = machines.from_results(folder / "cpu_epyc_2threads.json")
    files = [folder / f"cpu_epyc_2threads_{what}.json" for what in ("pretrain", "distill", "m2clip")]
    rows = roofline_measured.measured_steps(roofline_measured.read(files), machine)
    assert [row["step"] for row in rows] == ["pre-training", "distillation", "M2-CLIP, k400"]
    assert all(0.5 < row["share_of_ideal"] < 1.05 for row in rows)
    assert roofline_measured.measured_steps(roofline_measured.read(files), PLAN) == []


def test_results_without_ceilings_are_refused(tmp_path, capsys):
    (tmp_path / "empty.json").write_text("{}")
    assert roofline.main(["--measured", str(tmp_path / "empty.json")]) == 2
    assert "ceilings" in capsys.readouterr().err


def test_page_and_json_are_written(tmp_path):
    page, figures = tmp_path / "page.md", tmp_path / "figures.json"
    assert roofline.main(["--machine", "a100", "--pcie", "20", "--out", str(page), "--json", str(figures)]) == 0
    text = page.read_text()
    assert "predicted, not measured" in text
    assert "given: pcie_gb_s" in text
    result = json.loads(figures.read_text())
    whole = next(row for row in result["inference"] if row["views"] == 2 and row["mask_ratio"] == 0.75)
    assert whole["us_pcie_whole"] == pytest.approx(16 * 224 * 224 * 3 / 20e3)
    assert "e+" not in text
