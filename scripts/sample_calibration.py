"""Make the sampled part of the calibration text: dialogues of the embedded model with itself as the one who answers.

The questions are drawn from the lists below, the answers are sampled with the model card's settings; every dialogue
has its own recorded seed. Handwritten prose and dialogues stand in front of them in the same file.

    python scripts/sample_calibration.py --out src/chatglm/quantization/data/calibration.jsonl
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import chatglm
from chatglm import ChatModel
from chatglm.tokenizer import template

FIRST = {
    "zh": (
        "请介绍一下{}。",
        "{}有什么特点？",
        "怎样向小学生解释{}？",
        "写一段关于{}的短文。",
        "关于{}，新手最容易犯什么错误？",
        "我想了解{}，应该从哪里开始？",
        "请列出关于{}的五个要点。",
        "为{}写一句广告语。",
        "{}的优点和缺点分别是什么？",
        "给我讲一个和{}有关的小故事。",
    ),
    "en": (
        "Tell me about {}.",
        "What should a beginner know about {}?",
        "Explain {} to a child.",
        "Write a short paragraph about {}.",
        "Give me five tips on {}.",
        "What are the advantages and disadvantages of {}?",
        "Write a short poem about {}.",
        "Why do people care about {}?",
        "Describe a day that has to do with {}.",
        "What is a common mistake with {}?",
    ),
}
THEN = {
    "zh": (
        "能举个例子吗？",
        "请用一句话总结。",
        "还有别的吗？",
        "为什么？",
        "把它翻译成英文。",
        "请说得更详细一些。",
        "有什么需要注意的？",
        "那价格大概是多少？",
        "如果时间很少，该怎么办？",
        "谢谢，换个说法再讲一遍。",
    ),
    "en": (
        "Can you give me an example?",
        "Please sum it up in one sentence.",
        "What else?",
        "Why is that?",
        "Say it in simpler words.",
        "Please give me more details.",
        "What should I be careful about?",
        "How much does it cost?",
        "What if I have only ten minutes?",
        "Thank you. Now turn it into a list.",
    ),
}
TOPICS = {
    "zh": (
        "竹子; 自行车; 海水为什么是咸的; 中秋节; 做豆腐; 面试; 失眠; 养猫; 记账; 太阳能; 围棋; 高铁; 写日记; "
        "茶叶; 地震; 摄影; 编程语言; 感冒; 图书馆; 旅行计划; 睡前故事; 垃圾分类; 毛笔字; 时间管理; 学习英语; "
        "家庭聚会; 人工智能; 春天的雨; 做饺子; 骑马; 数据库; 月亮; 跑步; 城市公园; 古代丝绸; 演讲"
    ),
    "en": (
        "bees; sourdough bread; the tides; learning the piano; a job interview; rain; public libraries; "
        "saving money; chess; solar panels; keeping a diary; old bridges; gardening in a small flat; sleep; "
        "the moon; writing a letter; computer programs; hiking alone; black tea; moving to a new city; "
        "lighthouses; a balanced breakfast; learning Chinese; bicycles; email at work; volcanoes; photography; "
        "time zones; a good speech; recycling; snow; robots; small talk; maps; vegetables; music festivals"
    ),
}


def questions(language: str, seed: int, rounds: int) -> list[str]:
    """The questions of one dialogue."""
    draw = random.Random(f"{language} {seed}")
    topics = TOPICS[language].split("; ")
    return [draw.choice(FIRST[language]).format(topics[seed % len(topics)]), *draw.sample(THEN[language], rounds - 1)]


def sample(model: ChatModel, dialogues: int, rounds: int, batch: int) -> list[dict[str, object]]:
    """Dialogues by rounds, many at a time; one language after the other."""
    keys = [(language, seed) for language in ("zh", "en") for seed in range(dialogues // 2)]
    made: list[dict[str, object]] = []
    for start in range(0, len(keys), batch):
        group = keys[start : start + batch]
        asked = [questions(language, seed, rounds) for language, seed in group]
        turns: list[list[tuple[str, str]]] = [[] for _ in group]
        for number in range(rounds):
            prompts = [template.render(own[number], done) for own, done in zip(asked, turns, strict=True)]
            params = [chatglm.SamplingParams(seed=1000 * seed + number, max_new_tokens=160) for _, seed in group]
            replies = model.generate(prompts, params)
            for own, done, reply in zip(asked, turns, replies, strict=True):
                done.append((own[number], reply.text))
        for (_, seed), done in zip(group, turns, strict=True):
            made.append({"turns": [list(pair) for pair in done], "sampled_with_seed": seed})
        print(f"{len(made)} of {len(keys)} dialogues")
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="a .jsonl file; its sampled lines are replaced")
    parser.add_argument("--dialogues", type=int, default=288)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    lines = arguments.out.read_text(encoding="utf-8").splitlines() if arguments.out.exists() else []
    kept = [line for line in lines if "sampled_with_seed" not in line]
    model = chatglm.load(dtype="fp32", device=arguments.device, max_cached_tokens=1024 * arguments.batch)
    made = sample(model, arguments.dialogues, arguments.rounds, arguments.batch)
    text = "\n".join([*kept, *(json.dumps(row, ensure_ascii=False) for row in made)]) + "\n"
    arguments.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
