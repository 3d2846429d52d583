"""Reward model: one number for an answer, read from the hidden state of its last token.

`RewardModel` is a language model's backbone with a head of one row; it is stored as `transformer.*` and `score.*`, so
the folder opens here and as `ChatGLMForSequenceClassification` under transformers. With a value for each action the
same module is PPO's value model. Source: spec/training.md §4.4; Stiennon et al. 2020; ChatGLM-RLHF.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...checkpoint import check, load_into, open_checkpoint, save
from ...checkpoint.folder import Checkpoint
from ...checkpoint.saving import dump
from ...config import ModelConfig, to_original
from ...errors import CheckpointError
from ...model import GLM, Attend, Transformer, sdpa_attention
from ..loss import hidden_states
from ..samples import Batch
from .answers import last_tokens

HEAD = "score."
BODY = "transformer."
HEAD_STD = 0.01
"""Spread of a new head: scores start near 0, as the loss's penalty on their size wants them."""

ARCHITECTURE = "ChatGLMForSequenceClassification"


class RewardModel(nn.Module):
    """`glm`, whose own head is not used, and `score`: hidden → 1, bias zero at the start."""

    def __init__(self, glm: GLM, *, seed: int = 0) -> None:
        super().__init__()
        self.glm = glm
        self.score = nn.Linear(glm.config.hidden_size, 1, device=glm.device)
        drawn = torch.randn(1, glm.config.hidden_size, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            self.score.weight.copy_(drawn * HEAD_STD)
            self.score.bias.zero_()
        if not glm.config.tied_head:
            glm.lm_head.requires_grad_(False)

    @property
    def config(self) -> ModelConfig:
        return self.glm.config

    @property
    def transformer(self) -> Transformer:
        return self.glm.transformer

    @property
    def device(self) -> torch.device:
        return self.glm.device

    def values(self, hidden: Tensor) -> Tensor:
        """fp32 [...] of hidden states [..., hidden]."""
        output: Tensor = self.score(hidden.to(self.score.weight.dtype)).squeeze(-1)
        return output.float()

    def hidden(self, batch: Batch, *, attend: Attend = sdpa_attention) -> Tensor:
        """Hidden states [batch, tokens, hidden]."""
        return hidden_states(self.glm, batch, attend=attend)

    def scores(self, batch: Batch, *, attend: Attend = sdpa_attention) -> Tensor:
        """fp32 [answers]: the score of each answer of a batch, taken at its last real token, never at padding."""
        rows, columns = last_tokens(batch)
        return self.values(self.hidden(batch, attend=attend)[rows, columns])


def reward_loss(chosen: Tensor, rejected: Tensor, margin: Tensor | float = 0.0, *, penalty: float = 0.01) -> Tensor:
    """-log σ(r_c - r_r - margin) + penalty · (r_c² + r_r²) for each pair, [pairs]."""
    return -functional.logsigmoid(chosen - rejected - margin) + penalty * (chosen.square() + rejected.square())


def reward_tensors(model: RewardModel) -> dict[str, Tensor]:
    """What is stored: the backbone under a language model's names, and the head."""
    body = {f"{BODY}{name}": tensor for name, tensor in model.transformer.state_dict().items()}
    return {**body, f"{HEAD}weight": model.score.weight, f"{HEAD}bias": model.score.bias}


def save_reward_model(
    folder: str | Path,
    config: ModelConfig,
    tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    *,
    tokenizer_file: str | Path | None = None,
) -> Path:
    """Write a folder that `load_reward_model` and transformers' AutoModelForSequenceClassification open."""
    named = tensors.items() if isinstance(tensors, Mapping) else tensors
    stored = {**to_original(config), "architectures": [ARCHITECTURE], "num_labels": 1}
    return save(
        folder,
        ((name, tensor.detach().cpu()) for name, tensor in named),
        config,
        tokenizer_file=tokenizer_file,
        files={"config.json": dump(stored)},
        overwrite=True,
    )


def load_reward_model(
    folder: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", seed: int = 0
) -> RewardModel:
    """Open a reward model's folder, or start a new head on a language model's.

    Raises CheckpointError as the language model's loading does.
    """
    checkpoint = open_checkpoint(folder)
    config = checkpoint.config
    heads = {name: entry for name, entry in checkpoint.tensors.items() if name.startswith(HEAD)}
    if not heads:
        check(folder, tokenizer=False)
    if config.quantization_bit:
        raise CheckpointError(
            f"{folder} is quantised; a reward model has float weights",
            cure="give the checkpoint that was quantised, or `chatglm convert` it to fp16 first",
        )
    body = {name: entry for name, entry in checkpoint.tensors.items() if name.startswith(BODY)}
    with torch.device("meta"):
        glm = GLM(config)
    untied = replace(config, tied_head=False)  # nothing is said of a head here
    load_into(
        glm,
        Checkpoint(checkpoint.folder, untied, body, checkpoint.tokenizer_file),
        dtype=dtype,
        device=device,
        may_miss=("lm_head.",),
    )
    if config.tied_head:
        glm.tie_head()
    else:
        glm.lm_head.to_empty(device=torch.device(device))
    model = RewardModel(glm, seed=seed)
    if heads:
        load_into(model.score, _head_of(checkpoint, heads), dtype=torch.float32, device=device)
    return model


def _head_of(checkpoint: Checkpoint, heads: Iterable[str]) -> Checkpoint:
    named = {name.removeprefix(HEAD): checkpoint.tensors[name] for name in heads}
    untied = replace(checkpoint.config, tied_head=False)
    return Checkpoint(checkpoint.folder, untied, named, None)
