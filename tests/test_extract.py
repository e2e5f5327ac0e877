"""Features in shards: killed anywhere and started again, split over any number of ranks, damaged on the disk."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from makers import tiny_config
from torch import Tensor

from mmfast.data.records import ClipRecord
from mmfast.extract import FeatureStore, extract, weights_fingerprint
from mmfast.shards import ShardReader, place_in_world, write_aside
from mmfast.vit import MaskedViT


class Collection:
    """Clips made from their ids; some cannot be read."""

    def __init__(self, count: int = 11, broken: tuple[int, ...] = (), channels: int = 3, prefix: str = "clip") -> None:
        self.records = [ClipRecord(7 * i, f"{prefix}{i}", label=i % 3, label_name="abc"[i % 3]) for i in range(count)]
        self.broken, self.channels, self.read = set(broken), channels, list[int]()

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, place: int) -> dict[str, Any]:
        self.read.append(place)
        if place in self.broken:
            raise OSError(f"clip {place} is broken")
        draw = torch.Generator().manual_seed(place)
        clip = torch.randint(0, 256, (4, 32, 32, self.channels), dtype=torch.uint8, generator=draw).permute(3, 0, 1, 2)
        return {"clip_id": self.records[place].clip_id, "rgb": clip, "label": 0}


def model(seed: int = 0, **overrides: Any) -> MaskedViT:
    torch.manual_seed(seed)
    return MaskedViT(tiny_config(**overrides)).eval()


def run(out: Path, dataset: Any = None, net: MaskedViT | None = None, **options: Any) -> Any:
    options = {"shard_size": 3, "batch": 2, "progress": False, "rank": 0, "world": 1, **options}
    return extract(net or model(), Collection() if dataset is None else dataset, out, **options)


def read(out: Path) -> Tensor:
    return FeatureStore(out).features()


def test_features_are_those_of_the_masks_of_seed_clip_and_view(tmp_path: Path) -> None:
    from mmfast import tube_masks

    net, clips = model(), Collection(5)
    run(tmp_path / "f", clips, net, seed=3)
    store = FeatureStore(tmp_path / "f")
    assert store.ids == [0, 7, 14, 21, 28]
    assert store.names == [f"clip{i}" for i in range(5)]
    assert store.labels == ["a", "b", "c", "a", "b"]
    masks = tube_masks(5, 2, (2, 2, 2), 0.75, seed=3, clip_ids=store.ids)
    with torch.no_grad():
        expected = net.encode(torch.stack([clips[i]["rgb"] for i in range(5)]), masks)
    torch.testing.assert_close(store.features(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(store.features([28, 0, 28]), expected[[4, 0, 4]], rtol=1e-5, atol=1e-5)
    assert [i for i, _ in store] == store.ids
    torch.testing.assert_close(torch.stack([x for _, x in store]), expected, rtol=1e-5, atol=1e-5)
    assert store.settings["mask_seed"] == 3
    assert store.settings["weights"] == weights_fingerprint(net)


def test_ranks_together_do_every_clip_once_whatever_their_number_on_restart(tmp_path: Path) -> None:
    whole, parts, clips = tmp_path / "whole", tmp_path / "parts", Collection()
    run(whole)
    reports = [run(parts, clips, rank=0, world=3, workers=2)]
    reports += [run(parts, clips, rank=r, world=4) for r in (3, 1, 2, 0)]
    assert sum(r.done for r in reports) == len(clips)
    assert sorted(clips.read) == list(range(len(clips)))
    torch.testing.assert_close(read(parts), read(whole), rtol=1e-5, atol=1e-5)


_KILLED = """
import os, signal, sys
import tests_path
from test_extract import run
from pathlib import Path
import mmfast.shards as shards
left, when = int(sys.argv[2]), sys.argv[3]
replace = os.replace
def counting(source, target):
    global left
    left -= 1
    if left == 0 and when == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
shards.os.replace = counting
run(Path(sys.argv[1]))
"""


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("nth", [1, 2, 5])
def test_killed_between_any_two_files_loses_and_repeats_nothing(tmp_path: Path, nth: int, when: str) -> None:
    code = _KILLED.replace("import tests_path", f"sys.path.insert(0, {str(Path(__file__).parent)!r})")
    killed = subprocess.run([sys.executable, "-c", code, tmp_path / "f", str(nth), when], capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    report = run(tmp_path / "f")
    assert report.done + report.kept == 11
    store = ShardReader(tmp_path / "f")
    assert len(store) == 11
    assert sum(len(shard.ids) for shard in store._shards) == 11
    assert not store.verify()
    run(tmp_path / "whole")
    torch.testing.assert_close(read(tmp_path / "f"), read(tmp_path / "whole"), rtol=1e-5, atol=1e-5)


def test_ctrl_c_keeps_what_was_computed(tmp_path: Path) -> None:
    class Interrupted(Collection):
        def __getitem__(self, place: int) -> dict[str, Any]:
            if place == 5:
                raise KeyboardInterrupt
            return super().__getitem__(place)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "f", Interrupted())
    assert len(FeatureStore(tmp_path / "f")) == 4
    assert run(tmp_path / "f").done == 7


def test_a_finished_run_reads_no_clip_again(tmp_path: Path) -> None:
    run(tmp_path / "f")
    clips = Collection()
    assert run(tmp_path / "f", clips).kept == 11
    assert not clips.read


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"net": model(seed=1)}, "weights"),
        ({"net": model(norm_eps=1e-5)}, "config.norm_eps (1e-06 there, 1e-05 now)"),
        ({"views": 3}, "views (2 there, 3 now)"),
        ({"mask_ratio": 0.5}, "mask_ratio (0.75 there, 0.5 now)"),
        ({"seed": 1}, "mask_seed (0 there, 1 now)"),
        ({"precision": "bf16"}, "precision"),
        ({"about": {"stride": 4}}, "about.stride (null there, 4 now)"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
@pytest.mark.parametrize("rank", [0, 1])
def test_other_settings_are_refused_by_name(tmp_path: Path, options: dict[str, Any], named: str, rank: int) -> None:
    run(tmp_path / "f", Collection(2), world=2)
    with pytest.raises(ValueError, match=re.escape(named)):
        run(tmp_path / "f", Collection(2), rank=rank, world=2, **options)
    assert len(FeatureStore(tmp_path / "f")) == 1


def test_another_collection_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    run(tmp_path / "f", Collection(2))
    with pytest.raises(ValueError, match="clip 0 is 'clip0' there and 'film0' now"):
        run(tmp_path / "f", Collection(2, prefix="film"))


def test_a_collection_may_grow(tmp_path: Path) -> None:
    run(tmp_path / "f", Collection(4))
    assert run(tmp_path / "f", Collection(6)).done == 2


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("harm", [_cut, _flip, Path.unlink], ids=["cut short", "one bit", "gone"])
@pytest.mark.parametrize("world", [1, 2])
def test_a_damaged_shard_is_found_and_its_clips_done_again(tmp_path: Path, harm: Any, world: int) -> None:
    out = tmp_path / "f"
    run(out)
    whole = read(out)
    harm(out / "features-00000-000001.safetensors")
    assert list(FeatureStore(out).verify()) == ["features-00000-000001.safetensors"]
    with pytest.raises(ValueError, match="000001"):
        FeatureStore(out).features([21])
    done = [run(out, rank=rank, world=world).done for rank in range(world)]
    assert sum(done) == 3
    store = FeatureStore(out)
    assert not store.verify()
    assert len(store) == 11
    torch.testing.assert_close(store.features(), whole, rtol=1e-5, atol=1e-5)


def test_broken_clips_are_skipped_listed_and_done_by_retry(tmp_path: Path) -> None:
    out = tmp_path / "f"
    report = run(out, Collection(6, broken=(1, 4)))
    assert report.done == 4
    assert FeatureStore(out).failed == {7: ("clip1", "clip 1 is broken"), 28: ("clip4", "clip 4 is broken")}
    clips = Collection(6)
    assert list(run(out, clips).failed) == [7, 28]
    assert not clips.read
    assert run(out, Collection(6, broken=(4,)), retry=True).done == 1
    assert FeatureStore(out).failed == {28: ("clip4", "clip 4 is broken")}
    assert len(FeatureStore(out)) == 5


def test_what_is_held_does_not_grow_with_the_collection(tmp_path: Path) -> None:
    """At any time no more clips are alive than the loaders' lead, two batches and a shard's rows."""
    import weakref

    alive: list[weakref.ref[Tensor]] = []
    most = 0

    class Counted(Collection):
        def __getitem__(self, place: int) -> dict[str, Any]:
            nonlocal most
            item = super().__getitem__(place)
            alive.append(weakref.ref(item["rgb"]))
            most = max(most, sum(ref() is not None for ref in alive))
            return item

    run(tmp_path / "f", Counted(60), workers=1, batch=4)
    assert most <= 1 + 4 + 2 * 4 + 1
    assert max(len(s.ids) for s in ShardReader(tmp_path / "f")._shards) == 3


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, count = tmp_path / "f", 0
    fsync = os.fsync

    def full(handle: int) -> None:
        nonlocal count
        count += 1
        if count > 4:
            raise OSError(28, "No space left on device")
        fsync(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            run(out)
    assert not list(out.glob(".*.tmp"))
    assert not FeatureStore(out).verify()
    assert run(out).kept == 3
    assert len(FeatureStore(out)) == 11


def test_a_second_process_of_the_same_rank_is_refused(tmp_path: Path) -> None:
    class Nested(Collection):
        def __getitem__(self, place: int) -> dict[str, Any]:
            with pytest.raises(ValueError, match="another process is at work there as rank 0"):
                run(tmp_path / "f")
            return super().__getitem__(place)

    assert run(tmp_path / "f", Nested(1)).done == 1


def test_clips_of_another_modality_are_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the clips have 2 channels, this model takes 3"):
        run(tmp_path / "a", Collection(channels=2))
    with pytest.raises(ValueError, match="no 'flow'; they have clip_id, rgb, label"):
        run(tmp_path / "b", modality="flow")


def test_clips_of_several_sizes_keep_their_order(tmp_path: Path) -> None:
    class Sizes(Collection):
        def __getitem__(self, place: int) -> dict[str, Any]:
            item = super().__getitem__(place)
            return item if place % 2 else {**item, "rgb": item["rgb"][:, :2]}

    run(tmp_path / "f", Sizes(4), batch=4)
    run(tmp_path / "one", Sizes(4), batch=1)
    torch.testing.assert_close(read(tmp_path / "f"), read(tmp_path / "one"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"views": 0}, "views must be at least 1"),
        ({"mask_ratio": 1.0}, "mask_ratio must lie in"),
        ({"batch": 0}, "batch must be at least 1"),
        ({"workers": -1}, "workers must be at least 0"),
        ({"shard_size": 0}, "shard_size must be at least 1"),
        ({"rank": 2, "world": 2}, "rank must lie in"),
        ({"precision": "int4"}, "precision must be one of fp32, bf16, fp16, int8"),
        ({"dtype": "float8"}, "dtype must be one of"),
    ],
)
def test_arguments_out_of_range_are_named(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "f", **options)


def test_two_clips_of_one_id_are_refused(tmp_path: Path) -> None:
    clips = Collection(3)
    clips.records[2] = clips.records[1]
    with pytest.raises(ValueError, match="clip id 7 twice"):
        run(tmp_path / "f", clips)


def test_an_empty_collection_gives_an_empty_store(tmp_path: Path) -> None:
    assert run(tmp_path / "f", Collection(0)).done == 0
    assert len(FeatureStore(tmp_path / "f")) == 0
    assert FeatureStore(tmp_path / "f").features().numel() == 0


def test_the_place_in_the_world_is_the_launchers(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    assert place_in_world() == (0, 1)
    monkeypatch.setenv("SLURM_PROCID", "3")
    monkeypatch.setenv("SLURM_NTASKS", "8")
    assert place_in_world() == (3, 8)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert place_in_world() == (1, 2)


def test_a_folder_without_an_index_or_with_a_broken_one_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no index-\*\.json"):
        FeatureStore(tmp_path)
    (tmp_path / "index-00000.json").write_text("{")
    with pytest.raises(ValueError, match="index-00000.json: is no index"):
        FeatureStore(tmp_path)


def test_the_index_is_plain_json(tmp_path: Path) -> None:
    run(tmp_path / "f", Collection(2))
    about = json.loads((tmp_path / "f" / "index-00000.json").read_text())
    assert about["shards"][0]["names"] == ["clip0", "clip1"]
    assert about["settings"]["config"]["embed_dim"] == 64


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write_aside(path, b"old")

    def fails() -> Any:
        yield b"new"
        raise OSError("full")

    with pytest.raises(OSError, match="full"):
        write_aside(path, fails())
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_the_models_mode_is_put_back(tmp_path: Path) -> None:
    net = model().train()
    run(tmp_path / "f", Collection(1), net)
    assert net.training
