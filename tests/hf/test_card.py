"""The model card's lines as printed, in a fresh process: no warning, no network, no Python file of the checkpoint."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

CARD = """
import socket

def no_network(*args, **kwargs):
    raise OSError("a local folder must not open a connection")

socket.socket.connect = socket.getaddrinfo = no_network
import chatglm.hf
from transformers import AutoTokenizer, AutoModel
tokenizer = AutoTokenizer.from_pretrained("DIR", trust_remote_code=True)
model = AutoModel.from_pretrained("DIR", trust_remote_code=True)MODE
model = model.eval()
response, history = model.chat(tokenizer, "你好", history=[]MORE)
print("1:", response)
response, history = model.chat(tokenizer, "晚上睡不着应该怎么办", history=historyMORE)
print("2:", response, len(history))
for response, history in model.stream_chat(tokenizer, "再见", history=historyMORE):
    pass
print("3:", response, len(history))
"""

BAR = re.compile(r"(Loading (weights|checkpoint shards): .*)?\s*\Z")


def run_card(folder: Path, mode: str = ".float()", more: str = "") -> str:
    code = CARD.replace("DIR", str(folder)).replace("MODE", mode).replace("MORE", more)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=500)
    noise = [line for line in re.split(r"[\r\n]", done.stderr) if not BAR.match(line)]
    assert not noise and done.returncode == 0, done.stderr
    assert re.search(r"^1: .*^2: .* 2$.*^3: .* 3$", done.stdout, re.S | re.M), done.stdout
    return done.stdout


@pytest.mark.parametrize("mode", [".float()", ".half()", ".half().quantize(8)", ".quantize(4).float()"])
def test_the_cards_lines_answer_without_a_warning(mode: str, mini_folder: Path) -> None:
    run_card(mini_folder, mode, ", max_length=90")


@pytest.mark.parametrize("model", ["base-fp32", "int8", "int4", "int4-qe", "ptuning", "oned-fp32"])
def test_the_cards_lines_work_with_every_kind_of_folder(model: str, make_folder: Any) -> None:
    run_card(make_folder(model), more=", max_length=250")


def test_the_cards_lines_work_with_the_real_vocabulary(slim_folder: Path) -> None:
    run_card(slim_folder, more=", max_length=90")


def test_the_cards_lines_work_with_the_first_release(first_release_folder: Path) -> None:
    run_card(first_release_folder, more=", max_length=90")


@pytest.mark.parametrize("trust", ["True", "False", "None"])
def test_no_python_file_of_the_checkpoint_runs(trust: str, slim_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "poisoned"
    shutil.copytree(slim_folder, folder)
    for name in ("modeling", "configuration", "tokenization"):
        (folder / f"{name}_chatglm.py").write_text("raise SystemExit('the checkpoint ran its own code')\n")
    (folder / "quantization.py").write_text("raise SystemExit('the checkpoint ran its own code')\n")
    code = f"""
import chatglm.hf
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer
for auto in (AutoConfig, AutoTokenizer, AutoModel, AutoModelForSeq2SeqLM, AutoModelForCausalLM):
    found = auto.from_pretrained({str(folder)!r}, trust_remote_code={trust})
    assert type(found).__module__.startswith("chatglm.hf."), type(found)
    found.save_pretrained({str(tmp_path / "saved")!r})
made = AutoModel.from_config(AutoConfig.from_pretrained({str(folder)!r}), trust_remote_code={trust})
assert type(made).__module__.startswith("chatglm.hf.")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert not list((tmp_path / "saved").glob("*.py"))
    assert "auto_map" not in (tmp_path / "saved" / "config.json").read_text(encoding="utf-8")
