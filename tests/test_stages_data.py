"""Samplers and data modules of the stages."""

import json
import random
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("lightning")
from stages_fakes import FakeClips, pretrain_data

from mmfast.stages.data import Clips, DistillData, PretrainData
from mmfast.stages.sampler import Drawn, EpochSampler, RankPlaces, seeded

pytestmark = pytest.mark.filterwarnings("ignore")


def keys(sampler: EpochSampler, epoch: int) -> list[Any]:
    sampler.set_epoch(epoch)
    return list(sampler)


def test_an_epoch_is_one_pass_over_the_first_set_in_an_order_of_its_own() -> None:
    sampler = EpochSampler({"source": 12, "target": 5}, 3, seed=1)
    first, second = ([source for source, _ in keys(sampler, epoch)] for epoch in (0, 1))
    assert {turn for turn, _ in first} == {0}
    assert {turn for turn, _ in second} == {1}
    assert sorted(place for _, place in first) == sorted(place for _, place in second) == list(range(12))
    assert [place for _, place in first] != [place for _, place in second]


def test_the_shorter_set_goes_on_over_the_ends_of_epochs() -> None:
    sampler = EpochSampler({"source": 12, "target": 5}, 3, seed=1)
    target = [target for epoch in range(5) for _, target in keys(sampler, epoch)]
    assert [turn for turn, _ in target] == [i // 5 for i in range(60)]
    for turn in range(12):
        assert sorted(place for t, place in target if t == turn) == list(range(5))


def test_what_is_left_over_waits_for_another_epoch() -> None:
    sampler = EpochSampler({"target": 11}, 4)
    assert len(sampler) == len(keys(sampler, 0)) == 8
    seen = {place for epoch in range(20) for ((_, place),) in keys(sampler, epoch)}
    assert seen == set(range(11))


def test_ranks_share_each_step_of_the_one_process() -> None:
    sizes = {"source": 17, "target": 7}
    alone = keys(EpochSampler(sizes, 4, seed=3), 2)
    halves = [keys(EpochSampler(sizes, 2, rank=rank, world=2, seed=3), 2) for rank in (0, 1)]
    for step in range(4):
        together = [key for half in halves for key in half[2 * step : 2 * step + 2]]
        assert together == alone[4 * step : 4 * step + 4]


def test_a_sampler_begins_within_an_epoch_and_only_in_that_one() -> None:
    sizes = {"source": 12, "target": 5}
    whole = [keys(EpochSampler(sizes, 3), epoch) for epoch in range(4)]
    sampler = EpochSampler(sizes, 3)
    sampler.start = (2, 1)
    # Lightning makes the first iterator before set_epoch.
    assert list(sampler) == whole[2][3:]
    assert keys(sampler, 2) == whole[2][3:]
    assert keys(sampler, 3) == whole[3]


@pytest.mark.parametrize(
    ("sizes", "batch", "message"),
    [
        ({"source": 0}, 1, "the source data set has no clips"),
        ({"source": 3, "target": 0}, 1, "the target data set has no clips"),
        ({"source": 3}, 0, "batch_size must be at least 1, got 0"),
        ({"source": 3}, 2, "the source data set has 3 clips, one step takes batch_size 2 on each of 2 ranks"),
    ],
    ids=str,
)
def test_a_sampler_without_a_step_is_refused(sizes: dict[str, int], batch: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EpochSampler(sizes, batch, world=2)


def test_an_item_depends_on_its_key_alone() -> None:
    """FakeClips draws from the global generator, as many data sets do."""
    drawn = Drawn({"source": FakeClips(5), "target": FakeClips(5)}, seed=4)
    torch.manual_seed(0)
    first = drawn[((0, 3), (0, 3))]
    torch.manual_seed(1)
    again, later = drawn[((0, 3), (0, 3))], drawn[((1, 3), (0, 3))]
    assert torch.equal(first["source"]["rgb"], again["source"]["rgb"])
    assert not torch.equal(first["source"]["rgb"], later["source"]["rgb"])
    assert not torch.equal(first["source"]["rgb"], first["target"]["rgb"])


def test_seeding_puts_every_state_back() -> None:
    def draw() -> tuple[float, float, float]:
        return float(torch.rand(())), float(np.random.rand()), random.random()

    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    wanted = [draw(), draw()]
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    first = draw()
    with seeded(1, 2):
        inside = draw()
    assert [first, draw()] == wanted
    with seeded(1, 2):
        assert draw() == inside


def test_every_clip_is_on_a_rank_and_ranks_have_equally_many() -> None:
    parts = [list(RankPlaces(7, rank, 3)) for rank in range(3)]
    assert {len(part) for part in parts} == {3}
    assert {place for part in parts for place in part} == set(range(7))


def test_batches_hold_both_domains() -> None:
    data = pretrain_data()
    batch = next(iter(data.train_dataloader()))
    assert set(batch) == {"source", "target"}
    assert batch["source"]["rgb"].shape == batch["target"]["rgb"].shape == (2, 3, 4, 32, 32)
    assert batch["source"]["clip_id"].max() < 100 <= batch["target"]["clip_id"].min()


# -- lists of clips ----------------------------------------------------------------------------------------------------


def manifest(path: Path, labels: list[str | None]) -> Clips:
    """A manifest of clips whose frames are four white pictures."""
    from PIL import Image

    frames = path.parent / "frames"
    frames.mkdir(exist_ok=True)
    for number in range(4):
        Image.new("RGB", (40, 36), (255, 255, 255)).save(frames / f"{number}.png")
    rows = [{"path": "frames", "name": str(i), **({"label": l} if l else {})} for i, l in enumerate(labels)]
    path.write_text(json.dumps(rows))
    return Clips(path=str(path), stride=1)


def test_clips_of_a_manifest(tmp_path: Path) -> None:
    source = manifest(tmp_path / "source.json", ["cut", "pour", "cut"])
    target = manifest(tmp_path / "target.json", [None] * 4)
    data = PretrainData(source, target, batch_size=2, num_workers=0, num_frames=4, size=32)
    assert data.num_classes == 2
    data.setup()
    batch = next(iter(data.train_dataloader()))
    assert batch["source"]["rgb"].dtype == torch.uint8
    assert batch["source"]["rgb"].shape == (2, 3, 4, 32, 32)
    assert batch["target"]["label"].tolist() == [-1, -1]


def test_a_pass_over_a_short_set_draws_other_crops(tmp_path: Path) -> None:
    data = DistillData(manifest(tmp_path / "t.json", [None]), modalities=("rgb",), num_frames=4, size=32)
    data.setup()
    drawn = Drawn(data.train_sets)
    for _ in range(2):
        drawn[((0, 0),)]
        first = data.train_sets["target"].seed
        drawn[((1, 0),)]
        assert data.train_sets["target"].seed != first


def test_synthetic_clips() -> None:
    few = dict(clips_per_class=1)
    data = PretrainData(
        Clips("synthetic", "source", split="train", options=few),
        Clips("synthetic", "target", split="unlabelled", options=few),
        Clips("synthetic", "target", split="test", options=few),
        modality="flow",
        batch_size=2,
        num_workers=0,
        num_frames=4,
        size=32,
    )
    assert data.num_classes == 16
    data.setup()
    assert next(iter(data.train_dataloader()))["target"]["flow"].shape == (2, 2, 4, 32, 32)


def test_shared_classes_are_refused(tmp_path: Path) -> None:
    source = manifest(tmp_path / "source.json", ["Cut bread", "pour"])
    test = manifest(tmp_path / "test.json", ["cut_bread", "stir"])
    target = manifest(tmp_path / "target.json", [None])
    with pytest.raises(ValueError, match="share 1 of the target's 2 classes: cut_bread"):
        PretrainData(source, target, test).setup()
    with pytest.raises(ValueError, match="share 1 of the target's 2 classes: cut_bread"):
        DistillData(target, val=test, source=source).setup()


def test_unlabelled_source_clips_are_refused(tmp_path: Path) -> None:
    data = PretrainData(manifest(tmp_path / "s.json", ["cut", None, None]), with_target=False)
    with pytest.raises(ValueError, match="data.source must be labelled: 2 of 3 clips are not"):
        _ = data.num_classes


def test_unlabelled_validation_clips_are_refused(tmp_path: Path) -> None:
    target = manifest(tmp_path / "s.json", ["cut", None, None])
    with pytest.raises(ValueError, match="data.val must be labelled: 2 of 3 clips are not"):
        DistillData(target, val=target).val_dataloader()


def test_a_missing_target_is_refused_unless_the_loss_does_not_want_it(tmp_path: Path) -> None:
    source = manifest(tmp_path / "s.json", ["cut", "pour"])
    with pytest.raises(ValueError, match=r"data.target must be given: model.target_weight is above 0"):
        PretrainData(source)
    data = PretrainData(source, with_target=False, batch_size=1, num_workers=0, num_frames=4, size=32)
    data.setup()
    assert set(next(iter(data.train_dataloader()))) == {"source"}


def test_a_wrong_file_is_named_with_its_place_in_the_config(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data.source: .*nothing\.json"):
        _ = PretrainData(Clips(path=str(tmp_path / "nothing.json")), with_target=False).num_classes
    with pytest.raises(ValueError, match="path must be given for clips of format ego4d"):
        _ = PretrainData(Clips("ego4d"), with_target=False).num_classes


@pytest.mark.parametrize(("name", "value"), [("batch_size", 0), ("num_workers", -1)])
def test_numbers_that_make_no_sense_are_refused(name: str, value: int) -> None:
    wrong: dict[str, Any] = {name: value}
    with pytest.raises(ValueError, match=f"{name} must be at least .*, got {value}"):
        DistillData(Clips(path="x"), **wrong)


def test_unreadable_clips_are_reported_once(tmp_path: Path) -> None:
    source = manifest(tmp_path / "s.json", ["cut"] * 3)
    broken = json.loads((tmp_path / "s.json").read_text())
    (tmp_path / "empty").mkdir()
    broken[1]["path"] = "empty"
    (tmp_path / "s.json").write_text(json.dumps(broken))
    data = PretrainData(source, with_target=False, batch_size=3, num_workers=0, num_frames=4, size=32)
    data.setup()
    batch = next(iter(data.train_dataloader()))
    assert 1 not in batch["source"]["clip_id"]
    with pytest.warns(UserWarning, match="source clips: 1 of 3 clips cannot be read"):
        data.report_faults()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data.report_faults()


def test_a_text_file_is_a_list(tmp_path: Path) -> None:
    (tmp_path / "val.TXT").write_text("a.mp4 1\nb.mp4 0\n")
    clips = Clips(path=str(tmp_path / "val.TXT"))
    assert clips.format == "list"
    assert clips.read().labels == [1, 0]
    assert Clips(path="val.csv").format == "manifest"
    assert Clips("folder", "val.txt").format == "folder"
