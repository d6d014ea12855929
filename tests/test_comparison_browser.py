"""A comparison as a person meets it: its page in a real browser, without a network."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread
from test_comparison import Demo, compare, demo  # noqa: F401  (a fixture)

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is absent: pip install -e '.[browser]'")
CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is absent: apt-get install chromium"),
]
PAGE_MS = 200_000


def test_the_page_is_whole_without_a_network(demo: Demo, tmp_path: Path) -> None:  # noqa: F811
    done = compare(demo, tmp_path / "out", "experiment=demo", "--baseline", "smop", "--rows", "2")
    assert done.returncode == 0, done.stderr
    asked: list[str] = []
    complaints: list[str] = []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        page: Any = browser.new_context(viewport={"width": 1280, "height": 900}, offline=True).new_page()
        page.set_default_timeout(PAGE_MS)
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        address = (tmp_path / "out" / "compare.html").as_uri()
        page.goto(address)
        assert [url for url in asked if not url.startswith("data:")] == [address]
        assert complaints == []
        # Nothing is wider than the window, and every figure has a size.
        assert page.evaluate("document.documentElement.scrollWidth") <= 1280
        boxes = [figure.bounding_box() for figure in page.locator("section > figure > svg").all()]
        assert len(boxes) >= 8
        assert all(box["width"] > 300 and box["height"] > 150 for box in boxes)
        assert page.locator("table.scores").first.locator("tr.baseline td").first.inner_text() == "smop (baseline)"
        page.get_by_text("Training loss by task", exact=True).first.click()
        assert page.locator("details figure svg").first.is_visible()
        page.screenshot(path=tmp_path / "page.png", full_page=True)
        browser.close()
    assert imread(tmp_path / "page.png")[..., :3].std() > 0.02
