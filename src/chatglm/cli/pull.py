"""`chatglm pull`: a checkpoint from the hub, resumed where a download broke off."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .options import CommonOptions, Revision
from .progress import ProgressBar
from .units import plural


def pull(
    repo: Annotated[str, typer.Argument(help="OWNER/NAME, such as THUDM/chatglm-6b")],
    *,
    to: Annotated[
        Path | None, typer.Option("--to", help="A folder of your own [the hub's cache]", metavar="DIR")
    ] = None,
    revision: Revision = None,
    endpoint: Annotated[
        str | None, typer.Option("--endpoint", help="A mirror [HF_ENDPOINT, else the hub itself]", metavar="URL")
    ] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Ask nobody: what is here, or an error")] = False,
    common: CommonOptions,
) -> None:
    """Download the files of a checkpoint that are needed, and check them.

    Never Python files. An interrupted download goes on when the command is given again; unchanged files are kept.
    HF_ENDPOINT, HF_HUB_OFFLINE, HF_HOME and the usual proxy variables are obeyed; a flag goes before them.

    Try next: chatglm chat REPO
    """
    terminal = common.terminal()
    with ProgressBar(terminal) as progress:
        progress.say(f"asking for {repo}")
        from ..checkpoint import hub, verify

        folder = hub.pull(repo, to, revision, endpoint, offline=offline, progress=progress)
        problems = verify(folder)
    commit = hub.commit_of(folder)
    if common.json:
        facts = {"folder": str(folder), "repo": repo, "commit": commit, "problems": [str(found) for found in problems]}
        print(json.dumps(facts, ensure_ascii=False))
    else:
        print(f"{repo} is in {folder}" + (f" (commit {commit})" if commit else ""))
    if problems:
        terminal.complain("\n".join(map(str, problems)))
        terminal.complain(f"{plural(len(problems), 'problem')} in what was downloaded")
        raise typer.Exit(1)
    again = f" --revision {revision}" if revision and to is None else ""
    terminal.note(f"Try: chatglm chat {to or repo}{again}")
