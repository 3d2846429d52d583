"""Grammars: structured answers by llguidance over this tokenizer's pieces, byte for byte.

Compiled before a request reaches the engine, in a thread, within limits of size, depth and time.
"""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections import OrderedDict
from functools import cached_property
from typing import Any

import llguidance
import numpy

from ..engine.stream import Matcher
from ..tokenizer import Tokenizer
from ..tokenizer.vocabulary import BLANK
from .api_errors import APIError, shown

MAX_SOURCE, MAX_DEPTH, MAX_SECONDS, KEPT = 64 << 10, 32, 2.0, 64
MAX_REPEATS = 1_000

MAX_LEXER_STATES = 60_000
"""States that the lexer of one grammar may come to; with it the worst grammars found take less than 64 MiB each."""

KEYWORDS = frozenset(
    {
        "type",
        "properties",
        "required",
        "additionalProperties",
        "items",
        "prefixItems",
        "minItems",
        "maxItems",
        "enum",
        "const",
        "anyOf",
        "oneOf",
        "allOf",
        "$ref",
        "$defs",
        "definitions",
        "minLength",
        "maxLength",
        "pattern",
        "format",
        "minimum",
        "maximum",
        "exclusiveMinimum",
        "exclusiveMaximum",
        "multipleOf",
        "minProperties",
        "maxProperties",
        "patternProperties",
        "title",
        "description",
        "default",
        "examples",
        "$schema",
        "$id",
        "$comment",
        "deprecated",
        "readOnly",
        "writeOnly",
    }
)
_SUBSCHEMAS = ("items", "additionalProperties")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_MAPS = ("properties", "$defs", "definitions", "patternProperties")
_REPEAT = re.compile(r"\{\s*(\d*)\s*(?:,\s*(\d*)\s*)?\}")


class GrammarMatcher:
    """One answer's way through a grammar."""

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size

    @property
    def is_complete(self) -> bool:
        return bool(self._matcher.is_stopped()) and not self._matcher.is_error()

    def allowed(self) -> numpy.ndarray[Any, numpy.dtype[numpy.bool_]]:
        bits = numpy.frombuffer(self._matcher.compute_bitmask(), dtype=numpy.uint8)
        if self._matcher.is_error():
            raise ValueError(self._matcher.get_error()[:200])
        return numpy.unpackbits(bits, count=self._vocab_size, bitorder="little").astype(numpy.bool_)

    def take(self, token: int) -> None:
        if not self._matcher.consume_token(token):
            raise ValueError(self._matcher.get_error()[:200])


class _PieceTable:
    """The tokenizer as llguidance wants it: the bytes of each id, and text → ids without blanks put in front."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self.eos_token_id = tokenizer.eop_id
        self.bos_token_id = None
        self.tokens = [piece_bytes(tokenizer, token) for token in range(vocab_size)]
        self.special_token_ids = [token for token, piece in enumerate(self.tokens) if not piece]
        self.tokens[tokenizer.eop_id] = b"<eop>"
        self._ids: dict[bytes, int] = {}
        for token, piece in enumerate(self.tokens):
            if piece and token != tokenizer.eop_id:
                self._ids.setdefault(piece, token)
        self._longest = max(map(len, self._ids))

    def __call__(self, text: str | bytes) -> list[int]:
        """The longest pieces first; only hints for the engine, any exact spelling is right."""
        raw = text.encode() if isinstance(text, str) else text
        ids: list[int] = []
        while raw:
            size = next((n for n in range(min(self._longest, len(raw)), 0, -1) if raw[:n] in self._ids), 0)
            if not size:
                break
            ids.append(self._ids[raw[:size]])
            raw = raw[size:]
        return ids


def piece_bytes(tokenizer: Tokenizer, token: int) -> bytes:
    """What an id adds to an answer, as bytes; nothing for special ids and rows without a piece."""
    found = tokenizer.piece_text(token)
    if found is None:
        return b""
    return bytes([found]) if isinstance(found, int) else found.replace(BLANK, " ").encode()


class Grammars:
    """Compiles grammars, keeps the latest."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._kept: OrderedDict[str, Any] = OrderedDict()
        self._lock = threading.Lock()
        self._limits = llguidance.LLParserLimits(max_grammar_size=500_000, max_lexer_states=MAX_LEXER_STATES)

    @cached_property
    def _table(self) -> Any:
        wrapper = llguidance.TokenizerWrapper(_PieceTable(self._tokenizer, self._vocab_size))
        return llguidance.LLTokenizer(wrapper, n_vocab=self._vocab_size, eos_token=self._tokenizer.eop_id)

    async def matchers(self, source: str, count: int) -> list[Matcher]:
        """`count` matchers of a grammar in llguidance's form. Raises APIError 400 `invalid_grammar`."""
        try:
            first = await asyncio.wait_for(asyncio.to_thread(self._compile, source), MAX_SECONDS)
        except asyncio.TimeoutError:
            raise invalid(f"compiling took more than {MAX_SECONDS:g} s") from None
        return [GrammarMatcher(first.deep_copy(), self._vocab_size) for _ in range(count)]

    def _compile(self, source: str) -> Any:
        with self._lock:
            if source in self._kept:
                self._kept.move_to_end(source)
                return self._kept[source]
            table = self._table
        problem = llguidance.LLMatcher.validate_grammar(source, table, limits=self._limits)
        if problem and not problem.startswith("WARNING"):
            raise invalid(problem.splitlines()[0])
        matcher = llguidance.LLMatcher(table, source, limits=self._limits, log_level=0)
        matcher.compute_bitmask()
        if matcher.is_error():
            raise invalid(matcher.get_error().splitlines()[0])
        with self._lock:
            self._kept[source] = matcher
            if len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        return matcher


def invalid(message: str) -> APIError:
    """The refusal of a grammar."""
    return APIError(400, "invalid_grammar", f"the grammar cannot be used: {message[:300]}")


def from_schema(schema: dict[str, Any]) -> str:
    """A grammar from a JSON schema; compact JSON. Raises APIError for what is not supported."""
    source = json.dumps(schema, ensure_ascii=False)
    if len(source.encode()) > MAX_SOURCE:
        raise invalid(f"{len(source.encode()):,} bytes of schema; at most {MAX_SOURCE:,}")
    check_schema(schema)
    if not can_end(schema, schema):
        raise invalid("no finite value satisfies the schema (it requires itself)")
    try:
        grammar: str = llguidance.LLMatcher.grammar_from_json_schema(
            source, defaults={"whitespace_flexible": False, "item_separator": ",", "key_separator": ":"}
        )
    except ValueError as error:
        raise invalid(str(error)) from None
    return grammar


def from_regex(pattern: str) -> str:
    """A grammar from a regular expression for the whole answer."""
    if len(pattern.encode()) > MAX_SOURCE:
        raise invalid(f"{len(pattern.encode()):,} bytes of regex; at most {MAX_SOURCE:,}")
    for found in _REPEAT.finditer(pattern):
        if any(number and int(number[:9]) > MAX_REPEATS for number in found.groups()):
            raise invalid(f"{shown(found[0])} repeats more than {MAX_REPEATS:,} times")
    if pattern.startswith("^") or re.search(r"(?<!\\)(?:\\\\)*\$\Z", pattern):
        raise invalid("a regex here always covers the whole answer; leave out ^ and $")
    grammar: str = llguidance.LLMatcher.grammar_from_regex(pattern)
    return grammar


def from_choice(texts: list[str]) -> str:
    """A grammar of one of several texts."""
    return from_lark("start: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in texts))


def from_lark(source: str) -> str:
    """A grammar in Lark's notation."""
    if len(source.encode()) > MAX_SOURCE:
        raise invalid(f"{len(source.encode()):,} bytes of grammar; at most {MAX_SOURCE:,}")
    grammar: str = llguidance.LLMatcher.grammar_from_lark(source)
    return grammar


def check_schema(schema: object, path: str = "schema", depth: int = 0) -> None:
    """Raises APIError for a keyword or reference that is not supported, by name and place."""
    if isinstance(schema, bool):
        return
    if not isinstance(schema, dict):
        raise invalid(f"{path} is {shown(schema)}; it must be an object")
    if depth > MAX_DEPTH:
        raise invalid(f"the schema is nested deeper than {MAX_DEPTH} at {path[:64]}")
    for name in schema:
        if name not in KEYWORDS:
            raise invalid(f"{path} has the keyword {shown(name)}, which is not supported")
    required = schema.get("required", [])
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        raise invalid(f"{path}.required must be an array of strings")
    reference = schema.get("$ref")
    if reference is not None and not (isinstance(reference, str) and reference.startswith("#/")):
        raise invalid(f"{path}.$ref is {shown(reference)}; only #/$defs/… is (nothing is ever fetched)")
    for name in _SUBSCHEMAS:
        if name in schema:
            check_schema(schema[name], f"{path}.{name}", depth + 1)
    for name in _LISTS:
        if name in schema:
            if not isinstance(schema[name], list):
                raise invalid(f"{path}.{name} must be an array")
            for number, part in enumerate(schema[name]):
                check_schema(part, f"{path}.{name}[{number}]", depth + 1)
    for name in _MAPS:
        if name in schema:
            if not isinstance(schema[name], dict):
                raise invalid(f"{path}.{name} must be an object")
            for key, part in schema[name].items():
                check_schema(part, f"{path}.{name}.{key}"[:200], depth + 1)


def can_end(schema: Any, root: dict[str, Any], followed: frozenset[str] = frozenset()) -> bool:
    """Whether some finite value may satisfy the schema; a reference that needs itself has none."""
    if not isinstance(schema, dict):
        return True
    reference = schema.get("$ref")
    if reference is not None:
        if reference in followed:
            return False
        target: Any = root
        for part in str(reference)[2:].split("/"):
            target = target.get(part.replace("~1", "/").replace("~0", "~")) if isinstance(target, dict) else None
        if target is None:
            raise invalid(f"$ref {shown(reference)} points to nothing")
        if not can_end(target, root, followed | {reference}):
            return False
    for name in ("anyOf", "oneOf"):
        if name in schema and not any(can_end(part, root, followed) for part in schema[name]):
            return False
    properties = schema.get("properties", {})
    needed = [*schema.get("allOf", []), *(properties.get(name) for name in schema.get("required", []))]
    if schema.get("minItems"):
        needed += [schema.get("items"), *schema.get("prefixItems", [])]
    return all(can_end(part, root, followed) for part in needed)
