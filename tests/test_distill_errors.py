"""Multimodal distillation: what constructors and forward refuse."""

from typing import Any

import pytest
import torch
from distill_makers import clips, make, masks, teachers, vit
from torch import Tensor, nn

from mmfast.distill import CrossModalTranslate, ModalityWeights, MultimodalDistillation


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: MultimodalDistillation(vit(), {}), "teachers is empty"),
        (
            lambda: MultimodalDistillation(vit(), teachers("flow"), CrossModalTranslate(64, ("rgb",))),
            "teachers has 'flow'; translate knows rgb only",
        ),
        (
            lambda: MultimodalDistillation(vit(), teachers("flow"), weights=ModalityWeights(("rgb",))),
            "weights must know 'flow' as translate does, got rgb",
        ),
        (
            lambda: MultimodalDistillation(vit(), teachers("flow", embed_dim=32)),
            r"teachers\['flow'\] must have the student's width 64, got 32",
        ),
        (
            lambda: MultimodalDistillation(vit(), teachers("flow"), CrossModalTranslate(32, ("flow",))),
            "translate must have the student's width 64, got 32",
        ),
        (lambda: CrossModalTranslate(8, ()), "modalities must be one or more different names"),
        (lambda: CrossModalTranslate(8, ("rgb", "rgb")), "modalities must be one or more different names"),
        (lambda: CrossModalTranslate(8, hidden=0), "hidden must be at least 1, got 0"),
        (lambda: ModalityWeights(init={"rgb": 1.0}), "init must have a weight for each of flow, rgb, pose, got rgb"),
        (lambda: ModalityWeights(init=-1.0), "init of flow must be finite and at least 0, got -1.0"),
        (lambda: ModalityWeights(learnable=True, init=0.0), "init of flow must be finite and above 0, got 0.0"),
    ],
    ids=lambda v: "" if callable(v) else None,
)
def test_constructors_say_what_is_wrong(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_the_student_cannot_teach_itself() -> None:
    student = vit()
    with pytest.raises(ValueError, match=r"teachers\['rgb'\] shares parameters with the student"):
        MultimodalDistillation(student, {"rgb": student})
    assert all(p.requires_grad for p in student.parameters())


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: MultimodalDistillation(nn.Linear(2, 2), {}), "student must be a MaskedViT, got Linear"),
        (lambda: MultimodalDistillation(vit(), {"rgb": nn.Linear(2, 2)}), r"teachers\['rgb'\] must be a MaskedViT"),
        (lambda: CrossModalTranslate(8, "rgb"), "modalities must be several names, got the string 'rgb'"),
    ],
    ids=["student", "teacher", "modalities"],
)
def test_constructors_name_a_wrong_type(build: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        build()


@pytest.mark.parametrize(
    ("changes", "features", "message"),
    [
        ({"rgb": None}, {}, "videos must have 'rgb', the student's modality, got flow, pose"),
        ({"flow": None}, {}, "videos has no 'flow', and features has none either"),
        ({"depth": torch.zeros(1)}, {}, "videos has the unknown modality 'depth'; known are flow, rgb, pose"),
        ({}, {"Flow": torch.zeros(3, 64)}, "features has the unknown modality 'Flow'"),
        (
            {},
            {"flow": torch.zeros(3, 32)},
            r"features\['flow'\] must be \(3, 64\), as the student's are, got \(3, 32\)",
        ),
        (
            {"pose": torch.zeros(3, 21, 4, 12, 8)},
            {},
            r"videos\['pose'\] has the token grid \(2, 3, 2\), .* \(2, 2, 2\)",
        ),
        ({"pose": torch.zeros(3, 21, 4, 9, 8)}, {}, r"videos\['pose'\]: video is 9 x 8"),
        ({"flow": torch.zeros(2, 2, 4, 32, 32)}, {}, r"videos\['flow'\] must have 3 clips, .* got 2"),
    ],
    ids=["no_rgb", "no_flow", "unknown", "unknown_features", "width", "grid", "size", "batch"],
)
def test_forward_says_what_is_wrong(changes: dict[str, Any], features: dict[str, Tensor], message: str) -> None:
    videos = {m: v for m, v in {**clips(), **changes}.items() if v is not None}
    with pytest.raises(ValueError, match=message):
        make()(videos, masks(), features=features)


def test_without_teachers_features_are_needed() -> None:
    alone = MultimodalDistillation(vit(), {}, CrossModalTranslate(64))
    with pytest.raises(ValueError, match="features must be given: there are no teachers"):
        alone(clips(), masks())
