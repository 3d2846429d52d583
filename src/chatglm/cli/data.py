"""`chatglm data …`: a group of commands about training data, each in a file of its own (`data_<name>.py`)."""

from __future__ import annotations

COMMANDS: dict[str, str] = {
    "prepare": "Turn texts and dialogues into ids, once; resumes where it was interrupted.",
    "inspect": "Rows as the model sees them: ids, positions, the mask, what is trained.",
    "mix": "Several prepared sets as one stream, by weight.",
    "check": "List everything that is wrong with a corpus, with file and line.",
    "feedback": "Write the ratings and corrections of a server as training data.",
}
"""Name and one line of each; the function is named like the command, its module `data_<name>`."""
