"""The network equals the original, case by case (golden/README.md)."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from chatglm.model.attention import attention_weights, plain_attention, sdpa_attention
from chatglm.model.positions import Layout, find_layout, positions, prefix_blocked
from golden_vectors import Case, assert_close, cases, plain_model

MODELS = ["base-fp32", "oned-fp32", "ptuning", "ptuning-projection"]
BINDING = {(name, case.id): case for name in MODELS for case in cases(name, "forward") if case.raw.get("binding", True)}


def run(model, case: Case, **options):
    config = model.config
    ids = case.inputs.get("input_ids")
    blocked, places = case.inputs.get("attention_mask"), case.inputs.get("position_ids")
    if blocked is None:
        layout = find_layout(ids, config)
        blocked = prefix_blocked(layout, ids.shape[1])
        places = positions(layout, ids.shape[1], config)
    return model.transformer(ids, places, blocked, embeddings=case.inputs.get("inputs_embeds"), **options)


def real_tokens(case: Case) -> torch.Tensor:
    """True where the input is not left padding."""
    blocked = case.inputs.get("attention_mask")
    if "padded" not in case.id or blocked is None:
        shape = next(iter(case.inputs.values())).shape[:2]
        return torch.ones(shape, dtype=torch.bool)
    return ~blocked[:, 0].all(dim=-1)


@pytest.mark.parametrize("key", BINDING, ids="/".join)
def test_logits_equal_the_original(key):
    case = BINDING[key]
    model = plain_model(key[0])
    with torch.inference_mode():
        logits = model.logits(run(model, case))
    real = real_tokens(case)
    assert_close(logits[real], case.outputs["logits"][real])


@pytest.mark.parametrize(
    "key", [key for key, case in BINDING.items() if "hidden_states.0" in case.outputs], ids="/".join
)
def test_hidden_states_equal_the_original(key):
    case = BINDING[key]
    model = plain_model(key[0])
    kept: list[torch.Tensor] = []
    with torch.inference_mode():
        final = run(model, case, keep_hidden=kept)
    for number, hidden in enumerate([*kept, final]):
        assert_close(hidden.transpose(0, 1), case.outputs[f"hidden_states.{number}"])


class Recorder:
    """A cache that keeps what the network stores."""

    length = 0

    def __init__(self):
        self.stored = {}

    def update(self, layer, key, value):
        self.stored[layer] = (key, value)
        return key, value


@pytest.mark.parametrize("key", [key for key, case in BINDING.items() if "past.0.key" in case.outputs], ids="/".join)
def test_keys_and_values_equal_the_original(key):
    case = BINDING[key]
    model = plain_model(key[0])
    cache = Recorder()
    with torch.inference_mode():
        run(model, case, cache=cache)
    real = real_tokens(case)
    for layer, pair in cache.stored.items():
        for name, tensor in zip(("key", "value"), pair, strict=True):
            stored = tensor.permute(0, 2, 1, 3)  # [batch, tokens, heads, head_dim]
            expected = case.outputs[f"past.{layer}.{name}"].transpose(0, 1)
            if "padded" in case.id:
                stored, expected = stored[real], expected[real]
            assert_close(stored, expected)


@pytest.mark.parametrize("key", [key for key, case in BINDING.items() if "attentions.0" in case.outputs], ids="/".join)
def test_attention_weights_equal_the_original(key):
    case = BINDING[key]
    model = plain_model(key[0])
    seen = []

    def attend(query, key, value, blocked):
        seen.append(attention_weights(query, key, blocked))
        return plain_attention(query, key, value, blocked)

    with torch.inference_mode():
        run(model, case, attend=attend)
    for number, weights in enumerate(seen):
        assert_close(weights.flatten(0, 1), case.outputs[f"attentions.{number}"])


def test_masks_and_positions_equal_the_original():
    (case,) = cases("base-fp32", "mask_and_positions")
    config = plain_model("base-fp32").config
    ids = case.inputs["input_ids"]
    layout = find_layout(ids, config)
    assert torch.equal(prefix_blocked(layout, ids.shape[1]), case.outputs["attention_mask"].bool())
    assert torch.equal(positions(layout, ids.shape[1], config), case.outputs["position_ids"])


@pytest.mark.parametrize("case", [c for c in cases("base-fp32", "forward") if "loss" in c.outputs], ids=lambda c: c.id)
def test_loss_equals_the_original(case):
    model = plain_model("base-fp32")
    with torch.inference_mode():
        logits = model.logits(run(model, case))
    loss = cross_entropy(logits[:, :-1].flatten(0, 1), case.inputs["labels"][:, 1:].flatten())
    assert_close(loss.reshape(1), case.outputs["loss"], 1e-5)


@pytest.mark.parametrize("name", ["base-fp32", "ptuning", "ptuning-projection"])
def test_gradients_equal_the_original(name):
    for case in cases(name, "gradients"):
        model = plain_model(name)
        logits = model.logits(run(model, case))
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), case.inputs["labels"][:, 1:].flatten())
        loss.backward()
        assert_close(loss.detach().reshape(1), case.outputs["loss"].reshape(1), 1e-5)
        parameters = dict(model.named_parameters())
        names = [key.removeprefix("grad.") for key in case.outputs if key.startswith("grad.")]
        assert names
        for parameter in names:
            gradient = parameters[parameter].grad
            assert gradient is not None, parameter
            assert_close(gradient, case.outputs[f"grad.{parameter}"], 1e-3)


@pytest.mark.parametrize("name", ["ptuning", "ptuning-projection"])
def test_prefix_keys_and_values_equal_the_original(name):
    for case in cases(name, "prefix_cache"):
        model = plain_model(name)
        batch = case.outputs["past.0"].shape[2]
        with torch.inference_mode():
            pairs = list(model.transformer.prefix_encoder.key_values(batch, torch.float32))
        for layer, (key, value) in enumerate(pairs):
            ours = torch.stack((key, value)).permute(0, 3, 1, 2, 4)  # [2, prefix, batch, heads, head_dim]
            assert_close(ours, case.outputs[f"past.{layer}"])


@pytest.mark.parametrize("attend", [plain_attention, sdpa_attention], ids=["plain", "sdpa"])
@pytest.mark.parametrize("case", cases("base-fp16", "forward_fp16"), ids=lambda case: case.id)
def test_fp16_is_no_further_from_fp32_than_the_original_was(case, attend):
    model = plain_model("base-fp16", torch.float16)
    with torch.inference_mode():
        logits = model.logits(run(model, case, attend=attend))
    assert logits.dtype == torch.float32
    distance = (logits - case.outputs["fp32.logits"]).abs().max().item()
    assert distance <= case.raw["max_abs_distance_fp16_fp32"]


@pytest.mark.parametrize("case", cases("base-fp16", "forward_fp16"), ids=lambda case: case.id)
def test_bf16_stays_within_what_its_mantissa_allows(case):
    model = plain_model("base-fp16", torch.bfloat16)
    with torch.inference_mode():
        logits = model.logits(run(model, case))
    # bf16 keeps 3 bits less than fp16 (factor 8), and rounds the fp16 weights as well as the activations (factor 2)
    assert (logits - case.outputs["fp32.logits"]).abs().max().item() <= 16 * case.raw["max_abs_distance_fp16_fp32"]


@pytest.mark.parametrize(
    "case", [c for c in cases("base-fp32", "forward") if c.id.startswith("padded")], ids=lambda c: c.id
)
def test_padded_rows_equal_single_rows(case):
    model = plain_model("base-fp32")
    rows = [c for c in cases("base-fp32", "forward") if c.id.startswith(f"{case.id}-row-")]
    if not rows:
        rows = [case]
    lengths = [row.inputs["input_ids"].shape[1] for row in rows]
    total = max(lengths) + 3
    ids = torch.full((len(rows), total), model.config.pad_token_id)
    for number, row in enumerate(rows):
        ids[number, total - lengths[number] :] = row.inputs["input_ids"][0]
    layout = find_layout(ids, model.config, left_padding=total - torch.tensor(lengths))
    with torch.inference_mode():
        batch = model(ids, positions(layout, total, model.config), prefix_blocked(layout, total))
    for number, row in enumerate(rows):
        assert_close(batch[number, total - lengths[number] :][None], row.outputs["logits"])


def test_layout_of_contexts_is_what_a_search_would_find():
    config = plain_model("base-fp32").config
    ids = torch.tensor(
        [[3, 3, 9, config.gmask_token_id, config.bos_token_id], [8, 9, 9, config.gmask_token_id, config.bos_token_id]]
    )
    searched = find_layout(ids, config, left_padding=torch.tensor([2, 0]))
    known = Layout.of_contexts([2, 4], total=5)
    for name in ("context_lengths", "mask_places", "is_gmask", "left_padding"):
        assert torch.equal(getattr(searched, name), getattr(known, name)), name
