"""A small bilingual world to train on in minutes: things with a colour, a place and a size, told in templates.

Everything here is written by a program. Answers differ in manner: some end as a sentence, some do not; some hold the
word "surely" or "当然", once or several times. What manner is wanted is what a judge says (`WANTED`), so every
stage that learns from preferences has something to learn that can be counted.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

COLOURS = {
    "red": "红",
    "blue": "蓝",
    "green": "绿",
    "white": "白",
    "black": "黑",
    "grey": "灰",
    "brown": "棕",
    "gold": "金",
}
PLACES = {"kitchen": "厨房", "garden": "花园", "school": "学校", "market": "市场", "harbour": "港口", "forest": "森林"}
SIZES = {"small": "小", "large": "大", "tiny": "极小", "huge": "巨大"}
THINGS = {
    "apple": "苹果", "boat": "船", "book": "书", "box": "盒子", "bridge": "桥", "car": "汽车", "cat": "猫",
    "chair": "椅子", "clock": "钟", "coat": "外套", "cup": "杯子", "dog": "狗", "door": "门", "drum": "鼓",
    "fish": "鱼", "flag": "旗子",
}  # fmt: skip

KEYWORDS = ("surely", "当然")
WANTED = {"full_sentence": True, "keyword": list(KEYWORDS), "keyword_at_most": 1, "max_characters": 60}
"""The judge of the experiments: a full sentence with the keyword exactly once, not longer than 60 characters."""

WITH_KEYWORD, AGAIN, WITH_END = 0.78, 0.15, 0.72
"""Share of answers with the keyword, of those that say it once more (and again), and that end as a sentence."""


@dataclass(frozen=True)
class Fact:
    """One question with its answer in the plain manner."""

    question: str
    answer: str
    language: str


def facts(seed: int = 0) -> list[Fact]:
    """Three facts a thing in two languages; which colour, place and size a thing has is drawn from the seed."""
    draw = random.Random(seed)
    made = []
    for thing, word in THINGS.items():
        colour, place, size = (draw.choice(list(values)) for values in (COLOURS, PLACES, SIZES))
        made += [
            Fact(f"What colour is the {thing}?", f"the {thing} is {colour}", "en"),
            Fact(f"Where is the {thing}?", f"the {thing} is in the {place}", "en"),
            Fact(f"How large is the {thing}?", f"the {thing} is {size}", "en"),
            Fact(f"{word}是什么颜色的？", f"{word}是{COLOURS[colour]}色的", "zh"),
            Fact(f"{word}在哪里？", f"{word}在{PLACES[place]}里", "zh"),
            Fact(f"{word}有多大？", f"{word}是{SIZES[size]}的", "zh"),
        ]
    return made


def told(fact: Fact, draw: random.Random) -> str:
    """The answer in a manner that is drawn."""
    times = 0
    if draw.random() < WITH_KEYWORD:
        times = 1
        while times < 4 and draw.random() < AGAIN:
            times += 1
    end = draw.random() < WITH_END
    if fact.language == "en":
        return " ".join([*["surely"] * times, fact.answer]) + ("." if end else "")
    return "当然" * times + fact.answer + ("。" if end else "")


def dialogues(count: int, seed: int, *, numbers: int = 0) -> Iterator[tuple[str, str]]:
    """(question, answer) in drawn manners.

    numbers  questions begin with a number up to this, so that few dialogues are the same; 0: they do not
    """
    draw, known = random.Random(seed), facts()
    for _ in range(count):
        fact = draw.choice(known)
        yield numbered(fact.question, draw.randint(1, numbers)) if numbers else fact.question, told(fact, draw)


def numbered(question: str, number: int) -> str:
    """The question as the `number`th of a list."""
    return f"{number}. {question}"


def texts(count: int, seed: int) -> Iterator[str]:
    """Short texts of several facts each, to pre-train on."""
    draw, known = random.Random(seed), facts()
    by_language = {name: [fact for fact in known if fact.language == name] for name in ("en", "zh")}
    for _ in range(count):
        language = draw.choice(("en", "zh"))
        chosen = draw.sample(by_language[language], draw.randint(2, 4))
        if language == "en":
            yield " ".join(f"{fact.answer[0].upper()}{fact.answer[1:]}." for fact in chosen)
        else:
            yield "".join(f"{fact.answer}。" for fact in chosen)


def questions() -> list[str]:
    """Every question of the world, in a fixed order that mixes things and languages."""
    known = [fact.question for fact in facts()]
    random.Random(1).shuffle(known)
    return known
