"""Random checkpoints in the layout of the release, for tests at every size."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from chatglm.checkpoint import load_into, open_checkpoint, random_checkpoint, verify
from chatglm.checkpoint.layout import original_shards
from chatglm.checkpoint.random_weights import tokenizer_config
from chatglm.config import ModelConfig
from chatglm.model import GLM
from chatglm.model.positions import Layout, positions, prefix_blocked
from chatglm.quantization import swap_linears
from checkpoint_folders import SMALL
from golden_vectors import GOLDEN

TOKENIZER = GOLDEN / "tokenizer-reduced" / "ice_text.model"
DEEPER = replace(SMALL, num_layers=6, hidden_size=64, inner_hidden_size=256)


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for path in sorted(folder.glob("*.bin"))
        for name, tensor in torch.load(path, weights_only=True).items()
    }


def test_the_original_layout_has_the_releases_peculiarities(tmp_path: Path) -> None:
    folder = random_checkpoint(tmp_path / "model", DEEPER, seed=3, tokenizer_file=TOKENIZER)
    assert verify(folder, deep=True) == []
    shards, stale = original_shards(DEEPER)
    index = json.loads((folder / "pytorch_model.bin.index.json").read_text())
    assert index["metadata"]["total_size"] == stale > sum(tensor.nbytes for tensor in stored(folder).values())
    for k, names in enumerate(shards):
        file = f"pytorch_model-{k + 1:05d}-of-{len(shards):05d}.bin"
        assert list(torch.load(folder / file, weights_only=True)) == names
        assert all(index["weight_map"][name] == file for name in names)
    tensors = stored(folder)
    assert torch.equal(tensors["lm_head.weight"], tensors["transformer.word_embeddings.weight"])
    for name, tensor in tensors.items():
        assert tensor.dtype == (torch.float32 if "layernorm" in name else torch.float16), name
    frequencies = tensors["transformer.layers.5.attention.rotary_emb.inv_freq"]
    assert torch.equal(frequencies, (1 / 10_000 ** (torch.arange(0, 16, 2) / 16)).half())


def test_the_same_seed_gives_the_same_weights_in_both_layouts(tmp_path: Path) -> None:
    first = stored(random_checkpoint(tmp_path / "a", SMALL, seed=1))
    second = stored(random_checkpoint(tmp_path / "b", SMALL, seed=1))
    other = stored(random_checkpoint(tmp_path / "c", SMALL, seed=2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    name = "transformer.layers.1.mlp.dense_h_to_4h.weight"
    assert not torch.equal(first[name], other[name])
    folder = random_checkpoint(tmp_path / "d", SMALL, 1, "safetensors", tokenizer_file=TOKENIZER, max_shard_bytes=9_000)
    assert verify(folder, deep=True) == []
    checkpoint = open_checkpoint(folder)
    assert checkpoint.dtypes.keys() == {"float16"} and "lm_head.weight" not in checkpoint.tensors
    assert len(checkpoint.files) > 1
    model = GLM(SMALL)
    load_into(model, checkpoint, dtype=torch.float16)
    assert torch.equal(model.state_dict()[name], first[name])


def test_every_layer_matters_and_fp16_does_not_overflow(tmp_path: Path) -> None:
    config = replace(DEEPER, hidden_size=128, inner_hidden_size=512, num_heads=4)
    model = GLM(config)
    load_into(model, open_checkpoint(random_checkpoint(tmp_path / "model", config)), dtype=torch.float32)
    layout = Layout.of_contexts([30], total=31)
    ids = torch.randint(0, 200, (1, 31), generator=torch.Generator().manual_seed(0))

    def logits() -> torch.Tensor:
        return model(ids, positions(layout, 31, config), prefix_blocked(layout, 31))[0, -1].detach()

    whole = logits()
    assert 0.5 < whole.std() < 5 and model.transformer.word_embeddings(ids).abs().max() < 100
    for layer in model.transformer.layers:
        for branch in (layer.attention.dense, layer.mlp.dense_4h_to_h):
            kept = branch.weight.detach().clone()
            branch.weight.data.zero_()
            assert (logits() - whole).abs().max() > 0.02 * whole.abs().max()
            branch.weight.data.copy_(kept)


@pytest.mark.parametrize(("bits", "embeddings"), [(8, False), (4, False), (4, True)])
@pytest.mark.parametrize("layout", ["original", "safetensors"])
def test_a_quantised_config_gets_codes_and_scales(tmp_path: Path, bits: int, embeddings: bool, layout: str) -> None:
    config = replace(SMALL, quantization_bit=bits, quantization_embeddings=embeddings)
    folder = random_checkpoint(tmp_path / "model", config, layout=layout, tokenizer_file=TOKENIZER)  # type: ignore[arg-type]
    assert verify(folder, deep=True) == []
    with torch.device("meta"):
        model = swap_linears(GLM(config), bits, embeddings)
    load_into(model, open_checkpoint(folder), dtype=torch.float32)
    weight = model.transformer.layers[0].mlp.dense_h_to_4h.dequantize(torch.float32)
    assert 0.2 < weight.std() * 4 < 2.5  # the gain of 1.5 over √16 columns, roughly


def test_a_prefix_and_an_untied_head_are_drawn_too(tmp_path: Path) -> None:
    config = replace(SMALL, pre_seq_len=4, prefix_projection=True, tied_head=False, position_encoding="rotary_1d")
    folder = random_checkpoint(tmp_path / "model", config, tokenizer_file=TOKENIZER)
    assert verify(folder) == []
    tensors = stored(folder)
    assert not torch.equal(tensors["lm_head.weight"], tensors["transformer.word_embeddings.weight"])


def test_the_tokenizer_config_is_that_of_the_era() -> None:
    pre_slim = ModelConfig(
        vocab_size=150_528,
        bos_token_id=150_004,
        eos_token_id=150_005,
        mask_token_id=150_000,
        gmask_token_id=150_001,
        pad_token_id=20_003,
    )
    slim, before = tokenizer_config(SMALL), tokenizer_config(pre_slim)
    assert (slim["eos_token"], slim["end_token"], slim["num_image_tokens"]) == ("<eop>", "</s>", 0)
    assert (before["eos_token"], before["eop_token"]) == ("</s>", "<eop>")
    assert "num_image_tokens" not in before and "end_token" not in before


def test_progress_runs_to_the_whole(tmp_path: Path) -> None:
    seen: list[tuple[int, int, str]] = []
    folder = random_checkpoint(tmp_path / "model", SMALL, progress=lambda *now: seen.append(now))
    total = sum(tensor.nbytes for tensor in stored(folder).values())
    assert seen[-1][:2] == (total, total)
