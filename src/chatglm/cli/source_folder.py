"""Where a named model lies on this machine."""

from __future__ import annotations

from pathlib import Path

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
