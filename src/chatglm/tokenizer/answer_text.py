"""AnswerText: generated ids → the text a person reads, piece by piece.

Three stages, each holding back what later tokens could still change: whole characters (StreamDecoder), the original's
post-processing of answers (`normalize_piece`), stop strings. The pieces join to the full text.
"""

from __future__ import annotations

import re

from .response import TRAINING_TIME_MARK, normalize_piece
from .stop_strings import StopStrings
from .streaming import StreamDecoder
from .tokenizer import Tokenizer

_UNSETTLED = re.compile(
    r"[\s,!:;?]+\Z"
)  # trailing blanks may be stripped; the form of these marks depends on what follows


class AnswerText:
    """Feed ids with `push`, close with `finish`; `text` is what was given out so far, `tokens` what it took."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: tuple[str, ...] = (),
        *,
        normalize: bool = True,
        keep_first_blank: bool = False,
    ) -> None:
        self.text = ""
        self.tokens = 0
        self._decoder = StreamDecoder(tokenizer, keep_first_blank=keep_first_blank)
        self._stop = StopStrings(stop)
        self._normalize = normalize
        self._raw = ""  # what is not settled yet
        self._last = ""  # the character given out last

    @property
    def is_stopped(self) -> bool:
        """Whether a stop string was found; what follows is not part of the answer."""
        return self._stop.is_found

    def push(self, token: int) -> str:
        """New text that no later token can change; nothing, and the token not counted, after a stop string."""
        if self.is_stopped:
            return ""
        self.tokens += 1
        return self._give(self._decoder.push(token), is_last=False)

    def finish(self) -> str:
        """The rest, once no more tokens come."""
        return self._give(self._decoder.finish(), is_last=True)

    def _give(self, new: str, *, is_last: bool) -> str:
        if self._normalize:
            new = self._normalized(new, is_last)
        piece = self._stop.push(new)
        if is_last and not self._stop.is_found:
            piece += self._stop.finish()
        self.text += piece
        return piece

    def _normalized(self, new: str, is_last: bool) -> str:
        """Only what is new is looked at: a form depends on the neighbouring characters alone."""
        self._raw += new
        end = len(self._raw) if is_last else _stable_length(self._raw)
        part, self._raw = self._raw[:end], self._raw[end:]
        part = part if self._last else part.lstrip()
        piece = normalize_piece(part.rstrip() if is_last else part, self._last)
        self._last = piece[-1:] or self._last
        return piece


def _stable_length(raw: str) -> int:
    unsettled = _UNSETTLED.search(raw)
    end = unsettled.start() if unsettled else len(raw)
    mark = raw.rfind(TRAINING_TIME_MARK[0], 0, end)  # an unfinished [[training time]] mark
    if mark > 0 and raw[mark - 1] == TRAINING_TIME_MARK[0]:
        mark -= 1
    return mark if mark >= 0 and TRAINING_TIME_MARK.startswith(raw[mark:end]) else end
