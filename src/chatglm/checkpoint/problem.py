"""What can be wrong with a checkpoint, as a value: the file, the tensor, what was found and the cure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..errors import CheckpointError

PULL = "`chatglm pull THUDM/chatglm-6b`"


@dataclass(frozen=True)
class Problem:
    """One fault. `str()` is two or three lines: file and finding, the tensor where there is one, the cure.

    file    name inside the checkpoint folder
    what    what was found there; reads on from the file name
    cure    what to do, with the command where there is one
    tensor  the first tensor that suffers
    """

    file: str
    what: str
    cure: str
    tensor: str = ""

    def message(self) -> str:
        """Everything but the cure."""
        return f"{self.file} {self.what}" + (f"\n  tensor: {self.tensor}" if self.tensor else "")

    def __str__(self) -> str:
        return f"{self.message()}\n  cure: {self.cure}"

    def about(self, tensor: str) -> Problem:
        """The same problem, naming a tensor."""
        return replace(self, tensor=tensor)


def reward_problem(file: str, tensor: str) -> Problem:
    """A reward model where a language model is wanted."""
    return Problem(
        file,
        "holds a reward model: it scores answers and writes none",
        "give it as `reward.model` to `chatglm train ppo`, `rloo` or `bootstrap`; in Python "
        "`chatglm.training.rlhf.reward.load_reward_model`, or AutoModelForSequenceClassification",
        tensor,
    )


class FileError(CheckpointError):
    """A CheckpointError that carries its Problem, for callers that collect several."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.message(), cure=problem.cure)
        self.problem = problem


def raise_for(problems: Sequence[Problem], folder: str) -> None:
    """CheckpointError with the first problem and the number of others; nothing when there is none."""
    if not problems:
        return
    if len(problems) == 1:
        raise FileError(problems[0])
    rest = len(problems) - 1
    others = f"  and {rest} more problem{'s' if rest > 1 else ''}: `chatglm verify {folder}` lists them"
    raise CheckpointError(f"{problems[0].message()}\n{others}", cure=problems[0].cure)
