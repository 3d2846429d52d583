"""Small engines over golden models."""

from __future__ import annotations

import pytest
import torch

from chatglm.engine import Engine, KVCache, Runner, Sampler, SamplingParams, Sequence
from chatglm.model import GLM, plain_attention
from golden_vectors import plain_model

GREEDY = SamplingParams(temperature=0)


def engine_of(model: GLM, capacity: int = 1024, attend=plain_attention) -> Engine:
    """An engine whose unused cache slots are poisoned: reading one shows as NaN."""
    cache = KVCache(model.config, capacity, model.dtype, model.device)
    cache.keys[:, 16:] = torch.nan
    cache.values[:, 16:] = torch.nan
    return Engine(Runner(model, cache, attend), Sampler(None, model.config.eos_token_id))


def sequence_of(model: GLM, ids: list[int], params: SamplingParams = GREEDY, max_new: int = 16) -> Sequence:
    config = model.config
    return Sequence.from_prompt_ids(
        ids,
        params,
        max_new=max_new,
        sop_id=config.bos_token_id,
        gmask_id=config.gmask_token_id,
        mask_id=config.mask_token_id,
    )


@pytest.fixture(scope="session")
def base() -> GLM:
    return plain_model("base-fp32")
