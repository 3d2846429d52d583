"""generate and forward beyond the recorded cases: masks, batches, sampling, scores that fail, quantize."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModel, AutoTokenizer, GenerationConfig

from chatglm.errors import ChatGLMError, QuantizationError
from chatglm.hf.attention import fused_attention
from golden_vectors import GOLDEN, assert_close, cases

TEXTS = ["你好", "hello world, what is this?", "1+1="]


@pytest.fixture(scope="module")
def model(small_folder: Path) -> Any:
    return AutoModel.from_pretrained(str(small_folder)).float()


@pytest.fixture(scope="module")
def tokenizer(small_folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(str(small_folder))


def alone(model: Any, tokenizer: Any, text: str, **kwargs: Any) -> list[int]:
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    return model.generate(ids, **kwargs)[0, ids.shape[1] :].tolist()


def without_padding(ids: list[int], eos: int) -> list[int]:
    return ids[: ids.index(eos) + 1] if eos in ids else ids


@pytest.mark.parametrize("mask", ["the tokenizer's", "1 and 0", "none"])
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("use_cache", [True, False])
def test_a_padded_batch_answers_as_single_questions_do(
    mask: str, beams: int, use_cache: bool, model: Any, tokenizer: Any
) -> None:
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    inputs: dict[str, Any] = {"input_ids": batch["input_ids"]}
    if mask == "the tokenizer's":
        inputs = dict(batch)
    elif mask == "1 and 0":
        inputs["attention_mask"] = (batch["input_ids"] != tokenizer.pad_token_id).long()
    kwargs = {"max_new_tokens": 12, "do_sample": False, "num_beams": beams, "use_cache": use_cache}
    found = model.generate(**inputs, **kwargs)[:, batch["input_ids"].shape[1] :]
    for row, text in enumerate(TEXTS):
        expected = alone(model, tokenizer, text, **kwargs)
        ids = without_padding(found[row].tolist(), tokenizer.eos_token_id)
        if beams == 1 or row == 1:  # beam scores count the context, so padding changes which answer is best
            assert ids == without_padding(expected, tokenizer.eos_token_id)


@torch.no_grad()
def test_scores_of_a_padded_batch_equal_single_ones(model: Any, tokenizer: Any) -> None:
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    ones = (batch["input_ids"] != tokenizer.pad_token_id).long()
    for logits in (model(**batch).logits, model(batch["input_ids"], attention_mask=ones).logits):
        for row, text in enumerate(TEXTS):
            expected = model(tokenizer(text, return_tensors="pt")["input_ids"]).logits[0]
            assert_close(logits[row, -len(expected) :], expected)


@torch.no_grad()
def test_padding_on_the_right_changes_no_real_token(model: Any, tokenizer: Any) -> None:
    ids = tokenizer("hello", "hi", return_tensors="pt")["input_ids"]
    padded = torch.nn.functional.pad(ids, (0, 4), value=tokenizer.pad_token_id)
    mask = torch.nn.functional.pad(torch.ones_like(ids), (0, 4))
    assert_close(model(padded, attention_mask=mask).logits[:, : ids.shape[1]], model(ids).logits, 1e-5)


@torch.no_grad()
def test_every_form_of_the_full_mask_means_the_same(model: Any) -> None:
    (case,) = cases("base-fp32", "mask_and_positions")
    ids, positions, blocked = case.inputs["input_ids"], case.outputs["position_ids"], case.outputs["attention_mask"]
    expected = model(ids, positions, blocked).logits
    additive = torch.zeros(blocked.shape).masked_fill(blocked, torch.finfo(torch.float32).min)
    for mask in (blocked[:, 0], additive):
        assert torch.equal(model(ids, positions, mask).logits, expected)
    with pytest.raises(ValueError, match="True means blocked"):
        model(ids, positions, blocked.long())
    with pytest.raises(ValueError, match=r"attention_mask has shape \(11,\)"):
        model(ids, positions, blocked[0, 0, 0])
    with pytest.raises(ValueError, match="covers 3 tokens"):
        model(ids, attention_mask=torch.ones(2, 3))


def test_ids_without_a_context_are_refused_by_row_and_id(model: Any) -> None:
    with pytest.raises(ValueError, match=r"row 0 holds no <sop> \(id 204\)"):
        model(torch.tensor([[5, 6, 7]]))
    with pytest.raises(ValueError, match=r"row 1 holds neither \[gMASK\] \(id 201\) nor \[MASK\] \(id 200\)"):
        model.generate(torch.tensor([[5, 201, 204], [5, 6, 204]]), max_new_tokens=2)
    with pytest.raises(ValueError, match="generate needs input_ids"):
        model.generate(max_new_tokens=2)
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model()


@torch.no_grad()
def test_new_tokens_need_positions_and_a_fitting_mask(model: Any) -> None:
    ids = torch.tensor([[5, 6, 201, 204, 9]])
    past = model(ids[:, :4], use_cache=True).past_key_values
    with pytest.raises(ValueError, match="position_ids must be given"):
        model(ids[:, 4:], past_key_values=past)
    with pytest.raises(ValueError, match="covers 9 tokens; 4 in the cache and 1 new make 5"):
        model(
            ids[:, 4:], past_key_values=past, position_ids=torch.tensor([[[2], [2]]]), attention_mask=torch.ones(1, 9)
        )
    with pytest.raises(ValueError, match="layer 0 of past_key_values"):
        model(ids[:, 4:], past_key_values=[(torch.zeros(4, 1, 2), torch.zeros(4, 1, 2))], position_ids=ids[:, None, 4:])


@torch.no_grad()
def test_new_tokens_with_a_plain_mask_do_not_see_later_ones(model: Any) -> None:
    ids = torch.tensor([[5, 6, 201, 204, 9, 10, 11]])
    full = model(ids).logits
    past = model(ids[:, :4], use_cache=True).past_key_values
    positions = torch.tensor([[[2, 2, 2], [2, 3, 4]]])
    found = model(ids[:, 4:], past_key_values=past, position_ids=positions, attention_mask=torch.ones(1, 7)).logits
    assert_close(found, full[:, 4:])


def test_the_cache_reads_as_the_originals_tuple(model: Any) -> None:
    past = model(torch.tensor([[5, 201, 204]]), use_cache=True).past_key_values
    assert len(past) == 3 and [tuple(key.shape) for key, _ in past] == [(3, 1, 4, 12)] * 3
    assert past[-1][1].shape == (3, 1, 4, 12)
    with pytest.raises(IndexError, match="3 layers"):
        past[3]
    moved = model._reorder_cache(tuple(past), torch.tensor([0, 0]))
    assert moved[0][0].shape == (3, 2, 4, 12)


def test_outputs_come_as_a_tuple_when_asked(model: Any) -> None:
    ids = torch.tensor([[5, 201, 204]])
    loss, logits, past = model(ids, labels=ids, use_cache=True, return_dict=False)
    assert loss.dim() == 0 and logits.shape == (1, 3, 552) and len(past) == 3
    assert model(ids, use_cache=False).past_key_values is None
    assert model(ids, logits_to_keep=1).logits.shape == (1, 1, 552)


def test_sampling_follows_the_seed_and_streams_the_same(model: Any) -> None:
    ids = torch.tensor([[5, 6, 201, 204]])
    kwargs = {"do_sample": True, "max_new_tokens": 12, "temperature": 1.5, "top_k": 0, "top_p": 0.95}
    torch.manual_seed(3)
    first = model.generate(ids, **kwargs)
    torch.manual_seed(3)
    *_, streamed = model.stream_generate(ids, **kwargs)
    torch.manual_seed(4)
    other = model.generate(ids, **kwargs)
    assert torch.equal(first, streamed) and not torch.equal(first, other)


def test_sampled_beams_and_several_answers_come_back(model: Any) -> None:
    ids = torch.tensor([[5, 6, 201, 204], [7, 8, 201, 204]])
    torch.manual_seed(0)
    found = model.generate(ids, do_sample=True, num_beams=3, num_return_sequences=2, max_new_tokens=5)
    assert found.shape[0] == 4 and torch.equal(found[::2, :4], ids)
    scored = model.generate(
        ids,
        do_sample=False,
        num_beams=3,
        num_return_sequences=2,
        max_new_tokens=5,
        return_dict_in_generate=True,
        output_scores=True,
    )
    assert scored.sequences.shape[0] == 4 and bool(
        (scored.sequences_scores[::2] >= scored.sequences_scores[1::2]).all()
    )


def test_a_generation_config_is_obeyed(model: Any) -> None:
    ids = torch.tensor([[5, 6, 201, 204]])
    config = GenerationConfig(max_new_tokens=3, do_sample=False, eos_token_id=205, pad_token_id=3)
    assert model.generate(ids, generation_config=config).shape[1] <= 7
    short = GenerationConfig(max_length=4, do_sample=False, eos_token_id=205, pad_token_id=3)
    assert model.generate(ids, generation_config=short).shape[1] == 5
    found = model.generate(ids, max_new_tokens=3, do_sample=False, return_dict_in_generate=True, output_scores=True)
    assert found.sequences.shape[1] - 4 == len(found.scores)


def test_only_the_broken_sequence_of_a_batch_ends(small_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = AutoModel.from_pretrained(str(small_folder)).float()
    ids = torch.tensor([[5, 6, 201, 204], [7, 8, 201, 204]])
    expected = model.generate(ids[:1], max_new_tokens=6, do_sample=False)[0].tolist()
    table = model.transformer.word_embeddings.weight.data
    model.lm_head.weight = torch.nn.Parameter(table.clone())
    table[8] = float("nan")
    transformers.utils.logging.enable_propagation()
    try:
        found = model.generate(ids, max_new_tokens=6, do_sample=False).tolist()
        with pytest.raises(ChatGLMError, match=r"sequence 0 are not finite"):
            model.generate(ids[1:], max_new_tokens=6, do_sample=False)
        with pytest.raises(ChatGLMError, match="not finite"):
            model.generate(ids, max_new_tokens=6, do_sample=False, num_beams=2)
    finally:
        transformers.utils.logging.disable_propagation()
    assert found[1][4:6] == [205, 3] or found[1][4] == 205
    assert found[0][: len(expected)] == expected
    assert "sequence 1 are not finite" in caplog.text


@pytest.mark.parametrize("bits", [8, 4])
@torch.no_grad()
def test_quantize_packs_as_the_original_and_stays_close(bits: int) -> None:
    case = cases(f"checkpoint-int{bits}", "forward_quantised")[0]
    stored = AutoModel.from_pretrained(str(GOLDEN / "models" / f"int{bits}")).float()
    model = AutoModel.from_pretrained(str(GOLDEN / "models" / "base-fp32"))
    before = model(torch.tensor([[5, 6, 201, 204]])).logits
    assert model.quantize(0) is model and model.config.quantization_bit == 0
    assert model.quantize(bits) is model and model.config.quantization_bit == bits
    weight = model.transformer.layers[0].attention.query_key_value.weight
    assert weight.dtype == torch.int8
    assert model.quantize(8) is model and model.config.quantization_bit == bits
    after = model(torch.tensor([[5, 6, 201, 204]])).logits
    distance = (after - before).norm() / before.norm()
    assert 0 < distance < {8: 0.05, 4: 0.6}[bits]
    assert model.generate(torch.tensor([[5, 6, 201, 204]]), max_new_tokens=3, do_sample=False).shape[1] > 4
    assert stored.quantize(bits) is stored
    assert_close(stored(**case.inputs).logits, case.outputs["logits"])


def test_quantize_can_take_the_embedding_too(tmp_path: Path) -> None:
    model = AutoModel.from_pretrained(str(GOLDEN / "models" / "base-fp16")).quantize(8, quantize_embeddings=True)
    assert model.lm_head.weight.data_ptr() == model.transformer.word_embeddings.weight.data_ptr()
    model.save_pretrained(str(tmp_path))
    again = AutoModel.from_pretrained(str(tmp_path))
    assert again.config.quantization_embeddings
    ids = torch.tensor([[5, 6, 201, 204]])
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_a_weight_that_cannot_be_quantised_is_named() -> None:
    model = AutoModel.from_pretrained(str(GOLDEN / "models" / "base-fp32"))
    model.transformer.layers[1].mlp.dense_4h_to_h.weight.data[0, 0] = float("inf")
    with pytest.raises(QuantizationError, match=r"layers\.1\.mlp\.dense_4h_to_h"):
        model.quantize(4)


@torch.no_grad()
def test_fused_attention_gives_the_same_scores(monkeypatch: pytest.MonkeyPatch, model: Any, tokenizer: Any) -> None:
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    expected = model(**batch).logits
    monkeypatch.setattr(model.transformer, "_attend", lambda device: fused_attention)
    found = model(**batch).logits
    assert found.isfinite().all()
    real = batch["input_ids"] != tokenizer.pad_token_id
    assert_close(found[real], expected[real])
    ids = model.generate(**batch, max_new_tokens=5, do_sample=False)
    monkeypatch.undo()
    assert torch.equal(ids, model.generate(**batch, max_new_tokens=5, do_sample=False))


@pytest.mark.parametrize("answer_positions", ["mask", "running"])
def test_one_dimensional_positions_follow_the_config(answer_positions: str) -> None:
    config = transformers.AutoConfig.from_pretrained(str(GOLDEN / "models" / "oned-fp32"))
    config.answer_positions = answer_positions
    model = AutoModel.from_pretrained(str(GOLDEN / "models" / "oned-fp32"), config=config)
    ids = cases("oned-fp32", "generate")[1].inputs["input_ids"]
    cached = model.generate(ids, max_new_tokens=8, do_sample=False)
    assert torch.equal(cached, model.generate(ids, max_new_tokens=8, do_sample=False, use_cache=False))
    is_golden = cached[0].tolist() == cases("oned-fp32", "generate")[1].outputs["ids"][0][: cached.shape[1]]
    assert is_golden == (answer_positions == "mask")


def test_a_left_padded_batch_in_one_dimension_equals_single_rows() -> None:
    model = AutoModel.from_pretrained(str(GOLDEN / "models" / "oned-fp32"))
    long, short = torch.tensor([[9, 8, 7, 201, 204]]), torch.tensor([[6, 201, 204]])
    batch = torch.cat((long, torch.nn.functional.pad(short, (2, 0), value=3)))
    found = model.generate(batch, max_new_tokens=6, do_sample=False)
    for row, ids in enumerate((long, short)):
        expected = model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :].tolist()
        assert found[row, 5:].tolist()[: len(expected)] == expected
