"""GPTQ: codes chosen one column after the other, each column's rounding error made up for by the columns to come.

What is kept small is the error of the linear's output on calibration inputs, tr((W - W') H (W - W')ᵀ) with the
Hessian H = mean x·xᵀ. The storage does not change: scales come from the plain rounding of the same matrix, once and for
all, so columns may be treated in any order (the ones with the largest inputs first) without an index at run time.
Source: GPTQ (Frantar et al. 2022) §3, its act-order with static groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import QuantizationError
from .group_format import pack_pairs, quantize_groups

DAMPING = 0.01
"""Share of the Hessian's mean diagonal that is added to it, so that it can be inverted."""

BLOCK_COLUMNS = 128
"""Columns whose errors are collected before the rest of the matrix is changed."""


def gptq(
    weight: Tensor, hessian: Tensor, bits: int, group_size: int, *, damping: float = DAMPING
) -> tuple[Tensor, Tensor]:
    """Codes and scales of a matrix [rows, columns], in the group format of `quantize_groups`.

    hessian  fp32 [columns, columns]: the mean of x·xᵀ over calibration inputs x; not changed
    Works in fp32 on the device of `weight`; memory: three matrices of the Hessian's size and two of the weight's.
    Raises QuantizationError where the Hessian is not finite, beside what quantize_groups raises.
    """
    _, scales = quantize_groups(weight, bits, group_size)
    order = hessian.diagonal().argsort(descending=True, stable=True)
    factor = _inverse_factor(hessian[order][:, order], damping)
    groups = (order // group_size).tolist()
    codes = weight.new_empty(weight.shape, dtype=torch.int8)
    codes[:, order] = _codes(weight.float().T[order], scales.float().T.contiguous(), groups, factor, bits).T
    return (pack_pairs(codes) if bits == 4 else codes), scales


def _inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """U with Uᵀ·U = H⁻¹: row j says how the error of column j is spread over the columns behind it."""
    mean = hessian.diagonal().mean()
    if not bool(torch.isfinite(mean)):
        raise QuantizationError("the calibration inputs are not finite", cure="use other calibration text")
    damped = hessian + torch.eye(len(hessian), device=hessian.device) * (damping * mean if mean > 0 else 1.0)
    lower, failed = torch.linalg.cholesky_ex(damped)
    if int(failed):
        raise QuantizationError("the calibration inputs span too little to be inverted", cure="use more text")
    upper: Tensor = torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
    return upper


def _codes(columns: Tensor, scales: Tensor, groups: list[int], factor: Tensor, bits: int) -> Tensor:
    """int8 codes [columns, rows] of weights [columns, rows] in the order of treatment; the weights are used up.

    scales  fp32 [groups, rows]
    groups  the group of each column
    """
    lowest, highest = (-8, 7) if bits == 4 else (-127, 127)
    inverse = torch.where(scales == 0, 0.0, 1 / scales)
    codes = torch.empty_like(columns, dtype=torch.int8)
    for start in range(0, len(columns), BLOCK_COLUMNS):
        block = columns[start : start + BLOCK_COLUMNS]
        stop = start + len(block)
        errors = torch.empty_like(block)
        for k, group in enumerate(groups[start:stop]):
            spread = factor[start + k, start + k : stop]
            code = (block[k] * inverse[group]).round_().clamp_(lowest, highest)
            codes[start + k] = code
            errors[k] = (block[k] - code * scales[group]) / spread[0]
            block[k + 1 :].addr_(spread[1:], errors[k], alpha=-1)
        columns[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    return codes
