"""The policy as it was before anything was learned, which KL and ratios are measured from.

Where all weights learn it is a frozen copy. Where an adapter learns over a frozen base, the policy itself is the
reference once the adapter's parameters have their first values again: a copy of the adapter is kept, none of the model.
A fresh LoRA adds nothing, so that is the base with the adapter off.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from ...model import GLM


@dataclass(frozen=True)
class FirstValues:
    """A policy, and the values that what learns of it had in the beginning."""

    policy: GLM
    values: dict[str, Tensor]

    @classmethod
    def of(cls, policy: GLM) -> FirstValues:
        """Keep the values of this moment."""
        trained = (item for item in policy.named_parameters() if item[1].requires_grad)
        return cls(policy, {name: parameter.detach().float().clone() for name, parameter in trained})


Reference = GLM | FirstValues


@contextmanager
def standing(reference: Reference) -> Iterator[GLM]:
    """The reference as a model; a policy that is its own has the first values while the context lasts."""
    if isinstance(reference, GLM):
        yield reference
        return
    parameters = dict(reference.policy.named_parameters())
    now = {name: parameters[name].data for name in reference.values}
    was_training = reference.policy.training
    try:
        for name, value in reference.values.items():
            parameters[name].data = value.to(now[name].device)
        yield reference.policy.eval()
    finally:
        for name, value in now.items():
            parameters[name].data = value
        reference.policy.train(was_training)
