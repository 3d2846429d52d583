"""The command line: `chatglm chat | generate | pull | info | verify | convert | doctor`, one file a command.

Nothing heavy is imported before a command is chosen; `chatglm --help` imports typer and the table of commands.
"""

from __future__ import annotations

from .app import app, main

__all__ = ["app", "main"]
