"""`python -m chatglm.cli`, where the console script is not on the path."""

from __future__ import annotations

from . import main

if __name__ == "__main__":
    main()
