"""A tokenizer and a config of different checkpoints or eras are refused with both values."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from chatglm.config import ModelConfig, read_config
from chatglm.errors import TokenizerError
from chatglm.tokenizer import Tokenizer
from chatglm.tokenizer.fitness import needed_pieces

SLIM = ModelConfig()
PRE_SLIM = replace(
    SLIM, vocab_size=150_528, bos_token_id=150_004, eos_token_id=150_005, mask_token_id=150_000,
    gmask_token_id=150_001, pad_token_id=20_003,
)  # fmt: skip


def refusal(tokenizer: Tokenizer, config: ModelConfig) -> str:
    with pytest.raises(TokenizerError) as caught:
        tokenizer.check_against(config)
    return str(caught.value)


def test_each_era_fits_its_own_file(
    tokenizer: Tokenizer, first_release: Tokenizer, reduced: Tokenizer, embedded: Tokenizer, golden: Path
) -> None:
    embedded.check_against(read_config(embedded.path.parent / "config.json"))
    tokenizer.check_against(SLIM)
    first_release.check_against(PRE_SLIM)
    for folder in sorted((golden / "models").iterdir()):
        config = read_config(folder / "config.json")
        of_folder = {130_528: tokenizer, 150_528: first_release}.get(config.vocab_size, reduced)
        of_folder.check_against(config)


def test_needed_pieces_follow_from_the_special_ids(golden: Path) -> None:
    assert needed_pieces(SLIM) == 130_344
    assert needed_pieces(PRE_SLIM) == 130_000
    assert needed_pieces(read_config(golden / "models" / "base-fp32" / "config.json")) == 544


def test_first_release_file_beside_slim_weights_names_both_eras(first_release: Tokenizer) -> None:
    text = refusal(first_release, SLIM)
    assert "2,699,926 bytes, 130,000 pieces (pre-slim ids), the config needs 130,344 pieces (slim ids)" in text
    assert "<sop> is 150004, not 130004" in text
    assert "ids go to 150,343, the embedding has 130,528 rows" in text
    assert "cure: take ice_text.model from a revision since 2023-04-06" in text


def test_later_file_beside_pre_slim_weights_names_both_eras(tokenizer: Tokenizer) -> None:
    text = refusal(tokenizer, PRE_SLIM)
    assert "130,344 pieces (slim ids), the config needs 130,000 pieces (pre-slim ids)" in text
    assert "[gMASK] is 130001, not 150001" in text
    assert '"num_image_tokens": 20000' in text


def test_file_of_another_vocabulary_is_refused(tokenizer: Tokenizer, embedded: Tokenizer) -> None:
    text = refusal(embedded, SLIM)
    assert "12,344 pieces (slim ids), the config needs 130,344 pieces" in text
    assert "cure: take ice_text.model and config.json from the same checkpoint" in text
    assert "ids go to 130,343, the embedding has 130,340 rows" in refusal(tokenizer, replace(SLIM, vocab_size=130_340))


@pytest.mark.parametrize(
    ("key", "piece", "ours"),
    [
        ("bos_token_id", "<sop>", 130_004),
        ("eos_token_id", "<eop>", 130_005),
        ("mask_token_id", "[MASK]", 130_000),
        ("gmask_token_id", "[gMASK]", 130_001),
        ("pad_token_id", "<pad>", 3),
    ],
)
def test_one_special_id_that_differs_is_refused_with_both_values(
    tokenizer: Tokenizer, key: str, piece: str, ours: int
) -> None:
    assert f"{piece} is {ours}, not 77" in refusal(tokenizer, replace(SLIM, **{key: 77}))


def test_early_pre_slim_configs_without_a_pad_id_are_accepted(first_release: Tokenizer, tokenizer: Tokenizer) -> None:
    first_release.check_against(replace(PRE_SLIM, pad_token_id=0))
    assert "<pad> is 3, not 0" in refusal(tokenizer, replace(SLIM, pad_token_id=0))


def test_loading_checks_the_config_when_given(tokenizer_file: Path) -> None:
    assert Tokenizer.from_file(tokenizer_file, config=SLIM).vocab_size == 130_344
    with pytest.raises(TokenizerError, match="does not belong to the config"):
        Tokenizer.from_file(tokenizer_file, config=PRE_SLIM)


# Folders


def folder_with(tmp_path: Path, file: Path, stored: str | None) -> Path:
    shutil.copy(file, tmp_path / "ice_text.model")
    if stored is not None:
        (tmp_path / "tokenizer_config.json").write_text(stored, encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("stored", [None, "{}", '{"num_image_tokens": 0}'])
def test_folder_of_a_later_release_has_no_image_tokens(tmp_path: Path, reduced_file: Path, stored: str | None) -> None:
    assert Tokenizer.from_folder(folder_with(tmp_path, reduced_file, stored)).offset == 0


def test_folder_that_asks_for_image_tokens_serves_pre_slim_weights(tmp_path: Path, tokenizer_file: Path) -> None:
    folder = folder_with(tmp_path, tokenizer_file, '{"num_image_tokens": 20000}')
    assert Tokenizer.from_folder(folder, config=PRE_SLIM).encode("你好") == [20_005, 94_874]


def test_first_release_always_has_image_tokens(tmp_path: Path, first_release_file: Path, golden: Path) -> None:
    recorded = golden / "models" / "preslim-full-vocab"
    folder = folder_with(tmp_path, first_release_file, (recorded / "tokenizer_config.json").read_text())
    tokenizer = Tokenizer.from_folder(folder, config=read_config(recorded / "config.json"))
    assert tokenizer.offset == 20_000


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ("{", "not readable as a JSON object"),
        ("[]", "not readable as a JSON object"),
        ('{"num_image_tokens": 5}', "`num_image_tokens` is 5; it must be 0 or 20000"),
        (json.dumps({"num_image_tokens": "many"}), "`num_image_tokens` is 'many'"),
    ],
)
def test_broken_tokenizer_config_is_named(tmp_path: Path, reduced_file: Path, stored: str, message: str) -> None:
    with pytest.raises(TokenizerError) as caught:
        Tokenizer.from_folder(folder_with(tmp_path, reduced_file, stored))
    assert "tokenizer_config.json" in str(caught.value) and message in str(caught.value)


def test_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"ice_text\.model: no such file"):
        Tokenizer.from_folder(tmp_path)
