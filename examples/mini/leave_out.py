"""Patterns for `chatglm data prepare --leave-out-file`: sources that are non-commercial or state no licence.

python examples/mini/leave_out.py SOURCES.json > leave-out.txt
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def patterns(sources: list[dict[str, object]]) -> list[str]:
    """One for each source, as `source` of a record spells it; characters that patterns use stand for themselves."""
    out = []
    for entry in sources:
        licence = str(entry["licence"]).lower()
        is_unstated = licence.startswith("none stated") or "states none" in licence
        if entry["non_commercial"] or is_unstated:
            name = f"{entry['repository']}:{entry['file']}"
            out.append("".join(f"[{letter}]" if letter in "*?[" else letter for letter in name))
    return sorted(out)


if __name__ == "__main__":
    print("\n".join(patterns(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))))
