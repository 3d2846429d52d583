"""J10: something is wrong, tell me what."""

from __future__ import annotations

from pathlib import Path

from chatglm.cli.source_folder import EMBEDDED_MODEL
from checkpoint_folders import edit_tensors, golden_copy
from command_line import run


def test_doctor_then_info_then_a_deep_check() -> None:
    doctor = run("doctor")
    assert doctor.returncode == 0
    for text in ("Python", "torch", "CPU", "kernels", "free memory", "disk"):
        assert text in doctor.stdout
    info = run("info", EMBEDDED_MODEL)
    assert info.returncode == 0
    for text in ("era slim", "parameters 44,153,856", "int8", "licence in README.md", "sha256 fc7fcf03"):
        assert text in " ".join(info.stdout.split())
    assert run("verify", "--deep", EMBEDDED_MODEL).returncode == 0


def test_info_of_a_full_size_checkpoint(full_size: Path) -> None:
    (full_size / "MODEL_LICENSE").write_text("terms")
    info = run("info", full_size)
    assert info.returncode == 0, info.stderr
    shown = " ".join(info.stdout.split())
    for text in (
        "era slim",
        "parameters 6,173,286,400",
        "28 layers",
        "float16",
        "8 weight files",
        "licence MODEL_LICENSE",
    ):
        assert text in shown
    assert "sha256 5e974d9a" in shown and "the released file" in shown
    assert "fp16 12.35 GB" in shown


def test_a_tensor_with_nan_is_named_by_the_deep_check(tmp_path: Path) -> None:
    folder, name = golden_copy("base-fp16", tmp_path), "transformer.layers.1.mlp.dense_h_to_4h.weight"
    edit_tensors(folder / "pytorch_model.bin", lambda tensors: tensors[name][3].fill_(float("nan")))
    assert run("verify", folder).returncode == 0
    deep = run("verify", "--deep", folder)
    assert deep.returncode == 1
    assert name in deep.stdout and "NaN" in deep.stdout


def test_too_many_devices_are_one_line(tmp_path: Path) -> None:
    done = run("chat", golden_copy("base-fp32", tmp_path), "--devices", "9")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1
    import torch

    assert f"9 devices asked, {max(1, torch.cuda.device_count())} found" in done.stderr
