"""The prompt's format, and fitting a history into the context window."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chatglm.errors import PromptTooLongError
from chatglm.tokenizer import Tokenizer, template
from chatglm.tokenizer.template import Round, default_max_new_tokens, fit, render

ROUNDS = [("你好", "你好！"), ("Who are you?", "A bot.")]


def test_a_first_question_stands_bare() -> None:
    assert render("你好") == "你好"


def test_rounds_are_numbered_from_zero_in_the_exact_format() -> None:
    assert render("再见", ROUNDS) == (
        "[Round 0]\n问：你好\n答：你好！\n[Round 1]\n问：Who are you?\n答：A bot.\n[Round 2]\n问：再见\n答："
    )


def test_a_system_message_stands_before_the_first_kept_question() -> None:
    assert render("你好", system="Be brief.") == "Be brief.\n你好"
    assert render("再见", ROUNDS[:1], "Be brief.") == (
        "[Round 0]\n问：Be brief.\n你好\n答：你好！\n[Round 1]\n问：再见\n答："
    )


def test_an_empty_system_message_is_none() -> None:
    assert render("你好", ROUNDS, "") == render("你好", ROUNDS)


@pytest.mark.parametrize(
    ("window", "expected"), [(2048, 512), (4096, 512), (1024, 256), (2047, 511), (8, 2), (2, 1), (1, 1)]
)
def test_room_for_the_answer_is_512_or_a_quarter_of_a_small_window(window: int, expected: int) -> None:
    assert default_max_new_tokens(window) == expected


def test_everything_is_kept_when_it_fits(tokenizer: Tokenizer) -> None:
    fitted = fit(tokenizer, "再见", ROUNDS, system="Be brief.", limit=2048)
    assert fitted.prompt == render("再见", ROUNDS, "Be brief.")
    assert fitted.ids == tokenizer.encode_context(fitted.prompt)
    assert (fitted.dropped_rounds, fitted.max_new_tokens) == (0, 512)


def test_oldest_rounds_go_first_and_kept_ones_are_renumbered(tokenizer: Tokenizer) -> None:
    rounds = [(f"question {number}", "answer " * 20) for number in range(12)]
    fitted = fit(tokenizer, "last", rounds, system="Be brief.", limit=200, max_new_tokens=50)
    assert 0 < fitted.dropped_rounds < 12
    kept = rounds[fitted.dropped_rounds :]
    assert fitted.prompt == render("last", kept, "Be brief.")
    assert fitted.prompt.startswith(f"[Round 0]\n问：Be brief.\nquestion {fitted.dropped_rounds}\n")
    assert len(fitted.ids) + 50 <= 200
    one_more = render("last", rounds[fitted.dropped_rounds - 1 :], "Be brief.")
    assert len(tokenizer.encode_context(one_more)) + 50 > 200


def test_one_round_is_dropped_when_one_is_enough(tokenizer: Tokenizer) -> None:
    rounds = [(f"question {number}", "answer") for number in range(9)]
    limit = len(tokenizer.encode_context(render("last", rounds))) - 1
    assert fit(tokenizer, "last", rounds, limit=limit, max_new_tokens=0).dropped_rounds == 1


def test_a_question_that_exactly_fills_the_room_fits(tokenizer: Tokenizer) -> None:
    needed = len(tokenizer.encode_context("last"))
    assert fit(tokenizer, "last", ROUNDS, limit=needed + 7, max_new_tokens=7).dropped_rounds == 2
    assert fit(tokenizer, "last", ROUNDS, limit=needed + 7, max_new_tokens=7).prompt == "last"
    with pytest.raises(PromptTooLongError):
        fit(tokenizer, "last", ROUNDS, limit=needed + 6, max_new_tokens=7)


@pytest.mark.parametrize("rounds", [[], ROUNDS])
def test_a_question_that_does_not_fit_is_an_error_with_the_numbers(tokenizer: Tokenizer, rounds: list[Round]) -> None:
    question = "word " * 2000
    with pytest.raises(PromptTooLongError) as caught:
        fit(tokenizer, question, rounds, limit=2048)
    assert str(caught.value) == (
        "the question has 2,002 tokens, the model holds 2,048, 512 are reserved for the answer: 466 too many\n"
        "  cure: shorten the question, or lower max_new_tokens"
    )


def test_a_system_message_is_never_dropped(tokenizer: Tokenizer) -> None:
    with pytest.raises(PromptTooLongError, match="the question with the system message has"):
        fit(tokenizer, "你好", ROUNDS, system="word " * 2000, limit=2048)


@settings(deadline=None, max_examples=60)
@given(
    rounds=st.lists(st.tuples(st.text("ab 你好\n", max_size=40), st.text("xy 再见\n", max_size=60)), max_size=14),
    limit=st.integers(20, 400),
    system=st.sampled_from([None, "Be brief."]),
)
def test_fitting_drops_no_more_rounds_than_needed(
    reduced: Tokenizer, rounds: list[Round], limit: int, system: str | None
) -> None:
    lengths = [len(reduced.encode_context(render("last", rounds[drop:], system))) for drop in range(len(rounds) + 1)]
    fitting = [drop for drop, length in enumerate(lengths) if length + 5 <= limit]
    if fitting:
        fitted = template.fit(reduced, "last", rounds, system=system, limit=limit, max_new_tokens=5)
        assert fitted.dropped_rounds == fitting[0]
        assert fitted.ids == reduced.encode_context(render("last", rounds[fitting[0] :], system))
    else:
        with pytest.raises(PromptTooLongError):
            template.fit(reduced, "last", rounds, system=system, limit=limit, max_new_tokens=5)


def test_a_long_history_costs_a_few_encodings(reduced: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    encode = Tokenizer.encode
    monkeypatch.setattr(Tokenizer, "encode", lambda self, text: calls.append(len(text)) or encode(self, text))
    fit(reduced, "last", [("a", "b")] * 1000, limit=300, max_new_tokens=10)
    assert len(calls) <= 12
