"""Leaderboard, best recipe, plots and table of a study, read back and looked at."""

import csv
import io
import json
import math
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from random import Random

import matplotlib
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.text import Text
from rich.console import Console
from studies import KEYS, hyperprompt, mixed, smop, study, trial

from polyprompt.recipe import check, load
from tuning import study_plots, study_report
from tuning.spaces import configure
from tuning.study import Objective, Study
from tuning.study_importances import importances, weigh
from tuning.study_report import best_recipe, leaderboard, write

COST = Objective("num_trained_parameters", "min")


def shown(made: Study, **options: int) -> str:
    console = Console(width=220, file=io.StringIO())
    console.print(study_report.table(made, **options))
    return console.file.getvalue()  # type: ignore[attr-defined]


# --- leaderboard


def test_leaderboard_ranks_the_finished_and_keeps_the_rest(tmp_path: Path) -> None:
    write(mixed(), tmp_path)
    with (tmp_path / "leaderboard.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["number"] for row in rows] == ["2", "7", "3", "8", "9", "0", "1", "4", "5", "6"]
    assert [row["rank"] for row in rows] == ["1", "2", "3", "4", "5", "6", "", "", "", ""]
    assert list(rows[0])[:3] == ["rank", "number", "state"]
    assert list(rows[0])[3:9] == KEYS
    best, stopped, failed, waiting = rows[0], rows[6], rows[7], rows[9]
    assert (best["method.name"], best["method.reduction"], best["method.num_prompts"]) == ("hyperprompt", "4", "")
    assert (float(best["eval/mean"]), best["eval/mean std"], best["num_trained_parameters"]) == (0.9, "", "144000")
    assert (best["inference_flops"], best["num_steps"], best["seconds"]) == ("1288000", "400", "12.5")
    assert (stopped["state"], stopped["num_steps"], stopped["cause"]) == ("stopped", "100", "asha: step 100")
    assert (failed["eval/mean"], failed["cause"]) == ("", "out of memory: [GPU 0] | 12 GiB")
    assert (waiting["state"], waiting["num_trained_parameters"]) == ("waiting", "")


def test_leaderboard_has_mean_and_std_over_seeds() -> None:
    row = leaderboard(study([trial(0, smop(), 0.5, 0.7)]))[0]
    assert (row["eval/mean"], row["eval/mean std"]) == (pytest.approx(0.6), pytest.approx(math.sqrt(0.02)))
    assert (row["seeds"], row["num_steps"]) == ("1 2", 800)


def test_leaderboard_of_several_objectives_marks_the_front() -> None:
    made = study(
        [trial(0, smop(), 0.9, cost=900), trial(1, smop(), 0.8, cost=800), trial(2, smop(), 0.7, cost=850)],
        objectives=[Objective("eval/mean", "max"), COST],
    )
    rows = leaderboard(made)
    assert {row["number"]: row["front"] for row in rows} == {0: True, 1: True, 2: False}
    assert "num_trained_parameters std" not in rows[0]


def test_empty_study_has_a_header(tmp_path: Path) -> None:
    write(study([]), tmp_path)
    assert (tmp_path / "leaderboard.csv").read_text().startswith("rank,number,state,method.name,")
    assert "No trial has finished" in (tmp_path / "leaderboard.md").read_text()
    assert not list((tmp_path / "plots").iterdir())


def test_markdown_is_a_table_of_all_trials(tmp_path: Path) -> None:
    write(mixed(), tmp_path)
    text = (tmp_path / "leaderboard.md").read_text()
    lines = [line.replace(r"\|", "/") for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 10
    assert len({line.count("|") for line in lines}) == 1
    assert "| 1 | 2 | finished | hyperprompt | 0.001 |" in text
    assert "144,000" in lines[2]
    assert "Best: trial 2 (`method.name=hyperprompt`" in text
    assert "10 trials (6 finished, 1 stopped, 1 failed, 1 running, 1 waiting)" in text


# --- best.yaml


def test_best_recipe_is_the_trial_itself(tmp_path: Path) -> None:
    made = mixed()
    write(made, tmp_path)
    config = load([tmp_path / "best.yaml"])
    best = made.trials[2]
    assert config == configure(made.recipe, best.params, seed=1)
    assert config.identity() == configure(made.recipe, best.params, seed=1).identity()
    assert (config.name, config.train.seed, config.train.max_steps) == (None, 1, 400)
    method = config.method.model_dump()
    assert (method["reduction"], method["stacks"], method["variant"]) == (4, "both", "share")


def test_best_recipe_of_another_method_drops_the_bases_method_keys(tmp_path: Path) -> None:
    made = study([trial(0, smop(2.5e-5, 10, 3), 0.9)])
    write(made, tmp_path)
    config = load([tmp_path / "best.yaml"])
    expected = {"name": "smop", "num_prompts": 10, "length": 3}
    by_hand = check(
        {"tasks": ["embedded/nli"], "method": expected, "train": {"max_steps": 400, "seed": 1, "learning_rate": 2.5e-5}}
    )
    assert config == by_hand


@pytest.mark.parametrize("value", [None, True, "no", 1e-7, 3])
def test_best_recipe_keeps_the_type_of_a_value(value: object, tmp_path: Path) -> None:
    keys = {"NoneType": "backbone.dropout", "bool": "backbone.trainable", "str": "backbone.revision"}
    keys |= {"float": "train.learning_rate", "int": "evaluate.steps"}
    key = keys[type(value).__name__]
    made = study([trial(0, {key: value}, 0.9)], keys=[key])  # type: ignore[dict-item]
    (tmp_path / "best.yaml").write_text(best_recipe(made))
    section, name = key.split(".")
    found = getattr(getattr(load([tmp_path / "best.yaml"]), section), name)
    assert found == value
    assert type(found) is type(value)


def test_no_best_without_a_finished_trial(tmp_path: Path) -> None:
    write(mixed(), tmp_path)
    assert (tmp_path / "best.yaml").exists()
    write(study([trial(0, smop(), 0.5, state="stopped")]), tmp_path)
    assert not (tmp_path / "best.yaml").exists()


# --- plots


def test_plots_are_drawn_and_stale_ones_go(tmp_path: Path) -> None:
    backend = matplotlib.get_backend()
    write(mixed(), tmp_path)
    names = ["curves", "front_flops", "front_parameters", "importances", "parameters"]
    files = sorted((tmp_path / "plots").iterdir())
    assert [file.stem for file in files] == names
    for file in files:
        assert imread(file)[..., :3].std() > 0.02, f"{file.name} is blank"
    write(study([]), tmp_path)
    assert not list((tmp_path / "plots").iterdir())
    assert matplotlib.get_backend() == backend


def drawn(figure: Figure | None) -> Figure:
    assert figure is not None
    figure.draw_without_rendering()
    return figure


def test_parameter_plots_have_the_trials_that_have_the_key() -> None:
    figure = drawn(study_plots.parameters(mixed()))
    by_key = {axes.get_xlabel(): axes for axes in figure.axes if axes.get_visible()}
    assert list(by_key) == KEYS
    assert (by_key["train.learning_rate"].get_xscale(), by_key["method.reduction"].get_xscale()) == ("log", "linear")
    points = sorted(
        (float(line.get_xdata()[0]), float(line.get_ydata()[0])) for line in by_key["method.reduction"].lines
    )
    assert points == [(4.0, 0.9), (16.0, 0.8)]
    assert [tick.get_text() for tick in by_key["method.stacks"].get_xticklabels()] == ["both", "encoder"]
    assert figure.axes[0].get_ylabel() == "mean score"


def test_front_is_drawn_and_every_trial_is_named_without_overlap() -> None:
    figure = drawn(study_plots.front(mixed(), "num_trained_parameters"))
    axes = figure.axes[0]
    line = max(axes.lines, key=lambda line: len(line.get_xdata()))
    assert list(map(float, line.get_xdata())) == [2_000, 12_000, 30_000, 40_000, 50_000, 144_000]
    names = [text for text in axes.texts if text.get_text()]
    assert sorted(text.get_text() for text in names) == ["0", "2", "3", "7", "8", "9"]
    assert_apart(names)
    assert axes.get_xscale() == "log"
    assert "trained parameters" in axes.get_xlabel()
    assert "FLOPs" in drawn(study_plots.front(mixed(), "inference_flops")).axes[0].get_xlabel()


def test_names_in_a_crowd_do_not_overlap() -> None:
    random = Random(0)
    trials = [trial(i, smop(), random.gauss(0.8, 0.01), cost=random.choice([100, 5_000, 5_100])) for i in range(40)]
    figure = drawn(study_plots.front(study(trials), "num_trained_parameters"))
    names = figure.axes[0].texts
    assert len(names) > 20
    assert_apart(names)


def assert_apart(texts: list[Text]) -> None:
    boxes = [text.get_window_extent() for text in texts]
    assert not [pair for pair in combinations(boxes, 2) if pair[0].overlaps(pair[1])]


def test_pareto_agrees_with_trying_all_pairs() -> None:
    random, score = Random(1), Objective("eval/mean", "max")
    for _ in range(20):
        trials = [trial(i, smop(), random.randint(1, 6) / 8, cost=random.randint(1, 6)) for i in range(12)]
        points = [(t.mean("num_trained_parameters"), t.mean("eval/mean"), t) for t in trials]
        found = {(x, y) for x, y, _ in study_plots.pareto(points, score)}
        beaten = {(x, y) for x, y, _ in points for a, b, _ in points if a <= x and b >= y and (a, b) != (x, y)}
        assert found == {(x, y) for x, y, _ in points} - beaten


def test_curves_mark_where_trials_were_stopped() -> None:
    figure = drawn(study_plots.curves(mixed()))
    marks = {
        line.get_marker(): (float(line.get_xdata()[0]), float(line.get_ydata()[0]))
        for line in figure.axes[0].lines
        if line.get_marker() != "None"
    }
    assert marks == {"x": (100.0, 0.3)}
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["finished", "running", "stopped here", "best: trial 2"]


# --- importances


def many(score_of: str, count: int = 24) -> Study:
    random, trials = Random(2), []
    for number in range(count):
        rate, length = 10 ** random.uniform(-4, -2), random.choice([1, 3, 5, 10])
        prompts = random.choice([2, 4, 10, 20])
        params = smop(rate, prompts, length) if number % 2 else hyperprompt(rate, random.choice([4, 8, 16]))
        value = {"rate": -abs(math.log10(rate) + 3), "length": length / 10 if number % 2 else 0.2, "same": 0.5}[
            score_of
        ]
        trials.append(trial(number, params, value))
    return study(trials)


def test_the_key_that_matters_weighs_most() -> None:
    panels = weigh(many("rate"))
    assert [panel.title for panel in panels] == [
        "all finished (n = 24)",
        "method.name=hyperprompt (n = 12)",
        "method.name=smop (n = 12)",
    ]
    assert panels[0].weights["train.learning_rate"] > 0.8
    assert set(panels[0].weights) == {"method.name", "train.learning_rate"}
    assert set(panels[2].weights) == {"train.learning_rate", "method.num_prompts", "method.length"}
    assert all(sum(panel.weights.values()) == pytest.approx(1) for panel in panels)
    assert panels[1].unweighed == {"method.stacks": "one value only"}
    assert weigh(many("rate")) == panels


def test_a_conditional_key_weighs_where_it_exists() -> None:
    smop_panel = weigh(many("length"))[2]
    assert smop_panel.weights["method.length"] > 0.8


def test_what_cannot_be_weighed_says_why() -> None:
    assert set(weigh(many("same"))[0].unweighed.values()) == {"all scores are equal"}
    few = weigh(study([trial(0, smop(), 0.5), trial(1, smop(1e-2), 0.6)]))
    assert set(few[0].unweighed.values()) == {"needs 4 finished trials"}
    assert few[-1].unweighed == dict.fromkeys(["method.reduction", "method.stacks"], "no finished trial has it")
    texts = [text.get_text() for axes in drawn(importances(mixed())).axes for text in axes.texts]
    assert "needs 4 finished trials" in texts


# --- the terminal's table


def test_table_shows_best_first_with_causes_as_they_are() -> None:
    text = shown(mixed())
    lines = [line for line in text.splitlines() if line.startswith("│")]
    assert [line.split("│")[2].strip() for line in lines][:2] == ["2", "7"]
    assert "method hyperprompt, learning_rate 0.001, reduction 4, stacks both" in text
    assert "out of memory: [GPU 0] | 12 GiB" in text
    assert "144k" in lines[0]


def test_table_of_a_long_search_keeps_the_best_and_the_running() -> None:
    text = shown(mixed(), max_trials=2)
    lines = [line for line in text.splitlines() if line.startswith("│")]
    assert [line.split("│")[2].strip() for line in lines] == ["2", "7", "5"]
    assert "7 not shown" in text


def test_few_keys_get_their_own_columns_and_a_spread() -> None:
    made = study(
        [trial(0, {"train.learning_rate": 1e-3, "method.length": 5}, 0.5, 0.7)],
        keys=["train.learning_rate", "method.length"],
    )
    text = shown(made)
    assert "learning_rate" in text.splitlines()[2]
    assert "0.6 ± 0.14" in text


def test_report_is_the_same_after_the_file(tmp_path: Path) -> None:
    made = replace(mixed(), seconds=12.0)
    made.write(tmp_path / "study.json")
    read = Study.read(tmp_path / "study.json")
    assert json.dumps(leaderboard(read)) == json.dumps(leaderboard(made))
