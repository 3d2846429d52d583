"""Weight files filled tensor by tensor: any order, several runs, kills at any moment."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from chatglm.checkpoint.atomic import whole_folder
from chatglm.checkpoint.filling import JOURNAL, Filling, sizes_of
from chatglm.errors import CheckpointError

TENSORS = {
    "b": torch.arange(6, dtype=torch.uint8).reshape(2, 3),
    "a.weight": torch.randn(4, 5),
    "c": torch.randn(7).half(),
    "d": torch.randint(-9, 9, (3, 2), dtype=torch.int8),
    "e": torch.randn(8, 8).bfloat16(),
}
SHAPES = {name: (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)) for name, tensor in TENSORS.items()}


def stored(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


def assert_whole(folder: Path) -> None:
    found = stored(folder)
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())


@pytest.mark.parametrize("largest", [1_000_000, 130, 60])
@pytest.mark.parametrize("seed", range(3))
def test_tensors_written_in_any_order_are_a_checkpoint(tmp_path: Path, largest: int, seed: int) -> None:
    filling = Filling(tmp_path, SHAPES, largest)
    names = list(TENSORS)
    random.Random(seed).shuffle(names)
    for name in names:
        filling.add(name, TENSORS[name])
    filling.finish()
    assert_whole(tmp_path)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert files == filling.files
    index = tmp_path / "model.safetensors.index.json"
    assert index.exists() == (len(files) > 1)
    if index.exists():
        found = json.loads(index.read_text())
        assert found["metadata"]["total_size"] == sum(tensor.nbytes for tensor in TENSORS.values())
        for name, file in found["weight_map"].items():
            assert name in load_file(tmp_path / file)


def test_what_was_committed_is_held_by_the_next_run_and_the_rest_is_not(tmp_path: Path) -> None:
    first = Filling(tmp_path, SHAPES, 130)
    first.add("a.weight", TENSORS["a.weight"])
    first.add("c", TENSORS["c"])
    first.commit()
    first.add("e", TENSORS["e"])  # and the process dies here
    second = Filling(tmp_path, SHAPES, 130)
    assert second.holds("a.weight", "c") and not second.holds("e") and not second.holds("a.weight", "b")
    assert torch.equal(second.read("c"), TENSORS["c"])
    for name in ("b", "d", "e"):
        second.add(name, TENSORS[name])
    second.finish()
    assert_whole(tmp_path)


def test_a_weight_file_that_was_lost_is_begun_anew_with_its_tensors(tmp_path: Path) -> None:
    first = Filling(tmp_path, SHAPES, 60)
    for name, tensor in TENSORS.items():
        first.add(name, tensor)
    first.commit()
    (tmp_path / first.files[1]).unlink()
    Filling(tmp_path, SHAPES, 60)  # makes the file again, and dies
    second = Filling(tmp_path, SHAPES, 60)
    lost = {name for name in TENSORS if not second.holds(name)}
    assert lost and lost < TENSORS.keys()


def test_a_damaged_journal_counts_as_empty(tmp_path: Path) -> None:
    filling = Filling(tmp_path, SHAPES, 1000)
    filling.add("c", TENSORS["c"])
    filling.commit()
    (tmp_path / JOURNAL).write_text('["c')
    assert not Filling(tmp_path, SHAPES, 1000).holds("c")


def test_finishing_without_a_tensor_names_it(tmp_path: Path) -> None:
    filling = Filling(tmp_path, SHAPES, 1000)
    filling.add("c", TENSORS["c"])
    with pytest.raises(CheckpointError, match=r"a\.weight \(and 3 more\) was never written"):
        filling.finish()


def test_a_tensor_of_another_shape_or_dtype_is_a_fault_of_the_caller(tmp_path: Path) -> None:
    filling = Filling(tmp_path, SHAPES, 1000)
    with pytest.raises(AssertionError, match="c: "):
        filling.add("c", TENSORS["c"].float())


def test_a_job_gets_its_unfinished_folder_back_and_another_job_an_empty_one(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with pytest.raises(KeyboardInterrupt), whole_folder(target, 10, job="one") as folder:
        (folder / "half").write_text("done")
        raise KeyboardInterrupt
    assert not target.exists()
    with whole_folder(target, 10, job="one") as folder:
        assert (folder / "half").read_text() == "done"
        (folder / "unfinished-notes").write_text("not in the result")
    assert sorted(path.name for path in target.iterdir()) == ["half"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]

    other = tmp_path / "other"
    with pytest.raises(RuntimeError), whole_folder(other, 10, job="one") as folder:
        (folder / "half").write_text("done")
        raise RuntimeError
    with whole_folder(other, 10, job="two") as folder:
        assert [path.name for path in folder.iterdir()] == ["unfinished-job.txt"]


def test_disk_space_that_an_unfinished_folder_already_takes_is_not_asked_for_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "model"
    with pytest.raises(RuntimeError), whole_folder(target, 10, job="one") as folder:
        (folder / "half").write_bytes(b"x" * 100_000)
        raise RuntimeError
    usage = type("Usage", (), {"free": 50_000})
    monkeypatch.setattr("chatglm.checkpoint.atomic.shutil.disk_usage", lambda _: usage)
    with whole_folder(target, 120_000, job="one"):
        pass
    with pytest.raises(CheckpointError, match=r"50,000 bytes are free"), whole_folder(tmp_path / "x", 120_000, job="1"):
        pass


def test_sizes_are_bytes() -> None:
    assert sizes_of(SHAPES) == {name: tensor.nbytes for name, tensor in TENSORS.items()}
