"""Training through transformers' tools: labels and loss, checkpointing, PEFT, Trainer, P-tuning."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModel, AutoTokenizer

from chatglm.hf.outputs import next_token_loss
from golden_vectors import GOLDEN, assert_close, cases

TRAINED = cases("base-fp32", "gradients")[0].inputs


def base(name: str = "base-fp32", **kwargs: Any) -> Any:
    return AutoModel.from_pretrained(str(GOLDEN / "models" / name), **kwargs).float()


def enable_checkpointing(model: Any) -> None:
    # renamed in transformers 5.2x, where the older name warns
    enable: Callable[[], None] = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable()


def test_the_loss_is_the_shifted_cross_entropy_without_ignored_labels() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 11, generator=generator)
    labels = torch.tensor([[-100, 3, -100, 7, 1], [-100, -100, 2, 2, -100]])
    expected = [
        -logits[row, place - 1].log_softmax(-1)[labels[row, place]]
        for row, place in [(0, 1), (0, 3), (0, 4), (1, 2), (1, 3)]
    ]
    assert next_token_loss(logits, labels).item() == pytest.approx(torch.stack(expected).mean().item(), rel=1e-6)


def test_gradient_checkpointing_changes_no_gradient_and_holds_no_cache() -> None:
    plain, saving = base().train(), base().train()
    enable_checkpointing(saving)
    calls: list[int] = []
    saving.transformer.layers[0].register_forward_pre_hook(lambda *_: calls.append(1))
    output = saving(**TRAINED, use_cache=True)
    assert output.past_key_values is None
    output.loss.backward()
    assert len(calls) == 2  # once forward, once again for the gradients
    plain(**TRAINED).loss.backward()
    for (name, one), (_, other) in zip(plain.named_parameters(), saving.named_parameters(), strict=True):
        assert_close(other.grad, one.grad, 1e-5), name


def test_embeddings_as_input_give_the_same_loss_and_gradients_reach_them() -> None:
    model = base()
    ids, labels = TRAINED["input_ids"], TRAINED["labels"]
    derived = model(ids, labels=labels)
    embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
    from chatglm.model.positions import find_layout, positions, prefix_blocked

    layout = find_layout(ids, model.config.description)
    total = ids.shape[1]
    output = model(
        inputs_embeds=embeds,
        labels=labels,
        attention_mask=prefix_blocked(layout, total),
        position_ids=positions(layout, total, model.config.description),
    )
    assert output.loss.item() == pytest.approx(derived.loss.item(), rel=1e-6)
    output.loss.backward()
    assert embeds.grad is not None and embeds.grad.abs().max() > 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_a_lora_on_query_key_value_trains_saves_and_loads(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = base()
    before = model(**TRAINED).loss.item()
    lora = peft.get_peft_model(
        model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=["query_key_value"], task_type="CAUSAL_LM")
    )
    trained = [name for name, value in lora.named_parameters() if value.requires_grad]
    assert len(trained) == 2 * model.config.num_layers and all("query_key_value.lora_" in name for name in trained)
    assert lora(**TRAINED).loss.item() == pytest.approx(before, rel=1e-6)
    optimizer = torch.optim.AdamW([value for value in lora.parameters() if value.requires_grad], lr=1e-2)
    for _ in range(5):
        loss = lora(**TRAINED).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = lora.eval()(**TRAINED).loss.item()
    assert after < before - 0.01
    context = cases("base-fp32-generate", "generate")[0].inputs["input_ids"]
    answer = lora.generate(input_ids=context, max_new_tokens=4, do_sample=False)
    assert context.shape[1] < answer.shape[1] <= context.shape[1] + 4
    lora.save_pretrained(str(tmp_path))
    again = peft.PeftModel.from_pretrained(base(), str(tmp_path))
    assert again(**TRAINED).loss.item() == pytest.approx(after, rel=1e-5)
    merged = again.merge_and_unload()
    assert merged(**TRAINED).loss.item() == pytest.approx(after, rel=1e-4)


class Samples(torch.utils.data.Dataset):  # type: ignore[type-arg]
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {name: value[index % 2].tolist() for name, value in TRAINED.items()}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("kind", ["full", "checkpointed", "ptuning"])
def test_one_step_of_trainer_lowers_the_loss(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("accelerate")
    monkeypatch.setitem(os.environ, "CUDA_VISIBLE_DEVICES", "")
    model = base("ptuning") if kind == "ptuning" else base()
    frozen = model.transformer.layers[0].mlp.dense_h_to_4h.weight.detach().clone()
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=2,
        max_steps=2,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        gradient_checkpointing=kind == "checkpointed",
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1,
    )
    samples = Samples()
    trainer = transformers.Trainer(
        model, arguments, train_dataset=samples, eval_dataset=samples, data_collator=transformers.default_data_collator
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    assert after < before
    is_frozen = torch.equal(model.transformer.layers[0].mlp.dense_h_to_4h.weight, frozen)
    assert is_frozen == (kind == "ptuning")
    trainer.save_model(str(tmp_path / "saved"))
    again = AutoModel.from_pretrained(str(tmp_path / "saved")).float()
    ids = TRAINED["input_ids"]
    assert_close(again(ids).logits, model.eval()(ids).logits, 1e-5)


def test_a_collator_of_left_padded_features_trains(small_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(small_folder))
    model = base().train()
    features = [dict(tokenizer(question, answer)) for question, answer in (("1+1=", "2"), ("hello", "hi"))]
    batch = tokenizer.pad(features, padding=True, return_tensors="pt")
    labels = batch["input_ids"].masked_fill(batch["input_ids"] == tokenizer.pad_token_id, -100)
    together = model(**batch, labels=labels)
    losses, counts = [], []
    for feature in features:
        ids = torch.tensor([feature["input_ids"]])
        losses.append(model(ids, labels=ids).loss.item())
        counts.append(ids.shape[1] - 1)
    # the padding of the shorter row also predicts its first real token: one label more in the batch's mean
    padded = int((batch["input_ids"] == tokenizer.pad_token_id).sum().item() > 0)
    assert sum(counts) + padded == int((labels[:, 1:] != -100).sum())
    assert together.loss.isfinite() and min(losses) < together.loss.item() + 1


def test_a_prefix_trains_in_fp32_on_an_fp16_base() -> None:
    model = AutoModel.from_pretrained(str(GOLDEN / "models" / "ptuning")).half()
    model.transformer.prefix_encoder.float()
    case = cases("ptuning", "gradients")[0]
    model.train()
    loss = model(**case.inputs).loss
    loss.backward()
    table = model.transformer.prefix_encoder.embedding.weight
    assert table.grad.dtype == torch.float32 and table.grad.abs().max() > 0


def test_a_quantised_base_passes_gradients_to_a_prefix() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = base("ptuning").quantize(8)
    case = cases("ptuning", "gradients")[0]
    model.eval()(**case.inputs).loss.backward()
    grad = model.transformer.prefix_encoder.embedding.weight.grad
    expected = case.outputs["grad.transformer.prefix_encoder.embedding.weight"]
    assert torch.nn.functional.cosine_similarity(grad.flatten(), expected.flatten(), dim=0) > 0.99
