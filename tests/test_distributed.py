"""Two gloo processes, each with half the batch, train as one process does with all of it: DDP and FSDP2, on the CPU."""

import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from makers import tiny_config
from torch import Tensor, nn
from torch import distributed as dist
from torch import multiprocessing as mp
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from mmfast.distill import ModalityWeights, MultimodalDistillation
from mmfast.guard import StepGuard
from mmfast.masks import sample_pack
from mmfast.optim import param_groups
from mmfast.vit import MaskedViT

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch was built without gloo"
)

RANKS, BATCH, STEPS = 2, 4, 2
Loss = Callable[[nn.Module, slice], Tensor]
WRAPPERS = ("ddp", "fsdp")
MODELS = ("vit", "vit_checkpointed", "distill")


def vit(checkpointed: bool = False, **overrides: Any) -> MaskedViT:
    model = MaskedViT(tiny_config(**overrides))
    model.set_grad_checkpointing(checkpointed)
    return model


def build(name: str) -> tuple[nn.Module, Loss]:
    """The model in float64, and its loss on some clips of the batch: the same in every process."""
    torch.manual_seed(0)
    rgb, flow = torch.randn(BATCH, 3, 4, 32, 32).double(), torch.randn(BATCH, 2, 4, 32, 32).double()
    labels = torch.arange(BATCH)

    def pack(part: slice) -> Any:
        ids = list(range(BATCH))[part]
        return sample_pack(len(ids), 1, (2, 2, 2), 0.5, clip_ids=ids)

    if name == "distill":
        plain = dict(num_classes=0)
        teachers = {"rgb": vit(**plain), "flow": vit(in_chans=2, **plain)}
        weights = ModalityWeights(teachers, learnable=True)
        model: nn.Module = MultimodalDistillation(vit(**plain), teachers, weights=weights)
        loss: Loss = lambda m, part: m({"rgb": rgb[part], "flow": flow[part]}, pack(part))["total"]
    else:
        model = vit(checkpointed=name == "vit_checkpointed")
        loss = lambda m, part: F.cross_entropy(m(rgb[part], pack(part)), labels[part])
    return model.double().train(), loss


def wrap(model: nn.Module, wrapper: str) -> nn.Module:
    if wrapper == "ddp":
        return DistributedDataParallel(model)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (RANKS,))
    for block in (model.student if isinstance(model, MultimodalDistillation) else model).blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def whole(model: nn.Module) -> dict[str, Tensor]:
    """Trained parameters under the names they have unwrapped, gathered."""
    found = {n.removeprefix("module."): p.detach() for n, p in model.named_parameters() if p.requires_grad}
    return {n: (p.full_tensor() if hasattr(p, "full_tensor") else p).clone() for n, p in found.items()}


def train(
    model: nn.Module, loss_of: Callable[[], Tensor], clip_grad: float = 0.01
) -> tuple[list[float], dict[str, Tensor]]:
    optimizer = torch.optim.AdamW(param_groups(model, lr=1e-2))
    guard = StepGuard(optimizer, clip_grad=clip_grad)
    losses = []
    for _ in range(STEPS):
        loss = loss_of()
        mean = loss.detach().clone()
        if dist.is_initialized():
            dist.all_reduce(mean)
            mean /= RANKS
        assert guard.step(loss)
        assert guard.grad_norm is not None
        losses += [float(mean), float(guard.grad_norm)]
    return losses, whole(model)


def skipped_by_all(rank: int, wrapper: str) -> dict[str, Any]:
    """Only rank 1 has a bad loss, then only rank 1 has a bad gradient (with FSDP: of its own shard)."""
    model, loss = build("vit")
    model = wrap(model, wrapper)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    guard = StepGuard(torch.optim.AdamW(model.parameters()), scaler=scaler)
    part = halves()[rank]
    before = whole(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        moved = [guard.step(loss(model, part) * (float("nan") if rank else 1.0))]
    unchanged = all(torch.equal(p, before[n]) for n, p in whole(model).items())
    after_loss = scaler.get_scale()
    weight = next(p for p in model.parameters() if p.ndim == 2)
    hook = weight.register_post_accumulate_grad_hook(lambda p: spoil(p.grad) if rank else None)
    moved.append(guard.step(loss(model, part)))
    hook.remove()
    after_gradient = scaler.get_scale()
    moved.append(guard.step(loss(model, part)))
    return {
        "moved": moved,
        "unchanged": unchanged,
        "counts": (guard.skipped, guard.overflowed),
        "scales": (after_loss, after_gradient),
        "said": [str(w.message) for w in caught if "left out" in str(w.message)],
        "clear": all(p.grad is None for p in model.parameters()),
    }


def spoil(grad: Tensor) -> None:
    (grad.to_local() if hasattr(grad, "to_local") else grad).fill_(float("inf"))


def halves() -> list[slice]:
    size = BATCH // RANKS
    return [slice(rank * size, (rank + 1) * size) for rank in range(RANKS)]


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS, timeout=timedelta(seconds=60)
    )
    try:
        results: dict[str, Any] = {}
        for wrapper in WRAPPERS:
            for name in MODELS:
                model, loss = build(name)
                wrapped = wrap(model, wrapper)
                results[f"{wrapper}-{name}"] = train(wrapped, lambda w=wrapped, f=loss: f(w, halves()[rank]))
            results[f"{wrapper}-skipped"] = skipped_by_all(rank, wrapper)
        torch.save(results, f"{folder}/rank{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank found; the processes are started once for all tests."""
    folder = tmp_path_factory.mktemp("gloo")
    context = mp.spawn(work, args=(str(folder),), nprocs=RANKS, join=False)
    assert context is not None
    try:
        for _ in range(60):
            if context.join(timeout=5):
                break
        else:
            pytest.fail("the processes did not end within 300 s")
    finally:
        for process in context.processes:
            process.kill()
    return [torch.load(Path(folder, f"rank{rank}.pt"), weights_only=True) for rank in range(RANKS)]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_two_processes_train_as_one(ranks: list[dict[str, Any]], wrapper: str, name: str) -> None:
    model, loss = build(name)
    losses, parameters = train(model, lambda: loss(model, slice(None)))
    assert losses[2] != losses[0]
    for found in ranks:
        got_losses, got = found[f"{wrapper}-{name}"]
        assert got_losses == pytest.approx(losses, rel=1e-6)
        assert got.keys() == parameters.keys()
        for parameter_name, expected in parameters.items():
            torch.testing.assert_close(
                got[parameter_name], expected, rtol=0, atol=1e-9, msg=lambda text, n=parameter_name: f"{n}: {text}"
            )


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_all_ranks_leave_a_step_out_together(ranks: list[dict[str, Any]], wrapper: str) -> None:
    for rank, found in enumerate(ranks):
        got = found[f"{wrapper}-skipped"]
        assert got["moved"] == [False, False, True], rank
        assert got["unchanged"], rank
        assert got["counts"] == (1, 1), rank
        assert got["clear"], rank
        assert len(got["said"]) == 1, rank
    assert "loss nan (1 so far)" in ranks[1][f"{wrapper}-skipped"]["said"][0]
    assert "on another rank" in ranks[0][f"{wrapper}-skipped"]["said"][0]


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_the_scale_stays_one_on_all_ranks(ranks: list[dict[str, Any]], wrapper: str) -> None:
    """A bad loss leaves it; an overflow on one rank lowers it on all."""
    assert [found[f"{wrapper}-skipped"]["scales"] for found in ranks] == [(8.0, 4.0)] * RANKS
