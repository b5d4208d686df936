"""The MLflow UI in a real browser: what the tests of the UI and `docs/screenshots.py` have in common."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
CARD = "[data-testid='experiment-view-compare-runs-card']"  # of a chart
# The Assistant opens by itself at the first visit, over a quarter of the page; its button stays where scores may be.
QUIET = """
localStorage.setItem("mlflow.assistant.fab.autoOpenedOnFirstLoad_v1", "true");
localStorage.setItem("mlflow.assistant.panelOpen_v1", "false");
"""


def missing() -> str:
    """What this machine lacks to show a page; empty where it lacks nothing."""
    for package in ("playwright", "axe_playwright_python"):
        if find_spec(package) is None:
            return f"the package {package}"
    return "" if shutil.which("chromium") else "the program chromium"


@contextmanager
def chromium() -> Iterator[Browser]:
    """A headless Chromium of the system: Playwright's own download is not needed."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=ARGUMENTS)
        yield browser
        browser.close()


def barriers(page: Page) -> list[str]:
    """What axe finds on a page that keeps people with a screen reader, a keyboard or poor sight out."""
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page).response["violations"]
    return [f"{one['id']}: {node['html'][:200]}" for one in found for node in one["nodes"]]


class Ui:
    """The pages of the default experiment, each in a window of its own.

    MLflow's pages keep what they have loaded when only the address changes, and may then show a run without its
    artifacts; nothing is kept from window to window.
    """

    def __init__(self, browser: Browser, server: str, width: int = 1600, height: int = 1000) -> None:
        self.browser, self.server = browser, server
        self.size = (width, height)

    def runs(self, order_by: str = "") -> Page:
        """The table of runs, the one that is highest in the metric `order_by` first."""
        order = f"orderByKey=metrics.`{order_by}`&orderByAsc=false" if order_by else ""
        return self._open("experiments/0/runs", order)

    def run(self, run_id: str, tab: str = "") -> Page:
        """A tab of a run: none is the overview; `model-metrics`, `artifacts/report.html`."""
        return self._open(f"experiments/0/runs/{run_id}/{tab}".rstrip("/"))

    def models(self) -> Page:
        """The table of the checkpoints."""
        return self._open("experiments/0/models")

    def compare(self, run_ids: Sequence[str]) -> Page:
        """Runs side by side."""
        return self._open("compare-runs", f'runs={json.dumps(list(run_ids))}&experiments=["0"]')

    def _open(self, path: str, query: str = "") -> Page:
        """Without the workflow type, MLflow 3 opens its view of generative AI."""
        width, height = self.size
        page = self.browser.new_page(viewport={"width": width, "height": height})
        page.add_init_script(QUIET)
        page.goto(f"{self.server}/#/{path}?{query}&workflowType=machine_learning".replace("?&", "?"))
        return page


def show_columns(page: Page, metrics: Sequence[str]) -> None:
    """Adds metrics to the table of runs, as a user does."""
    page.locator("[role=gridcell]").first.wait_for()  # a search before the runs are there leaves its hits folded
    page.get_by_role("button", name="Columns", exact=True).click()
    for name in metrics:
        page.get_by_placeholder("Search columns").fill(name)
        page.locator(".du-bois-light-tree-title", has_text=re.compile(f"^{re.escape(name)}$")).click()
    page.get_by_role("heading", name="Runs").click()


def show_charts(page: Page, pattern: str) -> None:
    """Shows the charts of the metrics that match a regular expression, and waits until those in sight are drawn.

    MLflow draws those alone, and the others when they are scrolled to.
    """
    page.get_by_placeholder("Search metric charts").fill(pattern)
    page.wait_for_function(
        """([card, pattern]) => {
            const cards = [...document.querySelectorAll(card)];
            const seen = cards.filter(one => one.getBoundingClientRect().top < innerHeight);
            const wanted = cards.every(one => new RegExp(pattern).test(one.innerText.split("\\n")[0]));
            return cards.length && wanted && seen.every(one => one.querySelector(".js-plotly-plot .trace"));
        }""",
        arg=[CARD, pattern],
    )


def show_model_metrics(page: Page, metrics: Sequence[str]) -> None:
    """Has the table of models show these metrics alone, in columns as wide as their names.

    Of many metrics, MLflow shows none by itself, and keeps their part of the list folded.
    """
    page.locator("[role=gridcell]").first.wait_for()
    page.get_by_role("button", name="Columns", exact=True).click()
    tree = page.locator(".du-bois-light-tree")
    nodes = tree.locator(".du-bois-light-tree-treenode")
    tree.get_by_text("Parameters", exact=True).wait_for()
    for hidden in ("Status", "Logged from", "Registered models", "Dataset", "Metrics", "Parameters"):
        node = nodes.filter(has=page.get_by_text(hidden, exact=True))
        if node.locator(".du-bois-light-tree-checkbox-checked, .du-bois-light-tree-checkbox-indeterminate").count():
            tree.get_by_text(hidden, exact=True).click()
    folded = nodes.filter(has=page.get_by_text("Metrics", exact=True)).locator(".du-bois-light-tree-switcher_close")
    if folded.count():
        folded.click()
    for name in metrics:
        tree.locator(".du-bois-light-tree-treenode", has_text=f"Dataset: {name.split('/')[0]} test").locator(
            ".du-bois-light-tree-switcher"
        ).click()
        tree.get_by_text(name, exact=True).click()
    page.keyboard.press("Escape")
    for name in metrics:
        page.get_by_role("columnheader", name=name).locator(".ag-header-cell-resize").dblclick()
