"""Where a named model lies on this machine."""

from __future__ import annotations

from pathlib import Path

import typer

from ..errors import ChatGLMError, CheckpointError

EMBEDDED_MODEL = Path(__file__).parents[1] / "assets" / "mini"


def source_folder(source: str | None, revision: str | None = None) -> Path:
    """The folder of a checkpoint: the embedded model for None, a folder as it is, a hub name where it was pulled to.

    Raises a ChatGLMError that says how to get it.
    """
    if source is None:
        return EMBEDDED_MODEL
    if Path(source).is_dir():
        return Path(source)
    from ..checkpoint import hub

    return hub.resolve(source, revision=revision)


def with_adapter(source: str | None, adapter: str | None) -> tuple[str | None, str | None]:
    """(model, adapter) to load for `MODEL --adapter DIR`: a LoRA, a tuned prefix, or base and prefix as one.

    Without MODEL the adapter's folder names its base; MODEL may be such a folder too. Raises a usage error where DIR
    is a whole model beside MODEL, and CheckpointError for a folder without an adapter, or whose base is not here.
    """
    if source is None and adapter is None:
        return None, None
    from ..checkpoint import open_checkpoint
    from ..checkpoint.adapter import LoraAdapter, is_adapter, open_adapter

    if adapter is None and source is not None and is_adapter(source):
        source, adapter = None, source
    if adapter is None:
        return source, None
    if is_adapter(adapter) or not (Path(adapter) / "config.json").is_file():
        opened = open_adapter(adapter)
        return source or _base_of(adapter, opened.base, is_lora=isinstance(opened, LoraAdapter)), adapter
    if open_checkpoint(adapter).config.pre_seq_len is None:
        raise CheckpointError(f"{adapter} holds no tuned prefix", cure=f"`chatglm chat {adapter}` loads it as a model")
    if source is not None:
        raise typer.BadParameter(f"{adapter} holds its base model; leave {source} out", param_hint="--adapter")
    return adapter, None


def _base_of(adapter: str, base: str | None, *, is_lora: bool) -> str | None:
    """The model that an adapter's folder names, or None for the embedded one. Raises CheckpointError."""
    if base == "embedded":
        return None
    from ..checkpoint import hub

    merge = f"`chatglm convert --{'adapter' if is_lora else 'ptuning'} {adapter} --base MODEL --out DIR`"
    cure = f"`chatglm chat MODEL --adapter {adapter}`; or merge it: {merge}"
    if base is None:
        raise CheckpointError(f"{adapter} holds an adapter alone, and does not name its base model", cure=cure)
    try:
        hub.resolve(base)
    except ChatGLMError as error:
        raise CheckpointError(f"{adapter} holds an adapter alone; its base {base} is not here", cure=cure) from error
    return base
