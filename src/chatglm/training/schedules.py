"""What changes with time, each a pure function of the step or of the rows read: learning rate, batch size, embedding α.

Sources: GLM-130B table 11 and §3 (α relaxed from 0.1 to 1 and back); "constant, then decay": MiniCPM (2024) §4.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from .run_config import BatchSettings, ScheduleSettings


def learning_rate_factor(step: int, schedule: ScheduleSettings, total: int) -> float:
    """Multiple of the base rate at update `step`, counted from 0, of `total`."""
    warmup = min(100, total // 10) if schedule.warmup is None else schedule.warmup
    if step < warmup:
        return schedule.warmup_from + (1 - schedule.warmup_from) * (step + 1) / warmup
    total = schedule.steps or total
    if schedule.kind == "constant":
        return 1.0
    if schedule.kind == "constant_decay":
        begin = max(warmup, round(total * (1 - schedule.decay)))
        share = (step - begin) / max(1, total - begin)
    else:
        share = (step - warmup) / max(1, total - warmup)
    share = min(max(share, 0.0), 1.0)
    falling = (1 + math.cos(math.pi * share)) / 2 if schedule.kind == "cosine" else 1 - share
    return schedule.floor + (1 - schedule.floor) * falling


def rows_at(position: int, batch: BatchSettings, unit: int = 1) -> int:
    """Rows of the global batch that begins after `position` rows; a multiple of `unit`, the data-parallel processes."""
    rows = batch.rows
    if batch.ramp_from is not None and position < batch.ramp_rows:
        grown = (batch.rows - batch.ramp_from) * position / batch.ramp_rows
        rows = min(batch.rows, batch.ramp_from + int(grown // batch.ramp_step) * batch.ramp_step)
    return max(unit, rows // unit * unit)


def steps_for(rows: int, batch: BatchSettings, unit: int = 1) -> int:
    """Steps that it takes to read `rows` rows, the ramp counted."""
    position = steps = 0
    while position < rows:
        if position >= batch.ramp_rows or batch.ramp_from is None:
            return steps + math.ceil((rows - position) / rows_at(position, batch, unit))
        position += rows_at(position, batch, unit)
        steps += 1
    return steps


def on_lines(step: int, points: Sequence[tuple[float, float]], otherwise: float) -> float:
    """The value at `step` on straight lines between (step, value) points; constant before the first and after the last.

    otherwise  the value where there are no points
    """
    if not points:
        return otherwise
    points = sorted(points)
    if step <= points[0][0]:
        return points[0][1]
    for (left, low), (right, high) in pairwise(points):
        if step <= right:
            return low + (high - low) * (step - left) / (right - left)
    return points[-1][1]
