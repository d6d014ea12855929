import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics as sk

from polyprompt.errors import ConfigError, DataError
from polyprompt.tasks.metrics import METRICS, check_names, compute, normalise
from polyprompt.tasks.records import Example

YES_NO = ("no", "yes")


def examples(*targets: str, choices: tuple[str, ...] = YES_NO) -> list[Example]:
    return [Example("", t, choices) for t in targets]


def numbers(*values: float) -> list[Example]:
    return [Example("", f"{v:.1f}", value=v) for v in values]


def test_score_is_the_mean_of_the_named_metrics() -> None:
    scores = compute(["accuracy", "f1"], ["yes", "no", "yes", "yes"], examples("yes", "no", "no", "yes"))
    assert scores == {"accuracy": 0.75, "f1": pytest.approx(0.8), "score": pytest.approx(0.775)}


def test_accuracy_strips_space_and_minds_case() -> None:
    assert compute(["accuracy"], [" yes\n", "Yes"], examples("yes", "yes"))["accuracy"] == 0.5


def test_f1_takes_the_last_choice_as_positive() -> None:
    said, truth = ["yes", "yes", "no"], ["yes", "no", "no"]
    assert compute(["f1"], said, examples(*truth))["f1"] == pytest.approx(2 / 3)
    assert compute(["f1"], said, examples(*truth, choices=("yes", "no")))["f1"] == pytest.approx(2 / 3)
    assert compute(["f1"], ["no"] * 3, examples(*truth))["f1"] == 0.0


def test_f1_counts_a_text_outside_the_choices_as_the_wrong_class() -> None:
    # One true positive; the stray text counts as a false positive: precision 1/2, recall 1.
    assert compute(["f1"], ["yes", "perhaps"], examples("yes", "no"))["f1"] == pytest.approx(2 / 3)


def test_f1_without_choices_is_refused() -> None:
    with pytest.raises(ConfigError, match="needs choices"):
        compute(["f1"], ["a"], examples("a", choices=()))


def test_macro_f1_counts_classes_that_are_never_said() -> None:
    refs = examples("a", "b", "c", choices=("a", "b", "c"))
    # a: precision 1/3, recall 1, F1 1/2; b and c: 0.
    assert compute(["macro_f1"], ["a", "a", "a"], refs)["macro_f1"] == pytest.approx(0.5 / 3)


def test_matthews_agrees_with_its_formula() -> None:
    said = ["yes"] * 6 + ["no"] * 4
    truth = ["yes"] * 4 + ["no"] * 2 + ["no"] * 3 + ["yes"]
    tp, fp, tn, fn = 4, 2, 3, 1
    expected = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert compute(["matthews"], said, examples(*truth))["matthews"] == pytest.approx(expected)
    assert compute(["matthews"], ["yes"] * 10, examples(*truth))["matthews"] == 0.0


def test_correlations_use_the_exact_values() -> None:
    values, said = (0.0, 1.25, 2.5, 4.75), ["0.2", "1.0", "3.0", "2.8"]
    scores = compute(["pearson", "spearman"], said, numbers(*values))
    assert scores["pearson"] == pytest.approx(np.corrcoef(values, [0.2, 1.0, 3.0, 2.8])[0, 1])
    assert scores["spearman"] == pytest.approx(0.8)  # 1 - 6 * 2 / (4 * 15)


@pytest.mark.parametrize("said", ["3.0", "words", "nan", "inf", "1e300"])
def test_constant_predictions_correlate_by_nothing(said: str) -> None:
    assert compute(["pearson", "spearman"], [said] * 3, numbers(1, 2, 3))["score"] == 0.0


def test_a_text_that_is_no_number_counts_as_zero() -> None:
    refs = numbers(0, 2, 3)
    assert compute(["pearson"], ["nonsense", "2", "3"], refs) == compute(["pearson"], ["0.0", "2", "3"], refs)


def test_a_correlation_without_values_is_refused() -> None:
    with pytest.raises(ConfigError, match="needs numbers"):
        compute(["pearson"], ["1", "2"], examples("1", "2"))


def test_multirc_scores_answers_and_whole_questions() -> None:
    truth = ("False", "True")
    refs = [Example("", t, truth, group=g) for t, g in [("True", "a"), ("False", "a"), ("True", "b"), ("True", "c")]]
    scores = compute(["multirc_f1a", "multirc_em"], ["True", "True", "True", "False"], refs)
    assert scores["f1a"] == pytest.approx(2 * 2 / (3 + 3))
    assert scores["em"] == pytest.approx(1 / 3)  # a: one slip, b: right, c: wrong


def test_record_takes_the_best_answer() -> None:
    refs = [Example("", "Bhutto", answers=("Bhutto", "Benazir Bhutto")), Example("", "the CNN", answers=("the CNN",))]
    scores = compute(["record_f1", "record_em"], ["benazir  Bhutto!", "cnn news"], refs)
    assert scores["em"] == 0.5
    assert scores["f1"] == pytest.approx((1 + 2 / 3) / 2)


def test_exact_match_falls_back_to_the_target() -> None:
    assert compute(["exact_match"], ["The Answer."], [Example("", "answer")])["exact_match"] == 1.0
    assert normalise("A  man, an apple;the end") == "man appletheend".replace("appletheend", "applethe end")


@pytest.mark.parametrize(
    ("said", "referent", "label", "right"),
    [
        ("Bob", "Bob", True, True),
        ("the fuzzy bunny", "bunny", True, True),
        ("bunny", "The fuzzy bunny", True, True),
        ("Bob", "Bob's hat", True, False),
        ("Bob", "Bob's hat", False, True),
        ("Alice", "Bob", False, True),
        ("Alice", "Bob", True, False),
        ("BOB", "bob", False, False),
        ("", "Bob", False, False),
        ("the", "Bob", False, False),
    ],
)
def test_wsc_compares_what_was_named_with_the_label(said: str, referent: str, label: bool, right: bool) -> None:
    refs = [Example("", referent, value=float(label))]
    assert compute(["wsc_accuracy"], [said], refs)["accuracy"] == float(right)


def test_unknown_metrics_are_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match=r"unknown metric 'acuracy'.*Did you mean 'accuracy'"):
        check_names(["acuracy"])
    with pytest.raises(ConfigError, match="name at least one"):
        check_names([])


def test_nothing_to_score_is_refused() -> None:
    with pytest.raises(DataError, match="0 predictions for 0 examples"):
        compute(["accuracy"], [], [])
    with pytest.raises(DataError, match="1 predictions for 2 examples"):
        compute(["accuracy"], ["a"], examples("a", "b"))


WORDS = st.sampled_from(["no", "yes", "maybe"])
PAIRS = st.lists(st.tuples(WORDS, st.sampled_from(YES_NO)), min_size=1, max_size=30)


@given(PAIRS, st.randoms())
@settings(deadline=None, max_examples=50)
@pytest.mark.filterwarnings("ignore:A single label was found")
def test_class_metrics_agree_with_sklearn_and_ignore_order(pairs: list[tuple[str, str]], rng) -> None:  # type: ignore[no-untyped-def]
    said, truth = map(list, zip(*pairs, strict=True))
    names = ["accuracy", "macro_f1", "matthews", "f1", "exact_match"]
    scores = compute(names, said, examples(*truth))
    assert scores["accuracy"] == pytest.approx(sk.accuracy_score(truth, said))
    assert scores["matthews"] == pytest.approx(sk.matthews_corrcoef(truth, said))
    if "maybe" not in said:
        assert scores["f1"] == pytest.approx(sk.f1_score(truth, said, pos_label="yes", zero_division=0.0))
    assert -1.0 <= scores["matthews"] <= 1.0
    assert all(0.0 <= scores[n] <= 1.0 for n in ("accuracy", "macro_f1", "f1", "exact_match"))
    rng.shuffle(pairs)
    said, truth = map(list, zip(*pairs, strict=True))
    assert compute(names, said, examples(*truth)) == pytest.approx(scores)


@given(st.lists(st.sampled_from(YES_NO), min_size=2, max_size=20).filter(lambda t: len(set(t)) == 2))
@settings(deadline=None, max_examples=30)
def test_perfect_predictions_score_one(truth: list[str]) -> None:
    names = ["accuracy", "f1", "macro_f1", "matthews", "multirc_f1a", "multirc_em", "record_f1", "record_em"]
    for name in names:
        assert list(compute([name], truth, examples(*truth)).values()) == pytest.approx([1.0, 1.0])


FLOATS = st.floats(0, 5, allow_nan=False)


@given(st.lists(st.tuples(FLOATS, FLOATS), min_size=1, max_size=30))
@settings(deadline=None, max_examples=50)
@pytest.mark.filterwarnings("ignore::scipy.stats.NearConstantInputWarning")
def test_correlations_are_finite_and_agree_with_scipy(pairs: list[tuple[float, float]]) -> None:
    said, truth = zip(*pairs, strict=True)
    scores = compute(["pearson", "spearman"], [repr(x) for x in said], numbers(*truth))
    assert all(-1.0 <= s <= 1.0 for s in scores.values())
    if len(set(said)) > 1 and len(set(truth)) > 1:
        assert scores["spearman"] == pytest.approx(stats.spearmanr(said, truth).statistic)


def test_every_metric_is_exercised_here() -> None:
    with open(__file__) as file:
        text = file.read()
    assert all(f'"{name}"' in text for name in METRICS)
