"""The record of a study: what is best, what is on the front, and that the file keeps everything."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyprompt.errors import DataError
from tuning.study import Objective, SeedRun, State, Study, Trial

MEAN, PARAMETERS = "eval/mean", "num_trained_parameters"


def trial(number: int, *scores: float, state: State = "finished", cost: float = 1.0, **params: Any) -> Trial:
    runs = [
        SeedRun(seed, state=state, num_steps=10, seconds=2.0, metrics={MEAN: score, PARAMETERS: cost})
        for seed, score in enumerate(scores)
    ]
    return Trial(number, params, runs)


def study(*trials: Trial, objectives: tuple[Objective, ...] = (Objective(MEAN, "max"),)) -> Study:
    return Study("test", {"tasks": ["embedded/nli"]}, ["a"], list(objectives), "grid", "none", 0, list(trials))


def test_the_best_is_the_finished_trial_with_the_best_mean() -> None:
    made = study(trial(0, 0.5, 0.7), trial(1, 0.9, state="stopped"), trial(2, 0.6, 0.8), trial(3, math.nan))
    assert [t.number for t in made.ranked()] == [2, 0, 1, 3]
    best = made.best()
    assert best is not None
    assert best.number == 2
    assert best.mean(MEAN) == pytest.approx(0.7)
    assert best.std(MEAN) == pytest.approx(math.sqrt(0.02))
    assert best.num_steps == 20
    assert math.isnan(trial(0, 0.5).std(MEAN))
    assert math.isnan(trial(0, 0.5).mean("unknown"))
    assert [t.number for t in made.front()] == [2]
    assert study(trial(0, 0.9, state="failed")).best() is None


def test_fewer_is_better_where_the_objective_says_so() -> None:
    made = study(trial(0, 0.5, cost=3), trial(1, 0.4, cost=2), objectives=(Objective(PARAMETERS, "min"),))
    assert [t.number for t in made.ranked()] == [1, 0]


def test_states_of_trials() -> None:
    def state(*states: State) -> State:
        return Trial(0, {}, [SeedRun(i, state=s, cause=s) for i, s in enumerate(states)]).state

    assert state("finished", "finished") == "finished"
    assert state("finished", "waiting") == "running"
    assert state("finished", "stopped", "waiting") == "stopped"
    assert state("finished", "failed", "stopped") == "failed"
    assert state("waiting", "waiting") == "waiting"


POINTS = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12)


@settings(deadline=None)
@given(POINTS)
def test_the_front_is_what_nothing_beats(points: list[tuple[int, int]]) -> None:
    objectives = (Objective(MEAN, "max"), Objective(PARAMETERS, "min"))
    trials = [trial(i, float(score), cost=float(cost)) for i, (score, cost) in enumerate(points)]
    front = {t.number for t in study(*trials, objectives=objectives).front()}
    for i, (score, cost) in enumerate(points):
        beaten = any((s >= score and c <= cost) and (s > score or c < cost) for s, c in points)
        assert (i in front) != beaten


SCALARS = st.one_of(
    st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text(), st.none()
)


@settings(deadline=None)
@given(
    params=st.dictionaries(st.text(), SCALARS), value=st.floats(), curve=st.lists(st.tuples(st.integers(), st.floats()))
)
def test_the_file_keeps_everything(
    tmp_path_factory: pytest.TempPathFactory, params: dict[str, Any], value: float, curve: list[tuple[int, float]]
) -> None:
    path = tmp_path_factory.mktemp("study") / "study.json"
    run = SeedRun(7, "abc", "failed", "NaN", 3, 1.5, {MEAN: value}, curve, "/there")
    made = replace(study(Trial(4, params, [run])), seconds=3.5, parent_run_id="p")
    made.write(path)
    read = Study.read(path)
    assert repr(read) == repr(made)  # NaN equals itself there, and true is not 1


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        Study.read(tmp_path / "study.json")
    (tmp_path / "study.json").write_text('{"name": 3}')
    with pytest.raises(DataError, match=r"study\.json is not a study of this version"):
        Study.read(tmp_path / "study.json")
