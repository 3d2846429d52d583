"""Ten first questions and the embedded model's answers, as the README prints them.

The questions were written down before the first answer was seen, and no answer was picked: seed 0, the card's sampling
settings, each question in a new conversation. Run it to see whether your machine gives the same:

    python examples/first_questions.py
"""

from __future__ import annotations

from collections.abc import Iterator

QUESTIONS = {
    "中文": (
        "你好",
        "你能做什么？",
        "晚上睡不着应该怎么办",
        "中国的首都是哪里？",
        "写一首关于春天的短诗。",
    ),
    "English": (
        "Hello!",
        "What can you do?",
        "I can't sleep at night. What should I do?",
        "What is the capital of Japan?",
        "Write a short poem about the sea.",
    ),
}


def first_answers() -> Iterator[tuple[str, str, str, str]]:
    """Language, question, answer and finish reason of each question. fp32 on the CPU, so that machines agree."""
    import chatglm

    model = chatglm.load(device="cpu", dtype="fp32")
    for language, questions in QUESTIONS.items():
        for question in questions:
            reply = model.chat(question, seed=0)
            yield language, question, reply.text, reply.finish_reason


def as_markdown(answers: Iterator[tuple[str, str, str, str]]) -> str:
    """A bold question, then its answer as a quotation; says so where an answer was cut by the length limit."""
    parts = []
    for _, question, answer, finish_reason in answers:
        quoted = "\n".join(f"> {line}".rstrip() for line in answer.splitlines() or [""])
        cut = "" if finish_reason == "stop" else f"\n> *({finish_reason})*"
        parts.append(f"**{question}**\n\n{quoted}{cut}")
    return "\n\n".join(parts)


if __name__ == "__main__":
    print(as_markdown(first_answers()))
