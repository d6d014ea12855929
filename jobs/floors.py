"""Show what a recipe's tasks give away without understanding: the majority answer, and a bag of words.

    python jobs/floors.py RECIPE.yaml [more.yaml …] [key.sub=value …] [--zero-shot]

A method has learned something where it beats both. The bag of words is a logistic regression (for numbers: a ridge
regression) on TF-IDF of the input's words and word pairs, trained on the train split. Free text has no such floor.
--zero-shot: also what the recipe's backbone knows already, without prompts and untrained, scored as after training.
"""

import argparse
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "platform"))

from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline

from polyprompt import recipe
from polyprompt.config import DataConfig, RunConfig
from polyprompt.errors import PolypromptError
from polyprompt.reading import read_examples
from polyprompt.tasks import catalog, metrics
from polyprompt.tasks.records import Example, Task, TextTask


def floors(task: Task, data: DataConfig) -> tuple[float, float | None]:
    """Return the task's score of the most frequent training target, and of the bag of words (None for free text)."""
    train, validation = (
        [example for _, example in islice(read_examples(task, split), limit)]
        for split, limit in (
            (task.train_split, data.max_train_examples),
            (task.validation_split, data.max_validation_examples),
        )
    )
    most, _ = Counter(example.target for example in train).most_common(1)[0]
    majority = metrics.compute(task.metrics, [most] * len(validation), validation)["score"]
    if not (task.choices or train[0].value is not None):
        return majority, None
    return majority, metrics.compute(task.metrics, bag_of_words(train, validation), validation)["score"]


def bag_of_words(train: list[Example], validation: list[Example]) -> list[str]:
    """Return the predictions of a linear model on TF-IDF."""
    numeric = train[0].value is not None
    vectors = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
    model = make_pipeline(vectors, Ridge() if numeric else LogisticRegression(C=10, max_iter=2000))
    model.fit([e.input for e in train], [e.value if numeric else e.target for e in train])
    predicted = model.predict([e.input for e in validation])
    return [f"{value:.3f}" for value in predicted] if numeric else list(predicted)


def zero_shot(config: RunConfig, tasks: Sequence[Task]) -> dict[str, float]:
    """Return each task's score of the backbone as it is loaded: the run's validation rows, limits and `evaluate`.

    Without `data.max_input_tokens` an input may be longer than in training, by the prompt that is not there.
    """
    import torch

    from polyprompt import backbone as backbones
    from polyprompt.data import prepare
    from polyprompt.evaluate import evaluate
    from polyprompt.methods.full import Full
    from polyprompt.model import PromptedModel, input_limit
    from polyprompt.workers import Workers

    torch.set_num_threads(config.compute.cpus_per_worker)
    backbone = backbones.load(config.backbone, train=False, precision=config.train.precision, seed=config.train.seed)
    model = PromptedModel(backbone, Full())
    limit = input_limit(config, backbone, model.method)
    data = prepare(config, tasks, backbone.tokenizer, max_input_tokens=limit)
    workers = Workers(config.train.num_shards, config.compute.gradient_sum)
    return {name: own["score"] for name, own in evaluate(model, data, config, workers).items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arguments", nargs="+", metavar="RECIPE.yaml | key.sub=value")
    parser.add_argument("--zero-shot", action="store_true", help="the plain backbone too")
    options = parser.parse_intermixed_args()
    arguments = options.arguments
    shown = Table("Task", title="Scores without understanding")
    for heading in ("Majority", "Bag of words", *["Zero-shot"] * options.zero_shot):
        shown.add_column(heading, justify="right")
    try:
        config = recipe.load([Path(a) for a in arguments if "=" not in a], [a for a in arguments if "=" in a])
        tasks = [task for task in catalog.resolve(config) if not isinstance(task, TextTask)]
        found = {task.name: floors(task, config.data) for task in track(tasks, "floors", console=Console(stderr=True))}
        plain = zero_shot(config, tasks) if options.zero_shot else {}
    except PolypromptError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for name, (majority, bag) in found.items():
        own = [f"{plain[name]:.3f}"] if plain else []
        shown.add_row(name, f"{majority:.3f}", "" if bag is None else f"{bag:.3f}", *own)
    bags = [bag for _, bag in found.values()]
    mean = "" if None in bags else f"{statistics.fmean(bag for bag in bags if bag is not None):.3f}"
    shown.add_section()
    own = [f"{statistics.fmean(plain.values()):.3f}"] if plain else []
    shown.add_row("mean", f"{statistics.fmean(majority for majority, _ in found.values()):.3f}", mean, *own)
    Console().print(shown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
