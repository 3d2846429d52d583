"""LoRA, QLoRA and P-tuning v2 over a frozen base: what learns, what is kept, what is written, who can read it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import chatglm
from chatglm.checkpoint import convert_ptuning
from chatglm.checkpoint.adapter import LoraAdapter, open_adapter
from chatglm.config import ModelConfig
from chatglm.engine.adapters import with_adapter
from chatglm.errors import TrainingError
from chatglm.model import GLM
from chatglm.quantization import QuantizedLinear
from chatglm.training.adapters.costs import trained_parameters
from chatglm.training.adapters.lora import add_lora
from chatglm.training.adapters.settings import LoraSettings, PtuningSettings, settings_of
from chatglm.training.loop import Report, train
from chatglm.training.loss import batch_loss
from chatglm.training.masks import dense_blocked
from chatglm.training.methods import tuned
from chatglm.training.run_config import RunConfig, read_run
from chatglm.training.samples import collate
from chatglm.training.sft import SFTRun
from chatglm.training.task import ListSource, Task
from checkpoint_folders import SMALL, small_safetensors
from tiny_runs import LENGTH, ROWS, is_equal, tiny_run

pytest.importorskip("peft")

ALL_FOUR = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
BATCH = collate(ROWS[:4], LENGTH)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_safetensors(tmp_path_factory.mktemp("adapters") / "base", dtype=torch.float32)


def adapter_run(base: Path, out: Path, method: dict[str, Any], **sections: Any) -> RunConfig:
    values: dict[str, Any] = {
        "model": {"source": str(base)},
        "method": {"dropout": 0.0, **method} if "lora" in method["name"] else method,
        "export": {"enabled": True},
        "optimizer": {"lr": 1e-3, "weight_decay": 0.0},
        "compute": {"threads": 1},
        "steps": 6,
        "schedule": {"warmup": 0, "kind": "constant"},
        "save": {"every": 3},
    }
    return tiny_run(out, **{**values, **sections})


def run_of(base: Path, out: Path, method: dict[str, Any], **sections: Any) -> tuple[Report, GLM]:
    run = adapter_run(base, out, method, **sections)
    made = tuned(run)
    report = train(Task(made.model, batch_loss, ListSource(ROWS, LENGTH), exported=made.exported), run)
    return report, made.glm.eval()


def loss_of(model: GLM) -> float:
    with torch.no_grad():
        return float(batch_loss(model, BATCH).mean())


def logits_of(model: GLM) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(BATCH.ids, BATCH.positions, dense_blocked(BATCH))


def plain(folder: Path) -> GLM:
    return chatglm.load(folder, dtype="fp32", device="cpu").loaded.model


def test_trained_parameters_of_the_six_billion_shape_are_the_published_counts() -> None:
    for settings, expected in (
        (LoraSettings(), 3_670_016),
        (LoraSettings(targets=tuple(ALL_FOUR)), 14_680_064),
    ):
        with torch.device("meta"):
            model = GLM(ModelConfig())
        add_lora(model, settings, 0)
        learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
        assert sum(parameter.numel() for parameter in learning) == expected
        assert trained_parameters(ModelConfig(), settings) == expected
    assert trained_parameters(ModelConfig(), PtuningSettings()) == 29_360_128
    assert trained_parameters(ModelConfig(), PtuningSettings(prefix_projection=True)) == 957_059_072


def test_a_lora_learns_beside_a_frozen_base_and_the_folder_gives_the_same_scores(base: Path, tmp_path: Path) -> None:
    before = plain(base).state_dict()
    report, trained = run_of(base, tmp_path, {"name": "lora", "targets": ALL_FOUR}, steps=20)
    assert report.losses[-1][1] < report.losses[0][1] - 0.1
    kept = {name.replace(".base_layer", ""): value for name, value in trained.state_dict().items()}
    assert is_equal(before, {name: kept[name] for name in before})
    folder = tmp_path / "model"
    assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    adapter = open_adapter(folder)
    assert isinstance(adapter, LoraAdapter) and adapter.base == str(base.resolve())
    again = with_adapter(plain(base), adapter)
    torch.testing.assert_close(logits_of(again), logits_of(trained), atol=1e-5, rtol=1e-5)
    assert (logits_of(again) - logits_of(plain(base))).abs().max() > 0.1


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_peft_loads_the_folder_on_the_transformers_class(base: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    import chatglm.hf

    _, trained = run_of(base, tmp_path, {"name": "lora", "targets": ALL_FOUR})
    model = chatglm.hf.ChatGLMForConditionalGeneration.from_pretrained(str(base), dtype=torch.float32)
    loaded = peft.PeftModel.from_pretrained(model, str(tmp_path / "model")).eval()
    with torch.no_grad():
        found = loaded(BATCH.ids, position_ids=BATCH.positions, attention_mask=dense_blocked(BATCH)).logits
    torch.testing.assert_close(found, logits_of(trained), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [0, 8])
def test_gradients_over_a_quantised_base_are_those_over_its_expanded_weights(
    bits: int, group_size: int, base: Path, tmp_path: Path
) -> None:
    method = {"name": "qlora", "bits": bits, "group_size": group_size, "targets": ALL_FOUR}
    packed, wide = (tuned(adapter_run(base, tmp_path, method)).glm for _ in "ab")
    assert sum(isinstance(module, QuantizedLinear) for module in packed.modules()) == 4 * SMALL.num_layers
    codes = {name: buffer.clone() for name, buffer in packed.named_buffers() if name.endswith("weight")}
    expand_under_lora(wide)
    generator = torch.Generator().manual_seed(0)
    for one, other in zip(learning(packed), learning(wide), strict=True):
        with torch.no_grad():
            one.copy_(torch.randn(one.shape, generator=generator) * 0.05)
            other.copy_(one)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda kept: saved.append(kept) or kept, lambda kept: kept):
        loss = batch_loss(packed, BATCH).total
    loss.backward()
    expected = batch_loss(wide, BATCH).total
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for one, other in zip(learning(packed), learning(wide), strict=True):
        assert one.grad is not None and other.grad is not None
        torch.testing.assert_close(one.grad, other.grad, atol=1e-4, rtol=1e-4)
    hidden, inner = SMALL.hidden_size, SMALL.inner_hidden_size
    sizes = {(3 * hidden, hidden), (hidden, hidden), (inner, hidden), (hidden, inner)}
    wide_copies = [kept for kept in saved if kept.is_floating_point() and {tuple(kept.shape), kept.shape[::-1]} & sizes]
    assert not wide_copies
    assert all(torch.equal(codes[name], buffer) for name, buffer in packed.named_buffers() if name in codes)


def learning(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def expand_under_lora(model: GLM) -> None:
    """The same weights as plain linears, under the low-rank products."""
    from chatglm.quantization.swap import _plain_linear

    for module in list(model.modules()):
        inner = getattr(module, "base_layer", None)
        if isinstance(inner, QuantizedLinear):
            module.base_layer = _plain_linear(inner, torch.float32)  # type: ignore[assignment]


def test_a_quantised_checkpoint_keeps_its_format_under_qlora(base: Path, tmp_path: Path) -> None:
    golden = Path(__file__).parents[1] / "data" / "golden" / "models" / "int4"
    model = tuned(adapter_run(golden, tmp_path, {"name": "qlora", "bits": 8})).glm
    linears = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    assert {(linear.bits, linear.group_size) for linear in linears} == {(4, 0)}
    floats = tuned(adapter_run(golden, tmp_path, {"name": "lora"})).glm
    assert not any(isinstance(module, QuantizedLinear) for module in floats.modules())


@pytest.mark.parametrize(("bits", "projection"), [(0, False), (0, True), (8, True), (4, False)])
def test_a_prefix_learns_alone_and_is_all_that_is_written(
    bits: int, projection: bool, base: Path, tmp_path: Path
) -> None:
    method = {"name": "ptuning", "pre_seq_len": 3, "prefix_projection": projection, "bits": bits}
    report, trained = run_of(base, tmp_path / "run", method, steps=20, optimizer={"lr": 1e-2, "weight_decay": 0.0})
    assert report.losses[-1][1] < report.losses[0][1]
    names = {name for name, parameter in trained.named_parameters() if parameter.requires_grad}
    assert names and all(name.startswith("transformer.prefix_encoder.") for name in names)
    folder = tmp_path / "run" / "model"
    written = load_file(folder / "model.safetensors")
    assert set(written) == names and {tensor.dtype for tensor in written.values()} == {torch.float32}
    facts = json.loads((folder / "config.json").read_text())
    assert (facts["pre_seq_len"], facts["prefix_projection"]) == (3, projection)
    assert "quantization_bit" not in facts
    model = with_adapter(plain(base), open_adapter(folder))
    if bits == 0:
        torch.testing.assert_close(logits_of(model), logits_of(trained), atol=1e-5, rtol=1e-5)
    merged = convert_ptuning(folder, base, tmp_path / "merged")
    torch.testing.assert_close(logits_of(plain(merged)), logits_of(model), atol=1e-5, rtol=1e-5)


def test_chatglm_hf_takes_the_prefix_of_a_run(base: Path, tmp_path: Path) -> None:
    import chatglm.hf

    _, trained = run_of(base, tmp_path, {"name": "ptuning", "pre_seq_len": 3})
    model = chatglm.hf.ChatGLMForConditionalGeneration.from_pretrained(
        str(base), pre_seq_len=3, dtype=torch.float32
    ).eval()
    state = {
        name.removeprefix("transformer.prefix_encoder."): tensor
        for name, tensor in load_file(tmp_path / "model" / "model.safetensors").items()
    }
    model.transformer.prefix_encoder.load_state_dict(state)
    with torch.no_grad():
        found = model(BATCH.ids, position_ids=BATCH.positions, attention_mask=dense_blocked(BATCH)).logits
    torch.testing.assert_close(found, logits_of(trained), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", [{"name": "lora", "dropout": 0.3}, {"name": "ptuning", "pre_seq_len": 3}])
def test_a_run_that_was_resumed_ends_like_one_that_was_not(method: dict[str, Any], base: Path, tmp_path: Path) -> None:
    _, whole = run_of(base, tmp_path / "whole", method, steps=6)
    run_of(base, tmp_path / "parts", method, steps=3)
    report, resumed = run_of(base, tmp_path / "parts", method, steps=6)
    assert report.losses[0][0] == 4
    assert is_equal(dict(whole.state_dict()), dict(resumed.state_dict()))


def test_checkpointing_repeats_the_dropout_of_the_first_forward(base: Path, tmp_path: Path) -> None:
    method = {"name": "lora", "dropout": 0.5, "targets": ALL_FOUR}
    ends = []
    for checkpointing in (False, True):
        out = tmp_path / str(checkpointing)
        _, model = run_of(base, out, method, compute={"checkpointing": checkpointing, "threads": 1})
        ends.append([parameter.detach() for parameter in learning(model)])
    for one, other in zip(*ends, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("method", [{"name": "lora", "r": 4}, {"name": "ptuning", "pre_seq_len": 3}])
def test_a_run_starts_from_the_adapter_of_another(method: dict[str, Any], base: Path, tmp_path: Path) -> None:
    _, first = run_of(base, tmp_path / "first", method)
    again = tuned(adapter_run(base, tmp_path / "second", {**method, "start": str(tmp_path / "first" / "model")})).glm
    assert loss_of(again.eval()) == pytest.approx(loss_of(first), rel=1e-6)


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ({"name": "lora", "rank": 4}, "method.rank"),
        ({"name": "lora", "targets": ["attention"]}, "dense_4h_to_h"),
        ({"name": "lora", "targets": []}, "method.targets"),
        ({"name": "qlora", "bits": 3}, "method.bits"),
        ({"name": "ptuning", "pre_seq_len": 0}, "method.pre_seq_len"),
    ],
)
def test_a_wrong_key_or_value_of_a_method_is_named(method: dict[str, Any], said: str) -> None:
    with pytest.raises(TrainingError, match=said):
        settings_of(method)


@pytest.mark.parametrize(("name", "learns"), [("lora", 3_670_016), ("qlora", 14_680_064), ("ptuning", 29_360_128)])
def test_the_example_files_are_runs_that_train_the_published_counts(name: str, learns: int) -> None:
    run = read_run(Path(__file__).parents[2] / "examples" / "training" / f"sft-{name}.yaml", SFTRun)
    settings = settings_of(run.method)
    assert settings is not None and settings.name == name
    assert trained_parameters(ModelConfig(), settings) == learns


def test_an_adapter_that_does_not_fit_the_start_is_refused_with_both_numbers(base: Path, tmp_path: Path) -> None:
    run_of(base, tmp_path / "first", {"name": "lora", "r": 4})
    start = str(tmp_path / "first" / "model")
    with pytest.raises(TrainingError, match="rank 4"):
        tuned(adapter_run(base, tmp_path, {"name": "lora", "r": 8, "start": start}))
    with pytest.raises(TrainingError, match="linears"):
        tuned(adapter_run(base, tmp_path, {"name": "lora", "r": 4, "targets": ALL_FOUR, "start": start}))
    with pytest.raises(TrainingError, match="holds a LoRA"):
        tuned(adapter_run(base, tmp_path, {"name": "ptuning", "start": start}))


def test_lora_over_a_quantised_checkpoint_trains_beside_its_floats(tmp_path: Path) -> None:
    golden = Path(__file__).parents[1] / "data" / "golden" / "models" / "int8"
    expanded = tuned(adapter_run(golden, tmp_path, {"name": "lora"})).glm.eval()
    quantised = tuned(adapter_run(golden, tmp_path, {"name": "qlora"})).glm.eval()
    ids = torch.arange(5, 45).reshape(1, 40)
    positions = torch.stack((ids, ids * 0), 1)
    with torch.no_grad():
        torch.testing.assert_close(expanded(ids, positions), quantised(ids, positions), atol=1e-4, rtol=1e-4)
