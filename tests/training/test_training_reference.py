"""The loop against one written by hand: a GPT twin against PyTorch's own transformer layers, step by step."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from chatglm.model import GLM, initialize
from chatglm.training.loop import train
from chatglm.training.loss import batch_loss
from chatglm.training.samples import IGNORE, Sample
from chatglm.training.task import ListSource, Task
from tiny_runs import CONFIG, tiny_run

TOKENS, STEPS, ROWS = 24, 8, 6
TWIN = replace(CONFIG, norm_order="pre", residual_scale=1.0, position_encoding="learned_2d", qkv_layout="block")


def text(row: int) -> np.ndarray:
    return np.random.default_rng(row).integers(5, 60, TOKENS)


def gpt_sample(row: int) -> Sample:
    """`[gMASK] sop` and every token but the last; each token is predicted from those before it."""
    tokens = text(row)
    ids = np.concatenate([[TWIN.gmask_token_id, TWIN.bos_token_id], tokens[:-1]]).astype(np.int32)
    targets = np.concatenate([[IGNORE], tokens]).astype(np.int32)
    blocks = np.arange(len(ids))
    return Sample(ids, targets, np.stack([blocks * 0, blocks]).astype(np.int32), 1, "document")


class Plain(nn.Module):
    """GPT-2 of PyTorch's parts, with the twin's weights."""

    def __init__(self, twin: GLM) -> None:
        super().__init__()
        hidden = TWIN.hidden_size
        self.table, self.places, self.blocks = (
            nn.Embedding.from_pretrained(found.weight.detach().clone(), freeze=False)
            for found in (
                twin.transformer.word_embeddings,
                twin.transformer.position_embeddings,
                twin.transformer.block_position_embeddings,
            )
        )
        layer = nn.TransformerEncoderLayer(
            hidden,
            TWIN.num_heads,
            TWIN.inner_hidden_size,
            dropout=0.0,
            activation=lambda inner: functional.gelu(inner, approximate="tanh"),
            batch_first=True,
            norm_first=True,
            layer_norm_eps=TWIN.layernorm_epsilon,
        )
        last = nn.LayerNorm(hidden, eps=TWIN.layernorm_epsilon)
        self.layers = nn.TransformerEncoder(layer, TWIN.num_layers, last, enable_nested_tensor=False)
        for mine, theirs in zip(self.layers.layers, twin.transformer.layers, strict=True):
            names = {
                "self_attn.in_proj_": "attention.query_key_value.",
                "self_attn.out_proj.": "attention.dense.",
                "linear1.": "mlp.dense_h_to_4h.",
                "linear2.": "mlp.dense_4h_to_h.",
                "norm1.": "input_layernorm.",
                "norm2.": "post_attention_layernorm.",
            }
            state = theirs.state_dict()
            mine.load_state_dict({m + end: state[t + end] for m, t in names.items() for end in ("weight", "bias")})

    def forward(self, ids: Tensor) -> Tensor:
        places = torch.arange(ids.shape[1])
        hidden = self.table(ids) + self.places(torch.zeros_like(places)) + self.blocks(places)
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
        output: Tensor = self.layers(hidden, mask=mask, is_causal=True) @ self.table.weight.T
        return output


def by_hand(model: Plain) -> tuple[list[float], list[float]]:
    """Losses and norms. AdamW, matrices decayed by 0.1, clipping at 0.5, two steps of warm-up, a cosine to a tenth."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim == 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), eps=1e-8)
    losses, norms = [], []
    for step in range(STEPS):
        rate = (step + 1) / 2 if step < 2 else 0.1 + 0.9 * (1 + math.cos(math.pi * (step - 2) / (STEPS - 2))) / 2
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * rate
        rows = torch.from_numpy(np.stack([text(step * ROWS + row) for row in range(ROWS)]))
        start = torch.tensor([[TWIN.gmask_token_id, TWIN.bos_token_id]]).expand(ROWS, 2)
        scores = model(torch.cat([start, rows[:, :-1]], dim=1))[:, 1:]
        loss = functional.cross_entropy(scores.flatten(0, 1), rows.flatten())
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
        optimizer.step()
        losses.append(loss.item())
    return losses, norms


def test_the_loop_takes_the_steps_of_a_plain_pytorch_loop(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    model = GLM(TWIN)
    initialize(model, 0)
    for layer in model.transformer.layers:
        layer.input_layernorm.bias.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    plain = Plain(model)
    rows = [[gpt_sample(row)] for row in range(STEPS * ROWS)]
    task = Task(model, batch_loss, ListSource(rows, TOKENS + 1))
    run = tiny_run(
        tmp_path,
        steps=STEPS,
        batch={"rows": ROWS, "micro_rows": 2, "length": TOKENS + 1},
        optimizer={"lr": 3e-3, "clip": 0.5},
        schedule={"warmup": 2},
    )
    report = train(task, run)
    losses, norms = by_hand(plain)
    assert [loss for _, loss in report.losses] == pytest.approx(losses, abs=1e-5)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["norm"] for line in lines] == pytest.approx(norms, rel=1e-4)
    torch.testing.assert_close(model.transformer.word_embeddings.weight, plain.table.weight, atol=1e-4, rtol=1e-3)
