"""Which parts of a file a model takes: the encoder, the decoder, the classifier; and the positions no model keeps."""

import torch
from torch import Tensor

from ..layers import sinusoid_positions
from .layout import CLASSIFIER, DECODER, Draft


def take_encoder(draft: Draft) -> None:
    """Leave in the draft what a MaskedViT has: all but the decoder."""
    if draft.has_decoder:
        draft.notes.append("a pre-training model: only its encoder is taken")
        draft.leave_out([name for name in draft.state if name.startswith(DECODER)])


def take_autoencoder(draft: Draft) -> None:
    """Leave in the draft what a MaskedAutoencoder has: all of a pre-training file, the encoder of any other.

    Of another file the classifier is taken if it reads what MaskedAutoencoder's does, the mean of the normed tokens.
    """
    if draft.has_decoder:
        return
    draft.notes.append("no decoder in the file: it starts anew")
    alike = all(name in draft.state for name in ("norm.weight", "fc_norm.weight", "head.weight"))
    if not alike or draft.fields.get("pool", "mean") != "mean":
        classifier = [name for name in draft.state if name.startswith(CLASSIFIER)]
        if classifier:
            draft.notes.append("its classifier reads other features than MaskedAutoencoder's, so it is left out")
        draft.leave_out(classifier)
    for name in ("final_norm", "fc_norm", "num_classes", "pool"):
        draft.fields.pop(name, None)


def refuse_cosine_attention(draft: Draft, where: str) -> None:
    """Raise for VideoMAE v2's cos_attn, which no model here computes."""
    scaled = [name for name in draft.state if name.endswith(".attn.scale")]
    if scaled:
        raise ValueError(
            f"{where}: holds {draft.written_as(scaled[0])}: cosine attention (cos_attn=True) is not supported"
        )


def drop_positions(draft: Draft, where: str) -> None:
    """Leave out the sinusoid tables, which the models compute; raise for learned ones."""
    for name in ("pos_embed", "decoder.pos_embed"):
        table = draft.state.get(name)
        if table is None:
            continue
        if table.ndim != 3 or not _is_sinusoid(table[0]):
            written = draft.written_as(name)
            raise ValueError(
                f"{where}: {written} {tuple(table.shape)} is learned; mmfast's positions are fixed sinusoids"
            )
        draft.notes.append(f"{draft.written_as(name)} is the sinusoid table, which the model computes")
        draft.leave_out([name])


def _is_sinusoid(table: Tensor) -> bool:
    return torch.allclose(
        table.float(), sinusoid_positions(*table.shape), atol=1e-2 if table.dtype.itemsize < 4 else 1e-5
    )
