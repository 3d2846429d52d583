"""What the kernels must know of a quantised matrix, and how activations are laid out to meet it."""

from __future__ import annotations

from dataclasses import dataclass

from .dot_products import weight_offset
from .target import Target

LARGEST_GROUP = 128
"""Activations that share a scale, at most."""

GROUPS = (8, 16, 32, 64, 128)
"""Group sizes of weights that the kernels read; 0, a whole row, is another."""


@dataclass(frozen=True)
class Matrix:
    """A quantised weight [rows, columns] as its checkpoint stores it, whatever its rows.

    bits         8 or 4
    group        columns that share a scale; 0: a whole row
    is_original  the original's INT4: two's complement, the even column in the high half
    """

    columns: int
    bits: int
    group: int
    is_original: bool

    @property
    def row_bytes(self) -> int:
        return self.columns * self.bits // 8


@dataclass(frozen=True)
class Layout:
    """How one token's activations lie in memory for a target: blocks of one register of weights each.

    An INT4 block is the activations of the even columns, then those of the odd ones. Codes and scales are padded with
    zeros, so a kernel may read whole blocks.
    """

    target: Target
    bits: int
    columns: int
    group: int

    @classmethod
    def of(cls, target: Target, matrix: Matrix) -> Layout:
        """The layout that a matrix wants."""
        return cls(target, matrix.bits, matrix.columns, matrix.group or LARGEST_GROUP)

    @property
    def halves(self) -> int:
        """Registers of activations that meet one register of weights."""
        return 2 if self.bits == 4 else 1

    @property
    def block(self) -> int:
        """Columns in one register of weights."""
        return self.target.register_bytes * self.halves

    @property
    def step(self) -> int:
        """Columns after which sums of products are scaled: whole blocks and whole groups."""
        return max(self.block, self.group)

    @property
    def padded_columns(self) -> int:
        """Bytes of one token's codes."""
        return -(-self.columns // self.step) * self.step

    @property
    def groups(self) -> int:
        """Scales of one token, padded to whole registers."""
        count = self.padded_columns // self.group
        return -(-count // self.target.lanes) * self.target.lanes

    @property
    def offset(self) -> int:
        return weight_offset(self.target, self.bits)


@dataclass(frozen=True)
class Tile:
    """How the activations of many tokens lie in memory: `tokens` tokens together, four columns of each at a time.

    codes   [tiles, columns / quad, halves, tokens] of 4 bytes; an INT4 half is the even or the odd of eight columns
    starts  [tiles, groups, tokens] int32, -offset · Σ codes of a group: what a sum of products starts from
    scales  [tiles, groups, tokens] fp32
    """

    target: Target
    bits: int
    columns: int
    group: int
    tokens: int
    registers: int

    @classmethod
    def of(cls, target: Target, matrix: Matrix) -> Tile:
        """The tile for which sums of `tokens` × `registers` registers stay in the registers of the target."""
        tokens, registers = (12, 2) if target.registers == 32 else (8, 1)
        return cls(target, matrix.bits, matrix.columns, matrix.group or LARGEST_GROUP, tokens, registers)

    @property
    def halves(self) -> int:
        return 2 if self.bits == 4 else 1

    @property
    def quad(self) -> int:
        """Columns in 32 bits of weights."""
        return 4 * self.halves

    @property
    def groups(self) -> int:
        return -(-self.columns // self.group)

    @property
    def padded_columns(self) -> int:
        return self.groups * self.group

    @property
    def rows(self) -> int:
        """Rows of weights in a panel."""
        return self.registers * self.target.lanes

    @property
    def offset(self) -> int:
        return weight_offset(self.target, self.bits)
