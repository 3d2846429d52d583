"""`chatglm train …`: a group of commands, one a stage, each in a file of its own (`train_<name>.py`)."""

from __future__ import annotations

COMMANDS: dict[str, str] = {
    "pretrain": "Blank infilling on text, from random weights or a checkpoint.",
    "sft": "Answers to prompts, from a pre-trained checkpoint.",
    "plot": "Pictures of the curves of one or more runs.",
}
"""Name and one line of each; the function is named like the command, its module `train_<name>`."""
