"""`chatglm data …`: a group of commands about training data, each in a file of its own (`data_<name>.py`)."""

from __future__ import annotations

COMMANDS: dict[str, str] = {
    "feedback": "Write the ratings and corrections of a server as training data.",
}
"""Name and one line of each; the function is named like the command, its module `data_<name>`."""
