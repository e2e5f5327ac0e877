"""What M2CLIP and its config refuse, and in which words."""

from typing import Any

import pytest
import torch
from m2clip_makers import CLASSES, CONTEXT, END, FRAMES, TOWERS, WORDS, batch, tiny_config, tiny_model
from torch import Tensor

from mmfast.clip_config import CLIPConfig
from mmfast.m2clip import M2CLIP
from mmfast.m2clip_config import M2CLIPConfig


@pytest.fixture(scope="module")
def model() -> M2CLIP:
    return tiny_model()


def changed(name: str, index: Any, value: int) -> Tensor:
    tensor = batch()[name].clone()
    tensor[index] = value
    return tensor


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 3, FRAMES + 1, 32, 32), f"video has {FRAMES + 1} frames; the adapters of this model take {FRAMES}"),
        ((2, 3, FRAMES, 32, 16), "video is 32 x 16; M2-CLIP takes square frames"),
        ((2, 3, 32, 32), "video must be"),
        ((2, 4, FRAMES, 32, 32), "4 channels"),
        ((2, 3, FRAMES, 30, 30), "patch size"),
    ],
    ids=["frames", "not square", "4-D", "channels", "patch"],
)
def test_bad_video(model: M2CLIP, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model.encode_video(torch.zeros(shape))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(labels=torch.full((4,), -100)), "labels are all -100, so there is nothing to learn from"),
        (dict(labels=torch.tensor([0, 1, CLASSES, 2])), rf"labels must lie in 0..{CLASSES - 1}, got 0..{CLASSES}"),
        (dict(labels=torch.tensor([0, 1, -1, 2])), "labels must lie in"),
        (dict(labels=torch.tensor([0, 1, 2])), "labels must be 4 class numbers"),
        (dict(labels=torch.zeros(4)), "labels must be 4 class numbers, int64, got torch.float32"),
        (dict(token_ids=batch()["token_ids"][:3]), "token_ids must be .*one text a clip"),
        (dict(token_ids=changed("token_ids", (1, 1), END + 1)), f"token_ids must lie in 0..{END}"),
        (dict(token_ids=changed("token_ids", (1, 1), -1)), "token_ids must lie in"),
        (dict(class_token_ids=batch()["class_token_ids"][1:]), f"class_token_ids must hold {CLASSES} texts"),
        (dict(class_token_ids=torch.zeros(CLASSES)), "class_token_ids must be an integer tensor"),
        (dict(mlm_labels=torch.zeros(4, 3, dtype=torch.int64)), "mlm_labels must be integers of token_ids' shape"),
        (dict(mlm_labels=changed("mlm_labels", (0, 2), WORDS)), rf"mlm_labels must be -100 or lie in 0..{WORDS - 1}"),
        (dict(mlm_labels=changed("mlm_labels", (0, 2), -1)), "mlm_labels must be -100 or lie in"),
        (dict(mlm_labels=changed("mlm_labels", (1, CONTEXT - 1), 1)), "behind the end of its text"),
    ],
)
def test_bad_batches(model: M2CLIP, changes: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model.losses(**{**batch(), **changes})


def test_texts_longer_than_the_context(model: M2CLIP) -> None:
    with pytest.raises(ValueError, match=f"up to {CONTEXT}"):
        model.encode_text(torch.ones(2, CONTEXT + 1, dtype=torch.int64))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (dict(num_frames=0), ValueError, "num_frames must be at least 1"),
        (dict(num_classes=1.5), TypeError, "num_classes must be an int"),
        (dict(vision_layers=4), ValueError, "vision_layers must be at most 3"),
        (dict(text_layers=5), ValueError, "text_layers must be at most 4"),
        (dict(text_before=("norm",)), ValueError, "text_before must be"),
        (dict(class_dropout=1.0), ValueError, "class_dropout must be below 1"),
        (dict(class_scale=0.0), ValueError, "class_scale must be"),
        (dict(vision_width=3), ValueError, "unknown config field 'vision_width'"),
        (dict(weights=1.0), TypeError, "weights must be LossWeights"),
    ],
)
def test_bad_configs(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        tiny_config(**changes)


def test_an_unknown_preset_is_named_with_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"unknown preset 'k40'.*k400, ssv2, paper, reference"):
        M2CLIPConfig.preset("k40")


def test_words_need_frames_as_wide_as_the_text_tower() -> None:
    with pytest.raises(ValueError, match="num_words must be 0 for this CLIP"):
        M2CLIPConfig(CLIPConfig(**{**TOWERS, "embed_dim": 16}))
    assert M2CLIPConfig(CLIPConfig(**{**TOWERS, "embed_dim": 16}), num_words=0, text_layers=1).text_blocks == 3


def test_configs_survive_json() -> None:
    config = tiny_config("reference", vision_before="mlp", vision_layers=2)
    assert M2CLIPConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match="unknown config field 'frames'"):
        M2CLIPConfig.from_dict({"frames": 3})
