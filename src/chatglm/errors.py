"""Every exception a user can meet. A leaf: imports nothing of ours.

ChatGLMError
├── ConfigError          config.json: impossible size, foreign architecture, ids that disagree
├── CheckpointError      a file or tensor of a checkpoint
├── TokenizerError       ice_text.model, or ids it does not know
├── PromptTooLongError   the last question alone does not fit
├── DeviceError          device, dtype or memory that is not there
├── DownloadError        the hub
├── QuantizationError    a format or shape that cannot be quantised
├── RequestError         a sampling parameter or API field
├── TrainingError        data, recipe or a non-finite loss
└── MissingExtraError    an optional dependency that is not installed
"""

from __future__ import annotations


class ChatGLMError(Exception):
    """Base of all errors. The message says what was found and where; `cure` says what to do.

    `str(error)` is at most five lines: the message, then one `cure:` line when there is a cure.
    """

    def __init__(self, message: str, *, cure: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.cure = cure

    def __str__(self) -> str:
        return f"{self.message}\n  cure: {self.cure}" if self.cure else self.message


class ConfigError(ChatGLMError):
    """A model description that cannot be, or that this architecture does not cover."""


class CheckpointError(ChatGLMError):
    """A checkpoint file that is missing, damaged or does not fit its description."""


class TokenizerError(ChatGLMError):
    """A tokenizer file that is missing, damaged or belongs to other weights."""


class PromptTooLongError(ChatGLMError):
    """The question (with the system message) leaves no room for an answer."""


class DeviceError(ChatGLMError):
    """A device, dtype or amount of memory that this machine does not have."""


class DownloadError(ChatGLMError):
    """The hub could not be reached, or does not have what was asked for."""


class QuantizationError(ChatGLMError):
    """A weight or setting that cannot be quantised."""


class RequestError(ChatGLMError):
    """A sampling parameter or request field out of its range."""


class TrainingError(ChatGLMError):
    """Training data, a recipe, or a run that went wrong."""


class MissingExtraError(ChatGLMError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, *, extra: str, purpose: str) -> None:
        super().__init__(
            f"{package} is not installed; it is needed for {purpose}",
            cure=f'pip install "chatglm[{extra}]"',
        )
