"""`chatglm convert --adapter`: a LoRA into its base, against PEFT's merge; into INT8 and INT4 only with a warning."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import chatglm
from adapter_folders import low_rank_folder, prefix_folder
from chatglm.checkpoint import convert_ptuning, open_checkpoint, save
from chatglm.checkpoint.reading import read_tensor
from chatglm.config import ModelConfig
from chatglm.errors import CheckpointError
from chatglm.model import GLM
from chatglm.quantization import swap_linears
from chatglm.training.adapters.merging import merge_adapter
from checkpoint_folders import GOLDEN, SMALL, small_safetensors

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: read_tensor(entry) for name, entry in open_checkpoint(folder).tensors.items()}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", DTYPES)
def test_the_merged_weights_are_those_of_pefts_merge_bit_for_bit(name: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    import chatglm.hf

    dtype = DTYPES[name]
    base = small_safetensors(tmp_path / "base", dtype=dtype)
    adapter = low_rank_folder(tmp_path / "adapter", SMALL, base=str(base))
    merged = tensors_of(merge_adapter(adapter, base, tmp_path / "merged"))
    model = chatglm.hf.ChatGLMForConditionalGeneration.from_pretrained(str(base), dtype=dtype)
    expected = peft.PeftModel.from_pretrained(model, str(adapter)).merge_and_unload().state_dict()
    before = tensors_of(base)
    assert merged.keys() == before.keys()
    for key, tensor in merged.items():
        assert tensor.dtype == before[key].dtype
        assert torch.equal(tensor.float(), expected[key].to(dtype).float()), key
    changed = {key for key, tensor in merged.items() if not torch.equal(tensor, before[key])}
    assert len(changed) == 4 * SMALL.num_layers


def test_the_merged_checkpoint_answers_as_the_adapter_beside_its_base(tmp_path: Path) -> None:
    base = Path(chatglm.__file__).parent / "assets" / "mini"
    config = chatglm.load(device="cpu").config
    adapter = low_rank_folder(tmp_path / "adapter", config, seed=1, size=0.2)
    merge_adapter(adapter, base, tmp_path / "merged", dtype="fp32")
    asked: dict[str, Any] = {"temperature": 0, "max_new_tokens": 10}
    merged = chatglm.load(tmp_path / "merged").chat("你好", **asked).text
    assert merged == chatglm.load(adapter=adapter).chat("你好", **asked).text
    assert merged != chatglm.load().chat("你好", **asked).text


@pytest.mark.parametrize(("bits", "group_size"), [(8, 0), (4, 0), (8, 8), (4, 8)])
def test_codes_are_expanded_added_to_and_quantised_again_with_a_warning(
    bits: int, group_size: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = quantised_folder(tmp_path / "base", bits, group_size)
    adapter = low_rank_folder(tmp_path / "adapter", SMALL)
    with caplog.at_level(logging.WARNING, "chatglm"):
        merge_adapter(adapter, base, tmp_path / "merged")
    assert f"INT{bits} weights are expanded" in caplog.text
    before, after = open_checkpoint(base), open_checkpoint(tmp_path / "merged")
    assert after.config == before.config
    wide = chatglm.load(base, dtype="fp32").loaded.model
    merged = chatglm.load(tmp_path / "merged", dtype="fp32").loaded.model
    beside = chatglm.load(base, dtype="fp32", adapter=adapter)._engines["default"].runner.model
    for name, weight in merged.named_parameters():
        linear = beside.get_submodule(name.rpartition(".")[0])
        if not name.endswith(".weight") or not hasattr(linear, "up"):
            assert torch.equal(weight, wide.get_parameter(name))
            continue
        expected = linear.base.weight + linear.scaling * linear.up @ linear.down
        groups = expected.unflatten(-1, (-1, group_size or expected.shape[1]))
        half_step = groups.abs().amax(-1, keepdim=True) / (127 if bits == 8 else 7) * 0.51
        difference = (weight - expected).unflatten(-1, (-1, group_size or expected.shape[1])).abs()
        within = (difference <= half_step).float().mean()
        assert within > (0.999 if bits == 8 else 0.9)  # INT4's search may clip a group's largest weight


def quantised_folder(folder: Path, bits: int, group_size: int) -> Path:
    torch.manual_seed(0)
    model = swap_linears(GLM(replace(SMALL, torch_dtype="float32")), bits, group_size=group_size)
    tensors = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("lm_head")}
    return save(folder, tensors, model.config, tokenizer_file=GOLDEN / "tokenizer-reduced" / "ice_text.model")


def test_a_prefix_is_merged_as_by_ptuning(tmp_path: Path) -> None:
    base = small_safetensors(tmp_path / "base")
    prefix = prefix_folder(tmp_path / "prefix", SMALL)
    one = tensors_of(merge_adapter(prefix, base, tmp_path / "one"))
    other = tensors_of(convert_ptuning(prefix, base, tmp_path / "other"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_an_adapter_of_another_base_writes_nothing(tmp_path: Path) -> None:
    base = small_safetensors(tmp_path / "base")
    wide: ModelConfig = replace(SMALL, hidden_size=32)
    with pytest.raises(CheckpointError, match=r"\[32, 32\], the model's is \[16, 16\]"):
        merge_adapter(low_rank_folder(tmp_path / "adapter", wide), base, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
