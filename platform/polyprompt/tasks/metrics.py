"""The official metrics of GLUE and SuperGLUE. All are fractions of 1; correlations and Matthews lie in [-1, 1].

A metric reads predicted texts and the examples they belong to. A prediction counts after `strip()`; a text that is none
of the choices is simply wrong.
"""

import math
import re
import string
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from scipy import stats
from sklearn import metrics as sk

from polyprompt.errors import ConfigError, DataError, hint
from polyprompt.tasks.records import Example

Metric = Callable[[Sequence[str], Sequence[Example]], float]


def compute(names: Sequence[str], predictions: Sequence[str], references: Sequence[Example]) -> dict[str, float]:
    """Return each named metric and "score", their mean.

    A benchmark's own metric loses its prefix, which its task says already: multirc_f1a → f1a, wsc_accuracy → accuracy.
    Raises ConfigError for an unknown name and DataError where there is nothing to score.
    """
    check_names(names)
    if len(predictions) != len(references) or not references:
        raise DataError(f"{len(predictions)} predictions for {len(references)} examples; expected one each, at least 1")
    stripped = [p.strip() for p in predictions]
    scores = {_shown(name): float(METRICS[name](stripped, references)) for name in names}
    return scores | {"score": sum(scores.values()) / len(scores)}


def _shown(name: str) -> str:
    prefix, _, rest = name.partition("_")
    return rest if prefix in ("multirc", "record", "wsc") else name


def check_names(names: Sequence[str]) -> None:
    """Raise ConfigError for a metric that does not exist, or where none is named."""
    if not names:
        raise ConfigError(f"metrics: name at least one of {', '.join(METRICS)}")
    for name in names:
        if name not in METRICS:
            raise ConfigError(f"metrics: unknown metric {name!r}; known: {', '.join(METRICS)}.{hint(name, METRICS)}")


def accuracy(predictions: Sequence[str], references: Sequence[Example]) -> float:
    """Share of predictions that equal the target."""
    return float(np.mean([p == r.target for p, r in zip(predictions, references, strict=True)]))


def f1(predictions: Sequence[str], references: Sequence[Example]) -> float:
    """F1 of the positive class, which is the last of the choices (T5's label 1).

    As in T5, a prediction outside the choices counts as the wrong class, whichever that is.
    """
    if not references[0].choices:
        raise ConfigError("metrics: f1 needs choices (the last is the positive class); use record_f1 for free text")
    truth = [r.target == r.choices[-1] for r in references]
    guess = [
        p == r.choices[-1] if p in r.choices else r.target != r.choices[-1]
        for p, r in zip(predictions, references, strict=True)
    ]
    return float(sk.f1_score(truth, guess, zero_division=0.0))


def macro_f1(predictions: Sequence[str], references: Sequence[Example]) -> float:
    """Unweighted mean of the F1 of each choice (of each target that occurs, where there are no choices)."""
    targets = [r.target for r in references]
    labels = list(references[0].choices) or sorted(set(targets))
    return float(sk.f1_score(targets, list(predictions), labels=labels, average="macro", zero_division=0.0))


def matthews(predictions: Sequence[str], references: Sequence[Example]) -> float:
    """Matthews correlation; 0 for constant predictions."""
    return float(sk.matthews_corrcoef([r.target for r in references], list(predictions)))


def pearson(predictions: Sequence[str], references: Sequence[Example]) -> float:
    """Pearson correlation of the predicted numbers with `Example.value`; 0 where it is undefined."""
    return _correlation(stats.pearsonr, predictions, references)


def spearman(predictions: Sequence[str], references: Sequence[Example]) -> float:
    """Spearman rank correlation of the predicted numbers with `Example.value`; 0 where it is undefined."""
    return _correlation(stats.spearmanr, predictions, references)


def _correlation(
    statistic: Callable[..., tuple[float, float]], predictions: Sequence[str], references: Sequence[Example]
) -> float:
    x = np.array([_number(p) for p in predictions])
    y = np.array([_value(r, "a correlation needs numbers") for r in references])
    # A correlation with a constant does not exist; a model that says one thing only deserves no credit.
    if len(set(x)) < 2 or len(set(y)) < 2:
        return 0.0
    correlation = float(statistic(x, y)[0])
    # Numbers that differ by less than their rounding error have no defined correlation either.
    return min(1.0, max(-1.0, correlation)) if math.isfinite(correlation) else 0.0


def _number(prediction: str) -> float:
    """The predicted number. A text that is no number counts as 0.0, and so does one no score could be (T5 says -1)."""
    try:
        value = float(prediction)
    except ValueError:
        return 0.0
    return value if abs(value) < 1e6 else 0.0


def _value(example: Example, why: str) -> float:
    if example.value is None:
        raise ConfigError(f"metrics: {why}; the example with target {example.target!r} has none. Use another metric")
    return example.value


def multirc_em(predictions: Sequence[str], references: Sequence[Example]) -> float:
    """Share of questions (`Example.group`) whose answers are all judged rightly."""
    right: dict[str, bool] = defaultdict(lambda: True)
    for prediction, reference in zip(predictions, references, strict=True):
        right[reference.group] &= prediction == reference.target
    return float(np.mean(list(right.values())))


def record_em(predictions: Sequence[str], references: Sequence[Example]) -> float:
    """Share of predictions that equal an answer after SQuAD's normalisation."""
    best = [max(p == a for a in answers) for p, answers in _normalised(predictions, references)]
    return float(np.mean(best))


def record_f1(predictions: Sequence[str], references: Sequence[Example]) -> float:
    """Mean F1 of words shared with the nearest answer, after SQuAD's normalisation."""
    return float(np.mean([max(_word_f1(p, a) for a in answers) for p, answers in _normalised(predictions, references)]))


def _normalised(predictions: Sequence[str], references: Sequence[Example]) -> list[tuple[str, list[str]]]:
    pairs = zip(predictions, references, strict=True)
    return [(normalise(p), [normalise(a) for a in r.answers or (r.target,)]) for p, r in pairs]


def normalise(answer: str) -> str:
    """Lower the case, drop punctuation and articles, join white space (SQuAD's evaluation script)."""
    bare = "".join(c for c in answer.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def _word_f1(prediction: str, answer: str) -> float:
    words, truth = prediction.split(), answer.split()
    shared = sum((Counter(words) & Counter(truth)).values())
    # Two empty texts share no words either: so in SQuAD's and in T5's code.
    return 2 * shared / (len(words) + len(truth)) if shared else 0.0


# fmt: off
_DETERMINERS = frozenset((
    "a", "an", "few", "her", "his", "each", "every", "many", "much", "my", "our", "some",
    "that", "the", "their", "these", "this", "those", "which", "whose", "your",
))
# fmt: on


def wsc_accuracy(predictions: Sequence[str], references: Sequence[Example]) -> float:
    """Share of rows where "the model named the candidate" equals the row's label.

    The candidate is `Example.target`; the label is `Example.value`: 1.0 where it is the referent, else 0.0.
    Source: Raffel et al. 2020, section 2.4; T5's `wsc_simple` postprocessor.
    """
    right = []
    for prediction, reference in zip(predictions, references, strict=True):
        label = bool(_value(reference, "wsc_accuracy needs the row's label as a value"))
        # An empty prediction names nobody; without this it would be right for every false candidate.
        right.append(bool(_bare(prediction)) and names_candidate(prediction, reference.target) == label)
    return float(np.mean(right))


def names_candidate(prediction: str, candidate: str) -> bool:
    """WSC: does the generated referent name the row's candidate? An empty one does not."""
    said = _bare(prediction)
    return bool(said) and _same_referent(said, _bare(candidate))


def _bare(phrase: str) -> list[str]:
    return [w for w in phrase.lower().split() if w not in _DETERMINERS]


def _same_referent(said: list[str], referent: list[str]) -> bool:
    """Is one the other with words left out? "Bob" is not "Bob's hat"."""
    if any("'" in w for w in said) != any("'" in w for w in referent):
        return False
    return set(said) <= set(referent) or set(referent) <= set(said)


#: Every metric by name. exact_match is record_em under the name that free-text tasks expect.
METRICS: Mapping[str, Metric] = {
    "accuracy": accuracy,
    "f1": f1,
    "macro_f1": macro_f1,
    "matthews": matthews,
    "pearson": pearson,
    "spearman": spearman,
    "multirc_f1a": f1,
    "multirc_em": multirc_em,
    "record_f1": record_f1,
    "record_em": record_em,
    "wsc_accuracy": wsc_accuracy,
    "exact_match": record_em,
}
