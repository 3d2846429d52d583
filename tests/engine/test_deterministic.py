"""`deterministic`: a quantised model's answers are the same bits alone, in a batch and after a preemption."""

from __future__ import annotations

import pytest
import torch

from chatglm.chat import EMBEDDED_MODEL
from chatglm.engine.loading import LoadedModel, load_model
from chatglm.engine.sampling import SamplingParams
from chatglm.engine.serving import ServingEngine
from chatglm.engine.serving_setup import EngineBuilder
from chatglm.engine.serving_state import EngineLimits
from chatglm.engine.stream import Choices, make_group
from chatglm.engine.thread import run_to_end

WORDS = ["你好", "hello, who are you?", "今天天气怎么样", "tell me a story " * 6, "1+1=?"]


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_model(EMBEDDED_MODEL, "int8", "cpu")


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def answers(engine: ServingEngine, loaded: LoadedModel, words: list[str], count: int) -> dict[str, list]:
    """Tokens with their log-probabilities, by question."""
    groups = [
        make_group(
            word,
            "key",
            loaded.tokenizer.encode_context(word),
            SamplingParams(temperature=0),
            loaded.tokenizer,
            arrived=float(number),
            max_new=count,
            shared=Choices(ignore_eos=True, logprobs=0),
        )
        for number, word in enumerate(words)
    ]
    found: dict[str, list] = {word: [] for word in words}
    for event in run_to_end(engine, groups):
        found[event.group.id] += [(info.token, info.logprob) for info in event.infos]
    return found


@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_answers_are_the_same_bits_alone_together_and_after_a_preemption(loaded, kernels, monkeypatch):
    monkeypatch.setenv("CHATGLM_KERNELS", kernels)
    count = 12 if kernels == "auto" else 3
    limits = EngineLimits(
        max_running=8, context_cache_s=0, deterministic=True, prefill_budget=1 << 20, queue_timeout_s=1e9,
        request_timeout_s=1e9,
    )  # fmt: skip
    build = EngineBuilder(loaded, limits, 60_000_000)
    engine = build()
    assert build.warm is not None and build.warm.is_invariant
    together = answers(engine, loaded, WORDS, count)
    words = WORDS if kernels == "auto" else WORDS[:2]
    for word in words:
        assert answers(build(), loaded, [word], count) == {word: together[word]}
    if kernels == "auto":
        short = EngineBuilder(loaded, EngineLimits(**{**vars(limits), "pool_blocks": 8}), 60_000_000)()
        assert answers(short, loaded, WORDS, count) == together
        assert short.counters.preemptions > 0
