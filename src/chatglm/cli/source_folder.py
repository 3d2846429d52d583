"""Where a named model lies on this machine."""

from __future__ import annotations

from pathlib import Path

import typer

from ..errors import CheckpointError

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


def with_adapter(source: str | None, adapter: str | None) -> str | None:
    """The model to load when `--adapter` names a folder that `chatglm convert --ptuning` wrote: base and prefix as one.

    Raises a usage error for a model beside it, and CheckpointError for a folder without a prefix, or with nothing else.
    """
    if adapter is None:
        return source
    if source is not None:
        raise typer.BadParameter(f"{adapter} holds its base model; leave {source} out", param_hint="--adapter")
    from ..checkpoint import open_checkpoint

    checkpoint = open_checkpoint(adapter)
    if checkpoint.is_prefix_only:
        cure = f"merge it: `chatglm convert --ptuning {adapter} --base MODEL --out DIR`"
        raise CheckpointError(f"{adapter} holds a tuned prefix alone, without its base model", cure=cure)
    if checkpoint.config.pre_seq_len is None:
        raise CheckpointError(f"{adapter} holds no tuned prefix", cure=f"`chatglm chat {adapter}` loads it as a model")
    return adapter
