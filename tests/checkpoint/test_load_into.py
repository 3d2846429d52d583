"""Tensors into models: every form of checkpoint gives the original's logits, in one pass and little memory."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from chatglm.checkpoint import Checkpoint, load_into, open_checkpoint, random_checkpoint
from chatglm.config import ModelConfig
from chatglm.errors import CheckpointError, QuantizationError
from chatglm.model import GLM
from chatglm.model.positions import find_layout, positions, prefix_blocked
from chatglm.quantization import quantize_on_load, swap_linears
from checkpoint_folders import MODELS, PREFIX_ONLY, SMALL, edit_json, edit_tensors, golden_copy, small_safetensors
from golden_vectors import Case, assert_close, cases, tensors_of

TABLE = "transformer.word_embeddings.weight"
NORM = "transformer.final_layernorm.weight"
DENSE = "transformer.layers.0.attention.dense.weight"


def empty(config: ModelConfig) -> GLM:
    with torch.device("meta"):
        return swap_linears(GLM(config), config.quantization_bit, config.quantization_embeddings)


def loaded(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> GLM:
    model = empty(checkpoint.config)
    assert load_into(model, checkpoint, dtype=dtype) == []
    assert not [name for name, t in [*model.named_parameters(), *model.named_buffers()] if t.is_meta]
    return model.eval()


def logits(model: GLM, ids: torch.Tensor) -> torch.Tensor:
    layout = find_layout(ids, model.config)
    return model(ids, positions(layout, ids.shape[1], model.config), prefix_blocked(layout, ids.shape[1]))


def first_case(name: str, kind: str = "forward") -> Case:
    return next(case for case in cases(name, kind) if set(case.inputs) == {"input_ids"})


@pytest.mark.parametrize("name", ["base-fp32", "oned-fp32", "ptuning", "ptuning-projection"])
def test_golden_logits_from_bin_shards_and_safetensors(name: str) -> None:
    case = first_case(name)
    assert_close(logits(loaded(open_checkpoint(MODELS / name)), case.inputs["input_ids"]), case.outputs["logits"])


@pytest.mark.parametrize("name", ["int8", "int4", "int4-qe"])
def test_golden_logits_from_the_originals_quantised_checkpoints(name: str) -> None:
    case = first_case(f"checkpoint-{name}", "forward_quantised")
    model = loaded(open_checkpoint(MODELS / name))
    assert_close(logits(model, case.inputs["input_ids"]), case.outputs["logits"])
    assert model.lm_head.weight is model.transformer.word_embeddings.weight


@pytest.mark.parametrize("name", PREFIX_ONLY)
def test_golden_logits_from_a_prefix_over_its_base(name: str) -> None:
    whole = name.removesuffix("-prefix-only")
    case = first_case(whole)
    model = loaded(open_checkpoint(MODELS / whole).with_prefix(MODELS / name))
    assert_close(logits(model, case.inputs["input_ids"]), case.outputs["logits"])


def test_golden_logits_of_a_pre_slim_checkpoint_as_it_is_and_as_slim() -> None:
    checkpoint = open_checkpoint(MODELS / "preslim-full-vocab")
    case = cases("preslim-full-vocab", "forward_preslim")[0]
    ids = case.inputs["input_ids"]
    as_it_is = logits(loaded(checkpoint), ids)[0, :, ::499]
    assert_close(as_it_is, case.outputs["e551.logits_every_499th"])
    as_slim = logits(loaded(checkpoint.slim()), ids - 20_000)[0, :, ::499]
    assert_close(as_slim, case.outputs["v110_slim.logits_every_499th"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_everything_floating_gets_the_asked_dtype_also_stored_fp32_norms(tmp_path: Path, dtype: torch.dtype) -> None:
    checkpoint = open_checkpoint(random_checkpoint(tmp_path / "model", SMALL))
    assert checkpoint.tensors[NORM].dtype == "float32" and checkpoint.tensors[TABLE].dtype == "float16"
    model = loaded(checkpoint, dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    for name, tensor in model.state_dict().items():
        stored = torch.load(checkpoint.tensors[name].file, weights_only=True)[name]
        assert torch.equal(tensor, stored.to(dtype)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_and_scales_keep_their_dtype(dtype: torch.dtype) -> None:
    state, stored = loaded(open_checkpoint(MODELS / "int4-qe"), dtype).state_dict(), tensors_of("int4-qe")
    for name, tensor in state.items():
        is_kept = tensor.dtype == torch.int8 or name.endswith("_scale")
        assert tensor.dtype == (stored[name].dtype if is_kept else dtype), name
        assert torch.equal(tensor, stored[name].to(tensor.dtype)), name


def test_scales_stored_in_fp32_become_fp16_again(tmp_path: Path) -> None:
    """The original's CPU path saves them so after `.float()`."""
    folder = golden_copy("int4", tmp_path)
    name = "transformer.layers.0.attention.dense.weight_scale"
    edit_tensors(folder / "pytorch_model.bin", lambda tensors: tensors.update({name: tensors[name].float()}))
    state = loaded(open_checkpoint(folder)).state_dict()
    assert state[name].dtype == torch.float16 and torch.equal(state[name], tensors_of("int4")[name])


def test_the_embedding_of_a_quantised_model_answers_in_the_asked_dtype() -> None:
    model = loaded(open_checkpoint(MODELS / "int4-qe"), torch.bfloat16)
    assert model.transformer.word_embeddings(torch.tensor([3])).dtype == torch.bfloat16


def test_a_stored_head_equal_to_the_embedding_is_not_kept() -> None:
    checkpoint = open_checkpoint(MODELS / "base-fp32")
    assert "lm_head.weight" in checkpoint.tensors
    model = loaded(checkpoint)
    assert model.lm_head.weight is model.transformer.word_embeddings.weight


def test_an_equal_head_may_be_stored_in_another_dtype(tmp_path: Path) -> None:
    folder = golden_copy("ptuning", tmp_path)
    edit_tensors(
        folder / "pytorch_model.bin",
        lambda tensors: tensors.update({"lm_head.weight": tensors["lm_head.weight"].float()}),
    )
    loaded(open_checkpoint(folder))


@pytest.mark.parametrize("row", [0, 551])
def test_a_tied_head_that_differs_is_an_error_with_the_switch(tmp_path: Path, row: int) -> None:
    folder = golden_copy("ptuning", tmp_path)

    def differ(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["lm_head.weight"].clone()
        tensors["lm_head.weight"][row, 5] += 1

    edit_tensors(folder / "pytorch_model.bin", differ)
    with pytest.raises(CheckpointError, match="differs from the embedding") as refused:
        loaded(open_checkpoint(folder))
    assert '"tie_word_embeddings": false' in str(refused.value) and "lm_head.weight" in str(refused.value)
    edit_json(folder / "config.json", tie_word_embeddings=False)
    model = loaded(open_checkpoint(folder))
    assert (model.lm_head.weight != model.transformer.word_embeddings.weight).sum() == 1


def test_a_head_of_other_shape_differs_too(tmp_path: Path) -> None:
    folder = golden_copy("ptuning", tmp_path)
    edit_tensors(folder / "pytorch_model.bin", lambda tensors: tensors.update({"lm_head.weight": torch.zeros(3, 32)}))
    with pytest.raises(CheckpointError, match="differs from the embedding"):
        loaded(open_checkpoint(folder))


@pytest.mark.parametrize("embeddings", [False, True])
def test_weights_are_quantised_as_they_arrive(embeddings: bool) -> None:
    checkpoint = open_checkpoint(MODELS / "ptuning")
    model = empty(replace(checkpoint.config, quantization_bit=4, quantization_embeddings=embeddings))
    load_into(model, checkpoint, dtype=torch.float32, transform=quantize_on_load(4, embeddings))
    expected = GLM(checkpoint.config).half()  # in the stored dtype, as the original
    expected.load_state_dict({name: tensor for name, tensor in tensors_of("ptuning").items()})
    swap_linears(expected, 4, embeddings)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert model.lm_head.weight is model.transformer.word_embeddings.weight


def test_a_weight_that_cannot_be_quantised_is_named_while_loading(tmp_path: Path) -> None:
    folder = golden_copy("oned-fp32", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors[DENSE][1] = 1e30
    save_file(tensors, folder / "model.safetensors")
    model = empty(replace(open_checkpoint(folder).config, quantization_bit=8))
    with pytest.raises(QuantizationError, match=f"{DENSE}: row 1"):
        load_into(model, open_checkpoint(folder), dtype=torch.float32, transform=quantize_on_load(8))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
def test_a_value_that_is_not_finite_names_file_and_tensor(tmp_path: Path, value: float, dtype: torch.dtype) -> None:
    folder = small_safetensors(tmp_path / "model", dtype=dtype)
    tensors = load_file(folder / "model.safetensors")
    tensors[DENSE][7, 3] = value
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError) as refused:
        loaded(open_checkpoint(folder))
    assert str(refused.value).startswith("model.safetensors holds NaN or infinite values\n")
    assert f"tensor: {DENSE} [16, 16]" in str(refused.value)


def test_a_value_too_large_for_fp16_is_refused_and_loads_as_bf16(tmp_path: Path) -> None:
    folder = small_safetensors(tmp_path / "model", dtype=torch.float32)
    tensors = load_file(folder / "model.safetensors")
    tensors[DENSE][7, 3] = 70_000.0
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"beyond 65,504[^ ]* which fp16 cannot hold") as refused:
        loaded(open_checkpoint(folder), torch.float16)
    assert DENSE in str(refused.value)
    loaded(open_checkpoint(folder), torch.bfloat16)


def test_missing_tensors_are_named_before_anything_is_read(tmp_path: Path) -> None:
    folder = golden_copy("ptuning", tmp_path)
    edit_tensors(folder / "pytorch_model.bin", lambda tensors: [tensors.pop(DENSE), tensors.pop(NORM)])
    checkpoint = open_checkpoint(folder)
    seen: list[int] = []
    with pytest.raises(CheckpointError, match=rf"lacks `{NORM}` \(and 1 more\)"):
        load_into(empty(checkpoint.config), checkpoint, dtype=torch.float32, progress=lambda *a: seen.append(a[0]))
    assert seen == []


def test_a_base_without_the_prefix_that_its_config_promises_is_refused_or_allowed(tmp_path: Path) -> None:
    folder = golden_copy("base-fp16", tmp_path)
    edit_json(folder / "config.json", pre_seq_len=5, prefix_projection=False)
    checkpoint = open_checkpoint(folder)
    with pytest.raises(CheckpointError, match="prefix_encoder") as refused:
        load_into(empty(checkpoint.config), checkpoint, dtype=torch.float32)
    assert "pre_seq_len" in str(refused.value.cure)
    model = empty(checkpoint.config)
    name = "transformer.prefix_encoder.embedding.weight"
    missing = load_into(model, checkpoint, dtype=torch.float32, may_miss=("transformer.prefix_encoder.",))
    assert missing == [name] and [key for key, t in model.named_parameters() if t.is_meta] == [name]


def test_tensors_that_the_model_lacks_are_refused() -> None:
    checkpoint = open_checkpoint(MODELS / "ptuning")
    with pytest.raises(CheckpointError, match=r"holds `transformer\.prefix_encoder\.embedding\.weight`, which"):
        load_into(empty(replace(checkpoint.config, pre_seq_len=None)), checkpoint, dtype=torch.float32)


def test_a_wrong_shape_or_kind_is_refused_with_both(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(MODELS / "ptuning")
    with pytest.raises(CheckpointError, match=r"holds \[552, 32\] float16 where the model has \[500, 32\] float32"):
        load_into(empty(replace(checkpoint.config, vocab_size=500)), checkpoint, dtype=torch.float32)
    plain = open_checkpoint(MODELS / "int8")
    with pytest.raises(CheckpointError, match=r"weight_scale` \(and 7 more\), which the model does not have"):
        load_into(empty(replace(plain.config, quantization_bit=0)), plain, dtype=torch.float32)
    model = empty(checkpoint.config)
    model.transformer.layers[0].attention.dense.weight = torch.nn.Parameter(
        torch.zeros(32, 32, dtype=torch.int8), requires_grad=False
    )
    with pytest.raises(CheckpointError, match=r"where the model has .* int8"):
        load_into(model, checkpoint, dtype=torch.float32)


def test_a_transform_must_fit_the_model() -> None:
    checkpoint = open_checkpoint(MODELS / "ptuning")
    model = empty(checkpoint.config)
    with pytest.raises(CheckpointError, match=r"holds \[96, 32\] int8 where the model has \[96, 32\] float32"):
        load_into(model, checkpoint, dtype=torch.float32, transform=quantize_on_load(8))
    with pytest.raises(CheckpointError, match=f"the model has no {TABLE}2, which {TABLE} was turned into"):
        load_into(model, checkpoint, dtype=torch.float32, transform=lambda name, tensor: [(f"{name}2", tensor)])
    with pytest.raises(CheckpointError, match=r"nothing filled `transformer\..*of the model"):
        load_into(model, checkpoint, dtype=torch.float32, transform=lambda name, tensor: [])


def test_progress_runs_to_the_stored_bytes_the_head_included() -> None:
    checkpoint = open_checkpoint(MODELS / "base-fp32")
    seen: list[tuple[int, int, str]] = []
    load_into(empty(checkpoint.config), checkpoint, dtype=torch.float32, progress=lambda *now: seen.append(now))
    assert [done for done, _, _ in seen] == sorted(done for done, _, _ in seen)
    assert seen[-1] == (checkpoint.nbytes, checkpoint.nbytes, "loading weights")


def test_a_frozen_parameter_stays_frozen() -> None:
    checkpoint = open_checkpoint(MODELS / "ptuning")
    model = empty(checkpoint.config).requires_grad_(False)
    model.transformer.prefix_encoder.requires_grad_(True)
    load_into(model, checkpoint, dtype=torch.float32)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained == ["transformer.prefix_encoder.embedding.weight"]


MEASURE = """
import sys, torch
from chatglm.checkpoint import load_into, open_checkpoint
from chatglm.model import GLM
torch.set_num_threads(1)

def status(key):
    line = next(line for line in open("/proc/self/status") if line.startswith(key))
    return int(line.split()[1]) * 1024

checkpoint = open_checkpoint(sys.argv[1])
with torch.device("meta"):
    model = GLM(checkpoint.config)
torch.ones(1 << 20).half().float()  # whatever the library allocates once
before = status("VmRSS")
load_into(model, checkpoint, dtype=getattr(torch, sys.argv[2]))
print(status("VmHWM") - before, sum(p.nbytes for p in model.parameters()), max(p.nbytes for p in model.parameters()))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_loading_peaks_at_the_model_and_one_tensor(tmp_path: Path, dtype: str) -> None:
    """Mapped pages would count as resident: nothing of the files may stay. The stored head is read and not kept."""
    config = replace(SMALL, vocab_size=8_192, hidden_size=512, num_layers=12, inner_hidden_size=2_048, num_heads=8)
    folder = random_checkpoint(tmp_path / "model", config)
    run = [sys.executable, "-c", MEASURE, str(folder), dtype]
    # glibc keeps freed buffers once it has seen larger ones, now and then 25 MB of them: what it keeps is not measured
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(run, capture_output=True, text=True, check=True, env=env)
    peak, model, largest = map(int, done.stdout.split())
    assert model > 80_000_000
    assert peak < 1.05 * model + 2 * largest + 8_000_000  # in another dtype the tensor exists twice; the head's chunks


def test_an_unknown_key_of_the_config_is_a_warning_of_opening(tmp_path: Path) -> None:
    folder = golden_copy("base-fp16", tmp_path)
    edit_json(folder / "config.json", surprise=1)
    with pytest.warns(UserWarning, match="surprise"):
        open_checkpoint(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_checkpoint(MODELS / "base-fp16")
