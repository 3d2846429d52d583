"""The worst grammars stay within their limits of memory (test 19 and the limit of 256 MiB)."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("llguidance")

MEASURE = """
import asyncio, random, resource
import numpy
from chatglm.chat import EMBEDDED_MODEL
from chatglm.server import grammar
from chatglm.server.api_errors import APIError
from chatglm.tokenizer import Tokenizer

tokenizer = Tokenizer.from_folder(EMBEDDED_MODEL)
grammars = grammar.Grammars(tokenizer, tokenizer.vocab_size)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

def follow(source):
    try:
        matcher = asyncio.run(grammars.matchers(source, 1))[0]
        draw = random.Random(1)
        for _ in range(60):
            matcher.take(int(draw.choice(numpy.flatnonzero(matcher.allowed()))))
            if matcher.is_complete:
                return
    except (APIError, ValueError):
        pass  # refused, or ended by a limit: either is well

follow(grammar.from_regex("a+"))
before = peak()
number = {"type": "integer", "minimum": -99999, "maximum": 99999}
for source in (
    grammar.from_regex("(.*的.{20})|(.*a.{25}b)|(.*[b-z].{15}q)"),
    grammar.from_regex("((((a|b){1,900}c){1,900}d){1,900}e){1,900}"),
    grammar.from_regex(".*(%s).{1000}" % "|".join(f"{i:x}" for i in range(5000))),
    grammar.from_schema({"anyOf": [{"properties": {f"k{i}": number}} for i in range(500)]}),
    grammar.from_lark("start: A\\nA: /.*a.{200}/ & /.*b.{300}/ & ~/.*c.{100}/\\n"),
    grammar.from_lark('start: e\\ne: e e | "a" | ""\\n'),
):
    follow(source)
    print(peak() - before)
"""


def test_the_worst_grammars_take_less_than_256_mib():
    done = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    grown = [int(line) for line in done.stdout.split()]
    assert len(grown) == 6 and grown[-1] < 256, grown  # all of them together
