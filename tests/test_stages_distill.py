"""Stage II: teachers, and validation of the student on few-shot episodes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("lightning")
from lightning.pytorch.callbacks import Callback
from stages_fakes import distill_data, distill_stage, encoder_file, trainer, validated

from mmfast.checkpoints import load_pretrained
from mmfast.stages.resume import Export

pytestmark = pytest.mark.filterwarnings("ignore")


def weights(stage: Any) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in stage.loss_module.state_dict().items()}


def test_the_rgb_teacher_is_the_student_as_it_starts(tmp_path: Path) -> None:
    stage = distill_stage(tmp_path)
    module: Any = stage.loss_module
    start = weights(stage)
    trainer().fit(stage, distill_data())
    moved = module.student.state_dict()
    kept = module.teachers["rgb"].state_dict()
    assert all(torch.equal(kept[name], start[f"student.{name}"]) for name in kept)
    assert not all(torch.equal(kept[name], moved[name]) for name in kept)


def test_any_subset_of_teachers(tmp_path: Path) -> None:
    stage = distill_stage(tmp_path, teachers={"flow": str(encoder_file(tmp_path / "f", 2))})
    own = trainer(max_epochs=2)
    own.fit(stage, distill_data())
    assert {name for name in own.callback_metrics if name.startswith("mse") and "epoch" not in name} == {"mse_flow"}


def test_an_epoch_is_one_pass_over_the_target(tmp_path: Path) -> None:
    own = trainer(max_epochs=2)
    own.fit(distill_stage(tmp_path), distill_data(target=8))
    assert own.global_step == 2 * 4


@pytest.mark.parametrize(
    ("teachers", "message"),
    [
        ({}, "teachers must name at least one modality"),
        ({"flow": "student"}, "only rgb can be a copy of the student, got flow: student"),
        ({"sound": "student"}, "modality must be one of"),
    ],
    ids=str,
)
def test_wrong_teachers_are_refused(teachers: dict[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        distill_stage(tmp_path, teachers=teachers)


def test_a_teacher_of_another_modality_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"rgb takes 3 channels; flow has 2"):
        distill_stage(tmp_path, teachers={"flow": encoder_file(tmp_path / "rgb")})


def test_a_trained_norm_behind_the_mean_is_kept_unless_told(tmp_path: Path) -> None:
    folder = Path(encoder_file(tmp_path / "rgb"))
    model = load_pretrained(folder)
    assert model.fc_norm is not None
    torch.nn.init.constant_(model.fc_norm.weight, 3.0)
    model.save_pretrained(tmp_path / "trained")
    for fresh, wanted in ((False, 3.0), (True, 1.0)):
        stage = distill_stage(tmp_path, student=str(tmp_path / "trained"), fresh_fc_norm=fresh)
        assert stage.student.fc_norm is not None
        assert float(stage.student.fc_norm.weight[0]) == wanted


# -- validation --------------------------------------------------------------------------------------------------------


def test_validation_scores_the_student(tmp_path: Path) -> None:
    stage = distill_stage(tmp_path)
    own = trainer(max_epochs=2)
    own.fit(stage, validated(distill_data()))
    assert own.callback_metrics["val_accuracy"] > 90
    # A student that sees nothing must show, whatever the teachers see.
    module: Any = stage.loss_module
    with torch.no_grad():
        for block in module.student.blocks:
            block.attn.qkv.weight.zero_()
        module.student.patch_embed.proj.weight.zero_()
    own = trainer(max_epochs=2)
    found = own.validate(stage, validated(distill_data()), verbose=False)
    assert found[0]["val_accuracy"] < 75


def test_validation_leaves_out_clips_that_cannot_be_read(tmp_path: Path) -> None:
    own = trainer(max_epochs=2)
    own.fit(distill_stage(tmp_path), validated(distill_data(), broken=(2, 3)))  # one batch has no clip
    assert own.callback_metrics["val_accuracy"] > 90


def test_classes_too_small_for_the_episodes_are_refused_before_training(tmp_path: Path) -> None:
    stage = distill_stage(tmp_path, n_query=5)
    with pytest.raises(ValueError, match=r"too few in class 0 \(5\), class 1 \(4\), class 2 \(4\)"):
        trainer().fit(stage, validated(distill_data()))
    assert stage.global_step == 0


def test_the_best_student_is_exported(tmp_path: Path, monkeypatch: Any) -> None:
    class Keep(Callback):
        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 1:
                self.second = weights(pl_module)

    class Result:
        means = iter([0.5, 0.7, 0.6])
        standard_error = 0.1

        def gather(self) -> Any:
            self.mean = next(self.means)
            return self

    monkeypatch.setattr("mmfast.stages.distill.evaluate_episodes", lambda *_, **__: Result())
    keep = Keep()
    own = trainer([keep, Export(str(tmp_path / "best"), "val_accuracy")], enable_checkpointing=False)
    own.fit(distill_stage(tmp_path), validated(distill_data()))
    found = load_pretrained(tmp_path / "best").state_dict()
    assert all(torch.equal(tensor, keep.second[f"student.{name}"]) for name, tensor in found.items())
