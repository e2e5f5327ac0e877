"""How the cross-domain clips look: what a source and a target picture are made of, drawn without regard to the action."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

_FLOAT = np.float32


@dataclass(frozen=True)
class Domain:
    """What tells one domain's pictures from the other's. Ranges are (low, high) of a uniform draw a clip."""

    skins: tuple[tuple[int, int, int], ...]  # colours of the hand, RGB
    paint: tuple[float, float]  # brightness of walls, 0 to 255
    clutter: tuple[float, float]  # and of flat things in front of them
    tiles: bool  # stripes and tiles in place of a cloudy wall and a table
    light_from: tuple[float, float]  # degrees, 0 from the right, 90 from above
    ambient: tuple[float, float]
    tint: tuple[float, float, float]
    vignette: tuple[float, float]
    drift: float
    shake: float
    zoom: float
    noise: float


DOMAINS = {
    "source": Domain(
        skins=((241, 205, 178), (224, 172, 135), (198, 134, 95), (141, 92, 62), (96, 62, 44)),
        paint=(80, 150),
        clutter=(60, 170),
        tiles=False,
        light_from=(70, 160),
        ambient=(0.5, 0.62),
        tint=(1.03, 1.0, 0.93),
        vignette=(0.0, 0.15),
        drift=0.04,
        shake=0.008,
        zoom=0.015,
        noise=5.0,
    ),
    "target": Domain(
        skins=((92, 150, 200), (120, 190, 170), (215, 215, 220), (90, 120, 215), (190, 125, 200)),  # gloves
        paint=(25, 95),
        clutter=(15, 130),
        tiles=True,
        light_from=(-40, 60),
        ambient=(0.34, 0.5),
        tint=(0.88, 0.98, 1.1),
        vignette=(0.2, 0.5),
        drift=0.10,
        shake=0.022,
        zoom=0.04,
        noise=7.0,
    ),
}


@dataclass(frozen=True)
class Look:
    """How a clip is painted; drawn without regard to the action."""

    picture: np.ndarray  # float32 [3, h, w]: the still background, wider than the image
    skin: np.ndarray  # float32 [3], and so on
    sleeve: np.ndarray
    sleeve_from: float  # along the forearm
    rod: np.ndarray
    colours: np.ndarray  # [1 + strays, 2, 3]: the stripes of the thing and of the strays
    shapes: np.ndarray  # int [1 + strays]: 0 disc, 1 square, 2 bar
    thing_on_top: bool
    light: np.ndarray  # [3], towards the light, x right, y down, z to the viewer
    ambient: float
    gain: np.ndarray  # [3]
    vignette: float
    grain: np.ndarray | None  # [3, F, H, W]


def _cloud(rng: np.random.Generator, side: int, cells: int) -> np.ndarray:
    coarse = torch.from_numpy(rng.random((1, 1, cells + 3, cells + 3), dtype=_FLOAT))
    return F.interpolate(coarse, (side, side), mode="bicubic", align_corners=False)[0, 0].numpy()


def _colour(rng: np.random.Generator, low: float, high: float) -> np.ndarray:
    """float32 [3], three quarters of the way to grey: hands and things have the stronger colours."""
    colour = rng.uniform(low, high, 3)
    return ((colour + 3 * colour.mean()) / 4).astype(_FLOAT)


def _picture(rng: np.random.Generator, domain: Domain, side: int) -> np.ndarray:
    """float32 [3, side, side] in 0..255: a cloudy wall with a table's edge, or tiles, and a few flat things."""
    first, second, third = (_colour(rng, *domain.paint)[:, None, None] for _ in range(3))
    cloud = (_cloud(rng, side, 4) + 0.5 * _cloud(rng, side, 11) + 0.35 * _cloud(rng, side, side // 4)) / _FLOAT(1.85)
    x, y = np.arange(side, dtype=_FLOAT)[None] / side - _FLOAT(0.5), np.arange(side, dtype=_FLOAT)[:, None] / side
    turn = rng.uniform(0, np.pi)
    c, s = _FLOAT(np.cos(turn)), _FLOAT(np.sin(turn))
    along, across = x * c + (y - _FLOAT(0.5)) * s, (y - _FLOAT(0.5)) * c - x * s
    stripes, seams = rng.uniform(25, 60, 2)
    if domain.tiles:
        waves = np.clip(6 * np.sin(along * _FLOAT(stripes)) * np.sin(across * _FLOAT(seams)), -1, 1)
        picture = first + (second - first) * (_FLOAT(0.5) + _FLOAT(0.5) * waves)
        picture *= _FLOAT(0.7) + _FLOAT(0.6) * cloud
    else:
        picture = first + (second - first) * cloud
        edge = y - _FLOAT(rng.uniform(0.5, 0.75)) - x * _FLOAT(rng.uniform(-0.2, 0.2))
        table = third * (_FLOAT(0.8) + _FLOAT(0.4) * cloud + _FLOAT(0.08) * np.sin(y * _FLOAT(2 * stripes)))
        picture = np.where(edge > 0, table, picture)
    for centre_x, centre_y, wide, high in rng.uniform((-0.4, 0.1, 0.02, 0.02), (0.4, 0.9, 0.10, 0.10), (4, 4)):
        distance = np.maximum(np.abs(x - _FLOAT(centre_x)) - _FLOAT(wide), np.abs(y - _FLOAT(centre_y)) - _FLOAT(high))
        cover = np.clip(_FLOAT(0.5) - distance * side, 0, 1)
        picture += cover * (_colour(rng, *domain.clutter)[:, None, None] - picture)
    return picture.astype(_FLOAT, copy=False)


def draw_look(
    rng: np.random.Generator,
    domain: Domain,
    num_frames: int,
    side: int,
    strays: int,
    noise: float,
    variety: float,
    picture: bool,
) -> Look:
    """How a clip of the domain is painted. picture: False leaves out the background and the grain, for flow alone."""
    usual, skin = np.array(domain.skins[0]), np.array(domain.skins[rng.integers(len(domain.skins))])
    skin = (usual + variety * (skin - usual)) * rng.uniform(0.9, 1.06)
    angle, height = np.radians(rng.uniform(*domain.light_from)), rng.uniform(0.5, 0.8)
    flat = np.sqrt(1 - height**2)
    gain = np.array(domain.tint) * rng.uniform(0.85, 1.12) * rng.uniform(0.95, 1.05, 3)
    sleeve, rod = _colour(rng, 25, 215), _colour(rng, 30, 200)
    colours = rng.uniform(20, 240, (1 + strays, 2, 3)).astype(_FLOAT)
    shapes, on_top = rng.integers(0, 3, 1 + strays), bool(rng.random() < 0.5)
    sleeve_from, ambient, vignette = rng.uniform(0.15, 0.5), rng.uniform(*domain.ambient), rng.uniform(*domain.vignette)
    still, grain = np.zeros((3, 1, 1), dtype=_FLOAT), None
    if picture:
        # as much as the camera ever sees: it turns by half of zoom (radians), and never comes nearer than 1 - zoom
        wide = (1 + 0.5 * domain.zoom) / (1 - domain.zoom) + domain.drift + 2 * domain.shake
        still = _picture(rng, domain, int(np.ceil(wide * side)) + 2)
        usual_wall = _FLOAT(sum(domain.paint) / 2)
        still = usual_wall + _FLOAT(variety) * (still - usual_wall)
        if noise > 0:
            grain = rng.standard_normal((3, num_frames, side, side), dtype=_FLOAT) * _FLOAT(noise)
    return Look(
        picture=still,
        skin=skin.astype(_FLOAT),
        sleeve=sleeve,
        sleeve_from=sleeve_from,
        rod=rod,
        colours=colours,
        shapes=shapes,
        thing_on_top=on_top,
        light=np.array([flat * np.cos(angle), -flat * np.sin(angle), height]),
        ambient=ambient,
        gain=gain.astype(_FLOAT),
        vignette=vignette,
        grain=grain,
    )
