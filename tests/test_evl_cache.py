"""Features of a frozen backbone on the disk: what the decoder finds there, whose they are, how much room they take."""

import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from evl_makers import clips, tiny_config, tiny_model
from torch import Tensor
from torch.utils.data import DataLoader

from mmfast.data.records import ClipRecord
from mmfast.evl import EVL
from mmfast.evl_cache import CachedClips, FeatureCache, cache_features, collate_features
from mmfast.masks import tube_masks
from mmfast.shards import ShardReader

COUNT = 7
SHARD = "evl-00000-000001.safetensors"


class Collection:
    """Clips made from their ids, those of evl_makers; some cannot be read."""

    def __init__(self, model: EVL, count: int = COUNT, broken: tuple[int, ...] = (), named: bool = False) -> None:
        names = "abc" if named else (None,) * 3
        self.records = [ClipRecord(5 * i, f"clip{i}", label=i % 3, label_name=names[i % 3]) for i in range(count)]
        self.model, self.broken, self.read = model, broken, list[int]()

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, place: int) -> dict[str, Any]:
        self.read.append(place)
        if place in self.broken:
            raise OSError(f"clip {place} is broken")
        return {"clip_id": 5 * place, "rgb": clips(self.model.config, 1, seed=place)[0]}

    def video(self, places: list[int]) -> Tensor:
        return torch.stack([self[place]["rgb"] for place in places])


def run(folder: Path, model: EVL, dataset: Any = None, **options: Any) -> Any:
    """In fp32 and two clips a shard, unless told otherwise."""
    options = {"batch": 3, "progress": False, "rank": 0, "world": 1, "dtype": "float32", **options}
    if "shard_bytes" not in options:
        options["shard_bytes"] = 2 * streamed_bytes(model, options["dtype"], options.get("mask_ratio", 0.0)) + 1
    return cache_features(model, Collection(model) if dataset is None else dataset, folder, **options)


def streamed_bytes(model: EVL, dtype: str, mask_ratio: float) -> int:
    """Bytes of a clip by what the model streams, whatever the cache says."""
    video = clips(model.config, 1)
    mask = tube_masks(1, 1, model.check_video(video), mask_ratio)[:, 0] if mask_ratio else None
    with torch.no_grad():
        seen = list(model.stream(video, mask))
    numbers = sum(t.numel() for layer in seen for t in layer[:3] if t is not None)
    return numbers * getattr(torch, dtype).itemsize + (0 if seen[0].cells is None else seen[0].cells.nbytes)


def logits(model: EVL, features: Any) -> Tensor:
    with torch.no_grad():
        return model.proj(model.decode(features))


# -- what is read is what the backbone gives ----------------------------------------------------------------------------


@pytest.mark.parametrize("mask_ratio", [0.0, 0.5])
@pytest.mark.parametrize("backbone", ["clip", "vit"])
def test_the_decoder_finds_what_it_finds_in_the_video(tmp_path: Path, backbone: str, mask_ratio: float) -> None:
    model = tiny_model(backbone)
    collection = Collection(model)
    run(tmp_path, model, collection, mask_ratio=mask_ratio, seed=3)
    places = [4, 0, 6, 4]
    ids = [5 * p for p in places]
    video = collection.video(places)
    mask = None
    if mask_ratio:
        mask = tube_masks(4, 1, model.check_video(video), mask_ratio, seed=3, clip_ids=ids)[:, 0]
    with torch.no_grad():
        expected = model(video, mask)
    cache = FeatureCache(tmp_path, model)
    torch.testing.assert_close(logits(model, cache.features(ids)), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(model, cache.features(torch.tensor(ids[1:]))), expected[1:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_features_are_rounded_once_to_the_stored_dtype(tmp_path: Path, dtype: str) -> None:
    model = tiny_model()
    collection = Collection(model)
    run(tmp_path, model, collection, dtype=dtype, batch=1)
    with torch.no_grad():
        expected = list(model.stream(collection.video([2, 1])))
    found = FeatureCache(tmp_path, model).features([10, 5])
    for seen, layer in zip(found, expected, strict=True):
        for stored, exact in zip(seen[:3], layer[:3], strict=True):
            assert stored is not None
            assert exact is not None
            assert stored.dtype is getattr(torch, dtype)
            torch.testing.assert_close(stored.float(), exact, rtol=torch.finfo(stored.dtype).eps, atol=1e-4)
    wide = FeatureCache(tmp_path, model).features([10, 5], dtype=torch.float32)
    assert wide[0].out.dtype is torch.float32
    torch.testing.assert_close(wide[0].out, found[0].out.float(), rtol=0, atol=0)
    torch.testing.assert_close(logits(model, found), logits(model, wide), rtol=2e-2, atol=2e-2)


def test_another_precision_is_the_backbones_under_autocast(tmp_path: Path) -> None:
    model = tiny_model()
    collection = Collection(model)
    run(tmp_path, model, collection, precision="bf16")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = list(model.stream(collection.video([1])))
    found = FeatureCache(tmp_path, model, precision="bf16").features([5])
    torch.testing.assert_close(found[1].out, expected[1].out.float(), rtol=0, atol=0.05)
    with pytest.raises(ValueError, match=re.escape('precision ("bf16" there, "fp32" now)')):
        FeatureCache(tmp_path, model, precision="fp32")


def test_a_decoder_of_less_reads_its_part(tmp_path: Path) -> None:
    whole = tiny_model(num_layers=3)
    collection = Collection(whole)
    run(tmp_path, whole, collection)
    small = EVL(tiny_config(num_layers=1, temporal_cross_attention=False), whole.backbone).eval()
    cache = FeatureCache(tmp_path, small)
    with torch.no_grad():
        expected = small(collection.video([3]))
    torch.testing.assert_close(logits(small, cache.features([15])), expected, rtol=1e-5, atol=1e-5)
    assert cache.clip_bytes < FeatureCache(tmp_path, whole).clip_bytes


def test_no_clips_give_an_empty_batch(tmp_path: Path) -> None:
    model = tiny_model()
    run(tmp_path, model)
    assert logits(model, FeatureCache(tmp_path, model).features([])).shape == (0, model.config.num_classes)


def test_a_second_epoch_never_runs_the_backbone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    run(tmp_path, model)

    def raising(*args: Any) -> Any:
        raise AssertionError("the backbone ran")

    monkeypatch.setattr(model.backbone, "stream", raising)
    monkeypatch.setattr(model.backbone, "forward", raising)
    collection = Collection(model)
    assert run(tmp_path, model, collection, shard_bytes=1).kept == COUNT
    assert not collection.read
    model.train()
    optimizer = torch.optim.SGD(model.decoder.parameters(), lr=0.1)
    loader = DataLoader(CachedClips(FeatureCache(tmp_path, model)), 4, collate_fn=collate_features)
    before = model.decoder.cls_token.detach().clone()
    for _ in range(2):
        for batch in loader:
            loss = torch.nn.functional.cross_entropy(model.proj(model.decode(batch["features"])), batch["label"])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert not torch.equal(model.decoder.cls_token, before)
    assert len(FeatureCache(tmp_path, model)) == COUNT  # a trained decoder fits


def test_ids_names_and_labels_are_the_clips(tmp_path: Path) -> None:
    model = tiny_model()
    run(tmp_path, model, Collection(model, 4, broken=(1,), named=True))
    cache = FeatureCache(tmp_path, model)
    assert (cache.ids, cache.names, cache.labels) == ([0, 10, 15], ["clip0", "clip2", "clip3"], ["a", "c", "a"])
    assert 10 in cache
    assert 5 not in cache
    assert cache.failed == {5: ("clip1", "clip 1 is broken")}
    with pytest.raises(ValueError, match="clip 5 is not there: it could not be read"):
        cache.features([5])


def test_the_first_clip_that_can_be_read_tells_the_size(tmp_path: Path) -> None:
    model = tiny_model()
    assert run(tmp_path, model, Collection(model, 4, broken=(0, 1))).done == 2


def test_nothing_to_read_leaves_an_empty_cache(tmp_path: Path) -> None:
    model = tiny_model()
    run(tmp_path / "none", model, Collection(model, 0))
    assert len(FeatureCache(tmp_path / "none", model)) == 0
    assert len(run(tmp_path / "broken", model, Collection(model, 2, broken=(0, 1))).failed) == 2
    assert run(tmp_path / "broken", model, Collection(model, 2), retry=True).done == 2


def test_a_clip_of_another_grid_is_skipped_and_reported(tmp_path: Path) -> None:
    model = tiny_model(temporal_cross_attention=False)

    class Sizes(Collection):
        def __getitem__(self, place: int) -> dict[str, Any]:
            item = super().__getitem__(place)
            return item if place != 2 else {**item, "rgb": item["rgb"][..., :16]}

    report = run(tmp_path, model, Sizes(model))
    assert report.done == COUNT - 1
    assert list(report.failed) == [10]
    assert "is of 4 x 3 x 2 cells, the clips of the cache are of 4 x 3 x 3" in report.failed[10][1]


def test_the_model_keeps_its_mode(tmp_path: Path) -> None:
    model = tiny_model().train()
    run(tmp_path, model)
    assert model.decoder.training
    assert not model.backbone.training


# -- what it is read with -----------------------------------------------------------------------------------------------


def _other_weights() -> EVL:
    model = tiny_model()
    with torch.no_grad():
        next(model.backbone.parameters()).add_(1e-3)
    return model


@pytest.mark.parametrize(
    ("model", "asked", "named"),
    [
        (_other_weights, {}, "weights ("),
        (lambda: tiny_model("vit"), {}, "backbone.model"),
        (lambda: EVL(tiny_config(), tiny_model().backbone, backbone_dtype=torch.bfloat16), {}, "backbone_dtype"),
        (lambda: tiny_model(num_layers=3), {}, "num_layers (2 there, 3 now)"),
        (lambda: tiny_model(num_frames=8), {}, "has 4 frames, the temporal positions are of 8"),
        (lambda: tiny_model(grid=(2, 2)), {}, "a grid of 3 x 3 cells, the tables of offsets are of 2 x 2"),
        (tiny_model, {"mask_ratio": 0.75}, "mask_ratio (0.5 there, 0.75 now)"),
        (tiny_model, {"seed": 1}, "mask_seed (0 there, 1 now)"),
        (tiny_model, {"precision": "fp16"}, "precision"),
        (tiny_model, {"dtype": "bfloat16"}, "dtype"),
        (tiny_model, {"about": {"stride": 4}}, "about.stride (2 there, 4 now)"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_a_cache_of_something_else_is_refused_by_name(tmp_path: Path, model: Any, asked: Any, named: str) -> None:
    run(tmp_path, tiny_model(), mask_ratio=0.5, about={"stride": 2})
    with pytest.raises(ValueError, match=re.escape(named)):
        FeatureCache(tmp_path, model(), **asked)


def test_a_cache_without_queries_is_refused_where_they_are_read(tmp_path: Path) -> None:
    plain = tiny_model(temporal_cross_attention=False)
    run(tmp_path, plain)
    with pytest.raises(ValueError, match=re.escape("temporal_cross_attention (false there, true now)")):
        FeatureCache(tmp_path, EVL(tiny_config(), plain.backbone))


def test_a_folder_of_another_model_is_refused_before_it_is_written_to(tmp_path: Path) -> None:
    run(tmp_path, tiny_model())
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(ValueError, match=re.escape("index-00000.json is of a run with other settings: weights (")):
        run(tmp_path, _other_weights(), Collection(tiny_model(), COUNT + 1))
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_a_folder_of_something_else_is_named(tmp_path: Path) -> None:
    from makers import tiny_config as tiny_vit

    from mmfast.extract import extract
    from mmfast.vit import MaskedViT

    extract(MaskedViT(tiny_vit()), Collection(tiny_model(), 0), tmp_path, progress=False)
    with pytest.raises(ValueError, match="holds features, not evl features"):
        FeatureCache(tmp_path, tiny_model())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask_ratio": 1.0}, "mask_ratio must lie in"),
        ({"dtype": "int8"}, "dtype must be one of float32, bfloat16, float16"),
        ({"precision": "int8"}, "precision must be one of fp32, bf16, fp16"),
        ({"max_gib": 0}, "max_gib must be above 0"),
        ({"shard_bytes": 0}, "shard_bytes must be at least 1"),
        ({"batch": 0}, "batch must be at least 1"),
        ({"rank": 2, "world": 2}, "rank must lie in"),
    ],
)
def test_arguments_out_of_range_are_named(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match=message):
        run(tmp_path, model, **{"shard_bytes": 1, **options})


def test_a_backbone_that_trains_is_refused(tmp_path: Path) -> None:
    model = tiny_model()
    model.freeze_backbone(False)
    with pytest.raises(ValueError, match="model must have a frozen backbone"):
        run(tmp_path, model)


def test_clips_that_the_model_cannot_take_end_the_run_at_once(tmp_path: Path) -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match="video has 4 frames, the temporal positions are of 8"):
        run(tmp_path / "f", tiny_model(num_frames=8), Collection(model))
    assert not (tmp_path / "f").exists()


def test_float16_that_overflows_is_said(tmp_path: Path) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.backbone.transformer.resblocks[-1].mlp.fc2.bias.fill_(1e5)
    with pytest.raises(ValueError, match="float16 cannot hold the features"):
        run(tmp_path / "half", model, dtype="float16")
    run(tmp_path / "bf16", model, dtype="bfloat16")
    assert FeatureCache(tmp_path / "bf16", model).features([0])[1].out.isfinite().all()


# -- room on the disk ---------------------------------------------------------------------------------------------------


def test_a_cache_above_max_gib_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    model = tiny_model()
    size = streamed_bytes(model, "float32", 0.0)
    room = COUNT * (size / 2 + 9000) / 2**30  # enough for half of the bytes
    said = r"7 clips of .* MiB in float32 need .* GiB, and max_gib is .*; dtype bfloat16 .* or float16 .* would fit"
    with pytest.raises(ValueError, match=said):
        run(tmp_path / "f", model, max_gib=room)
    assert not (tmp_path / "f").exists()
    run(tmp_path / "f", model, max_gib=room, dtype="bfloat16")
    assert sum(p.stat().st_size for p in (tmp_path / "f").iterdir()) <= room * 2**30


def test_what_fits_in_no_dtype_is_said_with_how_many_would(tmp_path: Path) -> None:
    model = tiny_model()
    size = streamed_bytes(model, "float32", 0.0)
    with pytest.raises(ValueError, match="no dtype would fit, and so would 1 clips"):
        run(tmp_path, model, max_gib=1.5 * (size + 9000) / 2**30)


def test_a_cache_above_what_the_disk_has_free_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    run(tmp_path / "f", model, Collection(model, 3))
    free = int(4.5 * (streamed_bytes(model, "float32", 0.0) + 8192))
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=free))
        with pytest.raises(ValueError, match=r"5 clips of .* need .* GiB, and .* has .* GiB free"):
            run(tmp_path / "f", model, Collection(model, 8))
        assert run(tmp_path / "f", model, Collection(model, 7)).done == 4  # what is there needs no more room
    assert len(FeatureCache(tmp_path / "f", model)) == 7


@pytest.mark.parametrize("mask_ratio", [0.0, 0.5])
@pytest.mark.parametrize("backbone", ["clip", "vit"])
def test_the_bytes_of_a_clip_are_those_that_are_stored(tmp_path: Path, backbone: str, mask_ratio: float) -> None:
    model = tiny_model(backbone)
    run(tmp_path, model, mask_ratio=mask_ratio)
    assert FeatureCache(tmp_path, model).clip_bytes == streamed_bytes(model, "float32", mask_ratio)
    assert {len(shard.ids) for shard in ShardReader(tmp_path)._shards} == {1, 2}


def test_a_shard_holds_a_clip_at_least(tmp_path: Path) -> None:
    model = tiny_model()
    run(tmp_path, model, shard_bytes=1)
    assert {len(shard.ids) for shard in ShardReader(tmp_path)._shards} == {1}


# -- taken up again, shared out, damaged --------------------------------------------------------------------------------


def test_ranks_share_the_clips(tmp_path: Path) -> None:
    model = tiny_model()
    collection = Collection(model)
    assert [run(tmp_path, model, collection, rank=r, world=3, workers=2).done for r in range(3)] == [3, 2, 2]
    with torch.no_grad():
        expected = model(collection.video(list(range(COUNT))))
    cache = FeatureCache(tmp_path, model)
    torch.testing.assert_close(logits(model, cache.features(cache.ids)), expected, rtol=1e-5, atol=1e-5)


def test_a_run_that_was_interrupted_goes_on(tmp_path: Path) -> None:
    model = tiny_model()

    class Interrupted(Collection):
        def __getitem__(self, place: int) -> dict[str, Any]:
            if place == 5:
                raise KeyboardInterrupt
            return super().__getitem__(place)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, model, Interrupted(model))
    assert len(FeatureCache(tmp_path, model)) == 3
    assert run(tmp_path, model).done == COUNT - 3


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("harm", [_cut, _flip, Path.unlink], ids=["cut short", "one bit", "gone"])
def test_a_damaged_shard_is_named_and_its_clips_alone_are_done_again(tmp_path: Path, harm: Any) -> None:
    model = tiny_model()
    run(tmp_path, model)
    cache = FeatureCache(tmp_path, model)
    whole = cache.features(cache.ids)
    hurt = ShardReader(tmp_path)._shards[1].ids
    assert ShardReader(tmp_path)._shards[1].file == SHARD
    harm(tmp_path / SHARD)
    damaged = FeatureCache(tmp_path, model)
    assert list(damaged.verify()) == [SHARD]
    with pytest.raises(ValueError, match=SHARD):
        damaged.features(hurt)
    sound = [i for i in cache.ids if i not in hurt]
    assert len(damaged.features(sound)[0].out) == len(sound)
    collection = Collection(model)
    assert run(tmp_path, model, collection).done == len(hurt)
    assert {5 * place for place in collection.read} == set(hurt)
    mended = FeatureCache(tmp_path, model)
    assert not mended.verify()
    assert not (tmp_path / SHARD).exists()  # or the folder would grow with every fault
    for found, expected in zip(mended.features(cache.ids), whole, strict=True):
        torch.testing.assert_close(found.out, expected.out, rtol=1e-5, atol=1e-5)


def test_a_shard_cut_short_while_it_is_in_use_is_an_error_and_no_crash(tmp_path: Path) -> None:
    model = tiny_model()
    run(tmp_path, model)
    cache = FeatureCache(tmp_path, model)
    first = ShardReader(tmp_path)._shards[1].ids[:1]
    cache.features(first)
    _cut(tmp_path / SHARD)
    with pytest.raises(ValueError, match=f"{SHARD} has .* bytes, not the"):
        cache.features(first)


# -- clips to train on --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask_ratio", [0.0, 0.5])
def test_loaders_workers_read_the_features(tmp_path: Path, mask_ratio: float) -> None:
    model = tiny_model()
    run(tmp_path, model, mask_ratio=mask_ratio)
    cache = FeatureCache(tmp_path, model)
    chosen = [30, 0, 20, 5, 10]
    dataset = CachedClips(cache, chosen, labels=[4, 3, 2, 1, 0])
    batches = list(DataLoader(dataset, 2, num_workers=2, collate_fn=collate_features))
    assert torch.cat([b["clip_id"] for b in batches]).tolist() == chosen
    assert torch.cat([b["label"] for b in batches]).tolist() == [4, 3, 2, 1, 0]
    found = torch.cat([logits(model, b["features"]) for b in batches])
    torch.testing.assert_close(found, logits(model, cache.features(chosen)), rtol=1e-5, atol=1e-5)


def test_what_a_worker_has_checked_is_known_to_all(tmp_path: Path) -> None:
    model = tiny_model()
    run(tmp_path, model)
    cache = FeatureCache(tmp_path, model)
    list(DataLoader(CachedClips(cache), 2, num_workers=2, collate_fn=collate_features))
    assert cache._reader._sound.all()


def test_a_damaged_shard_in_a_worker_is_named(tmp_path: Path) -> None:
    model = tiny_model()
    run(tmp_path, model)
    _flip(tmp_path / SHARD)
    dataset = CachedClips(FeatureCache(tmp_path, model))
    with pytest.raises(ValueError, match=f"{SHARD} is corrupt"):
        list(DataLoader(dataset, 2, num_workers=1, collate_fn=collate_features))


def test_labels_are_the_caches_numbers_or_given(tmp_path: Path) -> None:
    model = tiny_model()
    run(tmp_path / "numbers", model)
    assert CachedClips(FeatureCache(tmp_path / "numbers", model), [10, 0]).labels == [2, 0]
    run(tmp_path / "names", model, Collection(model, named=True))
    cache = FeatureCache(tmp_path / "names", model)
    with pytest.raises(ValueError, match="labels must be given: clip 0 has the class 'a'"):
        CachedClips(cache)
    with pytest.raises(ValueError, match="labels must be one a clip, 7 in all, got 2"):
        CachedClips(cache, labels=[0, 1])
    with pytest.raises(ValueError, match="clip 3 is not there"):
        CachedClips(cache, [0, 3], [0, 0])


def test_unlabelled_clips_have_minus_one(tmp_path: Path) -> None:
    model = tiny_model()

    class Bare(Collection):
        def __init__(self) -> None:
            super().__init__(model, 2)
            self.records = None

        def __len__(self) -> int:
            return 2

        def __getitem__(self, place: int) -> dict[str, Any]:
            return {"rgb": clips(model.config, 1, seed=place)[0]}

    run(tmp_path, model, Bare())
    assert CachedClips(FeatureCache(tmp_path, model)).labels == [-1, -1]


@pytest.mark.gpu
@pytest.mark.parametrize("mask_ratio", [0.0, 0.5])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_features_made_on_the_gpu_are_those_of_the_cpu(tmp_path: Path, dtype: str, mask_ratio: float) -> None:
    model = tiny_model()
    collection = Collection(model)
    run(tmp_path / "cpu", model, collection, mask_ratio=mask_ratio)
    cpu = FeatureCache(tmp_path / "cpu", model).features([0, 15])
    model.cuda()
    run(tmp_path / "gpu", model, collection, mask_ratio=mask_ratio, dtype=dtype)
    gpu = FeatureCache(tmp_path / "gpu", model).features([0, 15], device="cuda")
    expected = logits(model, [f._make(None if t is None else t.cuda() for t in f) for f in cpu])
    near = 1e-3 if dtype == "float32" else 5e-2
    torch.testing.assert_close(logits(model, gpu), expected, rtol=near, atol=near)
