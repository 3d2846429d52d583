"""Writing checkpoints that other libraries read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from chatglm.checkpoint import load_into, open_checkpoint, save, verify
from chatglm.checkpoint.reading import read_tensor
from chatglm.checkpoint.saving import write_safetensors
from chatglm.checkpoint.tensor_file import list_tensors
from chatglm.config import read_config
from chatglm.model import GLM
from chatglm.quantization import swap_linears
from checkpoint_folders import MODELS, SMALL
from golden_vectors import GOLDEN

TOKENIZER = GOLDEN / "tokenizer-reduced" / "ice_text.model"


def model(dtype: torch.dtype = torch.float16) -> GLM:
    torch.manual_seed(0)
    return GLM(SMALL).to(dtype)


def assert_holds(folder: Path, state: dict[str, Tensor]) -> None:
    tensors = open_checkpoint(folder).tensors
    assert tensors.keys() == state.keys()
    assert all(torch.equal(read_tensor(tensors[name]), tensor) for name, tensor in state.items())


def without_head(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if not name.startswith("lm_head")}


def test_a_saved_model_is_a_sound_checkpoint_without_its_tied_head(tmp_path: Path) -> None:
    state = model().state_dict()
    folder = save(tmp_path / "deep" / "model", state, SMALL, tokenizer_file=TOKENIZER)
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "ice_text.model",
        "model.safetensors",
        "tokenizer_config.json",
    ]
    assert verify(folder, deep=True) == []
    assert_holds(folder, without_head(state))
    assert read_config(folder / "config.json") == SMALL


def test_the_safetensors_library_reads_what_is_written(tmp_path: Path) -> None:
    state = without_head(model(torch.bfloat16).state_dict())
    folder = save(tmp_path / "model", state, SMALL)
    read = load_file(folder / "model.safetensors")
    assert read.keys() == state.keys() and all(torch.equal(read[name], state[name]) for name in state)


def test_wide_dtypes_come_first_so_that_every_tensor_is_aligned(tmp_path: Path) -> None:
    tensors = {"odd": torch.ones(3, dtype=torch.int8), "half": torch.ones(3).half(), "wide": torch.ones(3)}
    write_safetensors(tmp_path / "file.safetensors", tensors)
    for name, entry in list_tensors(tmp_path / "file.safetensors").items():
        assert entry.offset % tensors[name].element_size() == 0
        assert torch.equal(read_tensor(entry), tensors[name])


@pytest.mark.parametrize("layout", ["safetensors", "original"])
def test_a_large_model_is_sharded_with_an_index(tmp_path: Path, layout: str) -> None:
    state = without_head(model().state_dict())
    folder = save(tmp_path / "model", state, SMALL, layout=layout, max_shard_bytes=8_000)  # type: ignore[arg-type]
    single = "model.safetensors" if layout == "safetensors" else "pytorch_model.bin"
    index = json.loads((folder / f"{single}.index.json").read_text())
    stem, suffix = single.split(".")
    files = sorted(path.name for path in folder.glob(f"{stem}-*"))
    assert files == [f"{stem}-{k:05d}-of-{len(files):05d}.{suffix}" for k in range(1, len(files) + 1)]
    assert len(files) > 2 and set(index["weight_map"].values()) == set(files)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in state.values())
    held = [sum(entry.nbytes for entry in list_tensors(folder / name).values()) for name in files]
    assert all(size <= 8_000 or len(list_tensors(folder / name)) == 1 for size, name in zip(held, files, strict=True))
    assert_holds(folder, state)


def test_the_original_layout_is_read_by_torch_and_keeps_the_head(tmp_path: Path) -> None:
    state = model().state_dict()
    folder = save(tmp_path / "model", state, SMALL, layout="original")
    read = torch.load(folder / "pytorch_model.bin", weights_only=True)
    assert read.keys() == state.keys() and all(torch.equal(read[name], state[name]) for name in state)


def test_a_view_is_written_without_the_storage_around_it(tmp_path: Path) -> None:
    large = torch.zeros(1_000_000)
    save(tmp_path / "model", [("a", large[:10]), ("b", large[::2][:4])], SMALL, layout="original")
    assert (tmp_path / "model" / "pytorch_model.bin").stat().st_size < 10_000


def test_tensors_may_come_one_at_a_time_and_one_shard_is_held(tmp_path: Path) -> None:
    alive: list[int] = []

    def stream() -> Iterator[tuple[str, Tensor]]:
        import weakref

        count = 0

        def gone() -> None:
            nonlocal count
            count -= 1

        for k in range(20):
            tensor = torch.full((100,), float(k))
            count += 1
            weakref.finalize(tensor, gone)
            alive.append(count)
            yield f"tensor.{k:02d}", tensor
            del tensor

    save(tmp_path / "model", stream(), SMALL, max_shard_bytes=1_600)  # four tensors
    assert max(alive) <= 4 + 2
    assert len(open_checkpoint(tmp_path / "model").tensors) == 20


@pytest.mark.parametrize(("bits", "embeddings"), [(8, False), (4, True)])
def test_a_quantised_model_comes_back_bit_for_bit(tmp_path: Path, bits: int, embeddings: bool) -> None:
    quantised = swap_linears(model(), bits, embeddings)
    folder = save(tmp_path / "model", quantised.state_dict(), quantised.config, tokenizer_file=TOKENIZER)
    assert verify(folder, deep=True) == []
    checkpoint = open_checkpoint(folder)
    with torch.device("meta"):
        empty = swap_linears(GLM(checkpoint.config), bits, embeddings)
    load_into(empty, checkpoint, dtype=torch.float16)
    expected = quantised.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in empty.state_dict().items())


def test_an_untied_head_is_saved(tmp_path: Path) -> None:
    config = replace(SMALL, tied_head=False)
    folder = save(tmp_path / "model", GLM(config).state_dict(), config)
    assert "lm_head.weight" in open_checkpoint(folder).tensors
    assert not open_checkpoint(folder).config.tied_head


def test_gradients_do_not_keep_a_model_from_being_saved(tmp_path: Path) -> None:
    save(tmp_path / "model", model().named_parameters(), SMALL)


def test_progress_ends_at_the_whole(tmp_path: Path) -> None:
    seen: list[tuple[int, int, str]] = []
    state = without_head(model().state_dict())
    save(tmp_path / "model", state, SMALL, progress=lambda *now: seen.append(now))
    total = sum(tensor.nbytes for tensor in state.values())
    assert seen[-1] == (total, total, "saving weights")


def test_further_files_go_along(tmp_path: Path) -> None:
    save(tmp_path / "model", {}, SMALL, files={"LICENSE": b"text"})
    assert (tmp_path / "model" / "LICENSE").read_bytes() == b"text"


def test_a_tokenizer_file_without_its_config_is_copied_alone(tmp_path: Path, tokenizer_file: Path) -> None:
    folder = save(tmp_path / "model", {}, SMALL, tokenizer_file=tokenizer_file)
    assert (folder / "ice_text.model").read_bytes() == tokenizer_file.read_bytes()
    assert not (folder / "tokenizer_config.json").exists()


def test_golden_weights_survive_a_round_trip_through_both_layouts(tmp_path: Path) -> None:
    source = open_checkpoint(MODELS / "base-fp32")
    state = {name: read_tensor(entry) for name, entry in source.tensors.items()}
    for layout in ("original", "safetensors"):
        folder = save(tmp_path / layout, state, source.config, layout=layout)  # type: ignore[arg-type]
        assert_holds(folder, state if layout == "original" else without_head(state))
