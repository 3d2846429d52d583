"""Listing the tensors of a file, compared with torch and the safetensors library."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from chatglm.checkpoint.reading import holds_same, is_finite, read_tensor, torch_dtype
from chatglm.checkpoint.tensor_file import TensorEntry, list_tensors
from chatglm.errors import CheckpointError
from checkpoint_folders import MODELS

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int8, torch.uint8, torch.int16]
DTYPES += [torch.int32, torch.int64, torch.bool]


def assert_same(listed: dict[str, TensorEntry], expected: dict[str, Tensor]) -> None:
    assert listed.keys() == expected.keys()
    for name, tensor in expected.items():
        assert listed[name].shape == tuple(tensor.shape) and torch_dtype(listed[name].dtype) == tensor.dtype
        assert torch.equal(read_tensor(listed[name]), tensor)


@pytest.mark.parametrize("path", sorted(MODELS.glob("*/*.bin")), ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_the_originals_files_are_listed_as_torch_reads_them(path: Path) -> None:
    assert_same(list_tensors(path), torch.load(path, weights_only=True))


@pytest.mark.parametrize("path", sorted(MODELS.glob("*/*.safetensors")), ids=lambda path: path.parent.name)
def test_safetensors_are_listed_as_their_library_reads_them(path: Path) -> None:
    with safe_open(path, framework="pt") as file:
        assert_same(list_tensors(path), {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
def test_every_dtype_is_read(tmp_path: Path, dtype: torch.dtype, suffix: str) -> None:
    path = tmp_path / f"file.{suffix}"
    tensors = {"a": torch.arange(12).reshape(3, 4).to(dtype), "b": torch.ones(5, dtype=dtype)}
    torch.save(tensors, path) if suffix == "bin" else save_file(tensors, path)
    assert_same(list_tensors(path), tensors)


def test_views_parameters_scalars_and_empty_tensors_are_read(tmp_path: Path) -> None:
    whole = torch.arange(24.0).reshape(4, 6)
    tensors = {
        "slice": whole[1:3],
        "turned": whole.T,
        "strided": whole[:, ::2],
        "shared": whole,
        "repeated": torch.ones(1).expand(3),
        "scalar": torch.tensor(3.5),
        "empty": torch.ones(0, 4),
        "parameter": nn.Parameter(torch.ones(2, 2)),
    }
    torch.save(tensors, tmp_path / "file.bin")
    listed = list_tensors(tmp_path / "file.bin")
    assert_same(listed, tensors)
    assert listed["strided"].strides == (6, 2) and listed["slice"].strides is None


def test_a_state_dict_with_its_metadata_is_read(tmp_path: Path) -> None:
    state = nn.Linear(3, 2).state_dict()
    torch.save(state, tmp_path / "file.bin")
    assert_same(list_tensors(tmp_path / "file.bin"), dict(state))


def test_leaving_rows_out_moves_the_place_in_the_file(tmp_path: Path) -> None:
    tensors = {"plain": torch.arange(30.0).reshape(6, 5), "turned": torch.arange(30.0).reshape(5, 6).T}
    torch.save(tensors, tmp_path / "file.bin")
    for name, entry in list_tensors(tmp_path / "file.bin").items():
        assert torch.equal(read_tensor(entry.from_row(4)), tensors[name][4:])


def test_listing_needs_no_torch_and_reads_no_tensor() -> None:
    path = MODELS / "base-fp16"
    code = (
        f"import sys\nfrom chatglm.checkpoint import open_checkpoint, verify\n"
        f"print(len(open_checkpoint({str(path)!r}).tensors), len(verify({str(path)!r}, tokenizer=False)))\n"
        f"assert not {{'torch', 'numpy', 'huggingface_hub'}} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["40", "0"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_only_nan_and_infinity_are_not_finite(dtype: torch.dtype) -> None:
    limits = torch.finfo(dtype)
    finite = torch.tensor(
        [0.0, -0.0, limits.max, limits.min, limits.tiny, limits.smallest_normal / 4, -1.5], dtype=dtype
    )
    assert is_finite(finite) and is_finite(finite[:0])
    for value in (float("nan"), -float("nan"), float("inf"), float("-inf")):
        assert not is_finite(torch.cat((finite, torch.tensor([value], dtype=dtype))))


def test_integers_are_finite() -> None:
    assert is_finite(torch.tensor([-1, 0x7C00, 0x7FFF], dtype=torch.int16))


def test_stored_tensors_are_compared_by_value_whatever_their_form(tmp_path: Path) -> None:
    plain = torch.arange(30.0).reshape(5, 6)
    torch.save({"a": plain, "b": plain.T.contiguous().T, "c": plain.half(), "d": plain + 1}, tmp_path / "file.bin")
    listed = list_tensors(tmp_path / "file.bin")
    assert listed["b"].strides is not None
    assert holds_same(listed["a"], listed["b"]) and holds_same(listed["b"], listed["c"])
    assert not holds_same(listed["a"], listed["d"]) and not holds_same(listed["b"], listed["d"])
    assert not holds_same(listed["a"], listed["a"].from_row(1))


def test_a_checkpoint_link_that_leads_nowhere_is_a_missing_file(tmp_path: Path) -> None:
    (tmp_path / "file.bin").symlink_to(tmp_path / "absent")
    with pytest.raises(CheckpointError, match=r"file\.bin is missing"):
        list_tensors(tmp_path / "file.bin")


def test_a_pointer_without_a_size_is_still_a_pointer(tmp_path: Path) -> None:
    (tmp_path / "file.bin").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(CheckpointError, match="is a Git-LFS pointer"):
        list_tensors(tmp_path / "file.bin")
