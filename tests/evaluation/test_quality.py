"""The suite as a whole on small text: forms by name, the report, the table, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from chatglm.chat import EMBEDDED_MODEL
from chatglm.checkpoint import open_checkpoint
from chatglm.errors import CheckpointError, ConfigError, RequestError
from chatglm.evaluation.forms import EVERY_FORM, fitting_forms, form_named, model_in
from chatglm.evaluation.quality import OWN_TEXT, QualitySettings, measure_quality
from chatglm.evaluation.table import as_markdown, as_text, percent, rows_of
from chatglm.quantization import dequantize_model
from chatglm.quantization.calibration_text import SHIPPED, CalibrationText
from chatglm.quantization.recipe import Recipe
from chatglm.quantization.writing import quantize_checkpoint
from chatglm.tokenizer import Tokenizer
from chatglm.tokenizer.examples import read_documents
from checkpoint_folders import MODELS, golden_copy, small_safetensors

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    forms = ("fp32", "bf16", "int8", "int4-row", "int4-g64")
    return measure_quality(QualitySettings((EMBEDDED_MODEL,), forms, OWN_TEXT[1:3], most=4))


def by_form(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["form"]: row for row in report["rows"]}


def test_fp32_is_the_reference(report: dict[str, Any]) -> None:
    row = by_form(report)["fp32"]
    assert row["perplexity"] == report["reference_perplexity"] and row["perplexity_change"] == 0
    assert row["divergence"] < 1e-6
    assert row["equal_next_tokens"] == row["equal_answers"] == 1


def test_fewer_bits_lose_more(report: dict[str, Any]) -> None:
    rows = by_form(report)
    order = ["fp32", "int8", "int4-g64", "int4-row"]
    divergences = [rows[name]["divergence"] for name in order]
    assert divergences == sorted(divergences)
    assert rows["int8"]["divergence"] < 0.002 and rows["int4-row"]["divergence"] > 2 * rows["int4-g64"]["divergence"]
    assert rows["int8"]["equal_next_tokens"] > rows["int4-row"]["equal_next_tokens"]


def test_a_file_row_multiplies_back_to_the_whole(report: dict[str, Any]) -> None:
    row = by_form(report)["int4-g64"]
    assert set(row["files"]) == {"chat_en.jsonl", "text_zh.txt"}
    for file in row["files"].values():
        assert file["perplexity"] > 1 and file["perplexity_change"] > -1


def test_the_report_says_what_was_scored(report: dict[str, Any]) -> None:
    assert report["suite"] == "quality" and report["model"] == "mini" and report["device"] == "cpu"
    assert [file["examples"] for file in report["files"]] == [4, 3]  # rounds of dialogues, spans of a text
    assert all(len(file["sha256"]) == 64 for file in report["files"])
    assert report["scored_tokens"] > 300 and report["scored_bytes"] > report["scored_tokens"]
    json.dumps(report)


def test_the_same_settings_give_the_same_report() -> None:
    settings = QualitySettings((EMBEDDED_MODEL,), ("int4",), OWN_TEXT[:1], most=2)
    assert measure_quality(settings) == measure_quality(settings)


def test_progress_counts_every_scored_token() -> None:
    seen: list[tuple[int, int, str]] = []
    settings = QualitySettings((EMBEDDED_MODEL,), ("int8",), OWN_TEXT[:1], most=2)
    report = measure_quality(settings, lambda *now: seen.append(now))
    assert seen[-1][0] == seen[-1][1] == 2 * report["scored_tokens"]
    assert [now[2] for now in seen] == ["fp32"] * (len(seen) // 2) + ["int8"] * (len(seen) // 2)


def test_several_checkpoints_are_compared_as_they_are_stored(tmp_path: Path) -> None:
    folder = quantize_checkpoint(EMBEDDED_MODEL, tmp_path / "four", Recipe(4))
    settings = QualitySettings((EMBEDDED_MODEL, folder), (), OWN_TEXT[:1], most=2)
    stored = by_form(measure_quality(settings))
    assert list(stored) == ["mini", "four"]
    assert stored["mini"]["divergence"] < 1e-6  # its INT8 rows are the reference's weights
    made = measure_quality(QualitySettings((EMBEDDED_MODEL,), ("int4",), OWN_TEXT[:1], most=2))["rows"][0]
    for key in ("weight_bytes", "perplexity", "divergence", "equal_next_tokens"):
        assert stored["four"][key] == pytest.approx(made[key]), key


def test_a_calibrated_form_is_what_the_command_writes(tmp_path: Path) -> None:
    source = small_safetensors(tmp_path / "model", dtype=torch.float32)
    text = tmp_path / "text.jsonl"
    text.write_text('{"turns": [["a b c", "d e f g"], ["h i", "a a b b c d"]]}\n' * 3, encoding="utf-8")
    words = CalibrationText((text,))
    model = model_in(source, form_named("int4-g8-gptq"), CPU, words)
    folder = quantize_checkpoint(source, tmp_path / "out", Recipe(4, 8, method="gptq", calibration=words))
    expected = dequantize_model(model_in(folder, form_named("stored"), CPU), torch.float32)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


class TestForms:
    """Names and what they stand for."""

    def test_endings_say_packing_bits_and_method(self) -> None:
        assert form_named("int4-row").recipe == Recipe(4, 0)
        assert form_named("int8").recipe == Recipe(8)
        assert form_named("int4-g32-e4-gptq").recipe == Recipe(4, 32, 4, "gptq")
        assert form_named("fp16").recipe is None

    @pytest.mark.parametrize("name", ["int3", "int4-gptq-g32", "fp8", "int4-g", "", "int4-g32 "])
    def test_other_names_are_refused_with_examples(self, name: str) -> None:
        with pytest.raises(RequestError, match=r"no form of weights\n  cure: use fp32, fp16, bf16, stored"):
            form_named(name)

    def test_only_forms_that_divide_the_model_are_offered(self) -> None:
        assert fitting_forms(EMBEDDED_MODEL) == EVERY_FORM
        small = fitting_forms(MODELS / "base-fp16")  # hidden size 32
        assert "int4-g32" in small and "int4-g64" not in small and "int4-row" in small

    def test_what_is_scored_is_the_form_expanded(self) -> None:
        model = model_in(MODELS / "base-fp16", form_named("int4-g8"), CPU)
        weight = model.transformer.layers[0].attention.dense.weight
        assert weight.dtype == torch.float32 and model.config.quantization_bit == 0
        groups = weight[0].unflatten(0, (-1, 8))
        assert all(len(group.unique()) <= 16 for group in groups)

    def test_fp16_and_bf16_are_rounded_weights(self) -> None:
        plain = open_checkpoint(MODELS / "oned-fp32")
        assert plain.tensors["transformer.layers.0.attention.dense.weight"].dtype == "float32"
        model = model_in(MODELS / "oned-fp32", form_named("bf16"), CPU)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


class TestWhatIsRefused:
    """Before a model is loaded."""

    def test_a_damaged_checkpoint(self, tmp_path: Path) -> None:
        folder = golden_copy("base-fp16", tmp_path)
        (folder / "pytorch_model.bin").unlink(missing_ok=True)
        for path in folder.glob("pytorch_model-*"):
            path.unlink()
        with pytest.raises(CheckpointError):
            measure_quality(QualitySettings((folder,), ("int8",)))

    def test_groups_that_do_not_divide(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="64 does not divide"):
            measure_quality(QualitySettings((golden_copy("base-fp16", tmp_path),), ("int4-g64",)))

    def test_text_without_anything_to_score(self, tmp_path: Path) -> None:
        empty = tmp_path / "empty.txt"
        empty.write_text("", encoding="utf-8")
        with pytest.raises(RequestError, match=r"empty\.txt holds nothing to score"):
            measure_quality(QualitySettings((EMBEDDED_MODEL,), ("int8",), (empty,)))

    def test_checkpoints_with_different_tokenizers(self, tmp_path: Path) -> None:
        with pytest.raises(RequestError, match="another tokenizer"):
            measure_quality(QualitySettings((EMBEDDED_MODEL, golden_copy("base-fp16", tmp_path)), ()))


def test_the_table_has_a_row_for_each_form(report: dict[str, Any]) -> None:
    table = rows_of(report)
    assert [row[0] for row in table] == ["weights", "fp32", "bf16", "int8", "int4-row", "int4-g64"]
    assert table[0][-2:] == ["chat_en.jsonl", "text_zh.txt"] and len({len(row) for row in table}) == 1
    markdown = as_markdown(table).splitlines()
    assert markdown[1].startswith("| --- | ---: |") and len(markdown) == len(table) + 1
    assert len({len(line) for line in as_text(table).splitlines()}) == 1
    assert percent(-0.000001) == "+0.00%" and percent(-0.0123) == "-1.23%"


def test_no_evaluation_text_is_calibrated_on() -> None:
    """Not a dialogue turn and not a sentence of the one is in the other."""

    def pieces(file: Path) -> set[str]:
        found: set[str] = set()
        for document in read_documents(file):
            texts = [document] if isinstance(document, str) else [part for turn in document for part in turn]
            for text in texts:
                found |= {part.strip() for part in text.replace("。", "\n").replace(". ", "\n").splitlines()}
        return {piece for piece in found if len(piece) > 12}

    calibration = pieces(SHIPPED)
    assert len(calibration) > 500
    for file in OWN_TEXT:
        own = pieces(file)
        assert len(own) > 15
        assert not own & calibration, file.name


def test_the_shipped_calibration_text_is_long_and_in_both_languages() -> None:
    """spec/performance.md §6.3: at least 128 rows of 512 tokens."""
    examples = CalibrationText().examples(Tokenizer.from_folder(EMBEDDED_MODEL), 1024)
    assert sum(map(len, examples)) > 128 * 512
    documents = [json.dumps(document, ensure_ascii=False) for document in read_documents(SHIPPED)]
    chinese = sum(any("\u4e00" <= character <= "\u9fff" for character in text) for text in documents)
    assert 0.3 < chinese / len(documents) < 0.7


def test_longer_calibration_text_is_cut_by_the_seed() -> None:
    tokenizer = Tokenizer.from_folder(EMBEDDED_MODEL)
    first, again, other = (CalibrationText(most_tokens=5000, seed=seed).examples(tokenizer, 1024) for seed in (0, 0, 1))
    assert first == again != other
    assert 4000 < sum(map(len, first)) <= 5000
