"""Make the virtual environment that `make chat` and `make test` use. Standard library only; run by any Python ≥ 3.10.

    python3 scripts/install.py --venv .venv --extras chat,hf --groups dev --torch auto

PyTorch is the one heavy part: on Linux the plain wheel is a CUDA build of about 3 GB with its parts, a CPU wheel has
0.2 GB. `plan_torch` is the whole decision. pip's own configuration (proxies, mirrors, wheel folders) stays in force.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
CONSTRAINTS = ROOT / "constraints.txt"
OLDEST_PYTHON = (3, 10)
PIP_WITH_EDITABLE, PIP_WITH_GROUPS = (21, 3), (25, 1)
PROBE_TIMEOUT_S = 10


class SetUpError(Exception):
    """The environment cannot be made; the message is one line for the user."""


class TorchPlan(NamedTuple):
    """`arguments` for `pip install` (None: install nothing), and the line that says so."""

    arguments: list[str] | None
    line: str


class Environment:
    """The virtual environment, and what can be asked of it and of the machine."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")

    def ask(self, *command: str, timeout_s: float = 120) -> str:
        """What the command prints, or "" when it fails."""
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return ""
        return done.stdout if done.returncode == 0 else ""

    def installed(self, package: str) -> str | None:
        """Version of a package in the environment."""
        code = f"import importlib.metadata as m; print(m.version({package!r}))"
        return self.ask(str(self.python), "-c", code).strip() or None

    def offered(self, *options: str) -> set[str]:
        """The torch versions that pip would find, with its own configuration and these options. Downloads no wheel."""
        listing = self.ask(str(self.python), "-m", "pip", "index", "versions", "torch", *options)
        found = re.search(r"^Available versions: (.*)$", listing, re.MULTILINE)
        return set(found.group(1).split(", ")) if found else set()

    def is_linux(self) -> bool:
        return sys.platform.startswith("linux")

    def sees_gpu(self) -> bool:
        """Does `nvidia-smi` list a card?"""
        return bool(shutil.which("nvidia-smi")) and "GPU" in self.ask("nvidia-smi", "-L", timeout_s=PROBE_TIMEOUT_S)


def plan_torch(choice: str, wanted: str, cpu_index: str, environment: Environment) -> TorchPlan:
    """Which build of torch to install, from where.

    choice     "auto", "cuda", "cpu" or "skip" (leave what the environment has)
    wanted     public version of the constraints file, such as "2.13.0"
    cpu_index  address of an index with `+cpu` wheels, asked only if pip's own configuration offers none
    Raises SetUpError when the choice cannot be had.
    """
    present = environment.installed("torch")
    if choice == "skip":
        if present is None:
            raise SetUpError(f"TORCH=skip, but {environment.folder} has no torch; put one there first")
        return TorchPlan(None, f"torch {present} is left as it is")
    if present is not None and present.split("+")[0] == wanted and fits(present, choice, environment):
        return TorchPlan(None, f"torch {present} is there already")
    replace = ["--force-reinstall", "--no-deps"] if present is not None else []
    plain = [*replace, f"torch=={wanted}"]
    if not environment.is_linux():
        return TorchPlan(plain, f"torch {wanted} from pip's index")
    if choice == "cuda":  # `===` passes over a `+cpu` wheel that pip's own configuration may offer
        return TorchPlan([*replace, f"torch==={wanted}"], f"torch {wanted}, CUDA build (about 3 GB with its parts)")
    if f"{wanted}+cpu" in environment.offered():
        return TorchPlan(plain, f"torch {wanted}+cpu, which pip's configuration offers")
    if choice == "auto" and environment.sees_gpu():
        return TorchPlan(plain, f"torch {wanted} for the NVIDIA GPU (about 3 GB with its parts)")
    options = ["--timeout", str(PROBE_TIMEOUT_S), "--retries", "0"]
    if f"{wanted}+cpu" in environment.offered("--index-url", cpu_index, *options):
        # its other packages come from pip's own index, so that the constraints file can be kept
        arguments = ["--index-url", cpu_index, *(replace or ["--no-deps"]), f"torch=={wanted}+cpu"]
        return TorchPlan(arguments, f"torch {wanted}+cpu from {cpu_index} (about 0.2 GB)")
    if choice == "cpu":
        raise SetUpError(f"TORCH=cpu, but torch {wanted}+cpu is not to be had from {cpu_index}; set TORCH_INDEX")
    return TorchPlan(
        plain, f"torch {wanted}, the plain wheel: about 3 GB, because no CPU wheel is to be had from {cpu_index}"
    )


def fits(present: str, choice: str, environment: Environment) -> bool:
    """Is the installed build the kind that was asked for? "auto" takes any."""
    is_cpu_build = present.endswith("+cpu") or not environment.is_linux()
    return {"auto": True, "cpu": is_cpu_build, "cuda": not present.endswith("+cpu")}[choice]


def wanted_torch(constraints: str) -> str:
    """The version of the line `torch==…`."""
    found = re.search(r"^torch==([\w.]+)", constraints, re.MULTILINE)
    if found is None:
        raise SetUpError("constraints.txt has no line `torch==VERSION`")
    return found.group(1)


def make_environment(environment: Environment) -> None:
    """A virtual environment with pip, unless a working one is there."""
    if environment.ask(str(environment.python), "-c", "import pip; print(pip.__version__)"):
        return
    if importlib.util.find_spec("ensurepip") is None:
        name = (
            "python3-venv" if sys.executable == "/usr/bin/python3" else f"python{version_text(sys.version_info)}-venv"
        )
        raise SetUpError(f"this Python cannot make virtual environments; on Debian and Ubuntu: sudo apt install {name}")
    say(f"making the environment {environment.folder} (Python {version_text(sys.version_info)})")
    made = subprocess.run([sys.executable, "-m", "venv", "--clear", str(environment.folder)], check=False)
    if made.returncode != 0:
        raise SetUpError(f"{sys.executable} -m venv {environment.folder} failed")


def update_pip(environment: Environment, oldest: tuple[int, int]) -> None:
    """Dependency groups and editable installs need a pip that knows them."""
    version = environment.installed("pip") or "0.0"
    if tuple(int(part) for part in version.split(".")[:2]) < oldest:
        needed = version_text(oldest)
        line = f"a newer pip (this environment has pip {version}, and at least {needed} is needed)"
        pip_install(environment, ["--upgrade", f"pip>={needed}"], line)


def pip_install(environment: Environment, arguments: list[str], line: str) -> None:
    """Run `pip install`, showing one status line instead of pip's hundred.

    Raises SetUpError with pip's last lines if it fails.
    """
    say(f"installing {line}")
    command = [str(environment.python), "-m", "pip", "install", "--no-input", *arguments]
    settings = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PYTHONUNBUFFERED": "1", "PIP_PROGRESS_BAR": "off"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", env=settings
    )
    lines: deque[str] = deque(["starting pip"], maxlen=20)
    reader = threading.Thread(target=lambda: lines.extend(process.stdout or ()), daemon=True)
    reader.start()
    started = time.monotonic()
    try:
        while process.poll() is None:
            reader.join(timeout=0.5)
            show_status(lines[-1], time.monotonic() - started)
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
        raise
    reader.join()
    clear_status()
    if process.returncode != 0:
        raise SetUpError("pip install failed:\n  " + "\n  ".join(text.rstrip() for text in lines))


_shown_at_s = 0.0


def show_status(text: str, seconds: float) -> None:
    """What pip does now: rewritten in place on a terminal, a line every 15 s elsewhere."""
    global _shown_at_s
    text = f"  {seconds:4.0f} s  {text.strip()}"
    if sys.stderr.isatty():
        sys.stderr.write("\r\033[K" + text[: shutil.get_terminal_size().columns - 1])
        sys.stderr.flush()
    elif seconds < _shown_at_s or seconds - _shown_at_s >= 15:
        _shown_at_s = seconds if seconds >= 15 else 0.0
        if seconds >= 15:
            print(text[:120], file=sys.stderr, flush=True)


def clear_status() -> None:
    if sys.stderr.isatty():
        sys.stderr.write("\r\033[K")
        sys.stderr.flush()


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def version_text(version: tuple[int, ...]) -> str:
    return ".".join(str(part) for part in version[:2])


def install(options: argparse.Namespace) -> None:
    """Environment, then torch, then the package with its extras and groups."""
    environment = Environment(options.venv)
    make_environment(environment)
    update_pip(environment, PIP_WITH_GROUPS if options.groups else PIP_WITH_EDITABLE)
    constraints = CONSTRAINTS.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        limits = Path(folder) / "constraints.txt"
        if options.torch == "skip":  # the torch that is there is the one to keep, whatever its version
            constraints = re.sub(r"^torch==.*\n", "", constraints, flags=re.MULTILINE)
        limits.write_text(constraints, encoding="utf-8")
        wanted = wanted_torch(CONSTRAINTS.read_text(encoding="utf-8"))
        plan = plan_torch(options.torch, wanted, options.torch_index, environment)
        if plan.arguments is None:
            say(plan.line)
        else:
            pip_install(environment, ["-c", str(limits), *plan.arguments], plan.line)
        extras = f"[{options.extras}]" if options.extras else ""
        groups = [part for name in options.groups.split(",") if name for part in ("--group", name)]
        what = f"chatglm{extras}" + (f" and the group {options.groups}" if options.groups else "")
        pip_install(environment, ["-c", str(limits), *groups, "-e", f"{ROOT}{extras}"], what)


def main() -> int:
    if sys.version_info < OLDEST_PYTHON:
        found, oldest = version_text(sys.version_info), version_text(OLDEST_PYTHON)
        say(f"{sys.executable} is Python {found}; chatglm needs {oldest} or newer. Name one: make PYTHON=python3.11")
        return 1
    parser = argparse.ArgumentParser(description="Make the environment of chatglm.")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv")
    parser.add_argument("--extras", default="chat", help="extras of pyproject.toml, with commas")
    parser.add_argument("--groups", default="", help="dependency groups of pyproject.toml, with commas")
    parser.add_argument("--torch", default="auto", choices=["auto", "cuda", "cpu", "skip"])
    parser.add_argument("--torch-index", required=True, help="an index with CPU wheels of torch for Linux")
    options = parser.parse_args()
    started = time.monotonic()
    try:
        install(options)
    except SetUpError as error:
        say(f"set-up: {error}")
        return 1
    except KeyboardInterrupt:
        say("set-up: interrupted; run it again to go on")
        return 130
    say(f"installed in {time.monotonic() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
