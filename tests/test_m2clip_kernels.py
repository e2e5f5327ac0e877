"""A small M2CLIP through the Triton kernels: losses and gradients against the restatement in float64."""

import m2clip_plain as plain
import pytest
from m2clip_makers import batch, published, tiny_model
from numerics import assert_close_to_truth

pytestmark = pytest.mark.interpret


def test_losses_and_gradients_through_the_kernels() -> None:
    model, given = tiny_model("k400"), batch(2)
    got = model.losses(**given)
    got["total"].backward()
    plain_state = {name: t.requires_grad_("adapter" in name) for name, t in published(model).items()}
    state = {name: t.double().requires_grad_("adapter" in name) for name, t in published(model).items()}
    losses = []
    for own, video in ((plain_state, given["video"]), (state, given["video"].double())):
        ids = (given["token_ids"], given["labels"], given["class_token_ids"], given["mlm_labels"])
        losses.append(plain.losses(model.config, own, video, *ids))
        losses[-1]["total"].backward()
    for name, loss in got.items():
        assert_close_to_truth(name, loss.detach(), losses[0][name].detach(), losses[1][name].detach())
    names = dict(zip(model.state_dict(), state, strict=True))
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        by_torch, truth = plain_state[names[name]].grad, state[names[name]].grad
        assert parameter.grad is not None, name
        assert by_torch is not None, name
        assert truth is not None, name
        assert_close_to_truth(name, parameter.grad, by_torch, truth)
