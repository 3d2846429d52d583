"""Calibration: a model goes through its layers with real text, and each linear is quantised for the inputs it sees.

Layer by layer, and within a layer linear by linear, with the inputs that the already quantised part gives. Memory: the
hidden states of the calibration text, one layer in fp32, and the Hessian of one linear; never the whole model.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..config import ModelConfig
from ..model import GLM, sdpa_attention
from ..model.batch import by_length, left_padded
from ..model.block import Block
from ..model.rotary import Rotary, rotary_table
from ..tokenizer.examples import Example
from .gptq import gptq
from .modules import GroupQuantizedLinear
from .swap import swap_tables_as_described

BATCH_TOKENS = 4_096
"""Tokens that go through a layer at once, padding counted."""

Embed = Callable[[Tensor, Tensor], Tensor]
"""(ids, positions) → hidden states, the input of the first layer."""


@dataclass
class _Batch:
    """Rows that run together; hidden [batch, tokens, hidden] is the input of the next layer."""

    hidden: Tensor
    rotary: Rotary | None
    blocked: Tensor
    is_real: Tensor  # bool [batch, tokens]: no padding

    def real(self, values: Tensor) -> Tensor:
        """The rows [real tokens, columns] of values [batch, tokens, columns], fp32."""
        return values[self.is_real].float()


class _Hessian:
    """The running mean of x·xᵀ."""

    def __init__(self, columns: int, device: torch.device) -> None:
        self.sum = torch.zeros(columns, columns, device=device)
        self.count = 0

    def add(self, inputs: Tensor) -> None:
        """inputs: fp32 [tokens, columns]."""
        self.sum.addmm_(inputs.T, inputs)
        self.count += len(inputs)

    def mean(self) -> Tensor:
        return self.sum / max(1, self.count)


class Calibration:
    """The calibration text on its way through the layers of one model.

        run = Calibration(examples, config, embed, device)
        for layer in layers:
            run.quantize(layer, bits, group_size)  # or run.advance(layer), where that was done before

    The P-tuning prefix of a tuned model does not take part. Both parts of an example are seen, context and answer.
    """

    def __init__(self, examples: Sequence[Example], config: ModelConfig, embed: Embed, device: torch.device) -> None:
        self.config, self.device = config, device
        self.batches = list(self._batches(examples, embed))
        self.tokens = sum(int(batch.is_real.sum()) for batch in self.batches)
        if self.tokens < (columns := max(config.hidden_size, config.inner_hidden_size)):
            warnings.warn(
                f"{self.tokens:,} tokens of calibration text do not span {columns:,} columns: the result may be worse "
                "than plain rounding; give more text",
                UserWarning,
                stacklevel=2,
            )

    @torch.no_grad()
    def _batches(self, examples: Sequence[Example], embed: Embed) -> Iterator[_Batch]:
        for numbers in by_length([len(example) for example in examples], BATCH_TOKENS):
            rows = [examples[number] for number in numbers]
            contexts, answers = [row.context_ids for row in rows], [row.answer_ids for row in rows]
            ids, positions, blocked = left_padded(contexts, answers, self.config, self.device)
            lengths = torch.tensor([len(row) for row in rows], device=self.device)
            total = ids.shape[1]
            is_real = torch.arange(total, device=self.device) >= total - lengths[:, None]
            has_rotary = self.config.position_encoding != "learned_2d"
            rotary = rotary_table(positions, self.config) if has_rotary else None
            yield _Batch(embed(ids, positions), rotary, blocked, is_real)

    @torch.no_grad()
    def quantize(self, layer: Block, bits: int, group_size: int) -> None:
        """Replace the four linears of `layer` (fp32, on the device) by quantised ones, and go through it."""
        attention, mlp = layer.attention, layer.mlp
        hessians = self._inputs_of(attention.query_key_value, lambda batch: layer.input_layernorm(batch.hidden))
        self._replace(attention, "query_key_value", hessians, bits, group_size)
        # dense sees what the heads mixed; its own output is not needed yet
        self._replace(attention, "dense", self._seen_by(attention.dense, layer, "attention"), bits, group_size)
        for batch in self.batches:
            normalised = layer.input_layernorm(batch.hidden)
            mixed = attention(normalised, batch.rotary, batch.blocked, None, None, sdpa_attention)
            batch.hidden = layer.add_residual(batch.hidden, normalised, mixed)
        after = self._inputs_of(mlp.dense_h_to_4h, lambda batch: layer.post_attention_layernorm(batch.hidden))
        self._replace(mlp, "dense_h_to_4h", after, bits, group_size)
        self._replace(mlp, "dense_4h_to_h", self._seen_by(mlp.dense_4h_to_h, layer, "mlp"), bits, group_size)
        for batch in self.batches:
            normalised = layer.post_attention_layernorm(batch.hidden)
            batch.hidden = layer.add_residual(batch.hidden, normalised, mlp(normalised))

    @torch.no_grad()
    def advance(self, layer: Block) -> None:
        """Go through a layer as it is."""
        for batch in self.batches:
            batch.hidden = layer(batch.hidden, batch.rotary, batch.blocked, None, None, sdpa_attention)

    def _inputs_of(self, linear: nn.Module, inputs: Callable[[_Batch], Tensor]) -> Tensor:
        """The Hessian of a linear whose inputs are known without running anything else."""
        assert isinstance(linear, nn.Linear)
        hessian = _Hessian(linear.in_features, self.device)
        for batch in self.batches:
            hessian.add(batch.real(inputs(batch)))
        return hessian.mean()

    def _seen_by(self, linear: nn.Module, layer: Block, branch: str) -> Tensor:
        """The Hessian of a linear inside a branch, from what reaches it while the branch runs."""
        assert isinstance(linear, nn.Linear)
        hessian = _Hessian(linear.in_features, self.device)
        seen: list[Tensor] = []
        hook = linear.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        try:
            for batch in self.batches:
                if branch == "attention":
                    normalised = layer.input_layernorm(batch.hidden)
                    layer.attention(normalised, batch.rotary, batch.blocked, None, None, sdpa_attention)
                else:
                    layer.mlp(layer.post_attention_layernorm(batch.hidden))
                hessian.add(batch.real(seen.pop()))
        finally:
            hook.remove()
        return hessian.mean()

    def _replace(self, parent: nn.Module, name: str, hessian: Tensor, bits: int, group_size: int) -> None:
        linear = parent.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        with torch.device("meta"):
            quantized = GroupQuantizedLinear(linear.in_features, linear.out_features, bits, group_size, bias=False)
        quantized.weight, quantized.weight_scale = gptq(linear.weight, hessian, bits, group_size)
        quantized.bias = linear.bias
        parent.set_submodule(name, quantized)


def quantize_with_calibration(model: GLM, wanted: ModelConfig, examples: Sequence[Example]) -> GLM:
    """Quantise a whole fp32 model in place, the linears with GPTQ; returns the model.

    wanted  its description afterwards, in a group format
    The streaming twin is writing.quantize_checkpoint.
    """
    run = Calibration(examples, model.config, model.transformer.embed, model.device)
    for layer in model.transformer.layers:
        assert isinstance(layer, Block)
        run.quantize(layer, wanted.quantization_bit, wanted.quantization_group_size)
    return swap_tables_as_described(model, wanted)
