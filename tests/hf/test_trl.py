"""HF Trainer and TRL's trainers on the chatglm.hf classes: the loss of the native loop on the same samples."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

pytest.importorskip("accelerate")

import chatglm.hf
from chatglm.checkpoint import load_into, open_checkpoint
from chatglm.model import GLM
from chatglm.tokenizer import Tokenizer
from chatglm.training.loss import LossSum, batch_loss, loss_positions, token_losses
from chatglm.training.rlhf.dpo import PairScores, dpo_loss
from chatglm.training.samples import IGNORE, Sample, collate

QUIET = (
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
    "ignore::UserWarning",
    "ignore::RuntimeWarning",
    "ignore::ImportWarning",
)
pytestmark = [pytest.mark.filterwarnings(line) for line in QUIET]

ROUNDS = [("2+2=", "four and more"), ("what is that?", "yes"), ("hello", "hi, who is it?")]
WORSE = ["no", "it is a and a and a", "a"]


@pytest.fixture(scope="module")
def tokenizer(small_folder: Path) -> Tokenizer:
    return Tokenizer.from_folder(small_folder, config=open_checkpoint(small_folder).config)


@pytest.fixture
def native(small_folder: Path) -> GLM:
    checkpoint = open_checkpoint(small_folder)
    with torch.device("meta"):
        model = GLM(checkpoint.config)
    load_into(model, checkpoint, dtype=torch.float32)
    return model


@pytest.fixture
def model(small_folder: Path) -> Any:
    return loaded(small_folder)


def loaded(small_folder: Path) -> Any:
    return chatglm.hf.ChatGLMForConditionalGeneration.from_pretrained(str(small_folder)).float()


def parts(tokenizer: Tokenizer, question: str, answer: str) -> tuple[list[int], list[int]]:
    """`question [gMASK] sop` and `answer eop`."""
    return tokenizer.encode_context(question), [*tokenizer.encode(answer), tokenizer.eop_id]


def native_sample(context: list[int], answer: list[int]) -> Sample:
    """As training lays it out: sop predicts the first token of the answer, its last one predicts eop."""
    length = len(context) - 1
    ids = [*context, *answer[:-1]]
    places = [*range(length), *[length - 1] * len(answer)]
    blocks = [0] * length + list(range(1, len(answer) + 1))
    targets = [IGNORE] * length + answer
    return Sample(
        np.array(ids, dtype=np.int32),
        np.array(targets, dtype=np.int32),
        np.array([places, blocks], dtype=np.int32),
        length,
        "dialogue",
    )


def feature(context: list[int], answer: list[int]) -> dict[str, list[int]]:
    """The same for transformers: labels are the ids, those of the context left out."""
    return {
        "input_ids": [*context, *answer],
        "labels": [IGNORE] * len(context) + answer,
        "attention_mask": [1] * (len(context) + len(answer)),
    }


def native_loss(model: GLM, tokenizer: Tokenizer) -> LossSum:
    """Packed into one row, in eval mode."""
    samples = [native_sample(*parts(tokenizer, *pair)) for pair in ROUNDS]
    with torch.no_grad():
        return batch_loss(model.eval(), collate([samples]))


class Features(torch.utils.data.Dataset):  # type: ignore[type-arg]
    def __init__(self, tokenizer: Tokenizer) -> None:
        self.rows = [feature(*parts(tokenizer, *pair)) for pair in ROUNDS]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return self.rows[index]


def arguments(out: Path, **more: Any) -> dict[str, Any]:
    return {
        "output_dir": str(out),
        "per_device_train_batch_size": 3,
        "per_device_eval_batch_size": 3,
        "max_steps": 3,
        "learning_rate": 1e-2,
        "report_to": [],
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
        **more,
    }


def losses(trainer: Any) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def test_trainer_begins_with_the_loss_of_the_native_loop_and_lowers_it(
    native: GLM, model: Any, tokenizer: Tokenizer, small_folder: Path, tmp_path: Path
) -> None:
    padder = chatglm.hf.ChatGLMTokenizer.from_pretrained(str(small_folder))
    collator = transformers.DataCollatorForSeq2Seq(padder, label_pad_token_id=IGNORE)
    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(**arguments(tmp_path)),
        train_dataset=Features(tokenizer),
        data_collator=collator,
    )
    trainer.train()
    expected = float(native_loss(native, tokenizer).mean())
    assert losses(trainer)[0] == pytest.approx(expected, rel=1e-3)  # logged with four digits
    assert losses(trainer)[-1] < losses(trainer)[0]


@pytest.mark.parametrize("with_lora", [False, True])
def test_trls_sft_begins_with_the_loss_of_the_native_loop_and_lowers_it(
    with_lora: bool, native: GLM, model: Any, tokenizer: Tokenizer, small_folder: Path, tmp_path: Path
) -> None:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    peft_config = None
    if with_lora:
        peft = pytest.importorskip("peft")
        peft_config = peft.LoraConfig(r=4, target_modules=["query_key_value"], task_type="CAUSAL_LM")
    rows = datasets.Dataset.from_list(Features(tokenizer).rows).remove_columns("attention_mask")
    trainer = trl.SFTTrainer(
        model,
        args=trl.SFTConfig(**arguments(tmp_path), gradient_checkpointing=False, bf16=False, max_length=None),
        train_dataset=rows,
        processing_class=chatglm.hf.ChatGLMTokenizer.from_pretrained(str(small_folder)),
        peft_config=peft_config,
    )
    trainer.train()
    expected = float(native_loss(native, tokenizer).mean())
    assert losses(trainer)[0] == pytest.approx(expected, rel=1e-3)
    assert losses(trainer)[-1] < losses(trainer)[0]
    learned = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name for name in learned) == with_lora
    if with_lora:
        trainer.save_model(str(tmp_path / "adapter"))
        adapted = chatglm.load(small_folder, adapter=tmp_path / "adapter")
        assert adapted.adapters == ["default"]


def test_trls_dpo_begins_at_ln_2_and_its_loss_is_the_native_one_of_the_tuned_policy(
    native: GLM, model: Any, tokenizer: Tokenizer, small_folder: Path, tmp_path: Path
) -> None:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")

    class OnIds(trl.DPOTrainer):  # type: ignore[misc, name-defined]
        """TRL would tokenise prompt and answer as one text, which is not this model's layout."""

        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset

    rows = []
    for (question, answer), worse in zip(ROUNDS, WORSE, strict=True):
        context, chosen = parts(tokenizer, question, answer)
        rows.append({"prompt_ids": context, "chosen_ids": chosen, "rejected_ids": parts(tokenizer, question, worse)[1]})
    trainer = OnIds(
        model,
        ref_model=loaded(small_folder),  # TRL finds classes inside transformers alone
        args=trl.DPOConfig(**arguments(tmp_path), beta=0.1, gradient_checkpointing=False, bf16=False, max_length=None),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=chatglm.hf.ChatGLMTokenizer.from_pretrained(str(small_folder)),
    )
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-3)
    assert losses(trainer)[-1] < losses(trainer)[0]
    batch = trainer.data_collator(rows)
    with torch.no_grad():
        found = float(trainer.compute_loss(trainer.model.eval(), batch))
    tuned = GLM(native.config)
    tuned.load_state_dict(trainer.accelerator.unwrap_model(trainer.model).state_dict())
    scores = [pair_scores(each, tokenizer) for each in (tuned, native)]
    assert found == pytest.approx(float(dpo_loss(*scores, beta=0.1)[0].mean()), rel=1e-3)


def pair_scores(model: GLM, tokenizer: Tokenizer) -> PairScores:
    samples = []
    for (question, answer), worse in zip(ROUNDS, WORSE, strict=True):
        samples += [native_sample(*parts(tokenizer, question, text)) for text in (answer, worse)]
    batch = collate([[sample] for sample in samples])
    with torch.no_grad():
        logprobs = -token_losses(model.eval(), batch)
    rows, _ = loss_positions(batch)
    sums = torch.zeros(len(samples)).index_add_(0, rows, logprobs)
    return PairScores.of_answers(sums, torch.bincount(rows))


def test_checkpointing_repeats_the_dropout_of_pefts_layers(model: Any, tokenizer: Tokenizer) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    settings = peft.LoraConfig(r=4, target_modules=["dense_h_to_4h"], lora_dropout=0.5, init_lora_weights=False)
    adapted = peft.get_peft_model(model, settings).train()
    row = feature(*parts(tokenizer, *ROUNDS[0]))
    inputs = {name: torch.tensor([row[name]]) for name in ("input_ids", "labels")}
    gradients = []
    for checkpointing in (False, True):
        model.transformer.gradient_checkpointing = checkpointing
        adapted.zero_grad()
        torch.manual_seed(1)
        adapted(**inputs).loss.backward()
        gradients.append([value.grad for value in adapted.parameters() if value.requires_grad])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)
