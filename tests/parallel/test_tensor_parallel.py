"""Two processes hold one model and give the logits and answers of one."""

from __future__ import annotations

import shutil

import pytest
import torch

from chatglm import SamplingParams
from chatglm.chat import load
from chatglm.config import read_config
from chatglm.errors import DeviceError
from chatglm.model import GLM
from chatglm.parallel import check_divisible, shard_model
from chatglm.parallel.sharding import local_heads, part_of
from golden_vectors import assert_close, plain_model, tensors_of

MODELS = ["base-fp32", "oned-fp32", "ptuning", "ptuning-projection", "int8", "int4"]


@pytest.fixture
def folder(golden, tmp_path):
    def prepare(name: str):
        target = tmp_path / name
        shutil.copytree(golden / "models" / name, target)
        for file in (golden / "tokenizer-reduced").iterdir():
            shutil.copy(file, target)
        return target

    return prepare


@pytest.mark.parametrize("name", MODELS)
def test_parts_have_the_shapes_of_the_sharded_model_and_join_to_the_whole(name, golden):
    config = read_config(golden / "models" / name / "config.json")
    stored = tensors_of(name)
    for tensor_name, tensor in stored.items():
        parts = [part_of(tensor_name, tensor, config, rank, 2) for rank in range(2)]
        if tensor_name.endswith(("attention.dense.bias", "dense_4h_to_h.bias")):
            assert torch.equal(parts[0] + parts[1], tensor)
        elif parts[0].shape == tensor.shape:
            assert torch.equal(parts[0], tensor)
        else:
            assert sum(part.numel() for part in parts) == tensor.numel()
            assert sorted(torch.cat([part.flatten() for part in parts]).tolist()) == sorted(tensor.flatten().tolist())
    if not config.quantization_bit:
        with torch.device("meta"):
            model = GLM(config)
        shard_model(model, 1, 2)
        assert local_heads(model) == config.num_heads // 2
        for tensor_name, place in model.state_dict().items():
            if tensor_name in stored:
                assert part_of(tensor_name, stored[tensor_name], config, 1, 2).shape == place.shape, tensor_name


def test_heads_that_do_not_divide_are_refused_with_both_numbers():
    config = plain_model("base-fp32").config
    with pytest.raises(DeviceError, match="4 heads cannot be split evenly over 3 devices"):
        check_divisible(config, 3)


@pytest.mark.parametrize("name", MODELS)
def test_two_processes_answer_as_one(name, folder):
    source = folder(name)
    prompts = ["你好", "hello world, what is this?"]
    settings = {"temperature": 0, "max_new_tokens": 12}
    alone = load(source, dtype="auto" if name.startswith("int") else "fp32", device="cpu", threads=1)
    expected = alone.generate(prompts, **settings)
    logits = first_logits(alone)
    team = load(source, dtype="auto" if name.startswith("int") else "fp32", device="cpu", threads=1, devices=2)
    try:
        assert_close(first_logits(team), logits)
        assert [reply.text for reply in team.generate(prompts, **settings)] == [reply.text for reply in expected]
        beams = {"num_beams": 2, "max_new_tokens": 8}
        assert team.chat("你好", **beams).text == alone.chat("你好", **beams).text
        ahead = team.chat("你好", temperature=0, max_new_tokens=20, prompt_lookup=4)
        assert ahead.text == alone.chat("你好", temperature=0, max_new_tokens=20).text
    finally:
        team.close()


def first_logits(model) -> torch.Tensor:
    config = model.config
    ids = [11, 25, 36, config.gmask_token_id, config.bos_token_id]
    sequence = model._sequence(ids, SamplingParams())
    sequence.slots = model.engine.runner.cache.allocate(32)
    logits = model.engine.runner.prefill([sequence]).clone()
    model.engine.runner.cache.release(sequence.slots)
    return logits
