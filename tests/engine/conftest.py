"""Fixtures of the engine tests."""

from engine_parts import base

__all__ = ["base"]
