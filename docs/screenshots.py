"""Makes the README's pictures: fills a database as the README says, and opens it in the MLflow UI.

    python docs/screenshots.py [--short] [--tracking-uri URI] [--out FOLDER]

`--short` trains for a minute less, for a trial; `--tracking-uri` takes a server that holds such runs already. Needs
Chromium (`apt-get install chromium`) and the extra `test`.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlflow import MlflowClient
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.support.browser import Ui, chromium, show_charts, show_model_metrics  # noqa: E402
from tests.support.servers import running  # noqa: E402

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

COLOURS = 128
METRICS = ("secondary_structure/test_3state_accuracy", "fitness/test_fitness_spearman")
CHARTS = "^(?!.*(baseline|balanced|per_seq)).*(accuracy|spearman)$"  # a user types it to see the main metrics alone
PARENT = "mlflow.parentRunId"
NO_BUTTON = "[data-assistant-ui] { visibility: hidden; }"  # MLflow's Assistant, which floats over the page


def main() -> None:
    """Fills, opens, photographs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="few steps and epochs")
    parser.add_argument("--tracking-uri", default="", help="MLflow server with the runs; by default they are made")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="folder for the pictures")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        server = options.tracking_uri or stack.enter_context(_filled(options.short))
        _photograph(stack.enter_context(chromium()), server, options.out)


@contextlib.contextmanager
def _filled(short: bool) -> Iterator[str]:
    """A server with what the README's commands leave: the main job, the demonstration, and all its checkpoints."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        uri = f"sqlite:///{folder}/mlflow.db"
        with contextlib.chdir(folder):  # where the default experiment keeps its artifacts from now on
            MlflowClient(uri).search_experiments()
        store = f"overrides=store={folder}/store" + (" dataset.num_epochs=1" if short else "")
        steps = ["-P", "steps=60"] if short else []
        out = folder / "pretrained"
        _mlflow_run(uri, "-P", store)
        _mlflow_run(uri, "-e", "pretrain", "-P", store, "-P", f"out={out}", *steps)
        _mlflow_run(uri, "-P", store, "-P", f"ckpt={out}/checkpoints/*", "-P", "config=configs/pretrain.yaml")
        with running(folder) as server:
            yield server.uri


def _mlflow_run(uri: str, *arguments: str) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "MLFLOW_TRACKING_URI": uri, "PATH": path}
    command = [sys.executable, "-m", "mlflow", "run", ".", "--env-manager", "local", *arguments]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, stdin=subprocess.DEVNULL)


def _photograph(browser: Browser, server: str, out: Path) -> None:
    client = MlflowClient(server)
    single, training, several = (_newest(client, kind) for kind in ("measurement", "training", "checkpoints"))

    page = Ui(browser, server, 1400, 1060).run(single)
    page.get_by_role("link", name=METRICS[0], exact=True).wait_for()
    if branch := client.get_run(single).data.tags.get("mlflow.source.git.branch"):  # of whoever makes the pictures
        page.get_by_text(branch, exact=True).evaluate_all("all => all.forEach(one => one.style.visibility = 'hidden')")
    _save(page, out / "mlflow-run.png")

    page = Ui(browser, server, 1400, 1140).run(training, "model-metrics")
    show_charts(page, CHARTS)
    _save(page, out / "mlflow-curve.png")

    page = Ui(browser, server, 1400, 1000).models()  # of which the list of columns takes all
    show_model_metrics(page, METRICS)
    page.set_viewport_size({"width": 1400, "height": 500})
    page.get_by_role("columnheader").filter(has_text=METRICS[1]).wait_for()
    _save(page, out / "mlflow-models.png")

    page = Ui(browser, server, 1400, 900).run(several)
    page.get_by_text("Show more").click()
    page.get_by_role("link", name=METRICS[0], exact=True).wait_for()
    _save(page, out / "mlflow-leaderboard.png")

    measured = client.search_runs(["0"], f"tags.`{PARENT}` = '{several}'", order_by=["attributes.start_time ASC"])
    page = Ui(browser, server, 1400, 1020).compare([measured[0].info.run_id, measured[-1].info.run_id])
    page.get_by_role("link", name=METRICS[0], exact=True).wait_for()
    page.get_by_text("Visualizations", exact=True).click()  # folded: of two runs the tables say more
    page.get_by_role("tab", name="Parallel Coordinates Plot").wait_for(state="hidden")
    page.get_by_text("Show diff only", exact=True).first.click()  # of the parameters
    page.get_by_text("cfg.device", exact=True).wait_for(state="hidden")
    _save(page, out / "mlflow-compare.png")

    with tempfile.TemporaryDirectory() as folder:
        page = _report(browser, client, single, "report.html", folder, (1200, 800))
        _save(page, out / "report.png")

        page = _report(browser, client, single, "report.html", folder, (390, 844), device_scale_factor=2)
        _save(page, out / "report-phone.png")

        last = max(client.list_artifacts(training, "downstream"), key=lambda one: int(f"0{one.path.partition('=')[2]}"))
        page = _report(browser, client, training, f"{last.path}/report.html", folder, (1200, 1500), color_scheme="dark")
        page.locator("summary").first.click()
        _save(page, out / "report-training.png")


def _report(
    browser: Browser, client: MlflowClient, run: str, path: str, folder: str, size: tuple[int, int], **options: Any
) -> Page:
    """The page of a measurement, as a file."""
    width, height = size
    page = browser.new_page(viewport={"width": width, "height": height}, **options)
    page.goto(Path(client.download_artifacts(run, path, folder)).as_uri())
    return page


def _newest(client: MlflowClient, kind: str) -> str:
    """The id of the newest run of a kind that is nested in no other."""
    runs = client.search_runs(["0"], f"tags.`downstream.kind` = '{kind}'")
    return next(str(run.info.run_id) for run in runs if PARENT not in run.data.tags)


def _save(page: Page, path: Path) -> None:
    """The window, in few colours: a picture in a repository should be small."""
    page.mouse.move(0, 0)  # what is hovered over shows tools
    page.add_style_tag(content=NO_BUTTON)
    shot = page.screenshot(animations="disabled")
    with Image.open(io.BytesIO(shot)) as image:
        image.convert("RGB").quantize(COLOURS).save(path, optimize=True)
    print(f"{path}: {path.stat().st_size // 1024} KB")
    page.close()


if __name__ == "__main__":
    main()
