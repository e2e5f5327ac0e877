"""What a training step of M2CLIP is measured against: the published step, restated in plain torch from its equations.

    loss = (contrastive + classes)/2 + VC + masked words/10       (seeds of each in mmfast/m2clip_losses.py)

`published` does it as released, but out of place, as in fp32 the released code has no backward: two passes of the text tower,
over captions and over all K prompts, each over all 77 tokens; adapters of dense tokens with their permuted copies and the
difference of frames at full width; ln_post over every token; masked words predicted at every place. `strong` is what a careful
engineer writes without new kernels: every different text once, no longer than the longest; the two branches of an adapter
in one product; ln_post of class tokens; masked places alone. Attention is torch's fused one in both. Nothing here runs code of
mmfast.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from peers import sdpa
from ted_adapter import published as published_ted
from torch import Tensor, nn

if TYPE_CHECKING:
    from mmfast.m2clip_config import M2CLIPConfig

IGNORED = -100
_OPENAI = (
    ("norm1.", "ln_1."),
    ("norm2.", "ln_2."),
    ("attn.qkv.", "attn.in_proj_"),
    ("attn.proj.", "attn.out_proj."),
    ("mlp.fc1.", "mlp.c_fc."),
    ("mlp.fc2.", "mlp.c_proj."),
)


@dataclass(frozen=True)
class Clips:
    """What a step is given, as M2CLIP.losses takes it. The video is on the device, the rest on the CPU."""

    video: Tensor
    token_ids: Tensor
    labels: Tensor
    class_token_ids: Tensor
    mlm_labels: Tensor


def published_name(name: str) -> str:
    """The name that M2-CLIP's files give a parameter of M2CLIP."""
    name = name.removeprefix("clip.").removeprefix("text.")
    if name.startswith(("t_adapter", "adapter_fc")):
        return f"visual.{name}"
    if "adapter" not in name:
        for mine, theirs in _OPENAI:
            name = name.replace(mine, theirs)
    return name


def wide(x: Tensor) -> Tensor:
    """In fp32, or wider where it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Norm(nn.LayerNorm):
    """In fp32, back in the precision of its input."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(wide(x)).to(x.dtype)


class Offset(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.conv = nn.Conv3d(hidden, hidden, (1, 3, 3), padding=(0, 1, 1), groups=hidden)
        self.fc2 = nn.Linear(hidden, dim)


class Temporal(nn.Module):
    """The time branch alone; with `offset_adapter` a TED-Adapter."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.conv = nn.Conv1d(hidden, hidden, 3, padding=1, groups=hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor, frames: int) -> Tensor:
        """x: [B*F, E]."""
        h = self.fc1(x).unflatten(0, (-1, frames)).transpose(1, 2).contiguous()
        return x + self.fc2(self.conv(h).transpose(1, 2).flatten(0, 1))


class TED(Temporal):
    def __init__(self, dim: int, hidden: int, frames: int, side: int) -> None:
        super().__init__(dim, hidden)
        self.offset_adapter = Offset(dim, hidden)
        self.frames, self.side = frames, side

    def published(self, x: Tensor) -> Tensor:
        """x: [B*F, 1 + cells, D]."""
        adapter: Any = self
        return published_ted(adapter, x, self.frames, (self.side, self.side))

    def strong(self, x: Tensor) -> Tensor:
        o, frames, tokens, hidden = self.offset_adapter, self.frames, x.shape[1], self.fc1.out_features
        bias = F.pad(self.fc1.bias, (0, hidden))
        h = F.linear(x, torch.cat((self.fc1.weight, o.fc1.weight)), bias).unflatten(0, (-1, frames))
        time = h[..., :hidden].permute(0, 3, 1, 2)  # with channels last in memory, as the convolutions like them
        u = F.conv2d(time, self.conv.weight[..., None], self.conv.bias, padding=(1, 0), groups=hidden)
        z = h[:, :, 1:, hidden:]
        d = z - torch.cat((z[:, :1], z[:, :-1]), 1) + o.fc1.bias
        cells = d.flatten(0, 1).unflatten(1, (self.side, self.side)).permute(0, 3, 1, 2)
        g = F.conv2d(cells, o.conv.weight[:, :, 0], o.conv.bias, padding=1, groups=hidden)
        both = torch.cat(
            (u.permute(0, 2, 3, 1).flatten(0, 1), F.pad(g.permute(0, 2, 3, 1).flatten(1, 2), (0, 0, 1, 0))), -1
        )
        out = x + F.linear(both, torch.cat((self.fc2.weight, o.fc2.weight), 1), self.fc2.bias)
        return out + F.pad(o.fc2.bias.expand(x.shape[0], tokens - 1, -1), (0, 0, 1, 0))


class TextAdapter(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.textad_fc1 = nn.Linear(dim, hidden)
        self.textad_fc2 = nn.Linear(hidden, dim)

    def published(self, x: Tensor) -> Tensor:
        return x + self.textad_fc2(F.gelu(self.textad_fc1(x)))

    strong = published


class MLP(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.c_fc, self.c_proj = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        h = self.c_fc(x)
        return self.c_proj(h * torch.sigmoid(1.702 * h))


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, hidden: int, adapters: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.ln_1, self.mlp, self.ln_2 = Norm(dim), MLP(dim, hidden), Norm(dim)
        for half, adapter in adapters.items():
            self.add_module(f"adapter_pre_{half}", adapter)

    def adapted(self, x: Tensor, half: str, how: str) -> Tensor:
        adapter = getattr(self, f"adapter_pre_{half}", None)
        return x if adapter is None else getattr(adapter, how)(x)

    def published(self, x: Tensor, mask: Tensor | None = None, keys: Tensor | None = None) -> Tensor:
        """mask: what is added to the scores. keys: attended to in place of x."""
        x = self.adapted(x, "attn", "published")
        q = self.ln_1(x)
        k = q if keys is None else self.ln_1(keys)
        x = x + self.attn(q, k, k, need_weights=False, attn_mask=mask)[0]
        x = self.adapted(x, "mlp", "published")
        return x + self.mlp(self.ln_2(x))

    def strong(self, x: Tensor, causal: bool = False, keys: Tensor | None = None) -> Tensor:
        x = self.adapted(x, "attn", "strong")
        heads, q = self.attn.num_heads, self.ln_1(x)
        weight, bias, dim = self.attn.in_proj_weight, self.attn.in_proj_bias, x.shape[-1]
        if keys is None:
            parts = F.linear(q, weight, bias).chunk(3, -1)
        else:
            other = F.linear(self.ln_1(keys), weight[dim:], bias[dim:]).chunk(2, -1)
            parts = (F.linear(q, weight[:dim], bias[:dim]), *other)
        q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in parts)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True) if causal else sdpa(q, k, v)
        x = x + self.attn.out_proj(out.transpose(1, 2).flatten(2))
        x = self.adapted(x, "mlp", "strong")
        return x + self.mlp(self.ln_2(x))


class Tower(nn.Module):
    def __init__(self, blocks: Sequence[Block]) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(blocks)


class Visual(nn.Module):
    """The vision tower, with M2-CLIP's heads of it."""

    def __init__(self, config: "M2CLIPConfig") -> None:
        super().__init__()
        c = config.clip
        self.frames, dim = config.num_frames, c.vision_width
        self.conv1 = nn.Conv2d(3, dim, c.patch_size, c.patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(dim))
        self.positional_embedding = nn.Parameter(torch.empty(1 + c.side**2, dim))
        self.ln_pre, self.ln_post = Norm(dim), Norm(dim)
        first, before = c.vision_depth - (config.vision_layers or 0), config.vision_before
        make = lambda: TED(dim, config.vision_hidden, self.frames, c.side)
        self.transformer = Tower(
            [
                Block(dim, c.vision_num_heads, c.hidden("vision"), {h: make() for h in before if i >= first})
                for i in range(c.vision_depth)
            ]
        )
        self.proj = nn.Parameter(torch.empty(dim, c.embed_dim))
        self.t_adapter = Temporal(c.embed_dim, max(c.embed_dim // 2, 1))
        self.adapter_fc = nn.Linear(dim, config.num_classes)

    def forward(self, video: Tensor, strong: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Features [B, E], frame features [B, F, E], class logits [B, K]."""
        x = self.conv1(video.transpose(1, 2).flatten(0, 1)).flatten(2).transpose(1, 2)
        x = torch.cat((self.class_embedding.to(x.dtype).expand(len(x), 1, -1), x), 1)
        x = self.ln_pre(x + self.positional_embedding.to(x.dtype))
        for block in self.transformer.resblocks:
            assert isinstance(block, Block)
            x = block.strong(x) if strong else block.published(x)
        first = x[:, 0].unflatten(0, (-1, self.frames))
        seen = self.ln_post(x[:, 0]) if strong else self.ln_post(x)[:, 0]
        frames = self.t_adapter(seen @ self.proj, self.frames).unflatten(0, (-1, self.frames))
        return frames.mean(1), frames, self.adapter_fc(self.ln_post(first.mean(1)))


class Words(nn.Module):
    """BERT's head for masked words."""

    def __init__(self, dim: int, words: int) -> None:
        super().__init__()
        self.transform = nn.ModuleDict({"dense": nn.Linear(dim, dim), "LayerNorm": nn.LayerNorm(dim, eps=1e-12)})
        self.decoder = nn.Linear(dim, words, bias=False)
        self.bias = nn.Parameter(torch.empty(words))

    def forward(self, x: Tensor) -> Tensor:
        h = self.transform["LayerNorm"](F.gelu(self.transform["dense"](x))).to(x.dtype)
        return self.decoder(h) + self.bias


class PlainM2CLIP(nn.Module):
    """M2-CLIP with the weights of an M2CLIP.   state: its state_dict; config: its M2CLIPConfig."""

    def __init__(self, state: Mapping[str, Tensor], config: "M2CLIPConfig") -> None:
        super().__init__()
        c = config.clip
        if c.gelu != "quick" or not config.num_words:
            raise ValueError("the published model has QuickGELU and predicts masked words")
        dim, depth = c.text_width, c.text_depth
        self.config = config
        self.visual = Visual(config)
        first = config.text_blocks - (config.text_layers or 0)
        make = lambda: TextAdapter(dim, config.text_hidden)
        self.transformer = Tower(
            [
                Block(dim, c.text_num_heads, c.hidden("text"), {h: make() for h in config.text_before if i >= first})
                for i in range(depth + 1)
            ]
        )
        self.token_embedding = nn.Embedding(c.vocab_size, dim)
        self.positional_embedding = nn.Parameter(torch.empty(c.context_length, dim))
        self.ln_final = Norm(dim)
        self.text_projection = nn.Parameter(torch.empty(dim, c.embed_dim))
        self.logit_scale = nn.Parameter(torch.empty(()))
        self.mlm_adapter = Words(dim, config.num_words)
        self.ahead: Tensor
        ahead = torch.full((c.context_length, c.context_length), float("-inf")).triu(1)
        self.register_buffer("ahead", ahead, persistent=False)
        self.load_state_dict({published_name(name): value for name, value in state.items()})
        for name, parameter in self.named_parameters():
            parameter.requires_grad_("adapter" in name)

    def text(self, ids: Tensor, strong: bool) -> tuple[Tensor, Tensor]:
        """Features [L, E] and token states [L, length, W] before ln_final."""
        x = self.token_embedding(ids) + self.positional_embedding[: ids.shape[1]]
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))  # as the released half precision has it
        mask = self.ahead.to(x.dtype)
        for block in list(self.transformer.resblocks)[: self.config.clip.text_depth]:
            assert isinstance(block, Block)
            x = block.strong(x, causal=True) if strong else block.published(x, mask)
        rows = torch.arange(len(x), device=x.device), ids.argmax(-1)
        last = self.ln_final(x[rows]) if strong else self.ln_final(x)[rows]
        return last @ self.text_projection, x

    def published(
        self, video: Tensor, ids: Tensor, labels: Tensor, class_ids: Tensor, mlm_labels: Tensor
    ) -> dict[str, Tensor]:
        """The losses as released, but with plain cross entropy of the classes, and words that are masked."""
        features, frames, logits = self.visual(video, False)
        texts, states = self.text(ids, False)
        classes, _ = self.text(class_ids, False)
        x = self.last_block().published(states, keys=frames)
        words = self.mlm_adapter(self.ln_final(x)).flatten(0, 1)
        return self.losses(features, texts, classes, logits, labels, words, mlm_labels.flatten())

    def strong(
        self,
        video: Tensor,
        ids: Tensor,  # every different text once, cut to the longest
        class_rows: Tensor,  # int64 [K], and [B]: where each stands among them
        caption_rows: Tensor,
        labels: Tensor,
        masked: Tensor,  # int64 [M]: masked tokens, among those of ids
        clips: Tensor,  # int64 [M]: whose they are
        word_ids: Tensor,  # int64 [M]
    ) -> dict[str, Tensor]:
        features, frames, logits = self.visual(video, True)
        texts, states = self.text(ids, True)
        x = self.last_block().strong(states.flatten(0, 1)[masked][:, None], keys=frames[clips])
        words = self.mlm_adapter(self.ln_final(x)).flatten(0, 1)
        return self.losses(features, texts[caption_rows], texts[class_rows], logits, labels, words, word_ids)

    def last_block(self) -> Block:
        block = self.transformer.resblocks[-1]
        assert isinstance(block, Block)
        return block

    def losses(
        self,
        features: Tensor,
        texts: Tensor,
        classes: Tensor,
        logits: Tensor,
        labels: Tensor,
        words: Tensor,
        word_ids: Tensor,
    ) -> dict[str, Tensor]:
        v, t, k = (wide(x) / wide(x).norm(dim=-1, keepdim=True) for x in (features, texts, classes))
        with torch.autocast(v.device.type, enabled=False):
            similarity = self.logit_scale.exp() * v @ t.t()
            scores = self.config.class_scale * v @ k.t()
        target = (10.0 * (labels[:, None] == labels).to(v.dtype)).softmax(-1)
        both = [F.kl_div(s.log_softmax(-1), target, reduction="batchmean") for s in (similarity, similarity.t())]
        found = {
            "contrastive": (both[0] + both[1]) / 2,
            "cmc": F.cross_entropy(scores, labels),
            "cmlm": F.cross_entropy(wide(words), word_ids, ignore_index=IGNORED),
            "vc": F.cross_entropy(wide(logits), labels),
        }
        total = (found["contrastive"] + found["cmc"]) / 2 + found["vc"] + found["cmlm"] / 10
        return found | {"total": total}
