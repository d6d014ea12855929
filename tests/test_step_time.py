"""The model of a step's time: it finds known constants again, and a dry run says what it knows."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from polyprompt import plan_report, step_time
from polyprompt.errors import ConfigError, DataError
from polyprompt.plan import plan
from polyprompt.recipe import check
from polyprompt.step_time import Load, Rates, StepTime

KNOWN = StepTime(per_flop=1.3e-11, per_flop_by_hidden=2e-9, per_pass=4e-3, per_trained_byte=3e-10, per_sent_byte=1.5e-9)
LOADS = [
    Load(flops, hidden, passes, trained, workers)
    for hidden, size in ((256, 2e10), (512, 1e11), (768, 4e11))
    for flops, passes in ((size, 4), (8 * size, 1))
    for trained in (30_000, 200 * hidden**2)
    for workers in (1, 2)
]


def test_known_constants_are_found_again() -> None:
    found = step_time.fit(LOADS, [KNOWN.seconds(load) for load in LOADS])
    assert list(found.model_dump().values())[:5] == pytest.approx(list(KNOWN.model_dump().values())[:5], rel=1e-6)


def test_noise_moves_an_estimate_by_no_more_than_itself() -> None:
    random = np.random.default_rng(0)
    noisy = [KNOWN.seconds(load) * (1 + random.normal(0, 0.02)) for load in LOADS]
    others = [load._replace(flops=load.flops * 3, passes=2) for load in LOADS]
    found = step_time.fit(LOADS, noisy)
    assert step_time.error(found, others, [KNOWN.seconds(load) for load in others]) < 0.04


def test_two_workers_halve_the_work_and_add_the_way_between_them() -> None:
    one, two = (KNOWN.seconds(Load(1e12, 768, 1, 10**9, workers)) for workers in (1, 2))
    sent = KNOWN.per_sent_byte * 10**9 / 2
    kept = KNOWN.per_pass + KNOWN.per_trained_byte * 10**9
    assert two - kept == pytest.approx((one - kept) / 2 + sent)


def test_too_few_steps_are_refused() -> None:
    with pytest.raises(ConfigError, match="at least 5 measured steps, not 4"):
        step_time.fit(LOADS[:4], [1.0] * 4)


def test_rates_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "rates.json"
    assert step_time.read(path) is None
    rates = Rates(machine="a machine", fits={}).with_fits({"fp32, 2 threads": KNOWN})
    step_time.write(path, rates)
    assert step_time.read(path) == rates
    path.write_text('{"machine": 3}')
    with pytest.raises(DataError, match=r"machine: .*python jobs/benchmark\.py --fit"):
        step_time.read(path)
    path.write_text("{")
    with pytest.raises(DataError, match="holds no measured rates"):
        step_time.read(path)


def test_a_dry_run_estimates_by_what_was_measured(
    small_run: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config = check(small_run)
    checked = plan(config)
    load = checked.step
    assert (load.passes, load.workers) == (4, 1)
    assert load.trained_bytes == 4 * checked.num_trained_parameters
    unknown = plan_report.time_line(checked, config)
    assert "no rates were measured here for fp32, 1 thread. Measure them: python jobs/benchmark.py --fit" in unknown
    known = StepTime(**dict.fromkeys(StepTime.model_fields, 0.0) | {"per_pass": 1.0, "held_out_error": 0.07})
    step_time.write(step_time.file(), Rates(machine="this machine", fits={"fp32, 1 thread": known}))
    said = plan_report.time_line(checked, config)
    # 12 steps of 4 passes of a second.
    assert "about 0:00:48 to train 12 steps of 4 s" in said
    assert "rates measured on this machine: fp32, 1 thread, within 7% on steps held out" in said
    other = check({**small_run, "compute": {"cpus_per_worker": 2}})
    assert "for fp32, 2 threads (there are: fp32, 1 thread)" in plan_report.time_line(checked, other)
