"""One vector for a text: the mean of its tokens' last hidden states."""

from __future__ import annotations

import torch
from torch import Tensor

from ..model.positions import generation_positions
from ..tokenizer import Tokenizer
from .row_runner import RowRunner
from .runner import Runner
from .sampling import SamplingParams
from .sequence import Sequence


@torch.inference_mode()
def mean_hidden(runner: Runner, ids: list[int], tokenizer: Tokenizer) -> Tensor:
    """Unit-length mean over the tokens of a context, special ones left out; fp32 [hidden] on the CPU.

    The context is `ids [gMASK]`, every token seeing every other. Each text runs alone: equal texts, equal vectors.
    """
    context = [*ids, tokenizer.gmask_id]
    sequence = Sequence(context, tokenizer.sop_id, len(ids), True, 1, SamplingParams(temperature=0))
    if isinstance(runner, RowRunner):
        hidden = runner.hidden(sequence)
    else:
        model = runner.model
        layout = runner._layout([sequence], [0])
        positions = generation_positions(layout, len(context), model.config)
        tokens = torch.tensor([context], device=model.device)
        hidden = model.transformer(tokens, positions, None, None, attend=runner.attend)[0]
    mean = hidden[: len(ids)].float().mean(dim=0)
    return torch.nn.functional.normalize(mean, dim=0).cpu()
