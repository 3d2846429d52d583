"""Backend: the model, its engine thread and the requests that are alive; what every route works with."""

from __future__ import annotations

import asyncio
import hashlib
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from .. import __version__
from ..engine.adapters import open_adapters
from ..engine.loading import LoadedModel
from ..engine.sampling import SamplingParams
from ..engine.serving import ServingEngine
from ..engine.serving_setup import EngineBuilder
from ..engine.serving_state import EngineLimits, StreamEvent
from ..engine.stream import Choices, Group, Matcher, make_group
from ..engine.thread import EngineThread
from ..errors import RequestError
from .api_errors import APIError
from .exchange import Exchange
from .faults import Faults
from .feedback.forwarding import FeedbackForwarder
from .feedback.keeping import FeedbackKeeper
from .feedback.store import FeedbackStore
from .grammar import Grammars
from .metrics import Metrics
from .rate_limits import RateLimits
from .settings import ServerSettings

T = TypeVar("T")


@dataclass(frozen=True)
class Owner:
    """Who asks: the name of a key, or an address. `bucket` is what rates and queues count by."""

    bucket: str
    key_name: str | None = None


class Backend:
    """Made before the loop runs; `open` and `close` inside it."""

    def __init__(self, loaded: LoadedModel, settings: ServerSettings) -> None:
        self.loaded = loaded
        self.settings = settings
        self.tokenizer = loaded.tokenizer
        self.context = loaded.config.max_sequence_length
        self.model_name = settings.served_model_name
        self.created = int(time.time())
        self.fingerprint = f"{_weights_hash(loaded)}-{__version__}"
        self.faults = Faults.parse(settings.faults)
        limits = EngineLimits(
            max_running=settings.max_running,
            queue_timeout_s=settings.queue_timeout_s,
            request_timeout_s=settings.request_timeout_s,
            context_cache_s=settings.context_cache_s,
            prefill_budget=settings.prefill_budget,
            preempt=settings.preempt,
            deterministic=settings.deterministic,
            pool_blocks=self.faults.pool_blocks,
        )
        self.adapters = open_adapters(settings.adapters, loaded.config)
        build = EngineBuilder(loaded, limits, settings.kv_memory, self.faults.change_logits, self.adapters)
        self.thread = EngineThread(self.faults.wrap(build), self._deliver, self._fail, max_waiting=settings.max_waiting)
        self.grammars = Grammars(self.tokenizer, loaded.config.vocab_size)
        memory = {"weights_bytes": _weights_bytes(loaded)}
        if build.warm is not None:
            memory["activation_peak_bytes"] = build.warm.activation_bytes
        self.metrics = Metrics(self.thread, self.model_name, settings.metrics_prefix, memory)
        self.rates = RateLimits(settings.rate_limit, settings.token_limit)
        self.feedback: FeedbackKeeper | None = None
        if settings.feedback_db is not None:
            store = FeedbackStore(settings.feedback_db)
            self.faults.fill(store)
            self.feedback = FeedbackKeeper(store, self.metrics)
        elif settings.feedback_url is not None and settings.feedback_spool is not None:
            forwarder = FeedbackForwarder(settings.feedback_url, settings.feedback_key, settings.feedback_spool)
            self.feedback = FeedbackKeeper(forwarder, self.metrics)
        self.is_draining = False
        self._exchanges: dict[str, Exchange] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._watchdog: asyncio.Task[None] | None = None
        self.on_broken: Callable[[], None] = lambda: None

    async def open(self) -> None:
        """Start the engine; from here on requests are served."""
        self._loop = asyncio.get_running_loop()
        self.thread.start()
        self._watchdog = asyncio.create_task(self._watch())

    async def close(self) -> None:
        """Stop the engine's thread; feedback that waits is written."""
        if self._watchdog is not None:
            self._watchdog.cancel()
        await asyncio.to_thread(self.thread.stop)
        if self.feedback is not None:
            await asyncio.to_thread(self.feedback.store.close)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(0.25)
            await asyncio.to_thread(self.thread.watch, self.faults.hang_s)
            if self.thread.is_broken:
                self.on_broken()

    # State

    def unready_reason(self) -> str | None:
        """Why a request sent now would be refused; None when it would be served."""
        if self.is_draining:
            return "draining"
        if self.thread.is_broken or not self.thread.is_ready or not self.thread.is_alive:
            return "engine_restarting"
        return "overloaded" if self.thread.is_full else None

    @property
    def num_live(self) -> int:
        """Requests whose handlers have not finished."""
        return len(self._exchanges)

    @property
    def model_ids(self) -> dict[str, str | None]:
        """What requests may name, and the adapter that each means."""
        return {self.model_name: None, **{f"{self.model_name}:{name}": name for name in self.adapters}}

    def check_model(self, name: str) -> str | None:
        """The adapter that a model's name means, None for the base. Raises APIError 404 for one that is not served."""
        served = self.model_ids
        if name not in served:
            raise APIError(
                404, "model_not_found", f"model {name[:64]!r} is not served; served: {', '.join(served)}", param="model"
            )
        return served[name]

    # Requests

    def submit(
        self,
        owner: Owner,
        prompt_ids: list[int],
        params: SamplingParams,
        *,
        max_new: int,
        n: int,
        seed: int | None,
        shared: Choices,
        matchers: list[Matcher] | None = None,
        adapter: str | None = None,
    ) -> Exchange:
        """Hand a request to the engine. Raises APIError when it cannot be taken."""
        group = make_group(
            uuid.uuid4().hex,
            owner.bucket,
            prompt_ids,
            params,
            self.tokenizer,
            arrived=time.monotonic(),
            max_new=max_new,
            n=n,
            seed=seed,
            shared=shared,
            matchers=matchers,
            adapter=adapter,
        )
        reason = self.unready_reason()
        if reason is not None:
            self._refuse(reason)
        exchange = Exchange(self.thread, group)
        self._exchanges[group.id] = exchange
        try:
            if not self.thread.submit(group):
                self._refuse("overloaded")
        except RequestError as error:
            del self._exchanges[group.id]
            raise APIError(400, "exceeds_kv_memory", f"{error.message}; {error.cure}") from None
        except APIError:
            del self._exchanges[group.id]
            raise
        self.rates.charge(owner.bucket, group.num_prompt_tokens)
        return exchange

    def _refuse(self, reason: str) -> None:
        self.metrics.count(self.metrics.rejected, reason)
        words = {
            "draining": "the server is shutting down; ask another one",
            "engine_restarting": "the engine is being restarted",
            "overloaded": f"{self.thread.max_waiting} requests wait already",
        }
        wait = min(60, max(1, self.thread.num_waiting // 8)) if reason == "overloaded" else 1
        raise APIError(503, reason, words[reason], headers={"Retry-After": str(wait)})

    def release(self, owner: Owner, exchange: Exchange) -> None:
        """The handler is done with it; what still runs is cancelled."""
        if self._exchanges.pop(exchange.group.id, None) is None:
            return
        if exchange.group.state != "finished":
            exchange.cancel()
        tokens = sum(stream.num_sampled for stream in exchange.group.streams)
        self.rates.charge(owner.bucket, tokens)
        self.metrics.note_end(exchange.group, exchange.finish or "cancelled")

    async def in_engine(self, job: Callable[[ServingEngine], T]) -> T:
        """Run a job in the engine's thread."""
        reason = self.unready_reason()
        if reason is not None:
            self._refuse(reason)
        return await asyncio.wrap_future(self.thread.call(job))

    def _deliver(self, events: list[StreamEvent]) -> None:
        """In the engine's thread."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._dispatch, events)

    def _dispatch(self, events: list[StreamEvent]) -> None:
        for event in events:
            exchange = self._exchanges.get(event.group.id)
            if exchange is not None:
                exchange.put(event)

    def _fail(self, groups: list[Group]) -> None:
        """In whichever thread noticed that the engine failed."""

        def tell() -> None:
            for group in groups:
                exchange = self._exchanges.get(group.id)
                if exchange is not None:
                    exchange.fail("internal_error")

        if self._loop is not None:
            self._loop.call_soon_threadsafe(tell)


def _weights_bytes(loaded: LoadedModel) -> int:
    """Parameters and buffers; what is shared counts once."""
    tensors = {tensor.data_ptr(): tensor for tensor in [*loaded.model.parameters(), *loaded.model.buffers()]}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _weights_hash(loaded: LoadedModel) -> str:
    """Names, sizes and ends of the checkpoint's files; cheap even for many gigabytes."""
    digest = hashlib.sha256()
    for file in sorted(loaded.folder.glob("*")):
        if file.suffix in (".safetensors", ".bin", ".json", ".model"):
            digest.update(f"{file.name} {file.stat().st_size}".encode())
            with file.open("rb") as stream:
                stream.seek(max(0, file.stat().st_size - 4096))
                digest.update(stream.read())
    return "fp_" + digest.hexdigest()[:12]
