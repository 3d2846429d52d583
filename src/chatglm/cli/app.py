"""The `chatglm` program: its commands by name, and what becomes of an error.

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Annotated, Any, ClassVar

import typer
from typer.core import TyperCommand, TyperGroup

from ..errors import ChatGLMError
from .option_groups import spread
from .streams import prepare_streams

COMMANDS: dict[str, str] = {
    "chat": "Talk with a model (the embedded one, if none is named).",
    "generate": "Answer a file of prompts; resumes where it was interrupted.",
    "web": "Chat in a browser, on this machine.",
    "serve": "Put a model behind OpenAI's API, for many users at once.",
    "pull": "Download a checkpoint from the hub; resumes where it was interrupted.",
    "info": "What a checkpoint is and how much memory it needs, without loading it.",
    "verify": "Check every file of a checkpoint before it is used.",
    "convert": "Write a checkpoint in today's form: safetensors, slim, with a tuned prefix.",
    "quantize": "Write a checkpoint in INT8 or INT4; resumes where it was interrupted.",
    "eval": "What each form of the weights costs: perplexity and agreement against fp32.",
    "bench": "Speed and memory here, beside what this machine could do at best.",
    "data": "Training data: what people said about answers.",
    "train": "Train a model: pre-training, fine-tuning, pictures of the curves.",
    "doctor": "What this machine has, what would be chosen and why, what is missing.",
}
"""Name and one line of each command; the module and the function are named like the command.

A module with a table COMMANDS of its own is a group: `chatglm data feedback` is `feedback` in `data_feedback.py`.
"""

_WIDTH = 110


class Command(TyperCommand):
    """A command whose options are listed under the headings of their groups."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None:
                default = "Arguments" if param.param_type_name == "argument" else "Options"
                sections.setdefault(getattr(param, "rich_help_panel", None) or default, []).append(record)
        for heading in sorted(sections, key=["Arguments", "Options", "Model", "Sampling", "Common"].index):
            with formatter.section(heading):
                formatter.write_dl(sections[heading])


class Commands(TyperGroup):
    """Knows its commands by name and imports one only when it is asked for.

    prefix  of the modules, in a group
    """

    table: ClassVar[dict[str, str]] = COMMANDS
    prefix: ClassVar[str] = ""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(self.table)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in self.table:
            return None
        module = importlib.import_module(f".{self.prefix}{cmd_name}", __package__)
        if hasattr(module, "COMMANDS"):
            return _group(cmd_name, module)
        single = typer.Typer(add_completion=False, rich_markup_mode=None)
        settings = {"help_option_names": ["-h", "--help"], "max_content_width": _WIDTH}
        single.command(cmd_name, cls=Command, context_settings=settings)(spread(getattr(module, cmd_name)))
        return typer.main.get_command(single)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(self.table.items()))

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name = args[0]
        if name not in self.table and not name.startswith("-"):
            near = difflib.get_close_matches(name, self.table, n=1)
            hint = f"Did you mean '{near[0]}'?" if near else f"Known: {', '.join(self.table)}."
            ctx.fail(f"No such command '{name}'. {hint}")
        return super().resolve_command(ctx, args)


def _group(name: str, module: ModuleType) -> Any:
    """Commands under a name of their own."""
    kind = type("Group", (Commands,), {"table": module.COMMANDS, "prefix": f"{name}_"})
    group = typer.Typer(cls=kind, add_completion=False, rich_markup_mode=None, no_args_is_help=True)
    settings = {"help_option_names": ["-h", "--help"], "max_content_width": _WIDTH}
    group.callback(help=COMMANDS[name], context_settings=settings)(lambda: None)
    return typer.main.get_command(group)


app = typer.Typer(
    cls=Commands,
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": _WIDTH},
)


@app.callback(invoke_without_command=True, epilog="Try: chatglm chat")
def chatglm(
    ctx: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """ChatGLM-6B on today's libraries: talk with it, look at its checkpoints, put it to work."""
    if version:
        from .. import __version__

        print(f"chatglm {__version__}")
    elif ctx.invoked_subcommand is None:
        print(ctx.get_help())


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and leave with its exit code. Never returns."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    debug = "--debug" in words[: words.index("--")] if "--" in words else "--debug" in words
    prepare_streams()
    _quiet_warnings(debug)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # torch's waiting threads leave the cores to others
    sys.exit(_run(words, debug))


def _run(words: list[str], debug: bool) -> int:
    try:
        typer.main.get_command(app).main(words, prog_name="chatglm")
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else 0 if leaving.code is None else 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        _forget_stdout()
        return 1
    except ChatGLMError as error:
        if debug:
            traceback.print_exc()
        print(f"chatglm: {error}", file=sys.stderr)
        return 1
    except Exception as error:  # the border of the program: one line for the user, everything with --debug
        if debug:
            traceback.print_exc()
        else:
            print(f"chatglm: unexpected {type(error).__name__}: {_first_line(error)}", file=sys.stderr)
            print("  cure: run the command again with --debug and report what it prints", file=sys.stderr)
        return 1
    return 0


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "")


def _forget_stdout() -> None:
    """The reader of our output has gone; keep the interpreter from complaining when it flushes."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _quiet_warnings(debug: bool) -> None:
    """Our own warnings as one line each; those of libraries only with --debug."""
    if debug:
        return
    warnings.simplefilter("ignore")
    warnings.filterwarnings("default", module=r"chatglm(\.|$)")
    warnings.showwarning = lambda message, *_: print(f"chatglm: warning: {message}", file=sys.stderr)
