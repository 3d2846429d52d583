"""The objective: autoregressive blank infilling, from a text's ids to the sample that the model is trained on.

Read in this order: special_ids, spans, blank_filling, continuation, mixture. Source: GLM (ACL 2022) §2; GLM-130B §2.2.
"""

from .blank_filling import fill_spans
from .continuation import continue_text, prompt_sample
from .mixture import CHATGLM, MIXTURES, Mixture, named_mixture
from .sampling import Objective, generator
from .special_ids import SpecialIds

__all__ = [
    "CHATGLM",
    "MIXTURES",
    "Mixture",
    "Objective",
    "SpecialIds",
    "continue_text",
    "fill_spans",
    "generator",
    "named_mixture",
    "prompt_sample",
]
