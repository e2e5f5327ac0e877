"""A synthetic cross-domain few-shot set, rendered as it is asked for: rgb, exact flow and hand heatmaps.

Classes are motions of a hand, its fingers, its tilt and a thing it holds on a rod (`crossdomain_motion`). Source and
target share no class, and differ in skin or glove, wall, light, camera motion and noise (`crossdomain_look`). A frame
alone says nothing about the class, as the state of a clip has one distribution in every frame, whatever the class.

Left and right mean something here: a mirrored clip shows another class, so no flip when training with labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mmfast.config import ViTConfig
from mmfast.data.crossdomain_look import DOMAINS, Domain, draw_look
from mmfast.data.crossdomain_motion import SOURCE_ACTIONS, TARGET_ACTIONS, Action, ClipMotion, camera_way, clip_motion
from mmfast.data.crossdomain_render import paint
from mmfast.data.heatmaps import hand_heatmaps
from mmfast.data.records import ClipRecord
from mmfast.data.transforms import normalize

__all__ = ["CrossDomain"]

_ACTIONS = {"source": SOURCE_ACTIONS, "target": TARGET_ACTIONS}
_SPLITS = ("train", "unlabelled", "test")
_MODALITIES = ("rgb", "flow", "pose")
_FLOW, _POSE = ViTConfig(in_chans=2), ViTConfig(in_chans=21)  # for their mean and std
_IDS = 1_000_000_000  # clip ids of one domain and split


class CrossDomain(Dataset[dict[str, Any]]):
    """Clips of one domain and split.

    Item i is a dict as of ClipDataset: "clip_id", "label" (-1 in split "unlabelled") and "broken" (0) int, and of the
    modalities asked for "rgb" uint8 [3, F, H, W], "flow" float32 [2, F, H, W] to the next frame, "pose" float32
    [21, F, H/4, W/4]. It is a pure function of (seed, domain, split, i) and of the settings: in any process, in any
    order, however many clips there are.

    domain: "source" (16 classes) or "target" (10 others). split: "train", "unlabelled" or "test": other clips of the same
    classes. clips_per_class: the set has so many times the number of classes; clip i shows class i modulo their number.
    size: pixels a side, a multiple of 4, from 32. normalise: flow is enlarged to that of 224 pixels a side, and both are
    normalised as published; without it flow is in pixels (x right, y down) and heatmaps peak at 1. sigma: width of a
    heatmap's bump in its pixels; None: 10 in 56 of the side.

    How hard it is: noise, standard deviation of the grain (None: the domain's); strays, things that move on their own;
    wobble, share of every motion that has nothing to do with the class (0 to 1); variety, how far skins and backgrounds are
    from the domain's usual skin and a plain wall (0 to 1); camera, a factor (0 to 10) on the domain's camera motion.
    Raises ValueError for an unknown name or a number out of range.
    """

    def __init__(
        self,
        domain: str = "source",
        split: str = "train",
        clips_per_class: int = 100,
        *,
        seed: int = 0,
        size: int = 64,
        num_frames: int = 8,
        modalities: Sequence[str] = _MODALITIES,
        normalise: bool = True,
        sigma: float | None = None,
        noise: float | None = None,
        strays: int = 1,
        wobble: float = 0.1,
        variety: float = 1.0,
        camera: float = 1.0,
    ) -> None:
        _one_of("domain", domain, tuple(DOMAINS))
        _one_of("split", split, _SPLITS)
        for modality in modalities:
            _one_of("modalities", modality, _MODALITIES)
        if size < 32 or size % 4:
            raise ValueError(f"size must be a multiple of 4 from 32, got {size}")
        smallest = {"clips_per_class": 1, "num_frames": 1, "seed": 0, "strays": 0, "noise": 0}
        given = {
            "clips_per_class": clips_per_class,
            "num_frames": num_frames,
            "seed": seed,
            "strays": strays,
            "noise": 0 if noise is None else noise,
        }
        for name, least in smallest.items():
            if given[name] < least:
                raise ValueError(f"{name} must be at least {least}, got {given[name]}")
        for name, number, most in (("wobble", wobble, 1), ("variety", variety, 1), ("camera", camera, 10)):
            if not 0 <= number <= most:
                raise ValueError(f"{name} must be from 0 to {most}, got {number}")
        if sigma is not None and sigma <= 0:
            raise ValueError(f"sigma must be more than 0, got {sigma}")
        if len(_ACTIONS[domain]) * clips_per_class > _IDS:
            raise ValueError(f"clips_per_class must leave at most {_IDS} clips, got {clips_per_class}")
        self.domain, self.split, self.seed, self.size, self.num_frames = domain, split, seed, size, num_frames
        self.modalities, self.normalise = tuple(modalities), normalise
        self.sigma = size / 4 * 10 / 56 if sigma is None else sigma
        self.strays, self.wobble, self.variety = strays, wobble, variety
        self.classes = tuple(action.name for action in _ACTIONS[domain])
        self.clips_per_class = clips_per_class
        base = DOMAINS[domain]
        self._look: Domain = replace(
            base,
            noise=base.noise if noise is None else noise,
            **{name: getattr(base, name) * camera for name in ("drift", "shake", "zoom")},
        )

    def __len__(self) -> int:
        return len(self.classes) * self.clips_per_class

    @property
    def labels(self) -> list[int]:
        """Class of every clip; -1 throughout in split "unlabelled"."""
        return [self._label(index) for index in range(len(self))]

    @property
    def clip_ids(self) -> list[int]:
        """Unlike those of any other domain and split."""
        return [self._first_id + index for index in range(len(self))]

    @property
    def records(self) -> list[ClipRecord]:
        """One a clip, without sources, as there are no files."""
        return [
            ClipRecord(
                clip_id=clip_id,
                name=f"{self.domain}/{self.split}/{index:06d}",
                stop=self.num_frames,
                label=None if label < 0 else label,
                label_name=None if label < 0 else self.classes[label],
            )
            for index, (clip_id, label) in enumerate(zip(self.clip_ids, self.labels, strict=True))
        ]

    @property
    def _first_id(self) -> int:
        return _IDS * (list(DOMAINS).index(self.domain) * len(_SPLITS) + _SPLITS.index(self.split))

    def _label(self, index: int) -> int:
        return -1 if self.split == "unlabelled" else index % len(self.classes)

    def _rng(self, index: int, use: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, self._first_id + index, use])

    def motion(self, index: int, action: Action | None = None) -> ClipMotion:
        """Where everything of clip index is; action: what it would be with another class, all else being equal."""
        index = range(len(self))[index]
        if action is None:
            action = _ACTIONS[self.domain][index % len(self.classes)]
        look = self._look
        camera = camera_way(self._rng(index, 0), self.num_frames, self.size, look.drift, look.shake, look.zoom)
        return clip_motion(
            self._rng(index, 1), action, self.num_frames, self.size, camera, wobble=self.wobble, strays=self.strays
        )

    def keypoints(self, index: int) -> Tensor:
        """float32 [F, 21, 2]: (x, y) of the hand's joints in pixels, some perhaps outside the image.

        Wrist, then four joints each of thumb, index, middle, ring and little finger, root to tip.
        """
        return _points(self.motion(index))

    def render(self, index: int, action: Action | None = None) -> dict[str, Any]:
        """Item index; action: what it would be with another class, all else being equal."""
        index = range(len(self))[index]
        motion = self.motion(index, action)
        item: dict[str, Any] = {"clip_id": self._first_id + index, "label": self._label(index), "broken": 0}
        rgb, flow = "rgb" in self.modalities, "flow" in self.modalities
        if rgb or flow:
            look = draw_look(
                self._rng(index, 2),
                self._look,
                self.num_frames,
                self.size,
                self.strays,
                self._look.noise,
                self.variety,
                picture=rgb,
            )
            frames, moved = paint(motion, look, self.size, rgb, flow)
            if frames is not None:
                item["rgb"] = torch.from_numpy(frames)
            if moved is not None:
                item["flow"] = torch.from_numpy(moved)
                if self.normalise:
                    item["flow"] = normalize(item["flow"] * (224 / self.size), _FLOW.mean, _FLOW.std)
        if "pose" in self.modalities:
            maps = hand_heatmaps(_points(motion), self.size // 4, self.sigma, (self.size, self.size))
            item["pose"] = normalize(maps, _POSE.mean, _POSE.std) if self.normalise else maps
        return item

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.render(index)


def _points(motion: ClipMotion) -> Tensor:
    joints = motion.joints[:-1]
    return torch.from_numpy(np.stack([joints.real, joints.imag], -1).astype(np.float32))


def _one_of(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be of {tuple(allowed)}, got {value!r}")
