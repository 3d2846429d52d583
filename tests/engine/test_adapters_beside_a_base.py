"""Adapters by name beside one base: whose answers they are, what is shared, what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import chatglm
from adapter_folders import low_rank_folder, prefix_folder
from chatglm.checkpoint.adapter import LoraAdapter, open_adapter
from chatglm.engine.adapters import LowRankLinear, with_adapter
from chatglm.errors import CheckpointError, RequestError
from chatglm.model import GLM

QUESTION = "What is the capital of France?"
GREEDY: dict[str, Any] = {"temperature": 0, "max_new_tokens": 12}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    where = tmp_path_factory.mktemp("by-name")
    config = chatglm.load(device="cpu").config
    return {
        "loud": low_rank_folder(where / "loud", config, seed=1, size=0.3),
        "soft": low_rank_folder(where / "soft", config, seed=2, size=0.3),
        "tuned": prefix_folder(where / "tuned", config, length=12, size=3.0),
    }


@pytest.fixture(scope="module")
def model(folders: dict[str, Path]) -> Any:
    return chatglm.load(device="cpu", adapters=folders)


def test_each_name_answers_as_if_loaded_alone(model: Any, folders: dict[str, Path]) -> None:
    answers = {name: model.chat(QUESTION, adapter=name, **GREEDY).text for name in ("base", "loud", "soft", "tuned")}
    assert len(set(answers.values())) == 4
    assert answers["base"] == model.chat(QUESTION, **GREEDY).text
    for name, folder in folders.items():
        alone = chatglm.load(adapter=folder)
        assert alone.chat(QUESTION, **GREEDY).text == answers[name]
        assert alone.chat(QUESTION, adapter="base", **GREEDY).text == answers["base"]
    streamed = "".join(delta.text for delta in model.stream_chat(QUESTION, adapter="loud", **GREEDY))
    assert streamed == answers["loud"]
    assert [reply.text for reply in model.generate([QUESTION, QUESTION], adapter="soft", **GREEDY)] == [
        answers["soft"]
    ] * 2


@pytest.mark.parametrize("dtype", ["fp16", "int4"])
def test_an_adapter_runs_over_every_form_of_the_base(dtype: str, folders: dict[str, Path]) -> None:
    model = chatglm.load(dtype=dtype, device="cpu", adapters=folders)
    answers = {name: model.chat(QUESTION, adapter=name, **GREEDY).text for name in ("base", *folders)}
    assert len(set(answers.values())) == 4


def test_a_twin_shares_every_weight_with_its_base(model: Any, folders: dict[str, Path]) -> None:
    base = model.loaded.model
    twin = with_adapter(base, open_adapter(folders["loud"]))
    held = {tensor.data_ptr() for tensor in base.parameters()}
    assert all(tensor.data_ptr() in held for tensor in twin.parameters())
    assert sum(isinstance(module, LowRankLinear) for module in twin.modules()) == 4 * base.config.num_layers
    assert not any(isinstance(module, LowRankLinear) for module in base.modules())


def test_the_product_is_scaling_times_up_times_down(model: Any, folders: dict[str, Path]) -> None:
    adapter = open_adapter(folders["loud"])
    assert isinstance(adapter, LoraAdapter)
    name = "transformer.layers.0.attention.dense"
    part = adapter.parts[name]
    assert part.scaling == 2.0  # alpha 8, rank 4
    stored = {key: tensor for key, tensor in _tensors(folders["loud"]).items() if name in key}
    down, up = (stored[f"base_model.model.{name}.lora_{half}.weight"] for half in "AB")
    base: GLM = model.loaded.model
    hidden = torch.randn(3, base.config.hidden_size, generator=torch.Generator().manual_seed(0))
    plain = base.get_submodule(name)(hidden)
    expected = plain + 2.0 * (hidden @ down.T @ up.T)
    found = with_adapter(base, adapter).get_submodule(name)(hidden)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_an_adapter_that_was_not_loaded_is_named_with_those_that_were(model: Any) -> None:
    with pytest.raises(RequestError, match="'quiet' is not loaded; loaded: base, loud, soft, tuned"):
        model.chat(QUESTION, adapter="quiet")


@pytest.mark.parametrize("name", ["base", "", "a b", "a:b", "x" * 65])
def test_a_name_that_no_request_could_carry_is_refused(name: str, folders: dict[str, Path]) -> None:
    with pytest.raises(RequestError, match="no name for an adapter"):
        chatglm.load(adapters={name: folders["loud"]})


def test_an_adapters_folder_loads_over_the_base_that_it_names(folders: dict[str, Path], model: Any) -> None:
    expected = model.chat(QUESTION, adapter="loud", **GREEDY).text
    assert chatglm.load(folders["loud"]).chat(QUESTION, **GREEDY).text == expected
    with pytest.raises(RequestError, match="an adapter itself"):
        chatglm.load(folders["loud"], adapter=folders["soft"])


def test_several_devices_and_adapters_exclude_each_other(folders: dict[str, Path]) -> None:
    with pytest.raises(RequestError, match="one device"):
        chatglm.load(device="cpu", devices=2, adapters=folders)


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def _config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "`bias` 'all'"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"lora_alpha": "much"}, "lora_alpha"),
        ({"r": 5}, "rank 4"),
    ],
)
def test_an_adapter_that_is_more_than_low_rank_sums_is_refused(
    change: dict[str, Any], said: str, tmp_path: Path, model: Any
) -> None:
    folder = low_rank_folder(tmp_path / "odd", model.config)
    _config(folder, **change)
    with pytest.raises(CheckpointError, match=said):
        chatglm.load(adapter=folder)


def test_an_adapter_of_another_model_is_refused_with_both_sizes(tmp_path: Path, model: Any) -> None:
    wide = replace(model.config, hidden_size=2 * model.config.hidden_size, num_heads=2 * model.config.num_heads)
    folders = (low_rank_folder(tmp_path / "wide", wide), prefix_folder(tmp_path / "prefix", wide))
    for folder, stored in zip(folders, (wide.hidden_size, 2 * wide.num_layers * wide.hidden_size), strict=True):
        with pytest.raises(CheckpointError, match=str(stored)):
            chatglm.load(adapter=folder)
    deep = low_rank_folder(tmp_path / "deep", replace(model.config, num_layers=model.config.num_layers + 1))
    with pytest.raises(CheckpointError, match=f"no linear transformer.layers.{model.config.num_layers}"):
        chatglm.load(adapter=deep)


def test_a_folder_without_an_adapter_says_what_one_holds(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"adapter_config\.json"):
        chatglm.load(adapter=tmp_path / "empty")
    with pytest.raises(CheckpointError, match="no such adapter folder"):
        chatglm.load(adapter=tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="a model and no adapter"):
        chatglm.load(adapter=Path(chatglm.__file__).parent / "assets" / "mini")


def test_half_a_product_and_foreign_tensors_are_named(tmp_path: Path, model: Any) -> None:
    folder = low_rank_folder(tmp_path / "half", model.config)
    tensors = _tensors(folder)
    name = next(iter(tensors))
    save_file({key: value for key, value in tensors.items() if key != name}, folder / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="alone"):
        chatglm.load(adapter=folder)
    save_file({**tensors, "base_model.model.lm_head.weight": torch.ones(2, 2)}, folder / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"lm_head.weight` is no part"):
        chatglm.load(adapter=folder)


def test_scaling_follows_patterns_and_the_root_of_the_rank(tmp_path: Path, model: Any) -> None:
    folder = low_rank_folder(tmp_path / "scaled", model.config)
    _config(folder, alpha_pattern={"layers.0.attention.dense": 2}, use_rslora=True)
    adapter = open_adapter(folder)
    assert isinstance(adapter, LoraAdapter)
    assert adapter.parts["transformer.layers.0.attention.dense"].scaling == 1.0  # 2 / sqrt(4)
    assert adapter.parts["transformer.layers.1.attention.dense"].scaling == 4.0  # 8 / sqrt(4)
