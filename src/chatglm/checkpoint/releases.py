"""The files of the known releases: sizes and hashes (spec/chatglm-6b.md §9).

A hash is a note: fine-tuned weights have the same sizes. Only the tokenizer file of a checkpoint whose eight shards
all have the sizes of a release must be that release's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..config import Era, ModelConfig

NUM_SHARDS = 8

_SLIM_SIZES = (
    1_740_651_802,
    1_879_731_432,
    1_980_385_902,
    1_913_294_120,
    1_879_722_289,
    1_879_731_496,
    1_074_103_621,
    1_069_286_123,
)
_PRE_SLIM_SIZES = (1_904_491_802, *_SLIM_SIZES[1:7], 1_233_126_123)

_V1_1_0 = (
    "14dafdc73e1b1da131fec6668f58774bf6eab1215963f92bdd5c7d81dc6ca383",
    "8678043a60cd2ce373543fffe8de9508a8cf4266d2c0f088d52167cae74af839",
    "84744300522f53f778744012cd95ffd6f0e533515e53034035fe7cca5daf70b0",
    "43eb8279007c062e39fd44e536647bc5d0069773c3a69ca087f60aa3b85894d5",
    "ccfc9d265ddc00a00e8d6c4f5328c381d64eb2c68e06b5214f4b73bed149e41d",
    "f13d68803861c8575a9702c4923e1ef1ed601d8ca17ca62841c32860be24e597",
    "570c6a9aad83b2b383765e27f6bddcad40efddeb84f8490aea29dc0e43666ac5",
    "39d30a1d55c7e0138ef8b85190f927851f0fda5483a6465b104f9696ceaec8b4",
)
_V0_1_0 = (
    "be79e2b22d99b3d76184f83f266cc764275220b66da6c4d0217176c8f8f6af27",
    "a80198fb714f7363d7e541125bb70b9cb6b1d1ef5988d32a7a25a852a374cbc3",
    "aaba0ae53b3ea30559575c8528dab52ca291a26ac847c5601fcf874db401198f",
    "968d134dd9b11e393d160144f097d6bff8c559413e3f75e9e0b6d35618eba669",
    "fc628ce0dcd5c38783e63fc81dd1b609fe01670ec3b855b358aa0d1d7ea48bf3",
    "511ec23b7907b7a26461671775a2ac08c08fb3695285bbe7d91fc534d7cbfd7e",
    "245d64e05cebeb214d696bccc87c1dbdf16c67c366e7f54af452ec5748c2186e",
    "607d08dd09074840c5f4603d4959a5c6789790955181c7253a2c14d38c1801d2",
)
_PRE_SLIM = (
    "fe5bac6bfa5b5404ddfe3fabe04862b785e013afd7b308b7beca08239f9489fa",
    *_V0_1_0[1:7],
    "e764ebdece24219efeda3c18aa32fe6414da3d1f533df8845815609e9ef7f4a7",
)

ERA_DATES: dict[Era, str] = {"pre-slim": "2023-03-14 to 04-05", "slim": "from 2023-04-06 on"}


@dataclass(frozen=True)
class Release:
    """One published set of weights: bytes and sha256 of its shards, first to last."""

    name: str
    era: Era
    sizes: tuple[int, ...]
    sha256: tuple[str, ...]


RELEASES = (
    Release("v1.1.0", "slim", _SLIM_SIZES, _V1_1_0),
    Release("v0.1.0", "slim", _SLIM_SIZES, _V0_1_0),
    Release("the first release", "pre-slim", _PRE_SLIM_SIZES, _PRE_SLIM),
)


def shard_name(index: int, count: int = NUM_SHARDS) -> str:
    """`pytorch_model-00001-of-00008.bin`; index from 0."""
    return f"pytorch_model-{index + 1:05d}-of-{count:05d}.bin"


def known_sizes(config: ModelConfig | None) -> dict[str, int]:
    """Size of each shard of the release that a full-size config belongs to; empty for any other model."""
    plain = ModelConfig()
    if config is None or config.quantization_bit or config.pre_seq_len is not None:
        return {}
    slim = config.slim()
    same = ("vocab_size", "hidden_size", "num_layers", "num_heads", "inner_hidden_size")
    if any(getattr(slim, name) != getattr(plain, name) for name in same):
        return {}
    sizes = _PRE_SLIM_SIZES if config.era == "pre-slim" else _SLIM_SIZES
    return {shard_name(index): size for index, size in enumerate(sizes)}


def release_name(files: Iterable[Path]) -> str | None:
    """Which release weight files may be, by their sizes alone (`v1.1.0 or v0.1.0`), or None."""
    sizes = {path.name: path.stat().st_size for path in files if path.exists()}
    return " or ".join(release.name for release in releases_of_sizes(sizes)) or None


def releases_of_sizes(sizes: Mapping[str, int]) -> list[Release]:
    """The releases all of whose shards have these sizes, by file name."""
    return [
        release
        for release in RELEASES
        if sizes == {shard_name(index): size for index, size in enumerate(release.sizes)}
    ]
