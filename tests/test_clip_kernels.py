"""CLIP through the Triton kernels: in the interpreter on the CPU, and on a GPU in every dtype, adapters and masks too."""

import copy

import pytest
import torch
from clip_makers import clips, make, texts
from lanes import KERNEL, gpu
from numerics import relative_error
from plain import part
from plain_clip import image_features, text_features

from mmfast import CLIP, sample_pack, tube_masks
from mmfast.clip_blocks import AdapterPlacement

GRID = (2, 3, 3)
SMALL = dict(vision_width=32, vision_depth=2, vision_num_heads=1, text_depth=2, text_num_heads=1)
ADAPTERS = dict(
    vision_adapters=AdapterPlacement(None, ("attn", "mlp"), 16, "ted"),
    text_adapters=AdapterPlacement((1,), ("mlp",), 16, "text"),
)


def features(model: CLIP, state: dict[str, torch.Tensor], video, ids, mask) -> tuple[torch.Tensor, torch.Tensor]:
    """By the equations, on the CPU."""
    image = image_features(model.config, part(state, "visual."), video, mask)
    return image, text_features(model.config, part(state, "text."), ids)


@pytest.mark.parametrize("adapters", [{}, ADAPTERS], ids=["bare", "adapters"])
@pytest.mark.parametrize("masked", [False, True], ids=["full", "tube"])
@pytest.mark.parametrize(("device", "dtype"), KERNEL)
def test_features(device: str, dtype: torch.dtype, masked: bool, adapters: dict, poisoned_empty) -> None:
    model, video, ids = make(**SMALL, **adapters), clips(2, 2), texts((3, 12, 5))
    mask = tube_masks(2, 1, GRID, 0.5)[:, 0] if masked else None
    state = model.state_dict()
    with torch.no_grad():
        truths = features(model, {n: t.double() for n, t in state.items()}, video.double(), ids, mask)
        plain = features(model, {n: t.to(dtype) for n, t in state.items()}, video.to(dtype), ids, mask)
        moved = copy.deepcopy(model).to(device, dtype)
        pixels = video.to(device, dtype)
        got = moved.encode_image(pixels, mask), moved.encode_text(ids)
    for mine, theirs, truth in zip(got, plain, truths, strict=True):
        assert mine.dtype == dtype
        # Plain torch on the CPU may err less than tensor cores do in fp32.
        assert relative_error(mine.cpu(), truth) <= max(2 * relative_error(theirs, truth), 1e-5)


@pytest.mark.parametrize("adapters", [{}, ADAPTERS], ids=["bare", "adapters"])
@pytest.mark.parametrize(("device", "dtype"), [p for p in KERNEL if p.values[1] == torch.float32])
def test_gradients(device: str, dtype: torch.dtype, adapters: dict, poisoned_empty) -> None:
    model, video, ids = make(**SMALL, **adapters), clips(2, 2), texts((3, 12, 5))
    mask = tube_masks(2, 1, GRID, 0.5)[:, 0]
    state = {n: t.detach().double().requires_grad_() for n, t in model.state_dict().items()}
    sum(f.square().sum() for f in features(model, state, video.double(), ids, mask)).backward()
    model.to(device)
    got = model.encode_image(video.to(device), mask), model.encode_text(ids)
    sum(f.square().sum() for f in got).backward()
    for name, p in model.named_parameters():
        if name != "logit_scale" and state[name].grad.any():
            assert relative_error(p.grad.cpu(), state[name].grad) <= 2e-5, name


@gpu
def test_nothing_waits_for_the_device() -> None:
    """With packs at hand, as in training on frozen prompts and in ensembles."""
    model, video = make(**SMALL).cuda(), clips(2, 2).cuda()
    ids = texts((3, 12, 5))
    views, pack = sample_pack(2, 2, GRID, 0.5, device="cuda"), model.text.pack(ids)
    ids = ids.cuda()
    run = lambda: (model.encode_image(video).sum() + model.encode_image(video, views).sum()
                   + model.encode_text(ids, pack).sum()).backward()  # fmt: skip
    run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@gpu
def test_autocast() -> None:
    model, video, ids = make(**SMALL, **ADAPTERS).cuda(), clips(2, 2).cuda(), texts((3, 12, 5))
    with torch.no_grad():
        wide = model.encode_image(video), model.encode_text(ids)
        with torch.autocast("cuda", torch.bfloat16):
            narrow = model.encode_image(video), model.encode_text(ids)
    for mine, truth in zip(narrow, wide, strict=True):
        assert relative_error(mine, truth) <= 5e-2
