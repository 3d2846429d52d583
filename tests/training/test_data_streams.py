"""Streams of rows: everything once an epoch, the same for any split of the work, shares as given."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

import chatglm
from chatglm.config import ModelConfig, read_config
from chatglm.errors import TrainingError
from chatglm.training.data import (
    Ingredient,
    Layout,
    MixedStream,
    PackedStream,
    Preparation,
    PreparedSet,
    TextStream,
    hold_out,
    open_stream,
    prepare,
)
from chatglm.training.data.instructions import InstructionPieces
from chatglm.training.data.opening import read_mixture, special_ids, write_mixture
from chatglm.training.data.order import Permutation
from chatglm.training.data.packing import plan_rows
from chatglm.training.data.streams import Stream, answer_sample, rows_of
from chatglm.training.objective import Mixture, Objective
from chatglm.training.samples import IGNORE, Sample, collate

TOKENIZER = Path(chatglm.__file__).parent / "assets" / "mini"
CONFIG = read_config(TOKENIZER / "config.json")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> PreparedSet:
    folder = tmp_path_factory.mktemp("data")
    texts = [
        {"text": f"Story {i}: " + "The cat sat on the mat. " * (1 + i % 9), "source": f"s{i % 3}"} for i in range(200)
    ]
    answers = [{"prompt": f"Question {i}?", "response": "Answer. " * (1 + i % 20), "source": "qa"} for i in range(150)]
    file = folder / "a.jsonl"
    file.write_text("\n".join(map(json.dumps, texts + answers)))
    return prepare(Preparation((str(file),), TOKENIZER, Layout(length=256)), folder / "set", workers=1)


def text_stream(prepared: PreparedSet, mixture: Mixture, length: int = 128, seed: int = 5) -> TextStream:
    return TextStream(prepared.text, Objective(special_ids(prepared), mixture), length=length, seed=seed)


def flat(row: list[Sample]) -> list[Any]:
    return [(s.ids.tolist(), s.targets.tolist(), s.positions.tolist(), s.context_length, s.source) for s in row]


@given(size=st.integers(1, 3000), key=st.integers(0, 2**40))
def test_a_permutation_has_everything_once(size: int, key: int) -> None:
    order = Permutation(size, key)
    assert sorted(map(order, range(size))) == list(range(size))


def test_a_permutation_looks_random() -> None:
    order = np.array([Permutation(10_000, 3)(place) for place in range(10_000)])
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.03
    assert abs(np.corrcoef(order, np.arange(10_000))[0, 1]) < 0.03
    assert [Permutation(50, 1)(i) for i in range(50)] != [Permutation(50, 2)(i) for i in range(50)]


@given(lengths=st.lists(st.integers(1, 100), min_size=1, max_size=200), seed=st.integers(0, 99))
def test_packed_rows_hold_every_sample_once_and_never_too_much(lengths: list[int], seed: int) -> None:
    plan = plan_rows(lengths, 64, seed, window=50)
    rows = [plan.row(number) for number in range(len(plan))]
    assert all(0 < sum(lengths[sample] for sample in row) <= 64 for row in rows)
    packed = sorted(sample for row in rows for sample in row)
    assert packed == [i for i, n in enumerate(lengths) if n <= 64]
    assert plan.left_out == sum(n > 64 for n in lengths)


def test_packing_fills_rows() -> None:
    lengths = np.random.default_rng(0).integers(5, 600, size=20_000)
    assert plan_rows(lengths, 1024, 0).filled > 0.98


@pytest.mark.parametrize(
    "mixture", [Mixture(token=0, document=1), Mixture(token=1, document=0), Mixture(token=0.4, document=0.6)]
)
def test_joined_texts_are_read_once_an_epoch_in_another_order_each(prepared: PreparedSet, mixture: Mixture) -> None:
    stream = text_stream(prepared, mixture)
    for epoch in range(3):
        places = sorted(stream._place(epoch, number)[1:] for number in range(stream.rows_per_epoch))
        for (start, size), (following, _) in itertools.pairwise(places):
            assert start + size == following
        assert places[0][0] >= 0 and places[-1][0] + places[-1][1] <= prepared.text.tokens
        read = sum(size for _, size in places)
        assert prepared.text.tokens - read < 128
    first, second = ([flat(stream.row(e * stream.rows_per_epoch + i)) for i in range(6)] for e in range(2))
    assert first != second
    assert all(sum(len(sample) for sample in stream.row(i)) <= 128 for i in range(stream.rows_per_epoch))


def test_modes_of_joined_texts_have_their_shares(prepared: PreparedSet) -> None:
    stream = text_stream(prepared, Mixture(token=0.3, document=0.7), length=16)
    modes = [stream._place(1, number)[0] for number in range(stream.rows_per_epoch)]
    assert modes.count("token") / len(modes) == pytest.approx(0.3, abs=0.06)


def test_a_text_shorter_than_a_row_is_one_row(prepared: PreparedSet) -> None:
    stream = text_stream(prepared, Mixture(token=0, document=1), length=10**6)
    assert stream.rows_per_epoch == 1
    assert len(stream.row(0)[0]) == prepared.text.tokens + 1


STREAMS: dict[str, Any] = {
    "text": {"part": "text"},
    "apart": {"part": "text", "texts": "apart"},
    "dialogue": {"part": "dialogue"},
    "all": {},
    "glm": {"part": "text", "objective": "glm-10b"},
    "glm apart": {"part": "text", "texts": "apart", "objective": "glm-10b"},
}


def opened(prepared: PreparedSet, name: str, **more: Any) -> Stream:
    return open_stream([Ingredient(str(prepared.folder), **STREAMS[name])], length=256, seed=3, **more)


@pytest.mark.parametrize("name", STREAMS)
def test_any_split_of_the_work_reads_the_same_rows(prepared: PreparedSet, name: str) -> None:
    alone = opened(prepared, name)
    expected = [flat(alone.row(index)) for index in range(40)]
    for world_size in (2, 3):
        rows: dict[int, Any] = {}
        for rank in range(world_size):
            mine = opened(prepared, name)  # another process, from another place
            indices = range(10 + rank, 40, world_size)
            rows |= zip(indices, map(flat, rows_of(mine, 10, 30, rank=rank, world_size=world_size)), strict=True)
        assert [rows[index] for index in range(10, 40)] == expected[10:]
    batch = collate([alone.row(index) for index in range(4)], 256)
    assert batch.loss_tokens > 0


@pytest.mark.parametrize("name", STREAMS)
def test_rows_fit_and_no_target_is_cut(prepared: PreparedSet, name: str) -> None:
    stream = opened(prepared, name)
    for index in range(stream.rows_per_epoch):
        row = stream.row(index)
        assert row and sum(map(len, row)) <= 256
        assert all(sample.cut_targets == 0 and sample.loss_tokens for sample in row)


@pytest.mark.parametrize("name", ["apart", "dialogue"])
def test_packed_samples_come_once_an_epoch(prepared: PreparedSet, name: str) -> None:
    stream = opened(prepared, name, with_sources=True)
    assert isinstance(stream, PackedStream)
    count = len(stream.pieces.lengths)
    for epoch in range(2):
        rows = range(epoch * stream.rows_per_epoch, (epoch + 1) * stream.rows_per_epoch)
        samples = [sample for index in rows for sample in stream.row(index)]
        assert len(samples) == count
        assert {sample.source for sample in samples} == ({"qa"} if name == "dialogue" else {"s0", "s1", "s2"})


def test_an_answer_sample_has_the_layout_of_fine_tuning() -> None:
    ids = np.array([7, 8, 51, 9, 10, 55], dtype=np.int32)  # two of question, [gMASK], two of answer, eop
    sample = answer_sample(ids, 3, 54)
    assert sample.ids.tolist() == [7, 8, 51, 54, 9, 10]
    assert sample.targets.tolist() == [IGNORE, IGNORE, IGNORE, 9, 10, 55]
    assert sample.positions.tolist() == [[0, 1, 2, 2, 2, 2], [0, 0, 0, 1, 2, 3]]
    assert sample.context_length == 3
    official = answer_sample(ids, 3, 54, official=True)
    assert official.targets.tolist() == [IGNORE, IGNORE, 54, 9, 10, 55]
    assert answer_sample(ids, 3, 54, "1d").positions[0].tolist() == [0, 1, 2, 3, 4, 5]


def test_instructions_answer_a_mask_in_a_quarter_of_a_row(prepared: PreparedSet) -> None:
    stream = open_stream([Ingredient(str(prepared.folder), "instruction")], length=256, seed=3, with_sources=True)
    ids = special_ids(prepared)
    samples = [sample for index in range(stream.rows_per_epoch) for sample in stream.row(index)]
    assert len(samples) == 150
    for sample in samples:
        assert (sample.objective, sample.source) == ("instruction", "qa")
        assert len(sample) <= 64
        assert sample.ids[sample.context_length - 1] == ids.mask and ids.gmask not in sample.ids
        assert (sample.targets[-1] == ids.eop) == (sample.cut_targets == 0)
    few = InstructionPieces(prepared.dialogue, ids, window=64, seed=3, most_per_source=20)
    assert len(few.lengths) == 20
    other = InstructionPieces(prepared.dialogue, ids, window=64, seed=4, most_per_source=20)
    assert few._chosen.tolist() != other._chosen.tolist()


class Counted:
    """A stream whose row i says that it is row i."""

    def __init__(self, rows: int) -> None:
        self.rows_per_epoch, self.length = rows, 8
        self.seen: list[int] = []

    def row(self, index: int) -> list[Sample]:
        self.seen.append(index)
        return []


@settings(max_examples=20)
@given(weights=st.lists(st.floats(0.001, 10), min_size=1, max_size=5), seed=st.integers(0, 9))
def test_a_mixture_has_its_shares_and_takes_every_streams_rows_in_order(weights: list[float], seed: int) -> None:
    streams = [Counted(10) for _ in weights]
    mixed = MixedStream(list(streams), weights, seed=seed)
    for index in range(2000):
        mixed.row(index)
    assert sum(mixed.shares) == pytest.approx(1)
    for stream, share, weight in zip(streams, mixed.shares, weights, strict=True):
        assert stream.seen == list(range(len(stream.seen)))
        assert len(stream.seen) == pytest.approx(2000 * share)
        assert abs(share - weight / sum(weights)) <= 0.001 * len(weights)


def test_a_mixture_is_mixed_finely() -> None:
    streams = [Counted(10), Counted(10)]
    mixed = MixedStream(list(streams), [0.5, 0.5], seed=1)
    which = [mixed.which(index)[0] for index in range(1000)]
    assert max(len(run) for run in "".join(map(str, which)).split("0")) < 20


def test_weights_that_are_no_shares_are_refused(prepared: PreparedSet) -> None:
    with pytest.raises(TrainingError, match="are no shares"):
        MixedStream([Counted(1)], [0.0], seed=0)
    folder = str(prepared.folder)
    with pytest.raises(TrainingError, match="a set of the mixture has no weight"):
        open_stream([Ingredient(folder, "text", 0.5), Ingredient(folder, "dialogue")], length=64, seed=0)


def test_a_mixture_file_keeps_folders_relative_and_refuses_unknown_keys(prepared: PreparedSet) -> None:
    path = prepared.folder.parent / "mixture.json"
    ingredients = [
        Ingredient(str(prepared.folder), "text", 0.7, "apart"),
        Ingredient(str(prepared.folder), "dialogue", 0.3),
    ]
    write_mixture(path, ingredients)
    assert json.loads(path.read_text())["sets"][0]["set"] == prepared.folder.name
    assert read_mixture(path) == ingredients
    stream = open_stream(path, length=256, seed=0)
    assert isinstance(stream, MixedStream) and stream.shares == [0.7, 0.3]
    path.write_text(path.read_text().replace("weight", "wieght"))
    with pytest.raises(TrainingError, match="unknown key `wieght`") as error:
        read_mixture(path)
    assert error.value.cure == "did you mean `weight`?"


def test_data_of_another_tokenizer_is_refused(prepared: PreparedSet) -> None:
    open_stream(prepared.folder, length=256, seed=0, config=CONFIG)
    with pytest.raises(TrainingError, match="sop is 12004 in the data, 130004 in the model"):
        open_stream(prepared.folder, length=256, seed=0, config=ModelConfig())
    with pytest.raises(TrainingError, match="is no prepared data"):
        open_stream(prepared.folder.parent, length=256, seed=0)
    with pytest.raises(TrainingError, match="none of 150 samples fits a row of 4 tokens"):
        open_stream([Ingredient(str(prepared.folder), "dialogue")], length=4, seed=0)


@pytest.mark.parametrize("name", ["text", "apart", "dialogue", "all", "glm"])
def test_held_out_rows_never_come_in_training(prepared: PreparedSet, name: str) -> None:
    whole = opened(prepared, name)
    training, held_out = hold_out(whole, 5)
    assert 0 < held_out.rows_per_epoch <= 8
    assert whole.rows_per_epoch - 10 <= training.rows_per_epoch < whole.rows_per_epoch
    if isinstance(training, TextStream) and isinstance(held_out, TextStream):
        assert (training.first, training.stop, held_out.stop) == (0, held_out.first, prepared.text.tokens)
        for part in (training, held_out):
            places = [part._place(2, number) for number in range(part.rows_per_epoch)]
            assert all(part.first <= start and start + size <= part.stop for _, start, size in places)
    elif isinstance(training, PackedStream) and isinstance(held_out, PackedStream):
        rows = [{part.plan.row(row)[0] for row in part.rows} for part in (training, held_out)]
        assert not rows[0] & rows[1] and len(rows[0]) + len(rows[1]) == len(training.plan)
    with pytest.raises(TrainingError, match="are to be held out, the data has"):
        hold_out(whole, 10_000)
