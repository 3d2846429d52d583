"""The KV cache between transformers' form and the original's.

transformers keeps keys and values as [batch, heads, tokens, head_dim] in a Cache object; the original handed out a
tuple of (key, value) for each layer, [tokens, batch, heads, head_dim], keys after the rotary. `ChatGLMCache` is the
first and reads as the second. Source: spec/chatglm-6b.md §3.7.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor
from transformers import DynamicCache

from ..model.attention import KeyValue


class ChatGLMCache(DynamicCache):
    """A growing cache; `cache[layer]` is the original's (key, value), both [tokens, batch, heads, head_dim]."""

    @classmethod
    def from_pairs(cls, pairs: Sequence[KeyValue]) -> ChatGLMCache:
        """From the original's tuple. Raises ValueError for tensors of another shape."""
        cache = cls()
        for layer, pair in enumerate(pairs):
            if len(pair) != 2 or any(tensor.dim() != 4 for tensor in pair):
                raise ValueError(
                    f"layer {layer} of past_key_values is not a (key, value) of [tokens, batch, heads, head_dim]"
                )
            key, value = (tensor.permute(1, 2, 0, 3) for tensor in pair)  # [batch, heads, tokens, head_dim]
            cache.update(key, value, layer)
        return cache

    def __len__(self) -> int:
        return len(self.layers) if hasattr(self, "layers") else len(self.key_cache)

    def __getitem__(self, layer: int) -> KeyValue:
        if not -len(self) <= layer < len(self):
            raise IndexError(f"the cache has {len(self)} layers, not layer {layer}")
        if hasattr(self, "layers"):
            key, value = self.layers[layer].keys, self.layers[layer].values
        else:  # transformers before 4.54
            key, value = self.key_cache[layer], self.value_cache[layer]
        return key.permute(2, 0, 1, 3), value.permute(2, 0, 1, 3)

    def __iter__(self) -> Iterator[KeyValue]:
        return (self[layer] for layer in range(len(self)))


class CacheForNetwork:
    """Any transformers Cache as the network asks for it (`model.attention.Cache`)."""

    def __init__(self, cache: Any) -> None:
        self.cache = cache

    @property
    def length(self) -> int:
        return held_tokens(self.cache)

    def update(self, layer: int, key: Tensor, value: Tensor) -> KeyValue:
        keys, values = self.cache.update(key, value, layer)
        return keys, values


def held_tokens(cache: Any) -> int:
    """Tokens in a cache, a P-tuning prefix counted; 0 for None and for an empty tuple."""
    if cache is None or (isinstance(cache, Sequence) and not cache):
        return 0
    if hasattr(cache, "get_seq_length"):
        return int(cache.get_seq_length())
    return int(cache[0][0].shape[0])


def as_cache(past: Any) -> Any:
    """A transformers Cache from what a caller gave as `past_key_values`: such a cache, or the original's tuple."""
    return past if hasattr(past, "get_seq_length") else ChatGLMCache.from_pairs(past)
