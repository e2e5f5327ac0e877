"""Pictures of reconstructions: which pixels are shown, and what they are said to be."""

import pytest
import torch
from plain import patch_targets
from torch import Tensor

from mmfast import tube_masks
from mmfast.config import MAEConfig
from mmfast.mae import MaskedAutoencoder
from mmfast.plots import plot_reconstruction, reconstruct

GEOMETRY = {"rgb": (3, 8, 32), "flow": (2, 8, 32), "pose": (21, 4, 16)}


def build(modality: str = "rgb", normalize: bool = True) -> MaskedAutoencoder:
    channels, patch, size = GEOMETRY[modality]
    torch.manual_seed(0)
    fields = dict(in_chans=channels, patch_size=patch, img_size=size, num_frames=4, embed_dim=32, depth=1, num_heads=1)
    fields |= dict(decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=1, normalize_target=normalize)
    return MaskedAutoencoder(MAEConfig(**fields)).eval()


def clips(model: MaskedAutoencoder, count: int = 2) -> Tensor:
    """uint8, brighter to the right, so that patches differ."""
    c = model.config
    draw = torch.Generator().manual_seed(1)
    noise = torch.randint(0, 60, (count, c.in_chans, c.num_frames, *c.frame_size), generator=draw)
    return (noise + torch.linspace(0, 190, c.frame_size[1]).long()).to(torch.uint8)


def masks(model: MaskedAutoencoder, count: int = 2) -> Tensor:
    return tube_masks(count, 1, model.config.grid, 0.5, seed=4)[:, 0]


def pixel_mask(model: MaskedAutoencoder, mask: Tensor) -> Tensor:
    """bool [B, 1, F, H, W]"""
    c = model.config
    cells = mask.view(-1, 1, *c.grid)
    for dim, size in ((2, c.tubelet_size), (3, c.patch_size), (4, c.patch_size)):
        cells = cells.repeat_interleave(size, dim)
    return cells


class Oracle(torch.nn.Module):
    """Predicts the targets themselves."""

    def __init__(self, model: MaskedAutoencoder, video: Tensor, mask: Tensor) -> None:
        super().__init__()
        self.pred: Tensor = patch_targets(model.config, normalised(model, video), mask, model.config.normalize_target)

    def forward(self, x: Tensor) -> Tensor:
        return self.pred.flatten(0, 1)


def normalised(model: MaskedAutoencoder, video: Tensor) -> Tensor:
    mean, std = (torch.tensor(v).view(-1, 1, 1, 1) for v in (model.config.mean, model.config.std))
    return (video / 255 - mean) / std


@pytest.mark.parametrize("modality", GEOMETRY)
def test_visible_patches_are_the_original_ones(modality):
    model = build(modality)
    video, mask = clips(model), masks(model)
    shown = reconstruct(model, video, mask)
    visible = ~pixel_mask(model, mask).expand_as(video)
    assert torch.equal(shown[visible], (video.float() / 255)[visible])
    assert not torch.equal(shown[~visible], (video.float() / 255)[~visible])


@pytest.mark.parametrize(("normalize", "statistics"), [(True, "target"), (False, "visible"), (False, "target")])
@pytest.mark.parametrize("modality", GEOMETRY)
def test_right_predictions_give_the_original_clip(modality, normalize, statistics):
    """With a removed patch's own statistics, or without any, un-normalising undoes what made the targets."""
    model = build(modality, normalize)
    video, mask = clips(model), masks(model)
    model.decoder.head = Oracle(model, video, mask)
    assert torch.allclose(reconstruct(model, video, mask, statistics), video / 255, atol=1e-5)


def test_a_float_clip_comes_back_before_normalisation():
    model = build(normalize=False)
    video, mask = clips(model), masks(model)
    model.decoder.head = Oracle(model, video, mask)
    assert torch.allclose(reconstruct(model, normalised(model, video), mask), video / 255, atol=1e-5)


def test_estimated_statistics_do_not_look_at_removed_pixels():
    model = build()
    video, mask = clips(model), masks(model)
    other = torch.where(pixel_mask(model, mask), 255 - video, video)
    assert torch.equal(reconstruct(model, video, mask), reconstruct(model, other, mask))
    assert not torch.equal(reconstruct(model, video, mask, "target"), reconstruct(model, other, mask, "target"))


def test_estimated_statistics_follow_the_nearer_visible_patches():
    """Two tubes stay, one dark and one bright, at the ends of a row: what lies between goes from dark to bright."""
    model = build()
    video = torch.zeros(1, 3, 4, 32, 32, dtype=torch.uint8)
    video[..., :8, 24:] = 200
    mask = torch.ones(1, 2, 4, 4, dtype=torch.bool)
    mask[:, :, 0, [0, 3]] = False
    shown = reconstruct(model, video, mask.flatten(1))[0, :, 0, :8].mean((0, 1))
    assert shown[8:16].mean() < 0.5 * shown[16:24].mean()
    assert shown[16:24].mean() < 200 / 255


def test_the_model_keeps_its_mode():
    model = build().train()
    reconstruct(model, clips(model), masks(model))
    assert model.training


def test_wrong_arguments_are_refused():
    model = build()
    video, mask = clips(model), masks(model)
    with pytest.raises(ValueError, match="statistics must be one of visible, target, got 'own'"):
        reconstruct(model, video, mask, "own")
    with pytest.raises(ValueError, match="one view a clip"):
        reconstruct(model, video, mask[:, None])
    with pytest.raises(ValueError, match="clip must be one of 2, got 2"):
        plot_reconstruction(model, video, mask, clip=2)
    with pytest.raises(ValueError, match=r"frames must lie in 1\.\.4, got 5"):
        plot_reconstruction(model, video, mask, frames=5)
    with pytest.raises(ValueError, match=r"frames must be numbers in 0\.\.3"):
        plot_reconstruction(model, video, mask, frames=[0, 4])


# -- figures -----------------------------------------------------------------------------------------------------------


def images(figure) -> list[list[Tensor]]:
    axes = [axis for axis in figure.axes if axis.images]
    columns = len(axes) // 3
    drawn = [torch.as_tensor(axis.images[0].get_array()) for axis in axes]
    return [drawn[row * columns : (row + 1) * columns] for row in range(3)]


def test_rows_are_original_masked_and_reconstruction():
    pytest.importorskip("matplotlib")
    model = build()
    video, mask = clips(model), masks(model)
    figure = plot_reconstruction(model, video, mask, clip=1, frames=[2, 0])
    original, masked, shown = images(figure)
    expected = reconstruct(model, video[1:], mask[1:])[0].clamp(0, 1)
    removed = pixel_mask(model, mask[1:])[0, 0]
    for column, frame in enumerate((2, 0)):
        pixels = video[1, :, frame].permute(1, 2, 0).float() / 255
        assert torch.equal(original[column], pixels)
        assert torch.equal(masked[column][~removed[frame]], pixels[~removed[frame]])
        assert masked[column][removed[frame]].unique().numel() == 1
        assert torch.equal(shown[column], expected[:, frame].permute(1, 2, 0))


def test_frames_are_spread_over_the_clip():
    pytest.importorskip("matplotlib")
    model = build()
    figure = plot_reconstruction(model, clips(model), masks(model), frames=2)
    assert [axis.get_title() for axis in figure.axes if axis.get_title()] == ["frame 0", "frame 3"]


@pytest.mark.parametrize(
    ("normalize", "statistics", "said"),
    [
        (True, "visible", "estimated from visible patches"),
        (True, "target", "taken from the original"),
        (False, "target", "pixels as predicted"),
    ],
)
def test_the_title_says_where_mean_and_contrast_come_from(normalize, statistics, said):
    pytest.importorskip("matplotlib")
    model = build(normalize=normalize)
    figure = plot_reconstruction(model, clips(model), masks(model), statistics=statistics, title="a clip")
    text = " ".join(figure.get_suptitle().split())
    assert text.startswith("a clip 16 of 32 patches removed")
    assert said in text


def test_flow_is_drawn_on_the_colour_wheel():
    """No motion is white, opposite directions are opposite hues, the fastest is the most saturated."""
    pytest.importorskip("matplotlib")
    model = build("flow", normalize=False)
    flow = torch.zeros(1, 2, 4, 32, 32)
    flow[:, 0, :, :, 8:16], flow[:, 0, :, :, 24:] = 4.0, -2.0
    mean, std = (torch.tensor(v).view(-1, 1, 1, 1) for v in (model.config.mean, model.config.std))
    figure = plot_reconstruction(model, (flow - mean) / std, masks(model, 1), frames=1)
    picture = images(figure)[0][0].double()
    assert torch.allclose(picture[:, :8], torch.ones(1, dtype=torch.float64), atol=1e-3)
    assert torch.allclose(picture[0, 12], torch.tensor([1.0, 0, 0], dtype=torch.float64), atol=1e-3)
    assert torch.allclose(picture[0, 28], torch.tensor([0.5, 1, 1], dtype=torch.float64), atol=1e-3)


def test_heatmaps_are_drawn_as_their_maximum():
    matplotlib = pytest.importorskip("matplotlib")
    model = build("pose")
    video = torch.zeros(1, 21, 4, 16, 16, dtype=torch.uint8)
    video[:, 7, :, 3, 3] = 255
    picture = images(plot_reconstruction(model, video, masks(model, 1), frames=1))[0][0]
    colours = matplotlib.colormaps["magma"]
    assert torch.allclose(picture[3, 3].double(), torch.tensor(colours(1.0)[:3], dtype=torch.float64))
    assert torch.allclose(picture[0, 0].double(), torch.tensor(colours(0.0)[:3], dtype=torch.float64))


def test_the_file_is_whole_or_not_there(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    model = build()
    video, mask = clips(model), masks(model)
    path = tmp_path / "picture.png"
    plot_reconstruction(model, video, mask, path=path)
    before = path.read_bytes()
    assert before.startswith(b"\x89PNG")

    def broken(self, file, **options):
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", broken)
    with pytest.raises(OSError, match="disk full"):
        plot_reconstruction(model, video, mask, path=path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
