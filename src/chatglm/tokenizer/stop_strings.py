"""Stop strings in streamed text, wherever token borders lie."""

from __future__ import annotations


class StopStrings:
    """Passes text on until one of `stop` appears; holds back what may be the beginning of one."""

    def __init__(self, stop: tuple[str, ...]) -> None:
        self.stop = stop
        self.is_found = False
        self._held = ""

    def push(self, text: str) -> str:
        """The part of the text so far that is certain to come before any stop string."""
        if self.is_found or not self.stop:
            return "" if self.is_found else text
        text = self._held + text
        places = [place for stop in self.stop if (place := text.find(stop)) >= 0]
        if places:
            self.is_found, self._held = True, ""
            return text[: min(places)]
        keep = max(_overlap(text, stop) for stop in self.stop)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """What was held back, once no more text comes."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-size:])), 0)
