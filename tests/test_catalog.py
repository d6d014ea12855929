import copy
import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from polyprompt.config import RunConfig
from polyprompt.errors import ConfigError, DataError
from polyprompt.reading import read_examples
from polyprompt.recipe import check
from polyprompt.tasks.catalog import CATALOGUE, resolve
from polyprompt.tasks.metrics import check_names
from polyprompt.tasks.records import Example, FileSource

DATA = Path(__file__).parents[2] / "shared" / "data"
real_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no benchmark data in {DATA}")


def one(name: str, row: Mapping[str, Any], split: str = "validation") -> Example:
    (example,) = CATALOGUE[name].examples(row, split)
    return example


def config(*tasks: str | dict[str, Any], **data: Any) -> RunConfig:
    return check({"tasks": list(tasks), "data": data})


PAIR = {"sentence1": "A b.", "sentence2": "C d."}
NLI = {"premise": "It rains.", "hypothesis": "It is wet."}


@pytest.mark.parametrize(
    ("name", "row", "text", "target"),
    [
        ("glue/cola", {"sentence": "He go.", "label": 0}, "cola sentence: He go.", "unacceptable"),
        ("glue/sst2", {"sentence": "fun", "label": 1}, "sst2 sentence: fun", "positive"),
        ("glue/mrpc", {**PAIR, "label": 1}, "mrpc sentence1: A b. sentence2: C d.", "equivalent"),
        ("glue/stsb", {**PAIR, "label": 3.72}, "stsb sentence1: A b. sentence2: C d.", "3.8"),
        (
            "glue/qqp",
            {"question1": "Why?", "question2": "How?", "label": 0},
            "qqp question1: Why? question2: How?",
            "not_duplicate",
        ),
        ("glue/mnli", {**NLI, "label": 2}, "mnli hypothesis: It is wet. premise: It rains.", "contradiction"),
        ("glue/mnli", {**NLI, "label": "neutral"}, "mnli hypothesis: It is wet. premise: It rains.", "neutral"),
        (
            "glue/qnli",
            {"question": "Who?", "sentence": "Bob.", "label": 1},
            "qnli question: Who? sentence: Bob.",
            "not_entailment",
        ),
        ("glue/rte", {**PAIR, "label": 0}, "rte sentence1: A b. sentence2: C d.", "entailment"),
        (
            "glue/rte",
            {**NLI, "label": "not_entailment"},
            "rte sentence1: It rains. sentence2: It is wet.",
            "not_entailment",
        ),
        ("glue/wnli", {**PAIR, "label": 1}, "wnli sentence1: A b. sentence2: C d.", "entailment"),
        (
            "super_glue/boolq",
            {"question": "is it so", "passage": "It is.", "label": True},
            "boolq question: is it so passage: It is.",
            "True",
        ),
        ("super_glue/cb", {**NLI, "label": 1}, "cb hypothesis: It is wet. premise: It rains.", "contradiction"),
        (
            "super_glue/copa",
            {"premise": "P.", "choice1": "X.", "choice2": "Y.", "question": "cause", "label": 1},
            "copa choice1: X. choice2: Y. premise: P. question: cause",
            "choice2",
        ),
        ("super_glue/rte", {**NLI, "label": 1}, "rte hypothesis: It is wet. premise: It rains.", "not_entailment"),
        (
            "super_glue/wic",
            {"word": "b", **PAIR, "label": False},
            "wic sentence1: A b. sentence2: C d. word: b",
            "False",
        ),
        ("extra/snli", {**NLI, "label": 0}, "snli hypothesis: It is wet. premise: It rains.", "entailment"),
        ("extra/ag_news", {"title": "T", "description": "D", "label": 1}, "ag_news text: T D", "World"),
        ("extra/ag_news", {"text": "T D", "label": 0}, "ag_news text: T D", "World"),
        ("extra/sst5", {"text": "fine", "label": 3}, "sst5 sentence: fine", "good"),
    ],
)
def test_a_row_becomes_t5_text(name: str, row: dict[str, Any], text: str, target: str) -> None:
    example = one(name, row)
    assert (example.input, example.target) == (text, target)
    assert example.choices == CATALOGUE[name].choices


def test_stsb_keeps_the_exact_number_and_rounds_to_a_fifth() -> None:
    rounded = {0.0: "0.0", 0.25: "0.2", 2.5: "2.4", 4.75: "4.8", 5: "5.0"}
    for label, target in rounded.items():
        example = one("glue/stsb", {**PAIR, "label": label})
        assert (example.target, example.value) == (target, label)


MULTIRC_NESTED = {
    "idx": 7,
    "passage": {
        "text": "<b>Sent 1: </b>A cat.<br>A dog.",
        "questions": [
            {
                "idx": 3,
                "question": "Who?",
                "answers": [{"text": "cat", "idx": 0, "label": 1}, {"text": "cow", "label": 0}],
            }
        ],
    },
}


def test_multirc_reads_both_forms_alike() -> None:
    task = CATALOGUE["super_glue/multirc"]
    flat = {"paragraph": MULTIRC_NESTED["passage"]["text"], "question": "Who?"}  # type: ignore[index]
    rows = [
        {**flat, "answer": "cat", "idx": {"paragraph": 7, "question": 3, "answer": 0}, "label": 1},
        {**flat, "answer": "cow", "idx": {"paragraph": 7, "question": 3, "answer": 1}, "label": 0},
    ]
    nested = list(task.examples(MULTIRC_NESTED, "train"))
    assert nested == [e for row in rows for e in task.examples(row, "train")]
    assert nested[0].input == "multirc question: Who? answer: cat paragraph: Sent 1: A cat. A dog."
    assert [(e.target, e.group) for e in nested] == [("True", "7.3"), ("False", "7.3")]


RECORD_NESTED = {
    "idx": 1,
    "passage": {
        "text": "Bob met Ann.\n@highlight\nBob left\n@highlight\nAnn stayed",
        "entities": [{"start": 0, "end": 2}, {"start": 8, "end": 10}, {"start": 24, "end": 26}],
    },
    "qas": [
        {
            "query": "@placeholder left.",
            "answers": [{"start": 0, "end": 2, "text": "Bob"}, {"start": 24, "end": 26, "text": "Bob"}],
        },
        {"query": "@placeholder met.", "answers": [{"text": "Bob"}, {"text": "Ann"}]},
    ],
}


def test_record_reads_both_forms_alike() -> None:
    task = CATALOGUE["super_glue/record"]
    base = {"passage": RECORD_NESTED["passage"]["text"], "entities": ["Bob", "Ann"]}  # type: ignore[index]
    rows = [
        {**base, "query": "@placeholder left.", "answers": ["Bob"], "idx": {"passage": 1, "query": 0}},
        {**base, "query": "@placeholder met.", "answers": ["Bob", "Ann"], "idx": {"passage": 1, "query": 1}},
    ]
    for split, targets in (("train", ["Bob", "Bob", "Ann"]), ("validation", ["Bob", "Bob"])):
        nested = list(task.examples(RECORD_NESTED, split))
        assert nested == [e for row in rows for e in task.examples(row, split)]
        assert [e.target for e in nested] == targets
    assert nested[1].answers == nested[1].choices == ("Bob", "Ann")
    assert nested[0].input == (
        "record query: @placeholder left. entities: Bob, Ann passage: Bob met Ann. Bob left. Ann stayed"
    )


def wsc_row(label: bool | None = True, **changes: Any) -> dict[str, Any]:
    span = {"span1_text": "Tom", "span1_index": 2, "span2_text": "he", "span2_index": 4, **changes}
    row = {"text": "Mitchell asked Tom if he, not she, could lend.", "target": span}
    return row if label is None else {**row, "label": label}


def test_wsc_names_the_referent_and_trains_on_true_rows_only() -> None:
    task = CATALOGUE["super_glue/wsc"]
    flat = {"text": wsc_row()["text"], **wsc_row()["target"], "label": 1}
    expected = Example("wsc: Mitchell asked Tom if *he*, not she, could lend.", "Tom", value=1.0)
    assert list(task.examples(wsc_row(), "train")) == list(task.examples(flat, "train")) == [expected]
    assert list(task.examples(wsc_row(False), "train")) == []
    assert one("super_glue/wsc", wsc_row(False)).value == 0.0
    assert one("super_glue/wsc", wsc_row(None), "test").value is None
    # Some official rows count one word too few.
    assert one("super_glue/wsc", wsc_row(span2_index=3)).input == expected.input


def test_snli_drops_rows_without_a_gold_label() -> None:
    for label in (-1, "-"):
        assert list(CATALOGUE["extra/snli"].examples({**NLI, "label": label}, "train")) == []


def test_test_rows_need_no_label() -> None:
    assert one("glue/mnli", {**NLI, "label": -1}, "test").target == ""
    assert one("super_glue/cb", NLI, "test").target == ""
    assert one("glue/stsb", {**PAIR, "label": -1.0}, "test").value is None


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        (
            "glue/cola",
            {"sentense": "x", "label": 1},
            r"field 'sentence' is missing; the row has sentense, label.*'sentense'",
        ),
        ("glue/cola", {"sentence": 3, "label": 1}, r"field 'sentence' must be text, not int 3"),
        ("glue/cola", {"sentence": "x"}, r"field 'label' is missing"),
        ("glue/cola", {"sentence": "x", "label": 2}, r"field 'label' is 2; expected one of 0 or 'unacceptable'"),
        ("glue/cola", {"sentence": "x", "label": -1}, r"field 'label' is -1"),
        ("glue/cola", {"sentence": "x", "label": "good"}, r"field 'label' is 'good'"),
        ("glue/stsb", {**PAIR, "label": 7.0}, r"expected a similarity from 0 to 5"),
        ("glue/stsb", {**PAIR, "label": "high"}, r"must be a number, not str 'high'"),
        ("super_glue/wsc", wsc_row(span2_text="them"), r"'them', which is not at word 4"),
        ("super_glue/multirc", {"idx": 1, "passage": {"text": "x"}}, r"field 'passage.questions' is missing"),
        ("super_glue/record", {"passage": "p", "query": "q", "entities": [], "answers": []}, r"'answers' is empty"),
    ],
)
def test_a_bad_row_names_its_field(name: str, row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        list(CATALOGUE[name].examples(row, "validation"))


def test_the_benchmarks_have_their_official_metrics() -> None:
    metrics = {name: task.metrics for name, task in CATALOGUE.items()}
    only_accuracy = {"sst2", "mnli", "qnli", "rte", "wnli", "boolq", "copa", "wic"}
    for name, names in metrics.items():
        check_names(names)
        if name.rpartition("/")[2] in only_accuracy:
            assert names == ("accuracy",)
    assert metrics["glue/cola"] == ("matthews",)
    assert metrics["glue/mrpc"] == metrics["glue/qqp"] == ("accuracy", "f1")
    assert metrics["glue/stsb"] == ("pearson", "spearman")
    assert metrics["super_glue/cb"] == ("accuracy", "macro_f1")
    assert metrics["super_glue/multirc"] == ("multirc_f1a", "multirc_em")
    assert metrics["super_glue/record"] == ("record_f1", "record_em")
    assert metrics["super_glue/wsc"] == ("wsc_accuracy",)
    assert len([n for n in metrics if n.startswith("glue/")]) == 9
    assert len([n for n in metrics if n.startswith("super_glue/")]) == 8


def test_tasks_pickle() -> None:
    for task in CATALOGUE.values():
        assert pickle.loads(pickle.dumps(task)) == task


def test_an_unknown_task_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match=r"unknown task 'super_glue/bolq'.*Did you mean 'super_glue/boolq'"):
        resolve(config("super_glue/bolq"))


def test_tasks_keep_the_config_s_order() -> None:
    names = ["super_glue/rte", "embedded/nli", "glue/rte"]
    assert [t.name for t in resolve(config(*names))] == names


def test_data_root_replaces_the_hub_but_not_the_generators(tmp_path: Path) -> None:
    (tmp_path / "rte").mkdir()
    for split in ("train", "validation"):
        (tmp_path / "rte" / f"{split}.jsonl").write_text("{}")
    tasks = resolve(config("glue/rte", "super_glue/rte", "embedded/nli", root=tmp_path))
    files = {s: tmp_path / "rte" / f"{s}.jsonl" for s in ("train", "validation")}
    assert tasks[0].source == tasks[1].source == FileSource(files)
    assert not isinstance(tasks[2].source, FileSource)


def test_a_missing_root_folder_or_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"folder .*/nowhere does not exist; data.root must hold"):
        resolve(config("glue/rte", root=tmp_path / "nowhere"))
    with pytest.raises(DataError, match=r"glue/rte: folder .*/rte does not exist"):
        resolve(config("glue/rte", root=tmp_path))
    (tmp_path / "rte").mkdir()
    (tmp_path / "rte" / "train.jsonl").write_text("{}")
    with pytest.raises(DataError, match=r"file .*rte/validation.jsonl does not exist"):
        resolve(config("glue/rte", root=tmp_path))


CUSTOM: dict[str, Any] = {
    "name": "my/topic",
    "files": {"train": "train.jsonl", "validation": "dev.jsonl"},
    "input": "question: {text} {{by {meta.author}}}",
    "target": "{label}",
    "labels": {"0": "world", "1": "sport"},
    "choices": ["world", "sport"],
    "metrics": ["accuracy", "macro_f1"],
    "weight": 2.0,
}
ROW = {"text": "Who won?", "meta": {"author": "Ann"}, "label": 1}


@pytest.fixture
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("train.jsonl", "dev.jsonl"):
        Path(name).write_text(json.dumps(ROW) + "\n")
    return tmp_path


def custom(**changes: Any) -> Any:
    table = {**copy.deepcopy(CUSTOM), **changes}
    (task,) = resolve(config({k: v for k, v in table.items() if v is not None}))
    return task


def test_a_user_task_fills_its_templates(in_folder: Path) -> None:
    task = custom()
    assert list(task.examples(ROW, "train")) == [Example("question: Who won? {by Ann}", "sport", ("world", "sport"))]
    assert task.source == FileSource({"train": in_folder / "train.jsonl", "validation": in_folder / "dev.jsonl"})
    assert (task.metrics, task.weight, task.choices) == (("accuracy", "macro_f1"), 2.0, ("world", "sport"))
    assert pickle.loads(pickle.dumps(task)) == task


def test_a_target_without_braces_is_a_field(in_folder: Path) -> None:
    task = custom(target="label", labels=None, choices=None, metrics=["exact_match"])
    assert [e.target for e in task.examples(ROW, "train")] == ["1"]


def test_labels_without_choices_are_the_choices(in_folder: Path) -> None:
    assert custom(choices=None).choices == ("world", "sport")


def test_a_correlation_keeps_the_target_s_number(in_folder: Path) -> None:
    task = custom(labels=None, choices=None, metrics=["pearson"])
    assert [e.value for e in task.examples(ROW, "train")] == [1.0]
    with pytest.raises(DataError, match="target 'high' is not a number"):
        list(task.examples({**ROW, "label": "high"}, "train"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input": "no field"}, r"my/topic: input: template 'no field' names no field"),
        ({"input": "{text"}, r"template '\{text': .*literal braces"),
        ({"input": "{}"}, "only {field} and {field.sub}"),
        ({"input": "{text!r}"}, "only {field} and {field.sub}"),
        ({"target": "{{label}}"}, r"my/topic: target: .* names no field"),
        (
            {"labels": {"0": "world", "1": "sports"}},
            r"labels give 'sports', which is not among the choices world, sport",
        ),
        ({"metrics": ["acc"]}, r"my/topic: metrics: unknown metric 'acc'"),
        ({"metrics": ["f1"], "choices": None, "labels": None}, "metric 'f1' needs choices"),
        ({"metrics": ["wsc_accuracy"]}, "fits its benchmark task only"),
        ({"files": {"train": "train.jsonl"}}, "the validation split is not given"),
    ],
)
def test_a_user_task_that_cannot_work_is_refused(in_folder: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        custom(**changes)


def test_a_missing_file_is_named_with_the_nearest(in_folder: Path) -> None:
    with pytest.raises(DataError, match=r"file .*/dev.json does not exist. Did you mean 'dev.jsonl'"):
        custom(files={"train": "train.jsonl", "validation": "dev.json"})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"texts": "x", "meta": {"author": "A"}, "label": 1},
            r"'text' is missing; the row has texts.*Did you mean 'texts'",
        ),
        ({**ROW, "meta": {}}, "field 'meta.author' is missing"),
        ({**ROW, "text": None}, "field 'text' is null"),
        ({**ROW, "text": {"a": "x"}}, "field 'text' is a table; name one of its parts: text.a"),
        ({**ROW, "text": ["x"]}, "field 'text' is a list"),
        ({**ROW, "label": 5}, "target '5' is not in the task's labels; expected one of 0, 1"),
    ],
)
def test_a_row_that_does_not_fit_its_template(in_folder: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        list(custom().examples(row, "train"))


def test_a_target_outside_the_choices(in_folder: Path) -> None:
    task = custom(labels=None)
    with pytest.raises(DataError, match=r"target 'sprot' is not among the choices world, sport. Did you mean 'sport'"):
        list(task.examples({**ROW, "label": "sprot"}, "train"))


@real_data
@pytest.mark.parametrize("name", sorted(CATALOGUE))
def test_every_catalogue_task_reads_the_official_files(name: str) -> None:
    (task,) = resolve(config(name, root=DATA))
    for split in (task.train_split, task.validation_split):
        assert isinstance(task.source, FileSource)
        with task.source.files[split].open() as file:
            rows = [json.loads(line) for line in file]
        examples = [e for row in rows for e in task.examples(row, split)]
        assert len(examples) >= len(rows) or name == "super_glue/wsc"
        assert all(e.input and e.target for e in examples)
        assert all(e.target in e.choices for e in examples if e.choices)
        assert not task.choices or {e.target for e in examples} == set(task.choices)


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_catalogue_tasks_come_from_other_files_too(tmp_path: Path, suffix: str) -> None:
    """CSV holds text alone, so its labels and numbers are read from text."""
    import pandas as pd

    for name, row in (
        ("rte", {"premise": "It rains.", "hypothesis": "It is wet.", "label": 0}),
        ("stsb", {"sentence1": "a", "sentence2": "b", "label": 3.75}),
        ("boolq", {"question": "is it", "passage": "It is.", "label": True}),
    ):
        folder = tmp_path / name
        folder.mkdir()
        for split in ("train", "validation"):
            frame = pd.DataFrame([row])
            path = folder / f"{split}{suffix}"
            frame.to_csv(path, index=False) if suffix == ".csv" else frame.to_parquet(path)
    config = check({"tasks": ["super_glue/rte", "glue/stsb", "super_glue/boolq"], "data": {"root": tmp_path}})
    targets = []
    for task in resolve(config):
        ((_, example),) = read_examples(task, "train")
        targets.append(example.target)
    assert targets == ["entailment", "3.8", "True"]
