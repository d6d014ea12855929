"""Plain text as a task: read as a stream, kept as tokens, drawn in full windows, evaluated by its loss."""

import gzip
import json
import math
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from prose import WORDS, document

from polyprompt import sources
from polyprompt.batches import Batches
from polyprompt.data import TextData
from polyprompt.errors import ConfigError, DataError
from polyprompt.plan import build, plan
from polyprompt.recipe import check
from polyprompt.worker import Job, train

Table = dict[str, Any]


def texts(config: Table) -> list[TextData]:
    _, data = build(check(config))
    return [task for task in data if isinstance(task, TextData)]


def decoded(split: Any, tokenizer: Any) -> str:
    return tokenizer.decode(np.asarray(split.tokens).tolist())


# -- reading


def test_every_kind_of_file_gives_the_same_documents(tmp_path: Path) -> None:
    documents = ["one line", "two lines\nof text"]
    (tmp_path / "a.txt").write_text("\n\none line\n\n\ntwo lines\nof text\n")
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"one line\n\ntwo lines\nof text"))
    rows = "".join(json.dumps({"body": {"text": d}}) + "\n" for d in documents)
    (tmp_path / "a.jsonl").write_text(rows)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(rows.encode()))
    pq.write_table(pa.Table.from_pylist([{"body": {"text": d}} for d in documents]), tmp_path / "a.parquet")
    expected = ["one line", "", "two lines", "of text", ""]
    for name in ("a.txt", "a.txt.gz", "a.jsonl", "a.jsonl.gz", "a.parquet"):
        assert list(sources.text_lines(tmp_path / name, "body.text")) == expected, name


def test_text_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"good\n\xff\xfe\n")
    with pytest.raises(DataError, match=r"a\.txt:2: not UTF-8"):
        list(sources.text_lines(tmp_path / "a.txt", "text"))
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"text " * 2000)[:-20])
    with pytest.raises(DataError, match=r"a\.txt\.gz: cannot be read"):
        list(sources.text_lines(tmp_path / "a.txt.gz", "text"))
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"text": 3}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:2: field 'text' is a int; expected text"):
        list(sources.text_lines(tmp_path / "a.jsonl", "text"))
    with pytest.raises(DataError, match=r"a\.jsonl:1: .*'body'"):
        list(sources.text_lines(tmp_path / "a.jsonl", "body"))


# -- splits


def test_the_last_documents_are_held_out(text_run: Table) -> None:
    model, data = build(check(text_run))
    spans = data[0]
    assert isinstance(spans, TextData)
    trained, kept = (decoded(split, model.backbone.tokenizer) for split in (spans.train, spans.validation))
    assert trained == " ".join(line for i in range(16) for line in document(i))
    assert kept == " ".join(line for i in range(16, 20) for line in document(i))


def test_given_validation_files_nothing_else_is_held_out(text_run: Table, tmp_path: Path) -> None:
    (tmp_path / "held.txt").write_text("\n".join(document(99, 60)))
    text_run["tasks"][0]["text"] = {
        "files": {"train": [str(tmp_path / "books.txt.gz")], "validation": [str(tmp_path / "held.txt")]}
    }
    spans = texts(text_run)[0]
    assert spans.train.num_tokens == 20 * 30 * 12
    assert spans.validation.num_tokens == 60 * 12


def test_a_file_of_one_document_cannot_be_split(text_run: Table, tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("\n".join(document(1)))
    text_run["tasks"][0]["text"] = {"files": {"train": [str(tmp_path / "one.txt")]}}
    with pytest.raises(DataError, match=r"one\.txt: 1 document, so none can be kept .* give validation files"):
        build(check(text_run))


def test_two_objectives_share_one_tokenised_text(text_run: Table) -> None:
    spans, prefix = texts(text_run)
    assert spans.train.folder == prefix.train.folder
    assert spans.digest != prefix.digest


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"text": {"files": {"train": ["gone.txt"]}}},
            DataError,
            "corpus/spans: text.files: .*gone.txt does not exist",
        ),
        ({"text": {"files": {"train": ["a.pdf"]}}}, ConfigError, r"unknown file type; expected one of \.txt"),
        ({"text": {}}, ConfigError, "exactly one of `files` and `hub`"),
        ({"text": {"files": {}}}, ConfigError, "give train, validation, or both"),
        ({"objektive": "spans"}, ConfigError, "objektive: unknown key. Did you mean 'objective'"),
        ({"objective": "spans"}, ConfigError, "objective: .*span_corruption"),
        ({"noise_density": 1.0}, ConfigError, "noise_density"),
        ({"input_tokens": 900, "mean_span_length": 1}, ConfigError, "corpus/spans: span corruption .* sentinels"),
        ({"input_tokens": 50_000}, DataError, "corpus/spans: the train text is shorter than"),
    ],
)
def test_bad_text_tasks_are_refused(text_run: Table, change: Table, error: type[Exception], message: str) -> None:
    if change.get("input_tokens") == 50_000:
        change = {**change, "objective": "prefix_lm"}
    text_run["tasks"][0] |= change
    with pytest.raises(error, match=message):
        build(check(text_run))


# -- rows


def test_a_row_depends_on_its_seed_and_a_held_out_row_does_not(text_run: Table) -> None:
    for task in texts(text_run):
        split = task.train
        again = pickle.loads(pickle.dumps(split))
        assert again.row(3, 7) == split.row(3, 7)
        assert split.row(3, 7) != split.row(3, 8)
        assert split.rows([3]) == again.rows([3])
        for seed in range(50):
            row = split.row(len(split) - 1, seed)  # shifted, the last window still ends in the text
            assert (len(row.input_ids), len(row.target_ids)) == split.size(len(split) - 1, seed)
        lengths = [(len(r.input_ids), len(r.target_ids)) for r in split.rows(range(len(split)))]
        assert lengths == list(zip(split.input_lengths.tolist(), split.target_lengths.tolist(), strict=True))


def test_span_corruption_pads_nothing(text_run: Table) -> None:
    text_run["tasks"] = text_run["tasks"][:1]
    config = check(text_run)
    _, data = build(config)
    batch = Batches(data, config, 0, range(config.train.num_shards))[1]
    for shard in batch.shards:
        for micro in shard.micro_batches:
            assert micro.mask_BT.all()
            assert (micro.labels_BS != -100).all()


def test_the_same_window_gets_other_noise_each_time(text_run: Table) -> None:
    text_run["tasks"] = text_run["tasks"][:1]
    config = check(text_run)
    _, data = build(config)
    first = Batches(data, config, 0, range(4))
    size = len(data[0].train)
    epoch = math.ceil(size / config.train.batch_size) + 1
    assert first[1].digest != first[1 + epoch].digest
    assert torch.equal(
        first[2].shards[0].micro_batches[0].input_ids_BT, first[2].shards[0].micro_batches[0].input_ids_BT
    )
    noises = {tuple(data[0].train.row(5, seed).input_ids) for seed in range(20)}
    assert len(noises) > 15


# -- training and evaluation


def test_the_unigram_floor_is_the_entropy_of_the_targets(text_run: Table) -> None:
    checked = plan(check(text_run))
    spans = next(task for task in checked.data if isinstance(task, TextData))
    targets = [t for row in spans.validation.rows(range(len(spans.validation))) for t in row.target_ids]
    counts = np.unique(targets, return_counts=True)[1]
    expected = -sum(c * math.log(c / len(targets)) for c in counts) / len(targets)
    floor = checked.majority["corpus/spans"]
    assert floor["loss"] == pytest.approx(expected)
    assert floor["score"] == pytest.approx(1 / floor["perplexity"])


def test_a_unigram_model_of_other_counts_is_no_better_than_the_floor(text_run: Table) -> None:
    checked = plan(check(text_run))
    spans = next(task for task in checked.data if isinstance(task, TextData))
    held_out, vocab_size = spans.validation, 500
    assert held_out.unigram_loss(Counter(), vocab_size) == pytest.approx(math.log(vocab_size))
    many = Counter({token: 10**9 * n for token, n in held_out.target_counts.items()})
    assert held_out.unigram_loss(many, vocab_size) == pytest.approx(held_out.unigram_loss())
    trained = held_out.unigram_loss(spans.train.target_counts, vocab_size)
    assert held_out.unigram_loss() < trained < math.log(vocab_size)


def test_text_that_is_only_evaluated_on_is_never_drawn(text_run: Table, books: Path) -> None:
    text_run["tasks"].append(
        {"name": "corpus/other", "text": {"files": {"validation": [str(books)]}}, "input_tokens": 32}
    )
    checked = plan(check(text_run))
    assert checked.shares["corpus/other"] == 0
    state = train(
        Job(check(text_run), books.parent, handle=None), torch.device("cpu"), lambda metrics, bundle: None
    ).state
    assert state.examples_seen["corpus/other"] == 0
    assert state.evaluations[-1]["tasks"]["corpus/other"]["loss"] > 0


def test_a_run_that_trains_on_no_text_is_refused(text_run: Table, books: Path) -> None:
    text_run["tasks"] = [{"name": "corpus/other", "text": {"files": {"validation": [str(books)]}}}]
    with pytest.raises(ConfigError, match="none of them has a training example"):
        plan(check(text_run))


def test_training_on_text_beats_unigrams_on_held_out_text(text_run: Table, tmp_path: Path) -> None:
    """Text with something to learn: every word tells the next."""
    order = WORDS * 40
    (tmp_path / "order.txt").write_text("\n\n".join(" ".join(order[i : i + 200]) for i in range(40)))
    text_run["tasks"] = [
        {"name": "corpus/order", "text": {"files": {"train": [str(tmp_path / "order.txt")]}}, "input_tokens": 32}
    ]
    text_run["backbone"]["dropout"] = 0.0
    text_run["train"] |= {"max_steps": 150, "batch_size": 16, "learning_rate": 0.01}
    text_run["evaluate"] = {}
    config = check(text_run)
    floor = plan(config).majority["corpus/order"]["loss"]
    state = train(Job(config, tmp_path, handle=None), torch.device("cpu"), lambda metrics, bundle: None).state
    assert state.evaluations[-1]["tasks"]["corpus/order"]["loss"] < floor - 0.5
