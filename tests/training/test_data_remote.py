"""Streamed corpora: the same rows for any split, the records of a corpus once an epoch, bad ones told."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

import chatglm
from chatglm.errors import TrainingError
from chatglm.tokenizer import Tokenizer
from chatglm.training.data import MixedStream, Preparation, open_stream, prepare
from chatglm.training.data.opening import Ingredient, read_mixture, write_mixture
from chatglm.training.data.problems import Allowance
from chatglm.training.data.remote import Remote, RemoteStream
from chatglm.training.objective import MIXTURES, Mixture, Objective, SpecialIds
from chatglm.training.samples import IGNORE, Sample

TOKENIZER = Path(chatglm.__file__).parent / "assets" / "mini"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(TOKENIZER)


class Corpus:
    """What `datasets.IterableDataset` offers, over lists; counts what was opened."""

    def __init__(self, *files: list[dict[str, Any]]) -> None:
        self.files = files
        self.opened: list[int] = []

    @property
    def num_shards(self) -> int:
        return len(self.files)

    def shard(self, num_shards: int, index: int) -> Iterable[dict[str, Any]]:
        self.opened.append(index)
        return [found for file in self.files[index::num_shards] for found in file]


def texts(start: int, count: int = 30) -> list[dict[str, Any]]:
    return [{"text": f"Text number {start + i} is short."} for i in range(count)]


def stream(
    corpus: Corpus, tokenizer: Tokenizer, mixture: Mixture = MIXTURES["chatglm-6b"], **more: Any
) -> RemoteStream:
    objective = Objective(SpecialIds.of_tokenizer(tokenizer), mixture)
    return RemoteStream(corpus, tokenizer, objective, **{"length": 64, "seed": 3, "shuffle": 8, **more})


def flat(row: list[Sample]) -> list[Any]:
    return [(sample.ids.tolist(), sample.targets.tolist(), sample.context_length) for sample in row]


def test_any_process_reads_the_same_rows_and_only_its_lanes(tokenizer: Tokenizer) -> None:
    files = [texts(100 * i) for i in range(4)]
    alone = stream(Corpus(*files), tokenizer)
    expected = [flat(alone.row(index)) for index in range(40)]
    for rank in range(2):
        corpus = Corpus(*files)
        mine = stream(corpus, tokenizer)
        assert [flat(mine.row(index)) for index in range(10 + rank, 40, 2)] == expected[10 + rank :: 2]
        assert set(corpus.opened) == {rank, rank + 2}
    assert flat(alone.row(5)) == expected[5]  # going back opens the lane again
    assert flat(stream(Corpus(*files), tokenizer, seed=4).row(0)) != expected[0]


def test_an_epoch_of_a_streamed_corpus_has_every_record_once(tokenizer: Tokenizer) -> None:
    found = stream(Corpus(texts(0, 50)), tokenizer, MIXTURES["gpt"], length=32)
    ids: list[int] = []
    end = found.objective.ids.end_of_text
    index = 0
    while ids.count(end) < 100:
        (sample,) = found.row(index)
        ids += [target for target in sample.targets.tolist() if target != IGNORE]
        index += 1
    said: list[str] = []
    while end in ids:
        said.append(tokenizer.decode(ids[: ids.index(end)]))
        ids = ids[ids.index(end) + 1 :]
    epochs = [said[:50], said[50:100]]
    assert all(sorted(epoch) == sorted(found["text"] for found in texts(0, 50)) for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_streamed_dialogues_are_packed_as_they_come(tokenizer: Tokenizer) -> None:
    corpus = Corpus(
        [{"messages": [{"role": "user", "content": f"q {i}"}, {"role": "assistant", "content": "a"}]} for i in range(9)]
    )
    found = stream(corpus, tokenizer, shuffle=1)
    first = found.row(0)
    assert len(first) > 2 and sum(map(len, first)) <= 64
    assert tokenizer.decode(first[0].ids[: first[0].context_length].tolist()) == "q 0"
    assert first[0].objective == "dialogue"


def test_bad_records_of_a_stream_stop_it_unless_allowed(tokenizer: Tokenizer) -> None:
    corpus = Corpus([*texts(0, 3), {"headline": "?"}, *texts(3)])
    with pytest.raises(TrainingError, match=r"stream, lane 0, line 4: no known format has the keys `headline`"):
        stream(corpus, tokenizer).row(0)
    passing = stream(corpus, tokenizer, allowance=Allowance.parse(["keys"]))
    passing.row(0)
    assert passing.findings.counts == {"keys": 1}
    with pytest.raises(TrainingError, match="holds no text and no dialogue"):
        stream(Corpus([]), tokenizer).row(0)
    with pytest.raises(TrainingError, match="has 1 files, which cannot be read in 2 lanes"):
        stream(corpus, tokenizer, lanes=2)


def test_options_of_a_streamed_corpus_are_words() -> None:
    found = Remote.parse("datasets:allenai/c4?name=en&split=validation&lanes=4&shuffle=10&prompt_column=ask")
    assert (found.path, found.name, found.split, found.lanes, found.shuffle) == (
        "allenai/c4",
        "en",
        "validation",
        4,
        10,
    )
    assert found.columns.prompt == "ask"
    with pytest.raises(TrainingError, match="unexpected keyword argument 'splitt'") as error:
        Remote.parse("datasets:allenai/c4?splitt=train")
    assert error.value.cure is not None and "known keys: name, split" in error.value.cure


def test_files_are_streamed_through_datasets_and_mixed_with_a_prepared_set(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    for number in range(2):
        lines = [json.dumps(found) for found in texts(100 * number)]
        (tmp_path / f"part-{number}.jsonl").write_text("\n".join(lines))
    prepared = prepare(Preparation((str(tmp_path / "part-0.jsonl"),), TOKENIZER), tmp_path / "set", workers=1)
    words = f"datasets:json?data_files={tmp_path}/part-*.jsonl"
    with pytest.raises(TrainingError, match="needs a tokenizer"):
        open_stream(words, length=64, seed=0)
    path = tmp_path / "mixture.json"
    write_mixture(
        path, [Ingredient(f"{words}&tokenizer={TOKENIZER}", weight=0.5), Ingredient(str(prepared.folder), weight=0.5)]
    )
    assert read_mixture(path)[0].set.startswith("datasets:json?")
    with pytest.raises(TrainingError, match="a streamed corpus is of unknown size"):
        open_stream([f"{words}&tokenizer={TOKENIZER}", prepared.folder], length=64, seed=0)
    found = open_stream(path, length=64, seed=0)
    assert isinstance(found, MixedStream) and isinstance(found.streams[0], RemoteStream)
    assert found.streams[0].lanes == 2
    assert all(0 < sum(map(len, found.row(index))) <= 64 for index in range(10))
