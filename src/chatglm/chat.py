"""Conversations on top of the engine: `load`, then `ChatModel.chat`, `stream_chat` and `generate`."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as ListLike
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .checkpoint import check, hub, open_checkpoint
from .checkpoint.adapter import Adapter, is_adapter, open_adapter
from .config import ModelConfig
from .engine.adapters import BASE, open_adapters, with_adapter
from .engine.beam import beam_search
from .engine.cpu_runner import cache_dtype
from .engine.distributed import LeadingRunner, Team, cache_of, gather_team, load_part
from .engine.graph_runner import make_runner
from .engine.loading import LoadedModel, Progress, load_model
from .engine.placement import check_devices, choose_device, free_memory, physical_cores
from .engine.runner import Runner
from .engine.sampler import Sampler
from .engine.sampling import SamplingParams
from .engine.scheduler import Engine
from .engine.sequence import FinishReason, Sequence
from .errors import CheckpointError, RequestError
from .parallel import check_divisible
from .tokenizer import Tokenizer, template
from .tokenizer.answer_text import AnswerText

logger = logging.getLogger(__name__)

History = ListLike[tuple[str, str]]
"""Earlier rounds, oldest first: (question, answer)."""

EMBEDDED_MODEL = Path(__file__).parent / "assets" / "mini"

EMBEDDED = "embedded"
"""What an adapter's folder calls it."""

DEFAULT = "default"
"""Name of the adapter that `load(adapter=…)` was given."""

CACHED_SEQUENCES = 8
"""Full-length sequences that the KV cache holds by default, where memory allows."""


@dataclass(frozen=True)
class Usage:
    """Token counts of one answer, and how many of the oldest rounds did not fit into the context."""

    context_tokens: int
    answer_tokens: int
    dropped_rounds: int = 0


@dataclass(frozen=True)
class Reply:
    """A complete answer.

    text           post-processed as the original does (Chinese punctuation, edge spaces)
    history        the rounds before and this one
    finish_reason  stop, length, cancelled or error
    seed           repeats this answer
    error          what went wrong, when finish_reason is error
    """

    text: str
    history: list[tuple[str, str]]
    finish_reason: FinishReason
    usage: Usage
    seed: int
    error: str | None = None


@dataclass(frozen=True)
class Delta:
    """A piece of a streamed answer; `reply` comes with the last one. Pieces join to `reply.text`."""

    text: str
    reply: Reply | None = None


def load(
    source: str | Path | None = None,
    dtype: str = "auto",
    device: str = "auto",
    *,
    revision: str | None = None,
    threads: int | None = None,
    devices: int = 1,
    max_cached_tokens: int | None = None,
    adapter: str | Path | None = None,
    adapters: Mapping[str, str | Path] | None = None,
    progress: Progress | None = None,
) -> ChatModel:
    """Load a model: a checkpoint folder, the name of one on the hub (already pulled), or None for the embedded model.

    An adapter's folder loads over the base that it names.

    dtype              auto, fp32, fp16, bf16, int8 or int4
    device             auto, cpu, cuda, cuda:N or mps
    revision           of a hub name: branch, tag or commit
    threads            CPU threads; all physical cores by default
    devices            split the model over so many GPUs (with device="cpu": over so many processes)
    max_cached_tokens  size of the KV cache in tokens; by default eight full-length sequences where memory allows
    adapter            a LoRA or P-tuning folder that every answer uses unless it names another
    adapters           further ones by name, for `chat(..., adapter="name")`; all share the base's memory
    Raises a ChatGLMError that names the file, the numbers and the cure.
    """
    if threads is not None and threads < 1:
        raise RequestError(f"threads is {threads}; it must be at least 1")
    torch.set_num_threads(threads or physical_cores())
    source, adapter = base_of(source, adapter)
    folder = EMBEDDED_MODEL if source is None else hub.resolve(str(source), revision=revision)
    folders = {**({} if adapter is None else {DEFAULT: adapter}), **(adapters or {})}
    if devices > 1:
        if folders:
            raise RequestError("adapters run on one device", cure="leave out `devices`, or merge the adapter first")
        return _load_split(folder, dtype, device, devices, max_cached_tokens, progress)
    opened = open_adapters(folders, open_checkpoint(folder).config) if folders else {}
    loaded = load_model(folder, dtype, device, progress=progress)
    return ChatModel(
        loaded,
        max_cached_tokens=max_cached_tokens,
        adapters=opened,
        adapter=None if adapter is None else DEFAULT,
    )


def base_of(source: str | Path | None, adapter: str | Path | None = None) -> tuple[str | Path | None, Any]:
    """(base, adapter) to load where `source` may be the folder of an adapter, which names its base.

    Raises CheckpointError where it names none, and RequestError where two adapters are asked for.
    """
    if source is None or not Path(source).is_dir() or not is_adapter(source):
        return source, adapter
    if adapter is not None:
        raise RequestError(f"{source} is an adapter itself, so {adapter} has no base", cure="give the base model")
    base = open_adapter(source).base
    if base is None:
        raise CheckpointError(
            f"{source} is an adapter that does not name its base model", cure="give the base, and this as the adapter"
        )
    return (None if base == EMBEDDED else base), source


def _load_split(
    folder: Path, dtype: str, device: str, devices: int, max_cached_tokens: int | None, progress: Progress | None
) -> ChatModel:
    """The model over several devices; checked here first, so that an error is one error and not one a process."""
    check(folder)
    config = open_checkpoint(folder).config
    check_devices(device, devices)
    check_divisible(config, devices)
    capacity = max_cached_tokens or config.max_sequence_length + (config.pre_seq_len or 0)
    team = gather_team(partial(load_part, folder, dtype), choose_device(device), devices, capacity)
    loaded = load_model(folder, dtype, str(team.device), group=team.group, progress=progress)
    return ChatModel(loaded, max_cached_tokens=capacity, team=team)


class ChatModel:
    """A loaded model that answers. Calls from several threads are run one after the other."""

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        max_cached_tokens: int | None = None,
        team: Team | None = None,
        adapters: Mapping[str, Adapter] | None = None,
        adapter: str | None = None,
    ) -> None:
        """adapters: by name; adapter: which of them answers where none is named, None: the base."""
        self.loaded = loaded
        self.config: ModelConfig = loaded.config
        self.tokenizer: Tokenizer = loaded.tokenizer
        model = loaded.model
        twins = {name: with_adapter(model, found) for name, found in (adapters or {}).items()}
        longest_prefix = max((twin.config.pre_seq_len or 0 for twin in (model, *twins.values())), default=0)
        capacity = max_cached_tokens or default_cache_tokens(loaded, longest_prefix)
        cache = cache_of(model, capacity)
        rows = torch.tensor(
            [self.tokenizer.has_no_piece(row) for row in range(self.config.vocab_size)], device=model.device
        )
        no_piece = rows if bool(rows.any()) else None
        runner = LeadingRunner(model, cache, team.group) if team else make_runner(model, cache, no_piece=no_piece)
        self._team = team
        self.engine = Engine(runner, Sampler(no_piece, self.config.eos_token_id))
        self.adapter = adapter
        self._engines = {BASE: self.engine}
        for name, twin in twins.items():
            self._engines[name] = Engine(Runner(twin, cache), self.engine.sampler)
        if twins and type(runner) is not Runner:
            logger.info("adapters run in plain PyTorch; the base keeps its %s", type(runner).__name__)
        self._lock = threading.Lock()

    def close(self) -> None:
        """End the worker processes of a model that is split over devices; nothing to do for another."""
        if self._team:
            self._team.close()
            self._team = None

    @property
    def device(self) -> torch.device:
        return self.loaded.model.device

    @property
    def dtype(self) -> str:
        """The form of the weights: fp32, fp16, bf16, int8 or int4."""
        return self.loaded.weights

    @property
    def adapters(self) -> list[str]:
        """Names of the adapters beside the base."""
        return [name for name in self._engines if name != BASE]

    def chat(
        self,
        question: str,
        history: History | None = None,
        system: str | None = None,
        *,
        adapter: str | None = None,
        **sampling: Any,
    ) -> Reply:
        """Answer one question. `sampling` takes the fields of SamplingParams.

        adapter  name of the adapter that answers; "base": none; by default the one that `load(adapter=…)` was given
        The oldest rounds are left out when the context is full; a question that alone does not fit raises
        PromptTooLongError.
        """
        *_, last = self.stream_chat(question, history, system, adapter=adapter, **sampling)
        assert last.reply is not None
        return last.reply

    def stream_chat(
        self,
        question: str,
        history: History | None = None,
        system: str | None = None,
        *,
        adapter: str | None = None,
        **sampling: Any,
    ) -> Iterator[Delta]:
        """The same, one piece a token (empty while nothing is sure). Closing the iterator ends the answer at once."""
        engine = self._engine(adapter)
        params = SamplingParams.from_mapping(sampling)
        rounds = [(str(asked), str(answered)) for asked, answered in history or ()]
        fitted = template.fit(
            self.tokenizer,
            question,
            rounds,
            system=system,
            limit=self.config.max_sequence_length,
            max_new_tokens=params.max_new_tokens,
        )
        sequence = self._sequence(fitted.ids, params)
        return self._stream(engine, sequence, question, rounds, fitted.dropped_rounds)

    def generate(
        self,
        prompts: ListLike[str],
        params: SamplingParams | ListLike[SamplingParams] | None = None,
        *,
        adapter: str | None = None,
        **sampling: Any,
    ) -> list[Reply]:
        """Answer many prompts as one batch, in order. `params` may differ from prompt to prompt."""
        engine = self._engine(adapter)
        if isinstance(prompts, str):
            raise RequestError("prompts is one string; give a list of strings")
        shared = SamplingParams.from_mapping(sampling) if params is None else params
        each = [shared] * len(prompts) if isinstance(shared, SamplingParams) else list(shared)
        if len(each) != len(prompts):
            raise RequestError(f"{len(prompts)} prompts, but {len(each)} sampling settings")
        sequences = []
        for prompt, own in zip(prompts, each, strict=True):
            fitted = template.fit(
                self.tokenizer,
                prompt,
                [],
                system=None,
                limit=self.config.max_sequence_length,
                max_new_tokens=own.max_new_tokens,
            )
            sequences.append(self._sequence(fitted.ids, own))
        with self._lock:
            texts = self._run(sequences, engine)
        return [
            self._reply(sequence, text, prompt, [], 0)
            for sequence, text, prompt in zip(sequences, texts, prompts, strict=True)
        ]

    def _engine(self, adapter: str | None) -> Engine:
        """Raises RequestError for an adapter that was not loaded."""
        name = adapter or self.adapter or BASE
        if name not in self._engines:
            raise RequestError(
                f"adapter {name!r} is not loaded; loaded: {', '.join(self._engines)}",
                cure='chatglm.load(base, adapters={"name": folder})',
            )
        return self._engines[name]

    def _sequence(self, ids: list[int], params: SamplingParams) -> Sequence:
        config = self.config
        room = config.max_sequence_length - len(ids)
        limit = params.max_new_tokens or template.default_max_new_tokens(config.max_sequence_length)
        if params.max_length is not None:
            limit = (
                params.max_length - len(ids)
                if params.max_new_tokens is None
                else min(limit, params.max_length - len(ids))
            )
        return Sequence.from_prompt_ids(
            ids,
            params,
            max_new=max(1, min(limit, room)),
            sop_id=config.bos_token_id,
            gmask_id=config.gmask_token_id,
            mask_id=config.mask_token_id,
        )

    def _stream(
        self, engine: Engine, sequence: Sequence, question: str, rounds: list[tuple[str, str]], dropped: int
    ) -> Iterator[Delta]:
        answer = AnswerText(self.tokenizer, sequence.params.stop)
        with self._lock:
            if sequence.params.num_beams > 1:
                beam_search(engine.runner, engine.sampler, sequence)
                for token in sequence.generated_ids:
                    answer.push(token)
            else:
                try:
                    engine.add(sequence)
                    while not sequence.is_finished:
                        for output in engine.step():
                            if output.token is not None:
                                yield Delta(answer.push(output.token))  # "" while text is held back: a chance to stop
                        _end_where_stopped(sequence, answer)
                finally:
                    engine.abandon([sequence])
        rest = answer.finish()
        _end_where_stopped(sequence, answer)
        streamed = rest if sequence.params.num_beams == 1 else answer.text
        yield Delta(streamed, self._reply(sequence, answer.text, question, rounds, dropped))

    def _run(self, sequences: list[Sequence], engine: Engine | None = None) -> list[str]:
        """All sequences to their end; the text of each."""
        engine = engine or self.engine
        answers = {sequence.number: AnswerText(self.tokenizer, sequence.params.stop) for sequence in sequences}
        try:
            for sequence in sequences:
                if sequence.params.num_beams > 1:
                    beam_search(engine.runner, engine.sampler, sequence)
                    for token in sequence.generated_ids:
                        answers[sequence.number].push(token)
                else:
                    engine.add(sequence)
            while engine.has_work:
                for output in engine.step():
                    answer = answers[output.sequence.number]
                    if output.token is not None:
                        answer.push(output.token)
                        _end_where_stopped(output.sequence, answer)
        finally:
            engine.abandon(sequences)
        for sequence in sequences:
            answers[sequence.number].finish()
            _end_where_stopped(sequence, answers[sequence.number])
        return [answers[sequence.number].text for sequence in sequences]

    def _reply(
        self, sequence: Sequence, text: str, question: str, rounds: list[tuple[str, str]], dropped: int
    ) -> Reply:
        assert sequence.finish_reason is not None
        usage = Usage(sequence.num_prompt_tokens, len(sequence.generated_ids), dropped)
        history = [*rounds, (question, text)]
        return Reply(text, history, sequence.finish_reason, usage, sequence.seed, sequence.error)


def _end_where_stopped(sequence: Sequence, answer: AnswerText) -> None:
    """A stop string was found in the text: the sequence ends with the token that completed it."""
    if answer.is_stopped:
        sequence.finish_reason = "stop"
        del sequence.generated_ids[answer.tokens :]


def default_cache_tokens(loaded: LoadedModel, prefix: int | None = None) -> int:
    """Eight full-length sequences, or as many as fit into a quarter of the free memory, at least one.

    prefix  tokens of the longest tuned prefix [the model's]
    """
    config, device = loaded.config, loaded.model.device
    longest = config.max_sequence_length + ((config.pre_seq_len or 0) if prefix is None else prefix)
    token_bytes = 2 * config.num_layers * config.hidden_size * cache_dtype(loaded.model).itemsize
    free = free_memory(device)
    fitting = CACHED_SEQUENCES if free is None else free // 4 // (longest * token_bytes)
    return longest * max(1, min(CACHED_SEQUENCES, fitting))
