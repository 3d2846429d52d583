"""Options with the same name and meaning in every command."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated, Any

import typer

from ..engine.sampling import SamplingParams
from ..errors import RequestError
from .streams import Terminal

_DEFAULT = SamplingParams()
_DTYPES = ("auto", "fp32", "fp16", "bf16", "int8", "int4")
_ALIASES = {"float32": "fp32", "float": "fp32", "float16": "fp16", "half": "fp16", "bfloat16": "bf16"}


def dtype_name(value: str) -> str:
    """One of the short names. Raises a usage error that lists them."""
    name = _ALIASES.get(value.lower(), value.lower())
    if name not in _DTYPES:
        raise typer.BadParameter(f"{value!r}; known: {', '.join(_DTYPES)}")
    return name


def _option(*names: str, help: str, panel: str, **more: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, show_default=False, **more)


@dataclass(frozen=True)
class CommonOptions:
    """How the command speaks."""

    json: Annotated[bool, _option("--json", help="Facts and answers as JSON on stdout.", panel="Common")] = False
    quiet: Annotated[bool, _option("--quiet", "-q", help="No greeting, progress or hints.", panel="Common")] = False
    debug: Annotated[bool, _option("--debug", help="A traceback with every error.", panel="Common")] = False

    def terminal(self) -> Terminal:
        return Terminal.detect(quiet=self.quiet)


Revision = Annotated[
    str | None, _option("--revision", metavar="NAME", help="Branch, tag or commit of a hub name", panel="Model")
]


AdapterFolder = Annotated[
    str | None,
    _option("--adapter", metavar="DIR", help="A LoRA or P-tuning folder over MODEL, or its own base", panel="Model"),
]


@dataclass(frozen=True)
class PlacementOptions:
    """Where and in which form the model runs."""

    dtype: Annotated[
        str,
        _option("--dtype", help=f"{', '.join(_DTYPES)} [auto]", panel="Model", metavar="NAME", callback=dtype_name),
    ] = "auto"
    device: Annotated[
        str, _option("--device", metavar="NAME", help="auto, cpu, cuda, cuda:N, mps [auto]", panel="Model")
    ] = "auto"
    devices: Annotated[
        int, _option("--devices", metavar="N", help="Split the model over N devices [1]", panel="Model", min=1)
    ] = 1
    threads: Annotated[
        int | None, _option("--threads", metavar="N", help="CPU threads [all physical cores]", panel="Model", min=1)
    ] = None
    revision: Revision = None

    def check_devices(self) -> None:
        """Raises DeviceError when more devices are asked for than there are."""
        if self.devices > 1:
            from ..engine.placement import check_devices

            check_devices(self.device, self.devices)


@dataclass(frozen=True)
class SamplingOptions:
    """How tokens are chosen; what is left out keeps the model card's value."""

    temperature: Annotated[
        float | None,
        _option("--temperature", metavar="X", help=f"0 is greedy [{_DEFAULT.temperature}]", panel="Sampling"),
    ] = None
    top_p: Annotated[
        float | None,
        _option("--top-p", metavar="X", help=f"Share of probability that is kept [{_DEFAULT.top_p}]", panel="Sampling"),
    ] = None
    top_k: Annotated[
        int | None,
        _option("--top-k", metavar="N", help=f"Tokens that are kept; 0 is all [{_DEFAULT.top_k}]", panel="Sampling"),
    ] = None
    min_p: Annotated[
        float | None,
        _option(
            "--min-p", metavar="X", help="Drop tokens below this share of the best one's probability", panel="Sampling"
        ),
    ] = None
    repetition_penalty: Annotated[
        float | None,
        _option("--repetition-penalty", metavar="X", help="Above 1: fewer repetitions [1.0]", panel="Sampling"),
    ] = None
    presence_penalty: Annotated[
        float | None, _option("--presence-penalty", metavar="X", help="-2 to 2 [0.0]", panel="Sampling")
    ] = None
    frequency_penalty: Annotated[
        float | None, _option("--frequency-penalty", metavar="X", help="-2 to 2 [0.0]", panel="Sampling")
    ] = None
    no_repeat_ngram_size: Annotated[
        int | None,
        _option("--no-repeat-ngram-size", help="No run of N tokens twice in an answer", panel="Sampling", metavar="N"),
    ] = None
    stop: Annotated[
        list[str] | None,
        _option("--stop", help="End the answer before this text (repeatable)", panel="Sampling", metavar="TEXT"),
    ] = None
    seed: Annotated[
        int | None, _option("--seed", metavar="N", help="The same seed, the same answer", panel="Sampling")
    ] = None
    max_new_tokens: Annotated[
        int | None,
        _option(
            "--max-new-tokens", metavar="N", help="Longest answer [512, less for small contexts]", panel="Sampling"
        ),
    ] = None
    max_length: Annotated[
        int | None,
        _option(
            "--max-length", metavar="N", help="The original's limit: question and answer together", panel="Sampling"
        ),
    ] = None
    num_beams: Annotated[
        int | None, _option("--num-beams", metavar="N", help="Beam search with this width [1]", panel="Sampling")
    ] = None
    prompt_lookup: Annotated[
        int | None,
        _option(
            "--prompt-lookup",
            metavar="N",
            help="Guess up to N tokens from earlier text: same answer, sooner where it repeats [0]",
            panel="Sampling",
        ),
    ] = None
    system: Annotated[
        str | None,
        _option(
            "--system",
            metavar="TEXT",
            help="Text before the first question (the model never had one)",
            panel="Sampling",
        ),
    ] = None

    def settings(self) -> dict[str, Any]:
        """What was given, checked. Raises a usage error naming field, value and range."""
        given = {name: value for name, value in asdict(self).items() if name != "system" and value not in (None, [])}
        if "stop" in given:
            given["stop"] = tuple(given["stop"])
        try:
            SamplingParams.from_mapping(given)
        except RequestError as error:
            raise typer.BadParameter(str(error)) from error
        return given


Source = Annotated[
    str | None,
    typer.Argument(help="Checkpoint folder or hub name [the embedded model]", show_default=False, metavar="MODEL"),
]
