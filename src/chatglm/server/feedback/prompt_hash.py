"""Which answers may be compared: those to the same context."""

from __future__ import annotations

import hashlib


def hash_ids(ids: list[int]) -> str:
    """sha256 of a context's ids as little-endian 32-bit numbers."""
    return hashlib.sha256(b"".join(token.to_bytes(4, "little") for token in ids)).hexdigest()
