"""A study as a person meets it: MLflow's own page in a real browser, over a real server."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
from matplotlib.image import imread
from test_study_tracking import SCORES, close, searched

from polyprompt.tracking_opening import RunHandle
from tuning.study import Study

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is absent: pip install -e '.[browser]'")
CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is absent: apt-get install chromium"),
]
START_SECONDS, PAGE_MS = 500, 200_000
SEARCHED = ["method.name", "train.learning_rate", "method.num_prompts", "method.length", "method.reduction"]


@pytest.fixture
def server(store: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An MLflow server on this machine alone, which the tracking of this process uses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{store}/mlflow.db"]
    command += ["--artifacts-destination", f"{store}/artifacts"]
    process = subprocess.Popen(
        command,
        env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        cwd=store,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    address = f"http://127.0.0.1:{port}"
    try:
        _wait_for(f"{address}/health", process)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        yield address
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.wait()


def _wait_for(address: str, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        with suppress(URLError, ConnectionError):
            urllib.request.urlopen(address, timeout=5).close()
            return
        time.sleep(0.5)
    pytest.fail(f"no MLflow server at {address}: exit status {process.poll()}")


@pytest.fixture
def page() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        opened = browser.new_page(viewport={"width": 1600, "height": 1100})
        opened.set_default_timeout(PAGE_MS)
        yield opened
        browser.close()


def test_a_study_is_decided_from_in_the_ui(server: str, page: Any, tmp_path: Path) -> None:
    parent, made = searched(tmp_path)
    assert close(parent, made, tmp_path / "out")
    assert _candidate(parent) == made.trials[2].runs[0].run_id
    _trials_compare(server, page, tmp_path, parent, made)
    _parent_shows_the_leaderboard(server, page, tmp_path, parent)


def _trials_compare(server: str, page: Any, tmp_path: Path, parent: RunHandle, made: Study) -> None:
    page.goto(f"{server}/#/experiments/{parent.experiment_id}/runs")
    with suppress(sync_api.TimeoutError):  # a panel of MLflow's that may be open
        page.get_by_role("button", name="Close", exact=True).click(timeout=10_000)
    _select_trials(page, len(made.trials))
    picture(page, tmp_path / "runs.png")
    page.get_by_role("button", name="Compare", exact=True).click()
    page.get_by_text("Comparing 4 Runs from 1 Experiment").wait_for()

    table = rows_of(page)
    for key in SEARCHED:
        assert set(table[key]) == {_shown(trial.params.get(key)) for trial in made.trials}, key
    metrics = page.locator("body").inner_text().partition("\nMetrics\n")[2].partition("\nArtifacts\n")[0].splitlines()
    assert {"objective/eval/mean", "num_trained_parameters", *map(str, SCORES)} <= set(metrics)
    assert "(unknown)" not in table["End Time:"]
    assert set(table["polyprompt.state"]) == {"finished", "stopped"}
    picture(page, tmp_path / "compare.png")

    page.get_by_role("button", name="Clear All").click()
    for key in SEARCHED[:3]:
        _choose(page, 0, key)
    _choose(page, 1, "objective/eval/mean")
    plot = page.locator(".js-plotly-plot").first
    for name in (*SEARCHED[:3], "objective/eval/mean"):
        plot.get_by_text(name, exact=True).first.wait_for()
    picture(page, tmp_path / "parallel_coordinates.png")


def _parent_shows_the_leaderboard(server: str, page: Any, tmp_path: Path, parent: RunHandle) -> None:
    page.goto(f"{server}/#/experiments/{parent.experiment_id}/runs/{parent.run_id}")
    page.locator("td", has_text="hyperprompt").first.wait_for()
    page.locator("th", has_text="train.learning_rate").first.wait_for()
    page.get_by_text("best/eval/mean").first.wait_for()
    picture(page, tmp_path / "parent.png")


def picture(page: Any, path: Path) -> None:
    page.wait_for_timeout(1500)  # until what moves has come to rest
    page.screenshot(path=path)
    assert imread(path)[..., :3].std() > 0.02, f"{path} is blank"


def rows_of(page: Any) -> dict[str, list[str]]:
    """Return the rows of the comparison's tables by their heading."""
    page.locator("tr", has_text="train.learning_rate").first.wait_for()
    page.get_by_text("objective/eval/mean", exact=True).first.wait_for()
    texts = [row.locator("th, td").all_inner_texts() for row in page.locator("tr").all()]
    return {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in texts if cells}


def _shown(value: object) -> str:
    return "" if value is None else str(value)


def _select_trials(page: Any, count: int) -> None:
    """Open the study's row and tick its trials."""
    name = page.get_by_role("link", name="methods", exact=True)
    name.locator("xpath=ancestor::div[@role='gridcell']").locator("button").first.click()
    for number in range(count):
        link = page.get_by_role("link", name=f"trial_{number}", exact=True)
        row = link.locator("xpath=ancestor::div[@role='row']").get_attribute("row-index")
        page.locator(f"[role=row][row-index='{row}'] input.ag-checkbox-input").first.check()


def _choose(page: Any, box: int, key: str) -> None:
    """Pick a key in one of the plot's two boxes; only the options in view exist, so the list is scrolled."""
    page.get_by_role("combobox").nth(box).locator("xpath=ancestor::div[contains(@class, 'select-selector')]").click()
    options = page.locator("[class*=select-item-option-content]:visible")
    options.first.wait_for()
    wanted = options.filter(has_text=re.compile(f"^{re.escape(key)}$"))
    for top in range(0, 6000, 150):
        page.locator("[class*=virtual-list-holder]:visible").first.evaluate(f"list => {{ list.scrollTop = {top} }}")
        page.wait_for_timeout(100)
        if wanted.count():
            wanted.first.click()
            page.keyboard.press("Escape")
            return
    pytest.fail(f"{key} is not among the options")


def _candidate(parent: RunHandle) -> str:
    from mlflow import MlflowClient

    return str(MlflowClient(tracking_uri=parent.uri).get_model_version_by_alias("methods", "candidate").run_id)
