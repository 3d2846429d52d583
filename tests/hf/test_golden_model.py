"""The original's vectors through the transformers classes."""

from __future__ import annotations

import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModel

import chatglm.hf
from golden_vectors import GOLDEN, Case, assert_close, cases

FP32_MODELS = ("base-fp32", "oned-fp32", "ptuning", "ptuning-projection")
QUANTISED = ("int8", "int4", "int4-qe")


@cache
def model_of(name: str) -> Any:
    """`models/<name>` as a user opens it, in fp32."""
    return AutoModel.from_pretrained(str(GOLDEN / "models" / name), trust_remote_code=True).float().eval()


def binding(names: tuple[str, ...], *kinds: str) -> list[Any]:
    return [
        pytest.param(name, case, id=f"{name}-{case.id}")
        for name in names
        for case in cases(name, *kinds)
        if case.raw.get("binding", True)
    ]


def real_tokens(case: Case) -> Tensor:
    """Which tokens are no padding, bool [batch, tokens]."""
    ids = case.inputs.get("input_ids")
    mask = case.inputs.get("attention_mask")
    if ids is None or mask is None or not case.raw.get("texts"):
        return torch.ones(case.outputs["logits"].shape[:2], dtype=torch.bool)
    return ~mask[:, 0].all(dim=1)


def compare_outputs(output: Any, case: Case) -> None:
    real = real_tokens(case)
    for name, expected in case.outputs.items():
        if name == "logits":
            assert_close(output.logits[real], expected[real])
        elif name == "loss":
            assert output.loss.item() == pytest.approx(expected.item(), rel=1e-5)
        elif name.startswith("hidden_states."):
            index = int(name.split(".")[1])
            assert_close(output.hidden_states[index][real.T], expected[real.T])
        elif name.startswith("past."):
            _, layer, part = name.split(".")
            found = output.past_key_values[int(layer)][("key", "value").index(part)]
            prefix = torch.ones(expected.shape[0] - real.shape[1], len(real), dtype=torch.bool)
            kept = torch.cat((prefix, real.T))
            assert_close(found[kept], expected[kept])
        elif name.startswith("attentions."):
            assert_close(output.attentions[int(name.split(".")[1])], expected)
        else:
            raise AssertionError(name)


@pytest.mark.parametrize(("name", "case"), binding(FP32_MODELS, "forward"))
@torch.no_grad()
def test_forward_gives_the_originals_outputs(name: str, case: Case) -> None:
    output = model_of(name)(
        **case.inputs,
        use_cache=True,
        output_hidden_states=True,
        output_attentions=any(key.startswith("attentions") for key in case.outputs),
    )
    compare_outputs(output, case)
    layers = model_of(name).config.num_layers
    assert len(output.hidden_states) == layers + 1 and len(output.past_key_values) == layers


@pytest.mark.parametrize(("name", "case"), binding(("base-fp32",), "mask_and_positions"))
@torch.no_grad()
def test_given_mask_and_positions_equal_the_derived_ones(name: str, case: Case) -> None:
    model = model_of(name)
    ids = case.inputs["input_ids"]
    assert torch.equal(model.get_masks(ids, ids.device), case.outputs["attention_mask"])
    assert torch.equal(model.get_position_ids(ids), case.outputs["position_ids"])
    derived = model(ids)
    assert_close(model(case.inputs["input_ids"], **case.outputs).logits, derived.logits, 1e-6)


@pytest.mark.parametrize("as_tuple", [False, True])
@torch.no_grad()
def test_cached_decode_equals_the_original_and_the_full_pass(as_tuple: bool) -> None:
    (case,) = cases("base-fp32", "cached_decode")
    model, ids, prefill = model_of("base-fp32"), case.inputs["input_ids"], case.raw["prefill"]
    output = model(ids[:, :prefill], use_cache=True)
    assert_close(output.logits, case.outputs["prefill.logits"])
    steps: list[Tensor] = []
    for step in range(ids.shape[1] - prefill):
        past = tuple(output.past_key_values) if as_tuple else output.past_key_values
        output = model(
            ids[:, prefill + step : prefill + step + 1],
            past_key_values=past,
            position_ids=torch.tensor([[[7], [2 + step]]]),
            use_cache=True,
        )
        assert_close(output.logits, case.outputs[f"step.{step}.logits"])
        steps.append(output.logits)
    for layer in range(model.config.num_layers):
        key, value = output.past_key_values[layer]
        assert_close(key, case.outputs[f"past.{layer}.key"])
        assert_close(value, case.outputs[f"past.{layer}.value"])
    full = model(ids).logits
    assert_close(full, case.outputs["full.logits"])
    assert_close(torch.cat(steps, dim=1), full[:, prefill:])


@torch.no_grad()
def test_several_tokens_over_a_cache_equal_the_original() -> None:
    (case,) = cases("base-fp32", "cached_decode_chunk")
    model, ids, prefill = model_of("base-fp32"), case.inputs["input_ids"], case.raw["prefill"]
    past = model(ids[:, :prefill], use_cache=True).past_key_values
    positions = case.inputs.get("position_ids")
    if positions is None:
        count = ids.shape[1] - prefill
        positions = torch.stack((torch.full((count,), 7), torch.arange(2, 2 + count)))[None]
    output = model(
        ids[:, prefill:], past_key_values=past, position_ids=positions, attention_mask=case.inputs["attention_mask"]
    )
    assert_close(output.logits, case.outputs["logits"])


@pytest.mark.parametrize(("name", "case"), binding(FP32_MODELS, "gradients"))
def test_gradients_equal_the_originals(name: str, case: Case) -> None:
    model = model_of(name)
    is_ptuning = model.config.pre_seq_len is not None
    model.train(not is_ptuning)  # eval mode leaves out the dropout of a prefix
    trained = {parameter for parameter, value in model.named_parameters() if value.requires_grad}
    if is_ptuning:
        assert trained == set(case.raw["requires_grad"])
    model.zero_grad()
    output = model(**case.inputs)
    output.loss.backward()
    model.eval()
    assert output.loss.item() == pytest.approx(case.outputs["loss"].item(), rel=1e-5)
    parameters = dict(model.named_parameters())
    for key, expected in case.outputs.items():
        if key.startswith("grad."):
            assert_close(parameters[key.removeprefix("grad.")].grad, expected, 1e-3)
    model.zero_grad()


@pytest.mark.parametrize(("name", "case"), binding(("ptuning", "ptuning-projection"), "prefix_cache"))
@torch.no_grad()
def test_a_prefix_alone_fills_the_cache_as_in_the_original(name: str, case: Case) -> None:
    model = model_of(name)
    sop, gmask = model.config.bos_token_id, model.config.gmask_token_id
    past = model(torch.tensor([[gmask, sop]]), use_cache=True).past_key_values
    prefix = model.config.pre_seq_len
    for layer in range(model.config.num_layers):
        found = torch.stack([part[:prefix] for part in past[layer]])
        assert_close(found, case.outputs[f"past.{layer}"])
        assert torch.equal(model.transformer.get_prompt(1, dtype=torch.float32)[layer], found)


GENERATED = binding(("base-fp32-generate", "oned-fp32", "ptuning", "ptuning-projection"), "generate")
GENERATED += binding(tuple(f"checkpoint-{name}" for name in QUANTISED), "generate")


def name_of_model(name: str) -> str:
    return name.removesuffix("-generate").removeprefix("checkpoint-")


@pytest.mark.parametrize(("name", "case"), GENERATED)
def test_generate_gives_the_originals_ids(name: str, case: Case) -> None:
    ids = model_of(name_of_model(name)).generate(**case.inputs, **case.raw["generate_kwargs"])
    assert ids.tolist() == case.outputs["ids"]


@pytest.mark.parametrize(
    ("name", "case"), [p for p in GENERATED if "num_beams" not in p.values[1].raw["generate_kwargs"]]
)
def test_generate_without_a_cache_gives_the_same_ids(name: str, case: Case) -> None:
    ids = model_of(name_of_model(name)).generate(**case.inputs, **case.raw["generate_kwargs"], use_cache=False)
    assert ids.tolist() == case.outputs["ids"]


@pytest.mark.parametrize(("name", "case"), binding(("base-fp32-generate",), "stream_generate"))
def test_stream_generate_yields_the_originals_steps_and_the_last_token(name: str, case: Case) -> None:
    model, kwargs = model_of("base-fp32"), case.raw["generate_kwargs"]
    prompt = case.inputs["input_ids"].shape[1]
    steps = list(model.stream_generate(**case.inputs, **kwargs))
    expected = case.outputs["new_ids_per_yield"]
    assert [step[0, prompt:].tolist() for step in steps[:-1]] == expected
    assert torch.equal(steps[-1], model.generate(**case.inputs, **kwargs))


@pytest.mark.parametrize(("name", "case"), binding(("base-fp16",), "forward_fp16"))
@torch.no_grad()
def test_fp16_is_no_further_from_fp32_than_the_original(name: str, case: Case) -> None:
    model = AutoModel.from_pretrained(str(GOLDEN / "models" / name)).half()
    output = model(**case.inputs)
    assert output.logits.isfinite().all()
    distance = (output.logits.float() - case.outputs["fp32.logits"]).abs().max().item()
    assert distance <= case.raw["max_abs_distance_fp16_fp32"]
    assert_close(model.float()(**case.inputs).logits, case.outputs["fp32.logits"])


@pytest.mark.parametrize(("name", "case"), binding(("base-fp16",), "generate_fp16"))
def test_fp16_generates_the_originals_ids(name: str, case: Case) -> None:
    model = AutoModel.from_pretrained(str(GOLDEN / "models" / name)).half()
    ids = model.generate(**case.inputs, **case.raw["generate_kwargs"])
    assert ids.tolist() in (case.outputs["fp16_ids"], case.outputs["fp32_ids"])


@pytest.mark.parametrize(
    ("name", "case"), binding(tuple(f"checkpoint-{name}" for name in QUANTISED), "forward_quantised")
)
@torch.no_grad()
def test_a_quantised_checkpoint_gives_the_originals_logits(name: str, case: Case) -> None:
    assert_close(model_of(name_of_model(name))(**case.inputs).logits, case.outputs["logits"])


@pytest.mark.parametrize(("name", "case"), binding(("slim-full-vocab",), "forward_top"))
@torch.no_grad()
def test_the_best_scores_of_the_real_vocabulary_equal_the_originals(name: str, case: Case) -> None:
    logits = model_of(name)(**case.inputs).logits[0, -1]
    expected = case.outputs["top20_logits"]
    best = logits.topk(20)
    assert_close(best.values, expected)
    assert set(best.indices[:10].tolist()) == set(case.outputs["top20_ids"][:10])
    sampled = next(value for key, value in case.outputs.items() if key.startswith("sampled_logits"))
    assert_close(logits[::1009], sampled)


@pytest.mark.parametrize(("name", "case"), binding(("preslim-full-vocab",), "forward_preslim"))
@torch.no_grad()
def test_a_first_release_checkpoint_gives_its_logits(name: str, case: Case) -> None:
    assert_close(model_of(name)(**case.inputs).logits[0, :, ::499], case.outputs["e551.logits_every_499th"])


@pytest.mark.parametrize(
    ("name", "case"),
    [pytest.param("preslim-full-vocab", case, id=case.id) for case in cases("preslim-full-vocab", "generate_preslim")],
)
def test_a_first_release_checkpoint_generates_its_ids(name: str, case: Case) -> None:
    ids = model_of(name).generate(**case.inputs, **case.raw["generate_kwargs"])
    assert ids[0].tolist() == case.outputs["e551_ids"]


@pytest.fixture(scope="module")
def slim_of_first_release(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from chatglm.checkpoint import convert

    folder = tmp_path_factory.mktemp("slim") / "converted"
    convert(GOLDEN / "models" / "preslim-full-vocab", folder, to_slim=True)
    return AutoModel.from_pretrained(str(folder)).float()


def test_a_first_release_checkpoint_converted_to_slim_generates_the_later_releases_ids(
    slim_of_first_release: Any,
) -> None:
    for case in cases("preslim-full-vocab", "generate_preslim"):
        ids = slim_of_first_release.generate(case.inputs["input_ids"] - 20_000, **case.raw["generate_kwargs"])
        assert [index + 20_000 for index in ids[0].tolist()] == case.outputs["v110_slim_ids"]


@pytest.mark.parametrize("name", ["ptuning", "ptuning-projection"])
@torch.no_grad()
def test_a_prefix_only_state_dict_loads_over_the_base(name: str, tmp_path: Path) -> None:
    whole = GOLDEN / "models" / name
    base = tmp_path / "base"
    base.mkdir()
    shutil.copy(whole / "config.json", base)
    state = torch.load(whole / "pytorch_model.bin", weights_only=True)
    torch.save({key: value for key, value in state.items() if "prefix_encoder" not in key}, base / "pytorch_model.bin")
    config = chatglm.hf.ChatGLMConfig.from_pretrained(str(whole))
    sizes = {"pre_seq_len": config.pre_seq_len, "prefix_projection": config.prefix_projection}
    described = chatglm.hf.ChatGLMConfig.from_pretrained(str(base), pre_seq_len=None)
    described.save_pretrained(str(base))

    model = AutoModel.from_pretrained(str(base), **sizes).float()
    prefix = torch.load(GOLDEN / "models" / f"{name}-prefix-only" / "pytorch_model.bin", weights_only=True)
    stripped = {key.removeprefix("transformer.prefix_encoder."): value for key, value in prefix.items()}
    model.transformer.prefix_encoder.load_state_dict(stripped)
    case = cases(name, "forward")[0]
    assert_close(model(case.inputs["input_ids"]).logits, case.outputs["logits"])
