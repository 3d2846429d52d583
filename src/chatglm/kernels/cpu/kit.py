"""The kernels that one model on one machine uses, made when they are first asked for."""

from __future__ import annotations

import functools

from .attention import Heads, attend_one, place_keys
from .emitter import Module
from .few_tokens import linear_few
from .float_rows import linear_floats
from .formats import Layout, Matrix, Tile
from .jit import Compiler
from .many_tokens import linear_many
from .norm import norm
from .pointwise import gelu_in_place
from .quantize import quantize_tiles, quantize_tokens
from .target import Target

KERNEL = "kernel"


class Kit:
    """Addresses of kernels by what they do. The parameters are those of the functions that write them."""

    def __init__(self, compiler: Compiler) -> None:
        self.compiler = compiler
        self.target: Target = compiler.target

    def _compile(self, write: functools.partial[None]) -> int:
        description = f"{write.func.__name__} {write.args} {sorted(write.keywords.items())}"
        return self.compiler.compile(description, (KERNEL,), lambda module: _write(write, module))[KERNEL]

    @functools.cache  # noqa: B019 - a kit lives as long as its kernels
    def linear_few(self, matrix: Matrix, tokens: int) -> int:
        return self._compile(functools.partial(linear_few, target=self.target, matrix=matrix, tokens=tokens))

    @functools.cache  # noqa: B019
    def linear_many(self, matrix: Matrix) -> int:
        return self._compile(functools.partial(linear_many, target=self.target, matrix=matrix))

    @functools.cache  # noqa: B019
    def linear_floats(self, columns: int, dtype: str) -> int:
        return self._compile(functools.partial(linear_floats, target=self.target, columns=columns, dtype=dtype))

    @functools.cache  # noqa: B019
    def quantize_tokens(self, layout: Layout, segments: int, has_gelu: bool) -> int:
        return self._compile(functools.partial(quantize_tokens, layout=layout, segments=segments, has_gelu=has_gelu))

    @functools.cache  # noqa: B019
    def quantize_tiles(self, tile: Tile, has_gelu: bool) -> int:
        return self._compile(functools.partial(quantize_tiles, tile=tile, has_gelu=has_gelu))

    @functools.cache  # noqa: B019
    def norm(self, columns: int, has_residual: bool, keeps: bool, layout: Layout | None) -> int:
        return self._compile(
            functools.partial(
                norm, target=self.target, columns=columns, has_residual=has_residual, keeps=keeps, layout=layout
            )
        )

    @functools.cache  # noqa: B019
    def dot_loop(self) -> int:
        from .rate import dot_loop

        return self._compile(functools.partial(dot_loop, target=self.target))

    @functools.cache  # noqa: B019
    def gelu(self, columns: int) -> int:
        return self._compile(functools.partial(gelu_in_place, target=self.target, columns=columns))

    @functools.cache  # noqa: B019
    def attend_one(self, heads: Heads, places: bool) -> int:
        return self._compile(functools.partial(attend_one, target=self.target, heads=heads, places=places))

    @functools.cache  # noqa: B019
    def place_keys(self, heads: Heads) -> int:
        return self._compile(functools.partial(place_keys, target=self.target, heads=heads))


def _write(write: functools.partial[None], module: Module) -> None:
    write(module, KERNEL)
