import gzip
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import pytest
import yaml
from scipy.stats import chisquare
from transformers import AutoTokenizer

from polyprompt import recipe
from polyprompt.backbone import EMBEDDED
from polyprompt.errors import DataError
from polyprompt.tasks import embedded
from polyprompt.tasks import embedded_words as suite

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "jobs"))

import make_skills  # noqa: E402
import pretrain  # noqa: E402
from skills import book_text, leaks  # noqa: E402
from skills.catalog import MAKERS  # noqa: E402
from skills.frames import COMMON, PLAIN, Draft  # noqa: E402

ROWS, VALIDATION_ROWS, GRAMMAR_LINES = 200, 40, 150
#: sha256 of everything that the small corpus below gives. Changed words or templates change it on purpose.
DIGEST = "8e95fc9d819b0622be2b8325ec2b68d11bc1041dbe514236beb1c74a8420edee"

Row = dict[str, Any]
every_task = pytest.mark.parametrize("name", list(MAKERS))


def small_corpus(path: Path) -> Path:
    """Twenty works of made sentences, the last of them held out and marked by a word of its own."""
    rng, works = Random(0), []
    for work in range(20):
        paragraphs = []
        for _ in range(12):
            sentences = []
            for _ in range(3):
                who, what = rng.choice(suite.PEOPLE), rng.choice(suite.THINGS)
                verb, how = rng.choice(suite.ACTIONS), rng.choice(suite.QUALITIES)
                topic, when = (
                    rng.choice(" ".join(suite.TOPICS.values()).split()),
                    rng.choice("before after while until".split()),
                )
                also = "xylograph" if work == 19 else rng.choice("quietly slowly early gladly".split())
                sentences.append(f"The {how} {who} {verb} this {what} {when} the {topic} was {also} seen.")
            paragraphs.append(" ".join(sentences))
        works.append("\n".join(paragraphs))
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.write("\n\n".join(works) + "\n")
    return path


def make(corpus: list[Path], out: Path, *more: str) -> None:
    make_skills.main(["--corpus", *map(str, corpus), "--out", str(out), "--grammar-lines", "10", *more])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("skills")
    sizes = ("--rows", str(ROWS), "--validation-rows", str(VALIDATION_ROWS), "--grammar-lines", str(GRAMMAR_LINES))
    make([small_corpus(out / "corpus.txt.gz")], out / "made", *sizes)
    return out / "made"


@cache
def rows(folder: Path, name: str, *splits: str) -> list[Row]:
    files = [folder / name / f"{split}.jsonl" for split in splits or ("train", "validation")]
    return [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]


def grammar(folder: Path) -> list[str]:
    lines = gzip.decompress((folder / "grammar.txt.gz").read_bytes()).decode().splitlines()
    return [line for line in lines if line]


def all_texts(folder: Path) -> Iterator[str]:
    yield from grammar(folder)
    yield from (f"{row['input']} {row['target']}" for name in MAKERS for row in rows(folder, name))


def test_rows_are_the_same_everywhere(folder: Path) -> None:
    digest = hashlib.sha256("\n".join(grammar(folder)).encode())
    for name in sorted(MAKERS):
        for split in ("train", "validation"):
            digest.update((folder / name / f"{split}.jsonl").read_bytes())
    assert digest.hexdigest() == DIGEST


def test_rows_of_one_wording_stand_alone_too(folder: Path) -> None:
    """In them the label words stand behind the question, in the order of the labels."""
    for wording in ("own", "signs"):
        chosen = rows(folder, "opinion", wording)
        assert 0.2 * ROWS < len(chosen) < 0.6 * ROWS
        assert {row["input"] for row in chosen} <= {row["input"] for row in rows(folder, "opinion", "train")}
        for row in chosen:
            assert row["input"].startswith(f"kind or unkind , {' or '.join(row['choices'])} : ")
            assert (set(row["choices"]) == {"kind", "unkind"}) == (wording == "own")
    assert not (folder / "copy" / "own.jsonl").exists()


def test_another_seed_gives_other_rows(folder: Path, tmp_path: Path) -> None:
    make([folder.parent / "corpus.txt.gz"], tmp_path, "--rows", "20", "--tasks", "copy", "--seed", "1")
    assert not {r["input"] for r in rows(tmp_path, "copy")} & {r["input"] for r in rows(folder, "copy")[:20]}


@every_task
def test_rows_are_whole_different_and_of_both_splits(folder: Path, name: str) -> None:
    assert (len(rows(folder, name, "train")), len(rows(folder, name, "validation"))) == (ROWS, VALIDATION_ROWS)
    assert len({row["input"] for row in rows(folder, name)}) == ROWS + VALIDATION_ROWS
    for row in rows(folder, name):
        assert row["target"]
        choices = row.get("choices", [row["target"]])
        assert choices.count(row["target"]) == 1
        assert len(set(choices)) == len(choices)


@every_task
def test_answers_are_balanced(folder: Path, name: str) -> None:
    """No place among the choices, and no answer, is favoured."""
    places = defaultdict(Counter)
    for row in rows(folder, name):
        if "choices" in row:
            places[len(row["choices"])][row["choices"].index(row["target"])] += 1
    for num_choices, counts in places.items():
        assert chisquare([counts[i] for i in range(num_choices)]).pvalue > 1e-3
    (_, most), *_ = Counter(row["target"] for row in rows(folder, name)).most_common(1)
    # Half of the rows worded in one way, where there are two answers, and some of the others.
    assert most < (PLAIN / 2 + 0.2) * (ROWS + VALIDATION_ROWS)


@every_task
def test_instructions_vary(folder: Path, name: str) -> None:
    """But for the share that is worded in one way, no start of an input is that of a quarter of the rows."""
    starts = Counter(" ".join(row["input"].lower().split()[:4]) for row in rows(folder, name))
    assert starts.most_common(1)[0][1] < (PLAIN + (1 - PLAIN) * 0.25 + 0.05) * (ROWS + VALIDATION_ROWS)


def test_texts_fit_the_embedded_tokenizer(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    made = [row for name in MAKERS for row in rows(folder, name)]
    assert max(map(len, tokenizer([row["input"] for row in made]).input_ids)) <= 160
    assert max(map(len, tokenizer([row["target"] for row in made]).input_ids)) <= 32
    assert 15 <= median(len(row["input"].split()) for row in made) <= 30


def ngrams(text: str, sizes: set[int]) -> set[str]:
    words = leaks.normalised(text).split()
    return {f" {' '.join(words[i : i + n])} " for n in sizes for i in range(len(words) - n + 1)}


def test_no_text_holds_a_row_of_the_embedded_suite(folder: Path) -> None:
    """Found in another way than leaks.py does: by all runs of words as long as a first part."""
    suite_rows = defaultdict(list)
    for parts in leaks.suite_parts():
        suite_rows[parts[0]].append(parts[1:])
    sizes = {len(part.split()) for part in suite_rows}
    for text in all_texts(folder):
        body = leaks.normalised(text)
        for part in ngrams(text, sizes) & suite_rows.keys():
            assert not any(all(other in body for other in others) for others in suite_rows[part]), text


def test_every_row_of_the_suite_counts_as_a_leak() -> None:
    rng = Random(0)
    for parts in rng.sample(list(leaks.suite_parts()), 500):
        mixed = rng.sample(parts, len(parts))
        assert leaks.leaks("Look at this: " + " ; and ".join(part.strip().title() for part in mixed) + "!")
        assert len(set(parts)) == 1 or not all(leaks.leaks(part) for part in parts)
    assert leaks.leaks("premise: the dog is here")
    assert not leaks.leaks("the dog is here : so it is not there")


def test_no_template_of_a_benchmark_occurs(folder: Path) -> None:
    prefixes = {example.input.split()[0] for task in embedded.tasks().values() for example in _examples(task)}
    assert prefixes == {"sentiment:", "acceptability:", "nli", "paraphrase", "similarity", "wic", "boolq", "copa"}
    for text in all_texts(folder):
        assert not leaks.MARKERS.search(text)
        assert text.split()[0].rstrip(":").lower() not in {prefix.rstrip(":") for prefix in prefixes}


def _examples(task: Any) -> Iterator[Any]:
    yield from task.examples(next(task.source.rows("train")), "train")


#: Tasks whose words mean nothing; every other task's answers must not be the suite's label sets.
MEANINGLESS = {"codes", "follow_rule", "copy"}
#: The suite's answers that are common words: not with the tasks that are nearest to the suite's own question.
NEAREST = {("no", "yes"): {"claim", "belongs", "follows", "lookup", "owner"}, ("False", "True"): {"alike", "sense"}}


@every_task
def test_no_label_set_answers_the_suites_question(folder: Path, name: str) -> None:
    label_sets = [task.choices for task in embedded.tasks().values() if task.choices]
    for row in rows(folder, name):
        for labels in label_sets if name not in MEANINGLESS else ():
            if name in NEAREST.get(labels, {name} if labels not in NEAREST else set()):
                assert set(row.get("choices", ())) != set(labels), row


def held(folder: Path, *names: str) -> str:
    return "\n".join(f" {row['input']} {row['target']} " for name in names for row in rows(folder, name))


def test_the_suites_forms_are_not_asked_the_suites_question(folder: Path) -> None:
    def words_of(*names: str) -> set[str]:
        """Words of the inputs but names that tell nothing; a row's own label words may be any."""
        made = [row for name in names for row in rows(folder, name)]
        free = [{*row.get("choices", ()), *COMMON} for row in made]
        return {
            w for row, any_ in zip(made, free, strict=True) for w in {*re.findall(r"[A-Za-z]+", row["input"])} - any_
        }

    praise = held(folder, "opinion", "kinder", "turn_of_mind")
    assert not re.search(rf"\b({'|'.join(suite.THINGS)}) was ", praise)
    assert " but " not in praise
    assert not re.search(rf"\b(was|were) ({'|'.join(suite.QUALITIES)})\b", held(folder, "agreement"))
    assert not words_of("follows") & {"all", "most", "several", "some", "few"}
    assert not words_of("closeness", "steps_between", "nearer") & {*suite.NAMES, *suite.ACTIONS}
    assert not re.search(r"the \w+ with \w+ and \w+", held(folder, "sense", "alike", "topic"))
    assert not words_of("claim", "belongs") & {*suite.STATED, *suite.STATES}
    assert not words_of("same_event") & {verb for pair in suite.SYNONYMS for verb in pair}
    events = [event for chain in suite.CHAINS for event in chain]
    assert not [event for event in events if event in held(folder, "cause_effect")]


def test_held_out_works_are_not_read(folder: Path) -> None:
    assert [book_text.held_out_works(n) for n in (2, 20, 33, 284)] == [1, 19, 31, 269]
    assert "xylograph" in gzip.decompress((folder.parent / "corpus.txt.gz").read_bytes()).decode()
    assert not [text for text in all_texts(folder) if "xylograph" in text.lower()]


def test_the_grammar_text_is_plain_statements(folder: Path) -> None:
    lines = grammar(folder)
    assert len(lines) == GRAMMAR_LINES
    assert not [line for line in lines if "?" in line or not line.endswith(" .")]
    for verb, determiner in (("was", "these"), ("were", "this")):
        assert not re.search(rf"\b{determiner} \w+ {verb}\b", "\n".join(lines))
    vocabulary = set(" ".join(lines).split())
    assert {"all", "most", "several", "some", "few", "no", "was", "were", "Monday", "north", "money"} <= vocabulary


def test_the_recipe_lists_tasks_that_are_made() -> None:
    recipe = yaml.safe_load((ROOT / "jobs" / "recipes" / "pretrain_embedded.yaml").read_text(encoding="utf-8"))
    listed = [task["name"] for task in recipe["tasks"] if task["name"].startswith("skills/")]
    assert listed
    assert {name.removeprefix("skills/") for name in listed} <= set(MAKERS)


def test_each_stage_starts_from_the_weights_of_the_one_before(tmp_path: Path) -> None:
    """The script with a stand-in for python that writes down what it is asked for."""
    for part in ("jobs/recipes", "build/skills"):
        (tmp_path / part).mkdir(parents=True)
    for file in (ROOT / "jobs" / "recipes").glob("pretrain_embedded*"):
        shutil.copy(file, tmp_path / "jobs" / "recipes")
    script = tmp_path / "jobs" / "recipes" / "pretrain_embedded.sh"
    environment = {**os.environ, "PYTHON": r"printf %s\n"}
    said = subprocess.run([script], env=environment, capture_output=True, text=True, check=True).stdout
    stages = [stage.splitlines() for stage in re.split(r"jobs/(?=pretrain\.py|make_\w+\.py)", said)[1:]]
    assert len(stages) == 14
    backbone = {"name": "embedded", "init": "random"}
    for script, recipe_file, *overrides, option, out in stages:
        assert option == "--out"
        table = recipe.merge([recipe.read(tmp_path / recipe_file)], overrides)
        assert table["backbone"] == backbone
        assert table["mixture"].get("weights", {}).keys() <= {task["name"] for task in table["tasks"]}
        pretrain.check(recipe.check(table))
        backbone = {"name": f"{out}/backbone" if script == "pretrain.py" else out, "init": "pretrained"}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--tasks", "copi"), r"no task 'copi'.*Did you mean 'copy'"),
        (("--rows", "0"), r"rows: 0 is out of range; expected at least 1"),
    ],
)
def test_bad_arguments_are_refused(folder: Path, tmp_path: Path, more: tuple[str, ...], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        make([folder.parent / "corpus.txt.gz"], tmp_path, *more)


def test_a_task_of_too_few_rows_is_refused(folder: Path) -> None:
    books = book_text.read_books([folder.parent / "corpus.txt.gz"])
    with pytest.raises(DataError, match="coin: 2 different rows; 3 are wanted"):
        make_skills.drafts("coin", lambda rng, _: Draft(rng.choice("ab"), "c"), books, 3, 0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("One work of one line.\n", "has 1 work; expected two or more"),
        ("One short work.\n\nAnother one.\n", "0 plain sentences and 0 common words; expected at least 50 and 100"),
    ],
)
def test_a_corpus_that_is_too_small_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "corpus.txt").write_text(text, encoding="utf-8")
    with pytest.raises(SystemExit, match=message):
        make([tmp_path / "corpus.txt"], tmp_path / "out")
    with pytest.raises(SystemExit, match="cannot be read"):
        make([tmp_path / "absent.txt"], tmp_path / "out")


@pytest.mark.slow
def test_rows_of_the_real_corpus_fit_the_embedded_tokenizer(shared_data: Path, tmp_path: Path) -> None:
    files = [shared_data / "corpus" / f"{name}.txt.gz" for name in ("eltec_novels", "classic_books")]
    make(files, tmp_path, "--rows", "500", "--grammar-lines", "500")
    test_texts_fit_the_embedded_tokenizer(tmp_path)
    test_no_text_holds_a_row_of_the_embedded_suite(tmp_path)
