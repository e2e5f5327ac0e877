"""mmfast's own folders: model.safetensors in canonical names, and config.json, which holds every field."""

from dataclasses import fields

from ..config import MAEConfig, ViTConfig
from .container import Source
from .layout import Dialect, Draft, draft_of

FORMAT = "mmfast"
VERSION = 1
MODELS: dict[str, type[ViTConfig]] = {"MaskedViT": ViTConfig, "MaskedAutoencoder": MAEConfig}


def _why_not(source: Source) -> str | None:
    if source.config is None:
        return "no config.json beside the weights"
    if source.config.get("format") != FORMAT:
        return f'config.json has no "format": "{FORMAT}"'
    return None


def _convert(source: Source, branch: str | None, head: str | None) -> Draft:
    assert source.config is not None
    if source.config.get("version") != VERSION:
        raise ValueError(f"{source.where}: config.json has version {source.config.get('version')!r}, not {VERSION}")
    kind = MODELS.get(str(source.config.get("model")))
    if kind is None or not isinstance(source.config.get("config"), dict):
        raise ValueError(f"{source.where}: config.json must hold a {' or a '.join(MODELS)} and its config")
    known = dict(source.config["config"])
    if known.get("fc_norm_eps") == known.get("norm_eps"):
        known.pop("fc_norm_eps", None)  # so that it follows an override of norm_eps
    if kind is ViTConfig:
        draft = draft_of(source, {name: name for name in source.tensors})
        draft.fields = known
        return draft
    draft = draft_of(source, {name: name.removeprefix("encoder.") for name in source.tensors})
    if not draft.has_decoder:
        raise ValueError(f"{source.where}: config.json says MaskedAutoencoder, but there is no decoder")
    # A MaskedViT has fc_norm if its tensors are there; a MaskedAutoencoder without classes only keeps it in mind.
    own = {f.name for f in fields(ViTConfig)} - {"fc_norm"}
    draft.fields = {name: value for name, value in known.items() if name in own}
    draft.mae_fields = {name: value for name, value in known.items() if name not in own}
    return draft


NATIVE = Dialect("mmfast", _why_not, _convert)
