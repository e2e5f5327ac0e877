"""Models of a few thousand weights, by name: to see in seconds that a benchmark runs. Their times mean nothing."""

from mmfast import clip_config, config

NAME = "tiny"
CELLS, SLOTS = 4, 2  # of its grid: 2 x 2 cells, 4 frames in tubelets of 2

_FRAMES = dict(img_size=32, num_frames=4)
_BLOCKS = dict(embed_dim=64, depth=2, num_heads=1)
_DECODER = dict(decoder_embed_dim=64, decoder_depth=1, decoder_num_heads=1)
_DISTILLED = {**_BLOCKS, **_FRAMES, "final_norm": True, "norm_eps": 1e-5}
_CLIP = dict(
    embed_dim=32, image_size=24, patch_size=8, vision_width=32, vision_depth=3, vision_num_heads=2, context_length=20,
    vocab_size=60, text_width=32, text_depth=2, text_num_heads=2,
)  # fmt: skip


def register() -> None:
    """Make "tiny" a name of a classifier, a masked autoencoder and a CLIP, and tiny_{rgb,flow,pose} names of classifiers."""
    config._NAMES[NAME] = {**_BLOCKS, **_FRAMES}
    config._NAMES[f"{NAME}_rgb"] = _DISTILLED
    config._NAMES[f"{NAME}_flow"] = {**_DISTILLED, "in_chans": 2}
    config._NAMES[f"{NAME}_pose"] = {**_DISTILLED, "in_chans": 21, "img_size": 8, "patch_size": 4}
    config._MAE_NAMES[f"{NAME}_pretrain"] = {**_BLOCKS, **_FRAMES, **_DECODER}
    clip_config._NAMES[NAME] = _CLIP
