"""What --dry-run tells of the stages that learn from preferences: files and descriptions are read, no weights."""

from __future__ import annotations

from typing import Any

from ...errors import TrainingError
from ..adapters.costs import costs
from ..forecast import forecast, lines_of
from ..schedules import steps_for
from ..starting import starting_config, starting_tokenizer
from ..text_stage import opened
from .bootstrap_stage import BootstrapRun, check_bootstrap
from .dpo_stage import DPORun
from .online_stage import OnlineRun, PPORun, RLOORun, check_online, prompts_of
from .preferences import Pair, balance_lengths
from .reward_stage import RewardRun, read_pairs

FLOAT_BYTES = 4


def look_at_pairs(run: RewardRun | DPORun) -> dict[str, Any]:
    """Pairs, and what training on them takes."""
    config = starting_config(run.model)
    pairs, held = read_pairs(run.data, run.model, run.seed, run.batch.length)
    used = _balanced(run, pairs)
    steps = run.steps if run.steps is not None else steps_for(round(len(used) * (run.epochs or 1)), run.batch)
    told = forecast(run, config, steps=steps)
    data = {"pairs": len(used), "held_out": len(held), "left_out_for_balance": len(pairs) - len(used)}
    left = f", {data['left_out_for_balance']:,} left out so that length tells nothing" if len(pairs) > len(used) else ""
    line = f"data       {len(used):,} pairs, {len(held):,} held out{left}"
    return {"forecast": told.as_mapping(), "data": data, "lines": [*lines_of(told), line]}


def _balanced(run: RewardRun | DPORun, pairs: list[Pair]) -> list[Pair]:
    if not isinstance(run, RewardRun) or not run.reward.balance:
        return pairs
    used = balance_lengths(pairs, bin_tokens=run.reward.bin_tokens, seed=run.seed)
    if not used:
        raise TrainingError("no pair is left when lengths are balanced", cure="reward.balance: false")
    return used


def look_at_prompts(run: OnlineRun) -> dict[str, Any]:
    """Prompts, rounds, and the memory of all roles: what learns, the frozen reference, the reward model."""
    config = starting_config(run.model)
    prompts, held = check_online(run)
    if run.data.general:
        opened(run.data.general, run, config, "data.general")
    each = run.group.answers if isinstance(run, RLOORun) else 1
    has_value = isinstance(run, PPORun) and run.ppo.value == "separate"
    trained, frozen = costs(run) or (config.num_parameters, config.num_parameters * FLOAT_BYTES)  # with the reference
    frozen += (bool(run.reward.model) + bool(run.reward.alarm)) * config.num_parameters * FLOAT_BYTES
    trained += config.num_parameters if has_value else 0
    told = forecast(run, config, trained=trained, frozen_bytes=frozen)
    data = {"prompts": len(prompts), "held_out": len(held), "answers_a_round": run.online.prompts * each}
    line = f"data       {len(prompts):,} prompts, {len(held):,} held out; {data['answers_a_round']:,} answers a round"
    return {"forecast": told.as_mapping(), "data": data, "lines": [*lines_of(told), line, "(roll-outs not counted)"]}


def look_at_bootstrap(run: BootstrapRun) -> dict[str, Any]:
    """Prompts and rounds."""
    check_bootstrap(run)
    config = starting_config(run.model)
    tokenizer = starting_tokenizer(run.model, config)
    prompts, held = prompts_of(run.data, run.seed, run.bootstrap.max_new, tokenizer, config)
    known = opened(run.data.general, run, config, "data.general")
    settings = run.bootstrap
    frozen = (2 + bool(run.reward.model)) * config.num_parameters * FLOAT_BYTES
    told = forecast(run, config, frozen_bytes=frozen, steps=(run.steps or 0) * settings.rounds)
    data = {
        "prompts": len(prompts),
        "held_out": len(held),
        "answers_a_round": min(settings.prompts or len(prompts), len(prompts)) * settings.answers,
        "known_rows": known.rows_per_epoch,
    }
    line = (
        f"data       {len(prompts):,} prompts, {len(held):,} held out; {data['answers_a_round']:,} answers in each of "
    )
    line += f"{settings.rounds} rounds, {known.rows_per_epoch:,} rows of known data"
    return {"forecast": told.as_mapping(), "data": data, "lines": [*lines_of(told), line, "(roll-outs not counted)"]}
