"""The stages: what a step of stage I computes, learning rates, steps that are not finite, two processes."""

import contextlib
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch import distributed as dist

pytest.importorskip("lightning")
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins import MixedPrecision
from makers import tiny_mae_config
from stages_fakes import (
    DECODER,
    PLAIN,
    TINY,
    Losses,
    distill_data,
    distill_stage,
    pretrain_data,
    pretrain_stage,
    trainer,
    validated,
)

from mmfast.checkpoints import load_pretrained
from mmfast.mae import MaskedAutoencoder
from mmfast.masks import sample_pack
from mmfast.stages.pretrain import PretrainStage

pytestmark = pytest.mark.filterwarnings("ignore")
FAKES = Path(__file__).with_name("stages_fakes.py")


def weights(stage: Any) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in stage.loss_module.state_dict().items()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


class Lrs(Callback):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.seen.append(optimizer.param_groups[0]["lr"])


# -- stage I ---------------------------------------------------------------------------------------------------------


class Given:
    """A batch, and the stage's losses of it at step 5."""

    def __init__(self, **settings: Any) -> None:
        self.batch = next(iter(pretrain_data().train_dataloader()))
        self.stage = pretrain_stage(**PLAIN, **settings)
        self.stage.trainer = trainer()
        self.stage.trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total.completed = 5
        assert self.stage.global_step == 5

    def mask(self, domain: str, stream: int) -> Any:
        seed = stream << 63 | 42 << 32 | 5
        return sample_pack(2, 1, (2, 2, 2), 0.5, seed=seed, clip_ids=self.batch[domain]["clip_id"])


@pytest.mark.parametrize("same", [False, True])
def test_masks_are_those_of_seed_step_and_clip(same: bool) -> None:
    given = Given(same_mask=same)
    source, target = given.batch["source"], given.batch["target"]
    theirs = given.mask("source", 0) if same else given.mask("target", 1)
    wanted = given.stage.loss_module(
        source["rgb"], target["rgb"], given.mask("source", 0), source["label"], target_mask=theirs
    )
    found = given.stage.losses(given.batch)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_without_target_weight_the_target_is_not_looked_at() -> None:
    given = Given(target_weight=0.0)
    del given.batch["target"]
    found = given.stage.losses(given.batch)
    assert torch.equal(found["total"], found["source_loss"] + 0.05 * found["ce"])


@pytest.mark.parametrize(("modality", "weight"), [("rgb", 0.05), ("flow", 0.01), ("pose", 0.01)])
def test_lambda_and_channels_follow_the_modality(modality: str, weight: float) -> None:
    small = dict(embed_dim=64, depth=1, num_heads=1, **DECODER)
    stage = PretrainStage(modality, num_classes=3, overrides=small)
    module: Any = stage.loss_module
    assert module.ce_weight == weight
    config = module.model.config
    assert (config.in_chans, config.grid, config.head_drop_rate) == (
        {"rgb": 3, "flow": 2, "pose": 21}[modality],
        (8, 14, 14),
        0.5,
    )


def test_init_from_rgb_gives_a_flow_model_its_encoder_but_the_embedding(tmp_path: Path, caplog: Any) -> None:
    MaskedAutoencoder(tiny_mae_config(num_classes=5)).save_pretrained(tmp_path)
    caplog.set_level("INFO")
    stage = PretrainStage("flow", 3, overrides={"img_size": 32, "num_frames": 4}, init=str(tmp_path))
    model: Any = stage.loss_module.model
    kept = load_pretrained(tmp_path).state_dict()
    own = model.state_dict()
    assert torch.equal(own["encoder.blocks.1.attn.qkv.weight"], kept["encoder.blocks.1.attn.qkv.weight"])
    assert own["encoder.patch_embed.proj.weight"].shape[1] == 2
    assert own["head.weight"].shape[0] == 3
    assert model.training
    assert "initialised (not in the file), 6: encoder.patch_embed.proj.weight" in caplog.text


def test_init_of_another_size_than_named_is_refused(tmp_path: Path) -> None:
    MaskedAutoencoder(tiny_mae_config()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="init has embed_dim 64, the model asked for 384"):
        PretrainStage(num_classes=3, name="pretrain_mmcdfsl_small_rgb", init=str(tmp_path))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(modality="depth"), "modality must be one of rgb, flow, pose, got 'depth'"),
        (dict(mask_ratio=1.0), r"mask_ratio must lie in \(0, 1\), got 1.0"),
        (dict(seed=-1), "seed must lie in"),
        (dict(patience=0), "patience must be at least 1, got 0"),
        (dict(warmup_epochs=-1), "warmup_epochs must be at least 0, got -1"),
        (dict(target_weight=-1.0), "target_weight must be finite"),
    ],
    ids=str,
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pretrain_stage(**settings)


def test_clips_without_the_modality_are_refused() -> None:
    given = Given()
    given.batch["source"] = {"clip_id": given.batch["source"]["clip_id"], "flow": None}
    with pytest.raises(
        ValueError, match="the clips have no rgb, the modality that is trained; they have clip_id, flow"
    ):
        given.stage.losses(given.batch)


# -- learning rates ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reference", [False, True])
def test_learning_rates_of_pre_training_are_scaled_by_all_clips_of_a_step(reference: bool) -> None:
    """5 steps an epoch, accumulated to 3; 2 x 2 clips: all three rates times 4/256."""
    lrs = Lrs()
    stage = pretrain_stage(lr=1.5e-4, min_lr=1e-5, warmup_lr=1e-6, reference=reference)
    trainer([lrs], accumulate_grad_batches=2, enable_checkpointing=False, max_epochs=3).fit(stage, pretrain_data())
    scale = 4 / 256
    assert len(lrs.seen) == 9
    assert lrs.seen[0] == pytest.approx(1e-6 * scale)
    assert max(lrs.seen) == pytest.approx(1.5e-4 * scale)
    assert lrs.seen.index(max(lrs.seen)) == (3 if reference else 2)
    assert (lrs.seen[-1] > 3 * 1e-5 * scale) == reference


def test_of_distillation_only_the_highest_is(tmp_path: Path) -> None:
    lrs = Lrs()
    stage = distill_stage(tmp_path, lr=2e-3, min_lr=5e-7, warmup_lr=5e-7)
    trainer([lrs], enable_checkpointing=False).fit(stage, distill_data())
    assert lrs.seen[0] == pytest.approx(5e-7)
    assert max(lrs.seen) == pytest.approx(2e-3 * 2 / 256)


def test_a_warm_up_as_long_as_training_is_refused() -> None:
    with pytest.raises(
        ValueError, match="warmup_epochs must be fewer than the epochs that are trained: got 3, that is 15 of 15"
    ):
        trainer().fit(pretrain_stage(warmup_epochs=3), pretrain_data())


def test_max_steps_cuts_the_schedule_short_and_does_not_squeeze_it() -> None:
    whole, short = Lrs(), Lrs()
    for lrs, steps in ((whole, -1), (short, 7)):
        trainer([lrs], enable_checkpointing=False, max_steps=steps).fit(pretrain_stage(), pretrain_data())
    assert short.seen == whole.seen[:7]


def test_weight_decay_leaves_biases_out_unless_told(tmp_path: Path) -> None:
    found = {}
    for decay_all in (False, True):
        stage = distill_stage(tmp_path, decay_all=decay_all)
        own = trainer(max_epochs=2)
        own.fit(stage, distill_data())
        found[decay_all] = sorted(group["weight_decay"] for group in own.optimizers[0].param_groups)
    assert found == {False: [0.0, 0.05], True: [0.05]}


# -- steps that are not finite -----------------------------------------------------------------------------------------


def poisoned(*clips: int, **settings: Any) -> Any:
    data = pretrain_data(**settings)
    data.train_sets["source"].poison = set(clips)
    return data


class Watch(Callback):
    """Which steps moved the weights."""

    def __init__(self) -> None:
        self.moved: list[bool] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.before = weights(pl_module)
        self.poisoned = bool(batch["source"]["rgb"].isnan().any())

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        moved = not equal(weights(pl_module), self.before)
        self.moved.append(moved)
        lr_is_zero = trainer.global_step == 1  # warm-up begins with 0
        assert moved != self.poisoned or lr_is_zero


def test_a_step_that_is_not_finite_is_left_out_counted_and_said() -> None:
    stage, watch = pretrain_stage(warmup_lr=0.01), Watch()
    with pytest.warns(RuntimeWarning, match=r"step \d+ left out: loss nan \(3 so far\)"):
        trainer([watch], enable_checkpointing=False, gradient_clip_val=1.0).fit(stage, poisoned(4))
    assert stage.skipped == 3
    assert watch.moved.count(False) == 3
    assert all(tensor.isfinite().all() for tensor in weights(stage).values())


def test_the_mean_over_an_epoch_is_of_its_finite_steps() -> None:
    own = trainer()
    own.fit(pretrain_stage(), poisoned(4))
    assert own.callback_metrics["total_epoch"].isfinite()


def test_accumulated_gradients_are_left_out_with_their_bad_part() -> None:
    stage = pretrain_stage()
    trainer(accumulate_grad_batches=5).fit(stage, poisoned(4))
    assert stage.skipped == 3


def test_too_many_in_a_row_end_the_run_and_name_the_step() -> None:
    with pytest.raises(FloatingPointError, match="step 3 has loss nan: 4 steps left out in a row, 4 in all"):
        trainer().fit(pretrain_stage(patience=4), poisoned(*range(10)))


def test_the_counts_go_on_with_the_run(tmp_path: Path) -> None:
    own = trainer(max_epochs=2)
    own.fit(pretrain_stage(), poisoned(4))
    own.save_checkpoint(tmp_path / "x.ckpt")
    stage = pretrain_stage()
    trainer().fit(stage, poisoned(4), ckpt_path=tmp_path / "x.ckpt", weights_only=True)
    assert stage.skipped == 3


def test_gradients_that_are_not_finite_are_left_out_too() -> None:
    class Spoil(Callback):
        def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
            if trainer.global_step == 4:
                next(pl_module.parameters()).grad[0] = float("inf")

    stage = pretrain_stage()
    with pytest.warns(RuntimeWarning, match="step 4 left out: gradients that are not finite at loss"):
        trainer([Spoil()], enable_checkpointing=False).fit(stage, pretrain_data())
    assert stage.skipped == 1


def half_precision(bad: tuple[int, ...] = ()) -> tuple[Any, float]:
    """A run in fp16 with a scaler: the stage, and the scale in the end."""
    scaler = torch.amp.GradScaler("cpu", init_scale=128.0, growth_interval=1000)
    stage = pretrain_stage()
    own = trainer()
    own.strategy.precision_plugin = MixedPrecision("16-mixed", "cpu", scaler)
    own.fit(stage, poisoned(*bad))
    return stage, scaler.get_scale()


def test_a_bad_loss_does_not_lower_the_scale_of_fp16() -> None:
    stage, scale = half_precision(bad=(4,))
    assert stage.skipped == 3
    assert scale == 128.0


def test_an_overflow_under_a_scaler_is_its_ordinary_work() -> None:
    class Overflow(Callback):
        def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
            if trainer.global_step == 4:
                next(pl_module.parameters()).grad[0] = float("inf")

    scaler = torch.amp.GradScaler("cpu", init_scale=128.0, growth_interval=1000)
    stage = pretrain_stage()
    own = trainer([Overflow()], enable_checkpointing=False)
    own.strategy.precision_plugin = MixedPrecision("16-mixed", "cpu", scaler)
    own.fit(stage, pretrain_data())
    assert stage.skipped == 0
    assert scaler.get_scale() == 64.0


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_on_a_gpu(precision: str, tmp_path: Path) -> None:
    stage = pretrain_stage()
    own = trainer(accelerator="gpu", precision=precision)
    own.fit(stage, poisoned(4))
    assert stage.skipped == 3
    assert own.callback_metrics["total_epoch"].isfinite()
    distilled = distill_stage(tmp_path)
    own = trainer(accelerator="gpu", precision=precision)
    own.fit(distilled, distill_data())
    assert own.callback_metrics["total_epoch"].isfinite()


# -- two processes -----------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def two_processes(folder: Path, *flags: str) -> list[dict[str, Any]]:
    """What each of two ranks of stages_fakes.py found."""
    port = str(free_port())
    shared = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": port, "NODE_RANK": "0"}
    command = [sys.executable, str(FAKES), str(folder), "--world", "2", *flags]
    with contextlib.ExitStack() as stack:
        ranks = []
        for rank in range(2):
            log = stack.enter_context((folder / f"log{rank}").open("w+"))
            ranks.append((subprocess.Popen(command, env={**shared, "LOCAL_RANK": str(rank)}, stderr=log), log))
        for process, log in ranks:
            code = process.wait()
            log.seek(0)
            assert code == 0, log.read()
    return [torch.load(folder / f"found{rank}.pt", weights_only=True) for rank in range(2)]


needs_gloo = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch was built without gloo"
)


@needs_gloo
def test_two_processes_train_as_one_with_a_bad_step_on_one_of_them(tmp_path: Path) -> None:
    losses = Losses()
    stage = pretrain_stage(**PLAIN)
    trainer([losses], enable_checkpointing=False).fit(stage, poisoned(4, batch_size=4))
    found = two_processes(tmp_path, "--poison", "4")
    assert found[0]["skipped"] == found[1]["skipped"] == stage.skipped > 0
    assert equal(found[0]["weights"], found[1]["weights"])
    together = (torch.tensor(found[0]["losses"]) + torch.tensor(found[1]["losses"])) / 2
    torch.testing.assert_close(together, torch.tensor(losses.seen), equal_nan=True, atol=1e-5, rtol=1e-5)
    for name, tensor in weights(stage).items():
        torch.testing.assert_close(found[0]["weights"][name], tensor, atol=1e-4, rtol=1e-4, msg=name)


@needs_gloo
def test_two_processes_validate_as_one(tmp_path: Path) -> None:
    own = trainer(max_epochs=2)
    own.fit(distill_stage(tmp_path), validated(distill_data(batch_size=4), spread=0.02))
    accuracy = float(own.callback_metrics["val_accuracy"])
    assert 40 < accuracy < 99
    found = two_processes(tmp_path, "--distill")
    assert found[0]["val_accuracy"] == found[1]["val_accuracy"] == pytest.approx(accuracy)


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown model 'pretrain_tiny'"):
        PretrainStage(name="pretrain_tiny", overrides=TINY)
