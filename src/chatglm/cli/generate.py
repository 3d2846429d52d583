"""`chatglm generate`: answers to a file of prompts, in batches."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ChatGLMError, PromptTooLongError
from .answer_writer import answer_record
from .model_loading import load
from .options import AdapterFolder, CommonOptions, PlacementOptions, SamplingOptions, Source
from .progress import ProgressBar
from .prompt_files import AnswerFile, Prompt, read_prompts
from .source_folder import with_adapter
from .units import plural

if TYPE_CHECKING:
    from ..chat import ChatModel


def generate(
    source: Source = None,
    *,
    prompts: Annotated[
        str,
        typer.Option(
            "--prompts", "-i", help='One prompt a line; .jsonl: a string or {"prompt": …} a line', metavar="FILE"
        ),
    ] = "-",
    out: Annotated[
        str | None,
        typer.Option("--out", "-o", help="One answer a line; .jsonl: one object a line [stdout]", metavar="FILE"),
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Prompts answered together", min=1, metavar="N")] = 8,
    adapter: AdapterFolder = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Begin anew where OUT or its part is there")] = False,
    placement: PlacementOptions,
    sampling: SamplingOptions,
    common: CommonOptions,
) -> None:
    r"""Answer a file of prompts, each on its own, and write one answer a line.

    In a text file a newline inside an answer is written as \n and a backslash as two. An interrupted run goes on where
    it was when the same command is given again. A prompt that cannot be answered gets an error in its place, and the
    exit code is 1.

    Try: printf '你好\nhello\n' | chatglm generate --json
    """
    terminal = common.terminal()
    settings = sampling.settings()
    questions = read_prompts(prompts)
    placement.check_devices()
    source, adapter = with_adapter(source, adapter)
    run = {
        "model": source,
        **({} if adapter is None else {"adapter": adapter}),
        "dtype": placement.dtype,
        "system": sampling.system,
        **settings,
    }
    failures = 0
    with AnswerFile(out, questions, run, as_json=common.json, overwrite=overwrite) as answers:
        if answers.is_resumed:
            terminal.note(f"resumed: {answers.num_done} of {plural(len(questions), 'prompt')} are answered")
        if answers.num_done < len(questions):
            model = load(source, placement, terminal, adapter)
            with closing(model), ProgressBar(terminal, unit="prompts") as progress:
                while answers.num_done < len(questions):
                    batch = questions[answers.num_done : answers.num_done + batch_size]
                    for record in answer_batch(model, batch, sampling.system, settings):
                        failures += "error" in record
                        answers.add(record)
                    progress(answers.num_done, len(questions), "prompts")
        answers.finish()
    if failures:
        terminal.complain(f"{plural(failures, 'prompt')} could not be answered (`error` in the JSON lines)")
    if out not in (None, "-"):
        terminal.note(f"Saved {plural(len(questions), 'answer')} to {out}. Try: head {out}")
    if failures:
        raise typer.Exit(1)


def answer_batch(
    model: ChatModel, batch: list[Prompt], system: str | None, settings: dict[str, Any]
) -> list[dict[str, Any]]:
    """One record a prompt; what makes a single prompt impossible is told in its record."""
    texts = [f"{system}\n{prompt.text}" if system else prompt.text for prompt in batch]
    try:
        replies = model.generate(texts, **settings)
    except PromptTooLongError as error:
        if len(batch) == 1:
            return [{"prompt": batch[0].text, "answer": "", "error": _one_line(error), **batch[0].fields}]
        return [record for prompt in batch for record in answer_batch(model, [prompt], system, settings)]
    return [
        {**answer_record(prompt.text, reply), **prompt.fields} for prompt, reply in zip(batch, replies, strict=True)
    ]


def _one_line(error: ChatGLMError) -> str:
    return str(error).replace("\n", ";")
