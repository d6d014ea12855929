"""Spaces: what is drawn is inside, conditional keys exist where they should, and bad recipes are explained."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from polyprompt.errors import ConfigError
from tuning import spaces
from tuning.constraints import Constraint
from tuning.schema import Space, check
from tuning.spaces import Params, Search, configure
from tuning.study import Scalar

BASE = {"tasks": ["embedded/nli", "embedded/wic"], "evaluate": {"steps": 10}}
RECIPES = sorted((Path(__file__).parents[1] / "tuning" / "recipes").glob("*.yaml"))
Table = dict[str, Any]


def made(search: Table, base: Table = BASE) -> Search:
    return Search("test", base, check(search))


def refusal(search: Table, base: Table = BASE) -> str:
    with pytest.raises(ConfigError) as error:
        made(search, base)
    return str(error.value)


def some(values: list[Any]) -> st.SearchStrategy[list[Any]]:
    return st.lists(st.sampled_from(values), min_size=1, unique=True)


@st.composite
def method_spaces(draw: st.DrawFn) -> Table:
    """A space over methods, each with its own keys, one key shared by two of them with other values."""
    names = draw(some(["smop", "hyperprompt", "prompt_tuning"]))
    space: Table = {"method.name": {"choice": names}}
    if "smop" in names:
        space["method.num_prompts"] = {"choice": draw(some([1, 2, 4, 10])), "when": {"method.name": "smop"}}
    lengths = []
    if "smop" in names:
        lengths.append({"choice": draw(some([1, 3, 5, 10])), "when": {"method.name": "smop"}})
    if "prompt_tuning" in names:
        lengths.append(
            {"quniform": [10, 50, draw(st.sampled_from([10, 20, 40]))], "when": {"method.name": ["prompt_tuning"]}}
        )
    if lengths:
        space["method.length"] = lengths
    if "hyperprompt" in names:
        space["method.stacks"] = {"choice": draw(some(["both", "encoder"])), "when": {"method.name": "hyperprompt"}}
        deeper = {"method.name": "hyperprompt", "method.stacks": "both"}
        space["method.decoder_length"] = {"randint": [1, draw(st.integers(2, 4))], "when": deeper}
    space["train.adam_beta2"] = {"choice": draw(some([0.9, 0.98, 0.999]))}
    return space


def brute_force(space: Table, limit: int) -> set[tuple[tuple[str, Scalar], ...]]:
    """Every combination of the values of every key and branch, written without conditions; absent keys dropped."""
    branches = {key: value if isinstance(value, list) else [value] for key, value in space.items()}
    keys = list(branches)
    everything = [[Space.model_validate(b).values() or [] for b in branches[key]] for key in keys]
    found = set()
    for values in itertools.product(*(sorted({v for own in e for v in own}, key=repr) for e in everything)):
        full = dict(zip(keys, values, strict=True))
        kept: Params = {}
        fits = True
        for key in keys:
            own = [b for b in branches[key] if all(
                kept.get(k) in (v if isinstance(v, list) else [v]) for k, v in b.get("when", {}).items()
            )]  # fmt: skip
            if own:
                fits = fits and full[key] in (Space.model_validate(own[0]).values() or [])
                kept[key] = full[key]
        smop = kept.get("method.num_prompts"), kept.get("method.length")
        if fits and (smop[0] is None or smop[0] * smop[1] <= limit):  # type: ignore[operator]
            found.add(tuple(sorted(kept.items())))
    return found


@settings(max_examples=40, deadline=None)
@given(space=method_spaces(), limit=st.integers(5, 60))
def test_the_grid_is_every_allowed_combination_once(space: Table, limit: int) -> None:
    expected = brute_force(space, limit)
    constraints = [f"method.num_prompts * method.length <= {limit}"] if "method.num_prompts" in space else []
    recipe = {"space": space, "searcher": "grid", "constraints": constraints}
    if not expected:
        assert "allow no configuration" in refusal(recipe)
        return
    grid = made(recipe).enumerated
    assert grid is not None
    assert len(grid) == len(expected)
    assert {tuple(sorted(params.items())) for params in grid} == expected


@settings(max_examples=25, deadline=None)
@given(space=method_spaces(), seed=st.integers(0, 1000), high=st.floats(2e-4, 1.0))
def test_random_draws_are_different_inside_and_the_same_again(space: Table, seed: int, high: float) -> None:
    space = {**space, "train.learning_rate": {"loguniform": [1e-4, high]}, "train.weight_decay": {"uniform": [0, high]}}
    recipe = {"space": space, "searcher": "random", "num_trials": 6, "seed": seed}
    drawn = made(recipe).enumerated
    assert drawn is not None
    assert len(drawn) == 6
    assert len({repr(params) for params in drawn}) == 6
    assert made({**recipe, "num_trials": 3}).enumerated == drawn[:3]
    assert made(recipe).enumerated == drawn
    for params in drawn:
        assert 1e-4 <= params["train.learning_rate"] <= high  # type: ignore[operator]
        assert 0 <= params["train.weight_decay"] <= high  # type: ignore[operator]
        assert own_keys(params)


def own_keys(params: Params) -> bool:
    """Are the method's keys those of its own config?"""
    own = {
        "smop": {"method.num_prompts", "method.length"},
        "hyperprompt": {"method.stacks", "method.decoder_length"},
        "prompt_tuning": {"method.length"},
    }
    method = str(params["method.name"])
    keys = {key for key in params if key.startswith("method.")} - {"method.name"}
    return keys <= own[method] and (("method.decoder_length" in keys) == (params.get("method.stacks") == "both"))


@pytest.mark.slow  # Ray Tune and Optuna are imported
@pytest.mark.parametrize("searcher", ["tpe", "nsga2"])
def test_optuna_draws_inside_the_conditions_and_constraints(searcher: str) -> None:
    from tuning.sampler import Learned

    space = {
        "method.name": {"choice": ["smop", "hyperprompt", "prompt_tuning"]},
        "method.num_prompts": {"choice": [2, 4, 10, 20], "when": {"method.name": "smop"}},
        "method.length": [
            {"choice": [1, 3, 5, 10], "when": {"method.name": "smop"}},
            {"quniform": [10, 50, 20], "when": {"method.name": "prompt_tuning"}},
        ],
        "method.stacks": {"choice": ["both", "encoder"], "when": {"method.name": "hyperprompt"}},
        "method.decoder_length": {"randint": [1, 4], "when": {"method.stacks": "both"}},
        "train.learning_rate": {"loguniform": [1e-4, 1e-1]},
        "train.adam_beta2": {"quniform": [0.9, 0.99, 0.01]},
    }
    objectives = ["eval/mean", "num_trained_parameters"] if searcher == "nsga2" else ["eval/mean"]
    search = made({
        "space": space, "searcher": searcher, "num_trials": 40, "objectives": objectives,
        "constraints": ["method.num_prompts * method.length <= 40"],
    })  # fmt: skip
    source = Learned(search, [])
    for number in range(40):
        params = source.suggest(number)
        assert params is not None
        assert own_keys(params)
        assert search.allows(params)
        search.run_config(params)
        values = {"eval/mean": float(params["train.learning_rate"]), "num_trained_parameters": float(number)}  # type: ignore[arg-type]
        source.tell(number, {} if number % 7 == 3 else values, failed=number % 7 == 5)
    assert source.suggest(40) is None


@pytest.mark.parametrize(
    ("text", "values", "holds"),
    [
        ("method.num_prompts * method.length <= 100", {"method.num_prompts": 20, "method.length": 5}, True),
        ("method.num_prompts * method.length <= 100", {"method.num_prompts": 20, "method.length": 6}, False),
        ("method.num_prompts * method.length <= 100", {"method.num_prompts": 20}, True),
        ("1 < a.b < 3 or not a.c", {"a.b": 5, "a.c": False}, True),
        ("a.name != 'full' and a.x % 2 == 0", {"a.name": "smop", "a.x": 3}, False),
        ("-a.x // 2 + 1.5 >= a.x / 2 - 1", {"a.x": 1}, True),
    ],
)
def test_constraints_are_computed(text: str, values: dict[str, Scalar], holds: bool) -> None:
    assert Constraint(text).holds(values) is holds


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("__import__('os').system('true')", "which is not allowed"),
        ("a.b ** 9 < 3", "which is not allowed"),
        ("a.b < (lambda: 3)()", "which is not allowed"),
        ("a.b <", "cannot be read"),
        ("1 < 2", "names no config key"),
    ],
)
def test_other_expressions_are_refused(text: str, what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        Constraint(text)


def test_a_constraint_that_cannot_be_computed_says_so() -> None:
    with pytest.raises(ConfigError, match=r"cannot be computed for a\.b='x'"):
        Constraint("a.b < 3").holds({"a.b": "x"})


LENGTH = {"method.encoder_length": {"choice": [1, 2]}}


@pytest.mark.parametrize(
    ("search", "what"),
    [
        ({"space": LENGTH, "schedulr": "asha"}, "search.schedulr: unknown key. Did you mean 'scheduler'"),
        ({"space": LENGTH, "scheduler": "ashs"}, "unknown scheduler 'ashs'; known: none, asha, median"),
        ({"space": LENGTH, "scheduler": {"name": "asha", "grace_step": 3}}, "Did you mean 'grace_steps'"),
        ({"space": LENGTH, "num_trials": 3}, "num_trials does not go with searcher=grid"),
        ({"space": LENGTH, "searcher": "random"}, "num_trials is required for searcher=random"),
        ({"space": LENGTH, "searcher": "random", "num_trials": 3}, "holds only 2 different configurations"),
        ({"space": {"method.encodr_length": {"choice": [1]}}}, "Did you mean 'encoder_length'"),
        ({"space": {"method.encoder_length": {"choice": [-1]}}}, "refuses method.encoder_length=-1"),
        ({"space": {"method.encoder_length": {"uniform": [1, 3]}}}, "has no end of values"),
        ({"space": {"method.encoder_length": {"choice": [1], "randint": [1, 3]}}}, "give exactly one of"),
        ({"space": {"method.encoder_length": {"randint": [3, 3]}}}, "low 3 must be below high 3"),
        ({"space": {"train.learning_rate": {"loguniform": [0, 3]}}}, "greater than 0"),
        ({"space": {"method.encoder_length": {"quniform": [1, 4, 2]}}}, "must be a multiple of q = 2"),
        ({"space": {"train.seed": {"choice": [1]}}}, "use search.seeds"),
        ({"space": {"compute.num_workers": {"choice": [1]}}}, "this key cannot be searched"),
        ({"space": {"method.length": {"choice": [1], "when": {"method.nam": "smop"}}}}, "not a searched key"),
        ({"space": {"method.name": {"choice": ["smop", "full"]}, "method.length": {"choice": [1]}}},
         "refuses method.name=full, method.length=1:\nmethod.length: unknown key"),
        ({"space": LENGTH, "objectives": "eval/men"}, "Did you mean 'eval/mean'"),
        ({"space": LENGTH, "objectives": "eval/embedded/copa/score"}, "unknown metric"),
        ({"space": LENGTH, "objectives": "step_seconds", "scheduler": "asha"}, "compares scores"),
        ({"space": LENGTH, "constraints": ["method.lengths < 3"]}, "neither searched nor a key"),
        ({"space": LENGTH, "constraints": ["method.encoder_length < 1"]}, "allow no configuration"),
        ({"space": LENGTH, "seeds": [1, 1]}, "lists one twice"),
    ],
)  # fmt: skip
def test_a_bad_search_is_refused_and_explained(search: Table, what: str) -> None:
    with pytest.raises(ConfigError) as error:
        made({"searcher": "grid", **search})
    assert what in str(error.value)


RATE = {"train.learning_rate": {"loguniform": [1e-4, 1e-2]}}
PBT = {"space": RATE, "searcher": "random", "num_trials": 4, "scheduler": "pbt"}


@pytest.mark.parametrize(
    ("search", "run", "what"),
    [
        ({"space": LENGTH}, {}, "search: space.method.encoder_length: with scheduler=pbt every searched key changes"),
        ({"space": {**RATE, "train.optimizer": {"choice": ["adamw"]}}}, {}, "Keys that may: train.learning_rate, "),
        ({"space": {**RATE, "backbone.dropout": {"choice": [0.1], "when": {"train.learning_rate": 1e-3}}}}, {},
         "when does not go with scheduler=pbt"),
        ({"searcher": "tpe"}, {}, "searcher=tpe does not go with scheduler=pbt"),
        ({"num_trials": 1}, {}, "a trial needs others"),
        ({"constraints": ["train.learning_rate < 1"]}, {}, "constraints do not go with scheduler=pbt"),
        ({"seeds": [1, 2]}, {}, "seeds [1, 2]: scheduler=pbt needs a single one"),
        ({"objectives": ["eval/mean", "inference_flops"]}, {}, "needs a single one that is a score"),
        ({"objectives": "inference_flops"}, {}, "needs a single one that is a score"),
        ({"scheduler": {"name": "pbt", "perturbation_steps": 6}}, {}, "must be a multiple of evaluate.steps=4"),
        ({"scheduler": {"name": "pbt", "perturbation_steps": 12}}, {}, "must be below train.max_steps=12"),
        ({"scheduler": {"name": "pbt", "perturbation_step": 4}}, {}, "Did you mean 'perturbation_steps'"),
        ({"scheduler": {"name": "pbt", "quantile_fraction": 0.6}}, {}, "less than or equal to 0.5"),
        ({}, {"evaluate": {"steps": 4, "early_stopping_patience": 2}}, "early_stopping_patience does not go with"),
        ({}, {"evaluate": {}}, "set evaluate.steps"),
    ],
)  # fmt: skip
def test_what_cannot_be_perturbed_is_refused(search: Table, run: Table, what: str) -> None:
    assert what in refusal({**PBT, **search}, {**BASE, "evaluate": {"steps": 4}, "train": {"max_steps": 12}, **run})


def test_a_scheduler_needs_evaluations_on_the_way() -> None:
    recipe = {"space": LENGTH, "searcher": "grid", "scheduler": "asha"}
    assert "set evaluate.steps" in refusal(recipe, {**BASE, "evaluate": {}})


def test_another_method_starts_a_fresh_table() -> None:
    base: dict[str, Any] = {
        **BASE, "method": {"name": "hyperprompt", "reduction": 4}, "train": {"learning_rate": 1e-3}
    }  # fmt: skip
    config = configure(
        base, {"method.name": "smop", "method.length": 3, "train.group_learning_rates.prompt": 0.1}, seed=7
    )
    assert config.method.name == "smop"
    assert config.train.seed == 7
    assert config.train.group_learning_rates == {"prompt": 0.1}
    assert configure(base, {"method.encoder_length": 3}).method.reduction == 4  # type: ignore[union-attr]
    base["train"]["group_learning_rates"] = {"prompt": 0.2, "hypernetwork": 0.3}
    assert configure(base, {"method.name": "smop"}).train.group_learning_rates == {"prompt": 0.2}


def test_overrides_reach_the_run_and_the_search(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(yaml.safe_dump({**BASE, "train": {"max_steps": 7}}))
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        yaml.safe_dump({"search": {"base": "base.yaml", "space": LENGTH, "searcher": "grid", "scheduler": "asha"}})
    )
    search = spaces.load([recipe], ["train.batch_size=8", "search.scheduler.grace_steps=20", "search.seeds=[1,2]"])
    assert search.name == "mine"
    assert (search.run.train.max_steps, search.run.train.batch_size) == (7, 8)
    assert search.config.scheduler.model_dump() == {"name": "asha", "grace_steps": 20, "reduction_factor": 3.0}
    assert search.config.seeds == [1, 2]
    recipe.write_text(yaml.safe_dump(BASE))
    with pytest.raises(ConfigError, match="has no `search` section"):
        spaces.load([recipe])


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_are_sound(path: Path) -> None:
    search = spaces.load([path])
    assert search.samples(5)
    for params in search.samples(50):
        if "method.name" in search.keys:
            assert search.run_config(params).method.name == params["method.name"]


def test_the_papers_grid_is_shipped() -> None:
    grid = spaces.load([p for p in RECIPES if p.stem == "smop_prompts"]).enumerated
    assert grid is not None
    assert {(p["method.num_prompts"], p["method.length"]) for p in grid} == set(
        itertools.product((2, 4, 10, 20), (1, 3, 5, 10))
    )
