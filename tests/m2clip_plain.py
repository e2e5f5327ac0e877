"""M2-CLIP restated in plain torch from its equations, dense, on a state dict with the published names."""

import torch
from torch import Tensor
from torch.nn import functional as F

State = dict[str, Tensor]


def part(state: State, prefix: str) -> State:
    return {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}


def norm(x: Tensor, s: State, name: str, eps: float = 1e-5) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], s[f"{name}.weight"], s[f"{name}.bias"], eps)


def line(x: Tensor, s: State, name: str) -> Tensor:
    return F.linear(x, s[f"{name}.weight"], s.get(f"{name}.bias"))


def attention(q: Tensor, k: Tensor, s: State, heads: int, causal: bool) -> Tensor:
    """q: [B, n, D], k: [B, m, D], both after the norm."""
    wq, wk, wv = s["attn.in_proj_weight"].chunk(3)
    bq, bk, bv = s["attn.in_proj_bias"].chunk(3)
    split = lambda x: x.unflatten(-1, (heads, -1)).transpose(1, 2)
    q, keys, values = split(F.linear(q, wq, bq)), split(F.linear(k, wk, bk)), split(F.linear(k, wv, bv))
    scores = q @ keys.transpose(-1, -2) / q.shape[-1] ** 0.5
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores[0, 0]).triu(1).bool(), float("-inf"))
    return line((scores.softmax(-1) @ values).transpose(1, 2).flatten(2), s, "attn.out_proj")


def mlp(x: Tensor, s: State) -> Tensor:
    h = line(x, s, "mlp.c_fc")
    return line(h * torch.sigmoid(1.702 * h), s, "mlp.c_proj")


def ted(x: Tensor, s: State, frames: int, side: int) -> Tensor:
    """x: [B*F, 1 + side*side, D]."""
    hidden = s["fc1.weight"].shape[0]
    h = line(x, s, "fc1").unflatten(0, (-1, frames)).permute(0, 2, 3, 1)  # B, L, A, F
    h = F.conv1d(h.flatten(0, 1), s["conv.weight"], s["conv.bias"], padding=1, groups=hidden)
    u = line(h.unflatten(0, (-1, x.shape[1])).permute(0, 3, 1, 2).flatten(0, 1), s, "fc2")
    cells = x[:, 1:].unflatten(0, (-1, frames))
    before = torch.cat((cells[:, :1], cells[:, :-1]), 1)
    o = part(s, "offset_adapter.")
    d = line(cells - before, o, "fc1").unflatten(2, (side, side)).permute(0, 4, 1, 2, 3)
    d = F.conv3d(d, o["conv.weight"], o["conv.bias"], padding=(0, 1, 1), groups=hidden)
    offset = line(d.permute(0, 2, 3, 4, 1).flatten(2, 3).flatten(0, 1), o, "fc2")
    return x + u + F.pad(offset, (0, 0, 1, 0))


def text_adapter(x: Tensor, s: State) -> Tensor:
    return x + line(F.gelu(line(x, s, "textad_fc1")), s, "textad_fc2")


def adapted(x: Tensor, s: State, half: str, run) -> Tensor:
    own = part(s, f"adapter_pre_{half}.")
    return run(x, own) if own else x


def block(x: Tensor, s: State, heads: int, run, causal: bool = False, keys: Tensor | None = None) -> Tensor:
    x = adapted(x, s, "attn", run)
    q = norm(x, s, "ln_1")
    x = x + attention(q, q if keys is None else norm(keys, s, "ln_1"), s, heads, causal)
    x = adapted(x, s, "mlp", run)
    return x + mlp(norm(x, s, "ln_2"), s)


def encode_video(config, s: State, video: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """video: float [B, 3, F, H, W].   Features [B, E], frame features [B, F, E], class logits [B, K]."""
    c, frames = config.clip, config.num_frames
    v = part(s, "visual.")
    x = F.conv2d(video.transpose(1, 2).flatten(0, 1), v["conv1.weight"], stride=c.patch_size).flatten(2).transpose(1, 2)
    x = torch.cat((v["class_embedding"].expand(len(x), 1, -1), x), 1) + v["positional_embedding"]
    x = norm(x, v, "ln_pre")
    for i in range(c.vision_depth):
        own = part(v, f"transformer.resblocks.{i}.")
        x = block(x, own, c.vision_num_heads, lambda y, a: ted(y, a, frames, c.side))
    tokens = x[:, 0].unflatten(0, (-1, frames))
    y = (norm(tokens, v, "ln_post") @ v["proj"]).flatten(0, 1)
    t = part(v, "t_adapter.")
    if t:
        h = line(y, t, "fc1").unflatten(0, (-1, frames)).transpose(1, 2)
        h = F.conv1d(h, t["conv.weight"], t["conv.bias"], padding=1, groups=h.shape[1]).transpose(1, 2).flatten(0, 1)
        y = y + line(h, t, "fc2")
    y = y.unflatten(0, (-1, frames))
    return y.mean(1), y, line(norm(tokens.mean(1), v, "ln_post"), v, "adapter_fc")


def encode_text(config, s: State, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Features [L, E] and token states [L, context, W], all of the context computed."""
    c = config.clip
    x = s["token_embedding.weight"][ids] + s["positional_embedding"][: ids.shape[1]]
    for i in range(c.text_depth):
        x = block(x, part(s, f"transformer.resblocks.{i}."), c.text_num_heads, text_adapter, causal=True)
    last = norm(x, s, "ln_final")[torch.arange(len(ids)), ids.argmax(-1)]
    return last @ s["text_projection"], x


def word_logits(config, s: State, states: Tensor, frames: Tensor) -> Tensor:
    """[B, context, V] of token states [B, context, W] and frame features [B, F, E]."""
    c = config.clip
    x = block(states, part(s, f"transformer.resblocks.{c.text_depth}."), c.text_num_heads, text_adapter, keys=frames)
    m = part(s, "mlm_adapter.")
    h = norm(F.gelu(line(norm(x, s, "ln_final"), m, "transform.dense")), m, "transform.LayerNorm", 1e-12)
    return F.linear(h, m["decoder.weight"], m["bias"])


def losses(config, s: State, video, ids, labels, class_ids, mlm_labels=None) -> State:
    features, frames, logits = encode_video(config, s, video)
    texts, states = encode_text(config, s, ids)
    classes, _ = encode_text(config, s, class_ids)
    v, t, k = (x / x.norm(dim=-1, keepdim=True) for x in (features, texts, classes))
    similarity = s["logit_scale"].exp() * v @ t.t()
    same = torch.tensor([[float(a == b) for b in labels.tolist()] for a in labels.tolist()], dtype=v.dtype)
    target = (10 * same).softmax(-1)
    kl = lambda x: (target * (target.log() - x.log_softmax(-1))).sum() / len(labels)
    scores = config.class_scale * v @ k.t()
    out = {
        "contrastive": (kl(similarity) + kl(similarity.t())) / 2,
        "cmc": F.cross_entropy(scores.softmax(-1) if config.cmc_double_softmax else scores, labels),
        "vc": F.cross_entropy(logits, labels),
        "cmlm": video.new_zeros(()),
    }
    if mlm_labels is not None and bool((mlm_labels >= 0).any()):
        words = word_logits(config, s, states, frames)
        out["cmlm"] = F.cross_entropy(words.flatten(0, 1), mlm_labels.flatten(), ignore_index=-100)
    w = config.weights
    out["total"] = sum(getattr(w, name) * out[name] for name in ("contrastive", "cmc", "vc", "cmlm"))
    return out
