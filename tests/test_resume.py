"""A run that was stopped anywhere goes on as if it had not been, and no stop leaves half a checkpoint."""

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("lightning")
from stages_fakes import Signal, distill_data, distill_stage, pretrain_data, pretrain_stage, trainer

from mmfast.stages.resume import AtomicCheckpointIO, Export, ResumePoint

pytestmark = pytest.mark.filterwarnings("ignore")
FAKES = Path(__file__).with_name("stages_fakes.py")


class KeepAll(ResumePoint):
    """Also copies every last.ckpt under the number of its step."""

    def _save(self, trainer: Any) -> None:
        super()._save(trainer)
        if self.path.exists():
            shutil.copy(self.path, self.path.with_name(f"{trainer.global_step}.ckpt"))


def weights(stage: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in stage.state_dict().items()}


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    differ = [name for name in wanted if not torch.equal(found[name], wanted[name])]
    assert not differ, f"{len(differ)} of {len(wanted)} tensors differ: {differ[:3]}"


CASES: dict[str, dict[str, Any]] = {
    "steps": dict(every_n_epochs=None, every_n_steps=1),
    "epochs": dict(every_n_epochs=1),
}


@pytest.fixture(scope="module", params=CASES)
def whole_run(request: Any, tmp_path_factory: Any) -> tuple[Path, dict[str, Tensor]]:
    """The checkpoints of a run of 3 epochs of 5 steps, and its last weights."""
    folder = tmp_path_factory.mktemp(request.param)
    stage = pretrain_stage()
    trainer([KeepAll(str(folder), **CASES[request.param])]).fit(stage, pretrain_data())
    return folder, weights(stage)


def test_a_run_that_goes_on_ends_bit_for_bit_as_one_that_was_never_stopped(
    whole_run: tuple[Path, dict[str, Tensor]],
) -> None:
    """With dropout, new noise in every pass, and a target set that is shorter than an epoch."""
    folder, wanted = whole_run
    points = sorted(folder.glob("[0-9]*.ckpt"), key=lambda p: int(p.stem))
    assert len(points) in (3, 15)
    for point in points[:-1]:
        stage = pretrain_stage()
        own = trainer()
        own.fit(stage, pretrain_data(), ckpt_path=point, weights_only=True)
        assert (own.global_step, own.current_epoch) == (15, 3), point.name
        assert_same(weights(stage), wanted)


@pytest.mark.parametrize("settings", [dict(accumulate_grad_batches=2), dict(limit_train_batches=3)], ids=str)
def test_going_on_with(settings: dict[str, Any], tmp_path: Path) -> None:
    stage = pretrain_stage()
    trainer([KeepAll(str(tmp_path), every_n_epochs=None, every_n_steps=1)], **settings).fit(stage, pretrain_data())
    wanted = weights(stage)
    for point in tmp_path.glob("[0-9]*.ckpt"):
        stage = pretrain_stage()
        trainer(**settings).fit(stage, pretrain_data(), ckpt_path=point, weights_only=True)
        assert_same(weights(stage), wanted)


def test_distillation_goes_on_too(tmp_path: Path) -> None:
    """Its teachers are not in the checkpoint: they come from their files again."""
    stage = distill_stage(tmp_path)
    trainer([KeepAll(str(tmp_path), every_n_epochs=None, every_n_steps=1)]).fit(stage, distill_data())
    wanted = weights(stage)
    saved = torch.load(tmp_path / "4.ckpt", weights_only=True)["state_dict"]
    assert not [name for name in saved if ".teachers." in name]
    for step in (1, 3, 4):
        stage = distill_stage(tmp_path)
        trainer().fit(stage, distill_data(), ckpt_path=tmp_path / f"{step}.ckpt", weights_only=True)
        assert_same(weights(stage), wanted)


@pytest.mark.parametrize("whole_run", ["steps"], indirect=True)
def test_clips_read_by_workers_are_the_same(tmp_path: Path, whole_run: tuple[Path, dict[str, Tensor]]) -> None:
    stage, data = pretrain_stage(), pretrain_data()
    data.num_workers = 2
    trainer().fit(stage, data, ckpt_path=whole_run[0] / "5.ckpt", weights_only=True)
    assert_same(weights(stage), whole_run[1])


@pytest.mark.parametrize("whole_run", ["steps"], indirect=True)
def test_another_batch_size_within_an_epoch_is_refused(whole_run: tuple[Path, dict[str, Tensor]]) -> None:
    folder = whole_run[0]
    with pytest.raises(ValueError, match="within an epoch of 5 steps, these clips, batch_size and ranks make 2"):
        trainer().fit(pretrain_stage(), pretrain_data(batch_size=4), ckpt_path=folder / "7.ckpt", weights_only=True)


def run(*args: Any, check: bool = True) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    return subprocess.run(
        [sys.executable, str(FAKES), *map(str, args)], env=env, capture_output=True, text=True, check=check
    )


def test_a_killed_process_goes_on_from_its_last_checkpoint(tmp_path: Path) -> None:
    stage = pretrain_stage()
    trainer().fit(stage, pretrain_data())
    step = random.randrange(3, 14)
    killed = run(tmp_path, "--every", 2, "--kill_at", step, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last.ckpt"]
    run(tmp_path, "--resume")
    found = torch.load(tmp_path / "found0.pt", weights_only=True)["weights"]
    assert_same(found, dict(stage.loss_module.state_dict()))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_step_end_and_leaves_a_checkpoint(number: int, tmp_path: Path) -> None:
    stage = pretrain_stage()
    trainer().fit(stage, pretrain_data())
    wanted = weights(stage)
    before = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit):
            trainer([ResumePoint(str(tmp_path)), Signal(6, number)]).fit(pretrain_stage(), pretrain_data())
    finally:
        signal.signal(signal.SIGINT, before)
    stage = pretrain_stage()
    own = trainer()
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 7
    own.fit(stage, pretrain_data(), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert_same(weights(stage), wanted)


def test_the_second_interrupt_does_not_wait() -> None:
    point = ResumePoint("nowhere")
    point._ask(signal.SIGINT, None)
    with pytest.raises(KeyboardInterrupt):
        point._ask(signal.SIGINT, None)


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    plugin = AtomicCheckpointIO()
    plugin.save_checkpoint({"weights": torch.zeros(10)}, path)
    with (
        file_size_limit(20_000),
        pytest.raises(OSError, match=r"last\.ckpt could not be written .*; the one written before is untouched"),
    ):
        plugin.save_checkpoint({"weights": torch.ones(100_000)}, path)
    assert torch.equal(torch.load(path)["weights"], torch.zeros(10))
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_save_that_fails_in_training_ends_it_and_the_run_goes_on_from_the_one_before(tmp_path: Path) -> None:
    class Full(AtomicCheckpointIO):
        def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
            with file_size_limit(50_000 if checkpoint["global_step"] == 6 else 10**9):
                super().save_checkpoint(checkpoint, path, storage_options)

    stage = pretrain_stage()
    trainer().fit(stage, pretrain_data())
    wanted = weights(stage)
    own = trainer([ResumePoint(str(tmp_path), every_n_steps=2)])
    own.strategy.checkpoint_io = Full()
    with pytest.raises(OSError, match="could not be written"):
        own.fit(pretrain_stage(), pretrain_data())
    stage = pretrain_stage()
    trainer().fit(stage, pretrain_data(), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert_same(weights(stage), wanted)


def test_the_trained_model_is_exported(tmp_path: Path) -> None:
    from mmfast.checkpoints import load_pretrained

    stage = pretrain_stage()
    trainer([Export(str(tmp_path))], enable_checkpointing=False, max_epochs=2).fit(stage, pretrain_data())
    own: Any = stage.loss_module
    assert_same(load_pretrained(tmp_path).state_dict(), own.model.state_dict())


@pytest.mark.parametrize("name", ["every_n_epochs", "every_n_steps", "every_n_minutes"])
def test_an_interval_of_nothing_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be above 0, or null for never, got 0"):
        ResumePoint("x", **{name: 0})
