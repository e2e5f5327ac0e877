"""mmfast's own folders: model.safetensors in canonical names, and config.json, which holds every field."""

from .container import Source
from .layout import Dialect, Draft, renamed

FORMAT = "mmfast"
VERSION = 1


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
    if source.config.get("model") != "MaskedViT" or not isinstance(source.config.get("config"), dict):
        raise ValueError(f"{source.where}: config.json must hold a MaskedViT and its config")
    draft = renamed(source.tensors, {name: name for name in source.tensors})
    draft.fields = dict(source.config["config"])
    if draft.fields.get("fc_norm_eps") == draft.fields.get("norm_eps"):
        draft.fields.pop("fc_norm_eps", None)  # so that it follows an override of norm_eps
    return draft


NATIVE = Dialect("mmfast", _why_not, _convert)
