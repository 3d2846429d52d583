"""`chatglm bench`: speed and memory of a model here, and what share of the machine's limit that is."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from .options import CommonOptions, PlacementOptions, Source
from .progress import ProgressBar
from .source_folder import source_folder
from .units import human_bytes

SHAPES = ("6b",)
KERNELS = ("auto", "triton", "native", "torch")


def _known(value: str | None, names: tuple[str, ...]) -> str | None:
    if value is not None and value not in names:
        raise typer.BadParameter(f"{value!r}; known: {', '.join(names)}")
    return value


def bench(
    source: Source = None,
    *,
    random: Annotated[
        str | None,
        typer.Option(
            "--random",
            help="Random weights of this shape instead of a model: 6b",
            metavar="SHAPE",
            callback=lambda value: _known(value, SHAPES),
        ),
    ] = None,
    prompt_tokens: Annotated[
        int, typer.Option("--prompt-tokens", help="Tokens of each context [512]", metavar="N", min=3)
    ] = 512,
    new_tokens: Annotated[
        int | None, typer.Option("--new-tokens", help="Timed decode steps [128; 24 on a CPU]", metavar="N", min=2)
    ] = None,
    batch: Annotated[int, typer.Option("--batch", help="Sequences run together [1]", metavar="N", min=1)] = 1,
    repeat: Annotated[
        int | None, typer.Option("--repeat", help="Timed first passes [20; 3 on a CPU]", metavar="N", min=1)
    ] = None,
    group_size: Annotated[
        int | None,
        typer.Option("--group-size", help="Of random quantised weights; 0: a scale a row [64]", metavar="N", min=0),
    ] = None,
    kernel: Annotated[
        str | None,
        typer.Option(
            "--kernel",
            help=f"{', '.join(KERNELS)} [auto]",
            metavar="NAME",
            callback=lambda value: _known(value, KERNELS),
        ),
    ] = None,
    cold: Annotated[
        bool, typer.Option("--cold", help="Also load the model with its files out of the page cache")
    ] = False,
    placement: PlacementOptions,
    common: CommonOptions,
) -> None:
    """Time first passes and decode steps, with greedy tokens on the host in order, and read the memory they take.

    The limits are a device's copy bandwidth and matrix rate, measured in the same run; the kernels are compared with
    plain PyTorch before any figure counts. Exit code 1 where they differ. --devices N: speed of N devices together, in
    plain PyTorch; memory and limits of the first.

    Try next: chatglm bench --random 6b --dtype int4
    """
    if source is not None and random is not None:
        raise typer.BadParameter("a model and --random exclude each other")
    terminal = common.terminal()
    with ProgressBar(terminal) as progress:
        progress.say("starting PyTorch")
        import torch

        from ..engine.placement import choose_device, physical_cores
        from ..evaluation.speed import SpeedSettings, measure_speed

        placement.check_devices()
        is_cpu = choose_device(placement.device).type == "cpu"
        shares = placement.devices if is_cpu else 1
        torch.set_num_threads(placement.threads or max(1, physical_cores() // shares))
        settings = SpeedSettings(
            source=None if random else source_folder(source, placement.revision),
            random_shape=random or "6b",
            dtype=placement.dtype,
            device=placement.device,
            group_size=group_size,
            kernels=kernel,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens or (24 if is_cpu else 128),
            batch=batch,
            repeat=repeat or (3 if is_cpu else 20),
            cold=cold,
            devices=placement.devices,
        )
        facts = measure_speed(settings, progress.say)
    if common.json:
        print(json.dumps(facts, ensure_ascii=False))
    else:
        for line in lines(facts):
            print(line)
    if not facts["parity"]["ok"]:
        terminal.complain(f"the kernels differ from plain PyTorch: {facts['parity']}")
        raise typer.Exit(1)


def lines(facts: dict[str, Any]) -> list[str]:
    """The same for a person."""
    memory = facts["memory"]
    rows = [
        ("model", f"{facts['dtype']}, group {facts['group_size']}, batch {facts['batch']}{_devices(facts)}"),
        ("machine", f"{facts['machine']}, {facts['kernels']} kernels, {facts['threads']} threads"),
        ("decode", _rate(facts, "decode", f"{facts['decode_ms']['median']:.2f} ms a step")),
        ("first pass", _rate(facts, "prefill", f"{facts['prompt_tokens']} tokens, first one after")
         + f" {facts['time_to_first_token_s']:.3f} s"),
        ("limits", f"{facts['bandwidth_bytes_per_s'] / 1e9:,.0f} GB/s, "
         f"{facts['matmul_flops_per_s'] / 1e9:,.0f} GFLOP/s, measured in the same run"),
        ("memory", ", ".join(f"{name} {human_bytes(size)}" for name, size in memory.items() if size is not None)),
        ("load", _load_times(facts)),
        ("parity", f"relative error {facts['parity']['error']:.1e}, quiet machine: {facts['quiet']}"),
    ]  # fmt: skip
    return [f"{name:<11} {value}" for name, value in rows]


def _devices(facts: dict[str, Any]) -> str:
    return "" if facts["devices"] == 1 else f", {facts['devices']} devices"


def _load_times(facts: dict[str, Any]) -> str:
    cold = "" if facts["load_cold_s"] is None else f" ({facts['load_cold_s']:.2f} s from the disk)"
    return f"{facts['load_s']:.2f} s{cold}, first token after {facts['first_token_s']:.2f} s"


def _rate(facts: dict[str, Any], what: str, detail: str) -> str:
    rate, limit = facts[f"{what}_tokens_per_s"], facts[f"limit_{what}_tokens_per_s"]
    return f"{rate:,.1f} tokens/s, {facts[f'{what}_fraction']:.0%} of {limit:,.0f} ({detail})"
