"""`chatglm train …`: a group of commands, one a stage, each in a file of its own (`train_<name>.py`)."""

from __future__ import annotations

COMMANDS: dict[str, str] = {
    "pretrain": "Blank infilling on text, from random weights or a checkpoint.",
    "sft": "Answers to prompts, from a pre-trained checkpoint.",
    "reward": "A score for answers, from pairs in which one was preferred.",
    "bootstrap": "Own answers: the best of several are learned, in rounds.",
    "dpo": "Preferred answers, straight from pairs.",
    "ppo": "Rewards for own answers, with a value model.",
    "rloo": "Rewards for own answers, several to a prompt (RLOO, GRPO).",
    "plot": "Pictures of the curves of one or more runs.",
}
"""Name and one line of each; the function is named like the command, its module `train_<name>`."""
