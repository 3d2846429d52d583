"""Parts of the network by themselves: rotary, attention twins, linears, initialisation, the family's other values."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy
import pytest
import torch
from torch.nn import functional

from chatglm.config import ModelConfig
from chatglm.model import GLM, initialize, plain_attention, sdpa_attention
from chatglm.model.attention import Attention
from chatglm.model.linear import CHUNK_ELEMENTS, LayerNorm, Linear, activation_dtype
from chatglm.model.prefix import PrefixEncoder
from chatglm.model.rotary import rotary_frequencies, rotary_table, rotate
from golden_vectors import assert_close

SMALL = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    num_layers=2,
    num_heads=2,
    inner_hidden_size=48,
    bos_token_id=60,
    eos_token_id=61,
    mask_token_id=62,
    gmask_token_id=63,
)
GLM_LIKE = replace(
    SMALL,
    position_encoding="learned_2d",
    norm_order="pre",
    qkv_layout="block",
    residual_scale=1.0,
    max_sequence_length=20,
)
GLM_130B_LIKE = replace(SMALL, position_encoding="rotary_1d", mlp="geglu", residual_scale=math.sqrt(140))


def test_parameters_of_chatglm_6b_are_exactly_6173286400():
    with torch.device("meta"):
        model = GLM(ModelConfig())
    assert sum(parameter.numel() for parameter in model.parameters()) == 6_173_286_400
    assert model.lm_head.weight is model.transformer.word_embeddings.weight


@pytest.mark.parametrize("config", [SMALL, GLM_LIKE, GLM_130B_LIKE, replace(SMALL, tied_head=False)])
def test_counted_parameters_are_those_of_the_description(config):
    assert sum(parameter.numel() for parameter in GLM(config).parameters()) == config.num_parameters


def test_frequencies_are_rounded_to_fp16():
    exact = 10_000.0 ** (-numpy.arange(0, 64, 2) / 64)
    ours = rotary_frequencies(64, 10_000.0, torch.device("cpu"))
    assert torch.equal(ours, torch.from_numpy(exact.astype(numpy.float16).astype(numpy.float32)))
    assert not numpy.allclose(ours.numpy(), exact, rtol=1e-6)


def test_rotation_equals_complex_multiplication_in_each_half():
    heads = torch.randn(1, 2, 3, 16, generator=torch.Generator().manual_seed(0))
    places = torch.tensor([[[0, 1, 1900], [0, 7, 33]]])
    turned = rotate(heads, rotary_table(places, SMALL))
    frequencies = rotary_frequencies(8, 10_000.0, torch.device("cpu")).double()
    for half in range(2):
        part, result = heads[..., half * 8 :][..., :8].double(), turned[..., half * 8 :][..., :8].double()
        angle = places[0, half].double()[:, None] * frequencies
        expected = torch.complex(part[..., :4], part[..., 4:]) * torch.polar(torch.ones_like(angle), angle)
        assert_close(torch.cat((expected.real, expected.imag), -1), result, 1e-5)


def test_position_zero_turns_nothing():
    heads = torch.randn(1, 2, 1, 16)
    assert torch.equal(rotate(heads, rotary_table(torch.zeros(1, 2, 1, dtype=torch.int64), SMALL)), heads)


def test_row_blocked_everywhere_attends_evenly():
    query, key, value = (torch.randn(1, 1, 3, 4) for _ in range(3))
    blocked = torch.tensor([[True, True, True], [False, True, True], [False, False, False]])
    mixed = plain_attention(query, key, value, blocked)
    assert torch.allclose(mixed[0, 0, 0], value[0, 0].mean(0), atol=1e-6)
    assert torch.allclose(mixed[0, 0, 1], value[0, 0, 0], atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 5, 9), (1, 2, 17, 17)])
def test_fused_attention_equals_plain_attention(shape):
    batch, heads, queries, keys = shape
    generator = torch.Generator().manual_seed(sum(shape))
    query = torch.randn(batch, heads, queries, 8, generator=generator)
    key, value = (torch.randn(batch, heads, keys, 8, generator=generator) for _ in range(2))
    blocked = torch.rand(batch, 1, queries, keys, generator=generator) < 0.4
    blocked[..., 0] = False
    for mask in (None, blocked):
        expected = plain_attention(query, key, value, mask)
        assert_close(sdpa_attention(query, key, value, mask), expected, 1e-5)


def test_heads_lie_as_the_layout_says():
    qkv = torch.arange(3 * 32, dtype=torch.float32)[None, None]
    query, key, value = Attention(SMALL, 0).split_heads(qkv)
    assert query[0, 1, 0, 0] == 48 and key[0, 1, 0, 0] == 64 and value[0, 0, 0, 0] == 32
    query, key, value = Attention(GLM_LIKE, 0).split_heads(qkv)
    assert query[0, 1, 0, 0] == 16 and key[0, 0, 0, 0] == 32 and value[0, 1, 0, 0] == 80


@pytest.mark.parametrize("tokens", [1, 3, 40])
@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32])
def test_linear_widens_stored_weights_to_the_activations(stored, tokens):
    linear = Linear(64, CHUNK_ELEMENTS // 64 + 5).to(stored)
    hidden = torch.randn(2, tokens, 64)
    with torch.inference_mode():
        expected = functional.linear(hidden, linear.weight.float(), linear.bias.float())
        ours = linear(hidden)
    assert ours.dtype == torch.float32
    assert_close(ours, expected, 1e-5)


@pytest.mark.parametrize("tokens", [1, 40])
def test_bf16_linear_stays_bf16(tokens):
    linear = Linear(64, 32).to(torch.bfloat16)
    hidden = torch.randn(1, tokens, 64).bfloat16()
    with torch.inference_mode():
        ours = linear(hidden)
        expected = functional.linear(hidden.float(), linear.weight.float(), linear.bias.float())
    assert ours.dtype == torch.bfloat16
    assert_close(ours, expected, 2**-8)


def test_narrow_linear_still_has_gradients():
    linear = Linear(8, 4).half()
    linear(torch.randn(2, 8)).sum().backward()
    assert linear.weight.grad is not None and linear.weight.grad.dtype == torch.float16


def test_layernorm_answers_in_the_dtype_of_its_input():
    norm = LayerNorm(16)
    assert norm(torch.randn(2, 16).bfloat16()).dtype == torch.bfloat16
    assert norm.half()(torch.randn(2, 16)).dtype == torch.float32


def test_fp16_on_a_cpu_is_a_storage_format():
    assert activation_dtype(torch.float16, torch.device("cpu")) == torch.float32
    assert activation_dtype(torch.bfloat16, torch.device("cpu")) == torch.bfloat16
    assert activation_dtype(torch.float16, torch.device("cuda")) == torch.float16
    assert GLM(SMALL).half().dtype == torch.float32


def numpy_layer_norm(x, norm):
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    weight, bias = norm.weight.detach().double().numpy(), norm.bias.detach().double().numpy()
    return (x - mean) / numpy.sqrt(variance + 1e-5) * weight + bias


def numpy_linear(x, linear):
    return x @ linear.weight.detach().double().numpy().T + linear.bias.detach().double().numpy()


def test_glm_description_is_pre_norm_with_learned_positions():
    """GLM (ACL 2022), spec/glm-family.md §2.1, in plain NumPy."""
    torch.manual_seed(0)
    model = GLM(GLM_LIKE)
    initialize(model, seed=1)
    ids = torch.tensor([[4, 9, 63, 60, 7]])
    places = torch.tensor([[[0, 1, 2, 2, 2], [0, 0, 0, 1, 2]]])
    blocked = torch.ones(5, 5, dtype=torch.bool).triu(1)
    blocked[:, :3] = False
    with torch.inference_mode():
        ours = model(ids, places, blocked[None, None])
    t = model.transformer
    x = t.word_embeddings.weight.detach().double().numpy()[ids[0]]
    x = x + t.position_embeddings.weight.detach().double().numpy()[places[0, 0]]
    x = x + t.block_position_embeddings.weight.detach().double().numpy()[places[0, 1]]
    for layer in t.layers:
        normalised = numpy_layer_norm(x, layer.input_layernorm)
        query, key, value = numpy.split(numpy_linear(normalised, layer.attention.query_key_value), 3, axis=-1)
        heads = []
        for h in range(2):
            part = slice(16 * h, 16 * h + 16)
            scores = query[:, part] @ key[:, part].T / 4.0
            scores = numpy.where(blocked.numpy(), -1e9, scores)
            weights = numpy.exp(scores - scores.max(-1, keepdims=True))
            heads.append(weights / weights.sum(-1, keepdims=True) @ value[:, part])
        x = x + numpy_linear(numpy.concatenate(heads, -1), layer.attention.dense)
        inner = numpy_linear(numpy_layer_norm(x, layer.post_attention_layernorm), layer.mlp.dense_h_to_4h)
        inner = 0.5 * inner * (1 + numpy.tanh(0.7978845608028654 * inner * (1 + 0.044715 * inner * inner)))
        x = x + numpy_linear(inner, layer.mlp.dense_4h_to_h)
    logits = numpy_layer_norm(x, t.final_layernorm) @ t.word_embeddings.weight.detach().double().numpy().T
    assert_close(ours[0], torch.from_numpy(logits), 1e-5)


def test_geglu_gates_with_its_second_half():
    model = GLM(GLM_130B_LIKE)
    mlp = model.transformer.layers[0].mlp
    hidden = torch.randn(1, 3, 32)
    with torch.inference_mode():
        inner = mlp.dense_h_to_4h(hidden)
        expected = mlp.dense_4h_to_h(inner[..., :48] * functional.gelu(inner[..., 48:]))
        assert_close(mlp(hidden), expected, 1e-6)


@pytest.mark.parametrize("config", [SMALL, GLM_LIKE, GLM_130B_LIKE, replace(SMALL, tied_head=False)])
def test_initialisation_is_reproducible_and_lets_the_model_learn(config):
    first, second = GLM(config), GLM(config)
    initialize(first, seed=5)
    initialize(second, seed=5)
    for (name, ours), theirs in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    initialize(second, seed=6)
    assert not torch.equal(first.transformer.word_embeddings.weight, second.transformer.word_embeddings.weight)
    places = torch.zeros(1, 2, 4, dtype=torch.int64)
    logits = first(torch.tensor([[1, 2, 63, 60]]), places[:, 0] if config.position_encoding == "rotary_1d" else places)
    loss = functional.cross_entropy(logits[0], torch.tensor([1, 2, 3, 4]))
    assert abs(loss.item() - math.log(64)) < 1.0
    loss.backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in first.parameters())


def test_deepnorm_starts_the_value_rows_smaller():
    deep = replace(SMALL, num_layers=8)
    model = GLM(deep)
    initialize(model, seed=0)
    parts = model.transformer.layers[0].attention.query_key_value.weight.unflatten(0, (2, 3, -1))
    query, value = parts[:, 0].std().item(), parts[:, 2].std().item()
    assert value / query == pytest.approx(16**-0.5, rel=0.15)


def test_gradient_checkpointing_changes_nothing():
    model = GLM(SMALL)
    initialize(model, seed=3)
    model.train()
    ids, places = torch.tensor([[1, 2, 63, 60]]), torch.zeros(1, 2, 4, dtype=torch.int64)
    model(ids, places).logsumexp(-1).sum().backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    model.transformer.gradient_checkpointing = True
    model(ids, places).logsumexp(-1).sum().backward()
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, expected[name], 1e-6)


def test_prefix_needs_a_length():
    with pytest.raises(ValueError, match="pre_seq_len"):
        PrefixEncoder(SMALL)


def test_prefix_dropout_acts_only_in_training():
    encoder = PrefixEncoder(replace(SMALL, pre_seq_len=4))
    assert all(
        torch.equal(a[0], b[0])
        for a, b in zip(*(list(encoder.eval().key_values(2, torch.float32)) for _ in "ab"), strict=True)
    )
    encoder.train()
    dropped = torch.stack([pair[0] for pair in encoder.key_values(2, torch.float32)])
    assert (dropped == 0).any()
