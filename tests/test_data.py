import csv
import json
import pickle
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from polyprompt.collation import IGNORED, Batch, collate, frugal_batches, length_batches
from polyprompt.data import Split, TaskData, majority, prepare
from polyprompt.errors import DataError
from polyprompt.reading import read_examples
from polyprompt.recipe import check
from polyprompt.tasks.catalog import CATALOGUE, resolve
from polyprompt.tasks.records import Example, GeneratedSource, HubSource, Row, Source, Task, TokenRow
from polyprompt.token_store import is_whole

DATA = Path(__file__).parents[2] / "shared" / "data"
real_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no benchmark data in {DATA}")
WORDS = ("<pad>", "</s>", "<unk>", "a", "b", "c", "d", "e", "no", "yes", "maybe", "in:")
PAD, EOS = 0, 1


def word_tokenizer(words: Sequence[str] = WORDS) -> PreTrainedTokenizerFast:
    model = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=model, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def ids(text: str) -> list[int]:
    return [*(WORDS.index(w) for w in text.split()), EOS]


ROWS: list[dict[str, Any]] = [
    {"text": "a b c", "label": "yes"},
    {"text": "d", "label": "no"},
    {"text": "a b c d e", "label": "yes"},
]


def write_jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def prepared(tmp_path: Path, max_input_tokens: int = 64, data: dict[str, Any] | None = None, **task: Any) -> TaskData:
    files = (
        {s: write_jsonl(tmp_path / f"{s}.jsonl", ROWS) for s in ("train", "validation")}
        if not task.get("files")
        else {}
    )
    table = {
        "name": "my/task",
        "files": files,
        "input": "in: {text}",
        "target": "{label}",
        "choices": ["no", "yes"],
        **task,
    }
    table = {k: v for k, v in table.items() if v is not None}
    config = check({"tasks": [table], "data": {"cache_dir": tmp_path / "cache", **(data or {})}})
    (result,) = prepare(config, resolve(config), word_tokenizer(), max_input_tokens=max_input_tokens)
    return result


def generated(source: Source, choices: tuple[str, ...] = ("no", "yes")) -> Task:
    return Task("my/generated", source, as_example, ("accuracy",), choices)


def as_example(row: Row, split: str) -> Iterator[Example]:
    yield Example(row["text"], row["label"], tuple(row.get("choices") or ()), value=row.get("value"))


def prepare_task(task: Task, cache: Path, **data: Any) -> TaskData:
    config = check({"tasks": ["glue/rte"], "data": {"cache_dir": cache, **data}})
    return prepare(config, [task], word_tokenizer(), max_input_tokens=64)[0]


def test_rows_hold_the_tokens_in_file_order(tmp_path: Path) -> None:
    data = prepared(tmp_path)
    assert len(data.train) == len(data.validation) == 3
    assert data.train.rows([2, 0]) == [
        TokenRow(ids("in: a b c d e"), ids("yes")),
        TokenRow(ids("in: a b c"), ids("yes")),
    ]
    assert data.train.input_lengths.tolist() == [5, 3, 7]
    assert data.train.target_lengths.tolist() == [2, 2, 2]
    assert data.train.input_lengths.dtype == data.train.target_lengths.dtype == np.int32
    assert data.validation.examples([1]) == [Example("in: d", "no", ("no", "yes"))]
    assert data.train.rows(np.array([1])) == [TokenRow(ids("in: d"), ids("no"))]
    assert data.train.rows([]) == []


def test_long_inputs_are_cut_and_keep_their_end(tmp_path: Path) -> None:
    data = prepared(tmp_path, max_input_tokens=4)
    assert [r.input_ids for r in data.train.rows(range(3))] == [ids("in: a b"), ids("in: d"), ids("in: a b")]
    assert data.train.num_cut_inputs == 2
    assert prepared(tmp_path, max_input_tokens=7).train.num_cut_inputs == 0


def test_long_targets_are_cut_and_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = prepared(tmp_path, data={"max_target_tokens": 3}, target="text", choices=None)
    assert [r.target_ids for r in data.train.rows(range(3))] == [ids("a b"), ids("d"), ids("a b")]
    assert data.train.num_cut_targets == 2
    assert "my/task: 2 of 3 train targets were cut to data.max_target_tokens=3" in caplog.text


def test_a_choice_that_would_be_cut_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"choice 'no' has 2 tokens; raise data.max_target_tokens=1"):
        prepared(tmp_path, data={"max_target_tokens": 1})


def test_choices_that_look_alike_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="'no', 'yes', 'unheard', 'unseen' are the same to the tokenizer"):
        prepared(tmp_path, choices=["no", "yes", "unheard", "unseen"])


def test_choice_ids_are_the_task_s_or_the_row_s(tmp_path: Path) -> None:
    data = prepared(tmp_path)
    assert data.validation.choice_ids(0) == data.validation.choice_ids(2) == [ids("no"), ids("yes")]

    def rows(split: str) -> Iterator[Row]:
        yield {"text": "a", "label": "b", "choices": ["b", "c d"]}
        yield {"text": "a", "label": "b"}

    free = prepare_task(generated(GeneratedSource(rows, "1"), choices=()), tmp_path)
    assert free.train.choice_ids(0) == [ids("b"), ids("c d")]
    assert free.train.choice_ids(1) == []
    assert free.train.examples([0, 1]) == [Example("a", "b", ("b", "c d")), Example("a", "b")]


def test_limits_keep_the_first_examples(tmp_path: Path) -> None:
    data = prepared(tmp_path, data={"max_train_examples": 2, "max_validation_examples": 1})
    assert (len(data.train), len(data.validation)) == (2, 1)
    assert data.train.targets() == ["yes", "no"]


def test_examples_survive_the_cache(tmp_path: Path) -> None:
    full = Example("a", "b", ("b", "c"), ("b", "d"), "7.3", 2.25)

    def rows(split: str) -> Iterator[Row]:
        yield {}

    task = Task("my/full", GeneratedSource(rows, "1"), lambda row, split: iter([full]), ("exact_match",))
    assert prepare_task(task, tmp_path).validation.examples([0]) == [full]


def folders(tmp_path: Path) -> set[str]:
    return {p.name for p in (tmp_path / "cache").iterdir()}


def test_the_cache_is_reused(tmp_path: Path) -> None:
    first = prepared(tmp_path)
    stamp = (first.train.folder / "train.arrow").stat().st_mtime_ns
    second = prepared(tmp_path)
    assert second.digest == first.digest
    assert (first.train.folder / "train.arrow").stat().st_mtime_ns == stamp
    assert folders(tmp_path) == {first.digest}


def test_the_digest_follows_everything_that_shapes_the_tokens(tmp_path: Path) -> None:
    digests = [
        prepared(tmp_path).digest,
        prepared(tmp_path, max_input_tokens=63).digest,
        prepared(tmp_path, data={"max_target_tokens": 31}).digest,
        prepared(tmp_path, data={"max_train_examples": 2}).digest,
        prepared(tmp_path, input="{text}").digest,
        prepared(tmp_path, choices=["yes", "no"]).digest,
        prepared(tmp_path, name="my/other").digest,
    ]
    train = write_jsonl(tmp_path / "other.jsonl", ROWS[::-1])
    digests.append(prepared(tmp_path, files={"train": train, "validation": tmp_path / "validation.jsonl"}).digest)
    config = check({"tasks": ["embedded/nli"], "data": {"cache_dir": tmp_path / "cache", "max_train_examples": 2}})
    tasks = resolve(config)
    known = [*WORDS, *tasks[0].choices]
    for words in (known, [*known, "the"]):
        digests += [d.digest for d in prepare(config, tasks, word_tokenizer(words), max_input_tokens=9)]
    assert len(set(digests)) == len(digests)
    # How a tokenizer was last called, and how a task is scored and drawn, change no token.
    tokenizer = word_tokenizer(known)
    tokenizer(["a b"], truncation=True, max_length=1, padding="max_length")
    assert prepare(config, tasks, tokenizer, max_input_tokens=9)[0].digest == digests[-2]
    assert prepared(tmp_path, metrics=["macro_f1"], weight=3.0).digest == digests[0]


@pytest.mark.parametrize("damage", ["cut", "no meta", "bad meta", "no split"])
def test_a_damaged_cache_is_made_anew(tmp_path: Path, damage: str) -> None:
    folder = prepared(tmp_path).train.folder
    match damage:
        case "cut":
            (folder / "train.arrow").write_bytes((folder / "train.arrow").read_bytes()[:-1])
        case "no meta":
            (folder / "meta.json").unlink()
        case "bad meta":
            (folder / "meta.json").write_text("{")
        case "no split":
            (folder / "validation.arrow").unlink()
    with pytest.raises(DataError, match="no whole cache"):
        len(Split(folder, "train"))
    assert prepared(tmp_path).train.rows([1]) == [TokenRow(ids("in: d"), ids("no"))]
    assert is_whole(folder)
    assert folders(tmp_path) == {folder.name}


def test_a_failed_run_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(DataError):
        prepared(tmp_path, target="{labels}")
    assert folders(tmp_path) == set()


def test_several_writers_at_once_agree(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", ROWS * 500)
    files = {"train": tmp_path / "train.jsonl", "validation": tmp_path / "train.jsonl"}
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: prepared(tmp_path, files=files), range(4)))
    assert len({r.digest for r in results}) == 1
    assert all(len(r.train) == 1500 for r in results)
    assert folders(tmp_path) == {results[0].digest}


def test_an_unwritable_cache_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"data.cache_dir: cannot write to .*/file"):
        prepared(tmp_path, data={"cache_dir": tmp_path / "file" / "cache"})


def test_a_split_pickles_as_its_address(tmp_path: Path) -> None:
    data = prepared(tmp_path)
    assert data.train.rows([0])  # opened before it is pickled
    pickled = pickle.dumps(data.train)
    assert len(pickled) < 1000
    assert pickle.loads(pickled).rows([0]) == data.train.rows([0])
    assert pickle.loads(pickle.dumps(data)).validation.targets() == ["yes", "no", "yes"]


@pytest.mark.slow
def test_another_process_opens_a_split(tmp_path: Path) -> None:
    data = prepared(tmp_path)
    script = f"import pickle; print(pickle.loads({pickle.dumps(data.train)!r}).targets())"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd="platform")
    assert run.stdout.strip() == "['yes', 'no', 'yes']"


def test_csv_and_parquet_read_like_jsonl(tmp_path: Path) -> None:
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["text", "label"])
        writer.writeheader()
        writer.writerows(ROWS)
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    jsonl = prepared(tmp_path).train.examples(range(3))
    data = prepared(tmp_path, files={"train": tmp_path / "rows.csv", "validation": tmp_path / "rows.parquet"})
    assert data.train.examples(range(3)) == data.validation.examples(range(3)) == jsonl


BAD_FILES = [
    ("rows.jsonl", b'{"text": "a", "label": "no"}\n\n{"text": \n', r"rows.jsonl:3: not valid JSON: Expecting value"),
    ("rows.jsonl", b'{"text": "a", "label": "no"}\n[1]\n', r"rows.jsonl:2: expected an object .* not list"),
    ("rows.jsonl", b'{"text": "a", "label": "no"}\n{"text": "\xff"}\n', r"rows.jsonl:2: not UTF-8"),
    (
        "rows.jsonl",
        b'{"text": "a", "label": "no"}\n{"txt": "a"}\n',
        r"my/task: .*rows.jsonl:2: field 'label' is missing",
    ),
    ("rows.jsonl", b'{"text": "a", "label": "nay"}\n', r"rows.jsonl:1: target 'nay' is not among the choices no, yes"),
    ("rows.jsonl", b"", r"my/task: the train split has no examples"),
    ("rows.jsonl", b"\n  \n", r"my/task: the train split has no examples"),
    ("rows.csv", b"text,label\n", r"my/task: the train split has no examples"),
    ("rows.csv", b'text,label\n"a\nb",no\nc\n', r"rows.csv:4: expected the header's 2 columns: text, label"),
    ("rows.csv", b"text,label\na,no,x\n", r"rows.csv:2: expected the header's 2 columns"),
    ("rows.csv", b"text,text\na,no\n", r"rows.csv:1: the header names a column twice"),
    ("rows.csv", b'text,label\n"a"b,no\n', r"rows.csv:\d+: not CSV"),
    ("rows.parquet", b"PAR1 nonsense", r"rows.parquet: not a readable Parquet file"),
    ("rows.txt", b"a", r"rows.txt: unknown file type '.txt'; expected one of .jsonl, .csv, .parquet"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES)
def test_a_bad_file_is_named_with_its_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    good = write_jsonl(tmp_path / "good.jsonl", ROWS)
    with pytest.raises(DataError, match=message):
        prepared(tmp_path, files={"train": tmp_path / name, "validation": good})


def test_a_byte_order_mark_is_no_fault(tmp_path: Path) -> None:
    file = tmp_path / "bom.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps(ROWS[0]).encode() + b"\n")
    assert len(prepared(tmp_path, files={"train": file, "validation": file}).train) == 1


def test_a_hub_data_set_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")
    repository = tmp_path / "repository"
    repository.mkdir()
    for name in ("train", "test"):
        pq.write_table(pa.Table.from_pylist(ROWS), repository / f"{name}.parquet")
    hub = {"path": str(repository), "splits": {"train": "train", "validation": "test"}}
    data = prepared(tmp_path, files=None, hub=hub)
    assert data.validation.examples(range(3)) == prepared(tmp_path).validation.examples(range(3))
    with pytest.raises(DataError, match=r"my/task: .*repository  train row 1: field 'nothing' is missing"):
        prepared(tmp_path, files=None, hub=hub, target="nothing")
    with pytest.raises(DataError, match=r"split 'validation'\) cannot be loaded: .*\n.*data.root=DIR"):
        prepared(tmp_path, files=None, hub={"path": str(repository)})


def test_a_hub_data_set_that_cannot_be_had(tmp_path: Path) -> None:
    task = generated(HubSource(str(tmp_path / "nowhere")))
    with pytest.raises(DataError, match=r"data set '.*nowhere'.*cannot be loaded"):
        prepare_task(task, tmp_path)


def test_collate_pads_and_masks() -> None:
    batch = collate([TokenRow([5, 6, 1], [9, 1]), TokenRow([7, 1], [8, 9, 1])], [4, 2], PAD)
    assert batch.input_ids_BT.tolist() == [[5, 6, 1], [7, 1, PAD]]
    assert batch.mask_BT.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch.labels_BS.tolist() == [[9, 1, IGNORED], [8, 9, 1]]
    assert batch.task_B.tolist() == [4, 2]
    assert batch.num_target_tokens == 5
    moved = batch.to("meta")
    for tensor in (moved.input_ids_BT, moved.mask_BT, moved.labels_BS, moved.task_B):
        assert (tensor.dtype, tensor.device.type) == (torch.int64, "meta")
    assert isinstance(moved, Batch)
    with pytest.raises(ValueError, match="1 rows but 2 task ids"):
        collate([TokenRow([1], [1])], [0, 1], PAD)


def test_a_pad_token_inside_a_text_is_not_masked() -> None:
    assert collate([TokenRow([PAD, 5, 1], [1])], [0], PAD).mask_BT.tolist() == [[1, 1, 1]]


def test_length_batches_hold_every_row_once_and_like_lengths() -> None:
    lengths = [3, 9, 1, 9, 5]
    batches = length_batches(lengths, 2)
    assert batches == [[1, 3], [4, 0], [2]]
    assert length_batches(np.array(lengths, dtype=np.int32), 2) == batches
    assert length_batches([], 2) == []


@given(lengths=st.lists(st.integers(1, 30), max_size=9), size=st.integers(1, 9), cost=st.integers(0, 60))
def test_batches_are_cut_where_that_saves_most(lengths: list[int], size: int, cost: int) -> None:
    """Held against every way to cut each batch."""

    def tokens(batches: list[list[int]]) -> int:
        return sum(cost + len(batch) * max(lengths[i] for i in batch) for batch in batches)

    def ways(batch: list[int]) -> list[list[list[int]]]:
        later = [[batch[:i], *rest] for i in range(1, len(batch)) for rest in ways(batch[i:])]
        return [[batch], *later]

    whole = length_batches(lengths, size)
    found = frugal_batches(lengths, size, cost)
    assert [i for batch in found for i in batch] == [i for batch in whole for i in batch]
    assert all(len(batch) <= size for batch in found)
    assert tokens(found) == sum(min(map(tokens, ways(batch))) for batch in whole)
    assert frugal_batches(lengths, size, 10**6) == whole


def test_majority_says_the_most_frequent_training_target(tmp_path: Path) -> None:
    validation = write_jsonl(tmp_path / "dev.jsonl", [*ROWS, {"text": "e", "label": "no"}])
    files = {"train": write_jsonl(tmp_path / "t.jsonl", ROWS), "validation": validation}
    data = prepared(tmp_path, files=files, metrics=["accuracy", "f1"])
    assert majority(data) == {"accuracy": 0.5, "f1": pytest.approx(2 / 3), "score": pytest.approx(7 / 12)}


def test_shared_choices_are_given_to_every_example() -> None:
    def rows(split: str) -> Iterator[Row]:
        yield ROWS[0]

    task = generated(GeneratedSource(rows, "1"))
    assert list(read_examples(task, "train")) == [("generated train row 1", Example("a b c", "yes", ("no", "yes")))]


@real_data
@pytest.mark.parametrize(
    ("name", "train", "validation", "expected"),
    [
        ("super_glue/cb", 250, 56, {"accuracy": 0.5, "macro_f1": 2 / 9}),
        ("super_glue/copa", 400, 100, {"accuracy": 0.45}),
        ("super_glue/wsc", 259, 104, {}),
        ("super_glue/record", 44, 32, {}),
        ("glue/rte", 2490, 277, {"accuracy": 146 / 277}),
        ("glue/wnli", 635, 71, {"accuracy": 40 / 71}),
        ("glue/stsb", 5749, 1500, {"pearson": 0.0, "spearman": 0.0}),
    ],
)
def test_official_files_give_the_official_counts_and_baselines(
    tmp_path: Path, name: str, train: int, validation: int, expected: dict[str, float]
) -> None:
    config = check({"tasks": [name], "data": {"root": DATA, "cache_dir": tmp_path}})
    tasks = resolve(config)
    (data,) = prepare(config, tasks, word_tokenizer([*WORDS, *tasks[0].choices]), max_input_tokens=128)
    assert (len(data.train), len(data.validation)) == (train, validation)
    scores = majority(data)
    assert {m: scores[m] for m in expected} == pytest.approx(expected)
    assert len(scores) == len(CATALOGUE[name].metrics) + 1
