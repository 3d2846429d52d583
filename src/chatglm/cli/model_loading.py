"""Loading for a person who waits: in the background behind the first prompt, or with a progress bar."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from .options import PlacementOptions
from .progress import ProgressBar
from .source_folder import source_folder
from .streams import Terminal

if TYPE_CHECKING:
    from ..chat import ChatModel


def load(source: str | None, placement: PlacementOptions, terminal: Terminal, adapter: str | None = None) -> ChatModel:
    """Load with a progress bar, with an adapter where one is given.

    Raises a ChatGLMError, for a damaged checkpoint before PyTorch is even imported.
    """
    with ProgressBar(terminal) as progress:
        folder = None
        if source is not None:
            from ..checkpoint import check

            progress.say(f"checking {source}")
            folder = source_folder(source, placement.revision)
            check(folder)
        progress.say("starting PyTorch")
        from ..chat import load as load_model

        progress.say("loading the model")
        return load_model(
            folder,
            placement.dtype,
            placement.device,
            threads=placement.threads,
            devices=placement.devices,
            adapter=adapter,
            progress=progress,
        )


class BackgroundLoad:
    """Starts at once in a thread, so that the prompt is there before PyTorch is; `result` waits."""

    def __init__(self, job: Callable[[], ChatModel]) -> None:
        self._job = job
        self._model: ChatModel | None = None
        self._error: BaseException | None = None
        self._is_done = threading.Event()
        threading.Thread(target=self._run, name="load the model", daemon=True).start()

    @classmethod
    def finished(cls, model: ChatModel) -> BackgroundLoad:
        """For a model that is there already."""
        load = cls(lambda: model)
        load._is_done.wait()
        return load

    def _run(self) -> None:
        try:
            self._model = self._job()
        except BaseException as error:  # raised again where the model is asked for
            self._error = error
        finally:
            self._is_done.set()

    @property
    def is_done(self) -> bool:
        return self._is_done.is_set()

    def close(self) -> None:
        """Let go of a model that was loaded."""
        if self._model is not None:
            self._model.close()

    def result(self) -> ChatModel:
        """The model, or the error that loading ended with. Ctrl-C interrupts the wait."""
        while not self._is_done.wait(0.2):  # a wait without a limit cannot be interrupted on Windows
            pass
        if self._error is not None:
            raise self._error
        assert self._model is not None
        return self._model
