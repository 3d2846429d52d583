"""One answer: streamed into a writer, stopped by Ctrl-C, remembered in the conversation."""

from __future__ import annotations

import signal
import threading
import time
from contextlib import nullcontext
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

from .answer_writer import AnswerWriter
from .conversation import Conversation
from .streams import silent_keyboard

if TYPE_CHECKING:
    from ..chat import ChatModel, Reply


@dataclass(frozen=True)
class Answered:
    """What became of a question.

    reply          None when the answer was stopped
    text           what was shown, in whole
    first_token_s  from the question to the first visible piece
    seconds        from the question to the end
    """

    text: str
    reply: Reply | None
    first_token_s: float
    seconds: float


class StopOnInterrupt:
    """Inside, the first Ctrl-C sets `is_asked`, a second one raises KeyboardInterrupt. Works in the main thread."""

    def __init__(self) -> None:
        self.is_asked = False
        self._before: Any = None

    def __enter__(self) -> StopOnInterrupt:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if self.is_asked:
            raise KeyboardInterrupt
        self.is_asked = True


def answer(
    model: ChatModel,
    conversation: Conversation,
    question: str,
    writer: AnswerWriter,
    *,
    can_stop: bool,
    rounds: list[tuple[str, str]] | None = None,
) -> Answered:
    """Stream the answer to `question` into `writer` and add the round to the conversation.

    can_stop  Ctrl-C ends the answer within one token, and what was said so far is kept; else it ends the program
    rounds    the earlier rounds that the model is shown; by default all
    Raises the ChatGLMErrors of `ChatModel.stream_chat`, before anything is written.
    """
    begin = time.monotonic()
    first: float | None = None
    pieces: list[str] = []
    reply: Reply | None = None
    shown = conversation.rounds if rounds is None else rounds
    stream = model.stream_chat(question, shown, conversation.system, **conversation.settings)
    stop = StopOnInterrupt()
    with stop if can_stop else nullcontext(), silent_keyboard() if can_stop else nullcontext():
        try:
            writer.begin()
            for delta in stream:
                if delta.text:
                    first = time.monotonic() - begin if first is None else first
                    pieces.append(delta.text)
                    writer.write(delta.text)
                reply = delta.reply
                if stop.is_asked:
                    break
        finally:
            stream.close()  # type: ignore[attr-defined]  # a generator: gives its cache slots back at once
            writer.end(question, reply)
    text = "".join(pieces)
    if text or reply is not None:
        conversation.rounds.append((question, text))
    seconds = time.monotonic() - begin
    return Answered(text, reply, seconds if first is None else first, seconds)
