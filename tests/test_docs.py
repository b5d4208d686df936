"""The documentation says what is so: its snippets run, its commands exist, its links lead somewhere."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import threading
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from mlflow import MlflowClient

import pipeline
from pipeline.config.yaml_file import read_config
from tests.support.browser import chromium, missing
from tests.support.programs import ROOT
from tests.support.snippets import PREPARED, Block, blocks, clone

PAGES = ["README.md", "benchmarks/README.md", "sample/README.md"]
PAGES += sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))
FRAGMENT = "model:\n  dwnstr_task_validation:\n    dataset: {dataset_path: d, target_column: y}\n"


def runs(block: Block) -> bool:
    return block.language == "python" and not block.title and not block.mark.startswith("not run: ")


def commands(block: Block) -> bool:
    return block.language == "bash" and block.mark == "runnable"


def pages_with(kind: Any) -> list[str]:
    return [page for page in PAGES if any(map(kind, blocks(ROOT / page)))]


@pytest.fixture
def folder(tmp_path: Path, tracking: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A clone with small configurations: the current folder, whose modules can be imported, and the home folder."""
    clone(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def written(block: Block, folder: Path) -> None:
    """Writes a block that has a title; what the page calls `my.yaml` stays the small one."""
    if block.title and block.title != "my.yaml":
        (folder / block.title).write_text(block.text)


@pytest.mark.parametrize("page", pages_with(runs))
def test_the_python_of_a_page_runs(page: str, folder: Path) -> None:
    """In one process per page, after what it takes for granted."""
    names: dict[str, Any] = {"__name__": "__main__", **PREPARED.get(page, dict)()}
    own = set()
    for block in blocks(ROOT / page):
        written(block, folder)
        own |= {Path(block.title).stem} if block.title.endswith(".py") else set()
        if runs(block):
            exec(compile("\n" * (block.line - 1) + block.text, str(ROOT / page), "exec"), names)
    for name in own:
        sys.modules.pop(name, None)
    if page == "docs/store.md":
        assert names["vectors"].shape == (len(names["table"]), 96)


def run(command: list[str], folder: Path, **variables: str) -> None:
    path = f"{folder}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables}
    subprocess.run(command, cwd=folder, env=environment, check=True, stdin=subprocess.DEVNULL)


@pytest.mark.slow
@pytest.mark.parametrize("page", pages_with(commands))
def test_the_commands_of_a_page_run(page: str, folder: Path) -> None:
    for block in blocks(ROOT / page):
        written(block, folder)
        if commands(block):
            run(["bash", "-euo", "pipefail", "-c", block.text], folder)


@pytest.mark.slow
def test_a_task_of_the_array_measures_its_checkpoint(folder: Path, tracking: str) -> None:
    for name in ("step=1", "step=2", "step=10"):
        (folder / name).symlink_to(ROOT / "sample" / "checkpoint")
    for index in ("2", "3"):  # there is no checkpoint 3, which is said
        job = ["bash", "examples/slurm/measure.sh", "step=*", "my.yaml"]
        run(job, folder, VENV=sys.prefix, SLURM_ARRAY_TASK_ID=index)
    runs = [one for one in MlflowClient(tracking).search_runs(["0"]) if "mlflow.parentRunId" not in one.data.tags]
    assert [(one.info.status, one.info.run_name.partition(" 0.")[0]) for one in runs] == [
        ("FINISHED", "step=10: fitness")
    ]


@pytest.mark.slow
def test_the_job_of_a_training_runs_two_ranks(folder: Path, tracking: str) -> None:
    """Slurm's `srun` on one node starts the command as it is."""
    (folder / "srun").write_text('#!/bin/sh\nexec "$@"\n')
    (folder / "srun").chmod(0o755)
    ranks = {"SLURM_GPUS_ON_NODE": "2", "SLURM_CPUS_PER_TASK": "2", "PORT": "0"}
    script = ["examples/huggingface_trainer.py", "--steps", "2", "--config", "my.yaml"]
    run(["bash", "examples/slurm/train.sh", *script], folder, VENV=sys.prefix, **ranks)
    (one,) = [one for one in MlflowClient(tracking).search_runs(["0"]) if "mlflow.parentRunId" not in one.data.tags]
    assert "test_fitness_probe_spearman" in one.data.metrics


@pytest.mark.parametrize("page", PAGES)
def test_the_configurations_of_a_page_are_read(page: str, tmp_path: Path) -> None:
    for block in blocks(ROOT / page):
        if block.language == "yaml":
            text = block.text if "dwnstr_task_validation" in block.text else FRAGMENT + block.text
            path = tmp_path / f"{block.line}.yaml"
            path.write_text(text)
            read_config(path)


@pytest.mark.parametrize("page", PAGES)
def test_mlflow_run_has_the_parameters_of_a_page_and_the_overrides_are_keys(page: str) -> None:
    entries = yaml.safe_load((ROOT / "MLproject").read_text())["entry_points"]
    text = (ROOT / page).read_text(encoding="utf-8")
    for line in re.findall(r"^ *mlflow run \. (.*?)(?: {4,}#.*)?$", text, re.MULTILINE):
        words = shlex.split(line)
        entry = words[words.index("-e") + 1] if "-e" in words else "main"
        given = dict(words[i + 1].split("=", 1) for i, word in enumerate(words) if word == "-P")
        assert set(given) <= set(entries[entry]["parameters"]), line
        if not given.get("overrides", "store=").startswith("store="):
            read_config(ROOT / "configs" / "default.yaml", given["overrides"].replace("cuda", "cpu"))


class Links(HTMLParser):
    """What a page of the site loads, where it leads to, and the anchors in it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value for name, value in attrs if value}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        self.links += [values["href"]] if tag == "a" and "href" in values else []
        self.loaded += [values[name] for name in ("src", "href") if name in values and tag != "a"]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as strictly as MkDocs can."""
    made = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(made)]
    built = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    )
    assert built.returncode == 0, built.stdout + built.stderr
    return made


def test_every_link_of_the_site_leads_somewhere(site: Path) -> None:
    pages = {path: Links(path) for path in site.rglob("*.html") if path.name != "404.html"}
    assert len(pages) > 30
    broken = []
    for path, page in pages.items():
        for link in page.links + page.loaded:
            parts = urlsplit(link)
            if parts.scheme:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            known = pages[target].anchors if target in pages else {""}
            if not target.is_file() or (parts.fragment and unquote(parts.fragment) not in known):
                broken.append(f"{path.relative_to(site)}: {link}")
    assert broken == []


def test_the_site_loads_nothing_from_elsewhere(site: Path) -> None:
    for path in site.rglob("*.html"):
        assert [one for one in Links(path).loaded if urlsplit(one).netloc] == [], path.name
    for path in site.rglob("*.css"):
        assert re.findall(r"url\(['\"]?(?:https?:)?//|@import", path.read_text(encoding="utf-8")) == [], path.name


@pytest.mark.skipif(bool(missing()) and not os.environ.get("CI"), reason=f"needs {missing()}")
def test_the_search_finds_a_page_without_a_network(site: Path) -> None:
    handler = partial(SimpleHTTPRequestHandler, directory=str(site))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server, chromium() as browser:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        here = f"http://127.0.0.1:{server.server_port}/"
        page = browser.new_page()
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(f"{here}index.html")
        page.get_by_role("textbox").first.click()
        page.keyboard.type("ridge regression")
        page.locator(".md-search-result__item").get_by_text("The probe").first.wait_for()
        server.shutdown()
    assert [url for url in asked if not url.startswith((here, "blob:", "data:"))] == []


def test_every_page_is_in_the_navigation(site: Path) -> None:
    """The first page leads to all pages of `docs/`, and to the README's relations."""
    linked = {unquote(urlsplit(link).path) for link in Links(site / "index.html").links}
    assert {f"{path.stem}.html" for path in (ROOT / "docs").glob("*.md")} <= linked


def test_every_public_name_is_in_the_reference(site: Path) -> None:
    assert {f"pipeline.{name}" for name in pipeline.__all__} <= Links(site / "api.html").anchors


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 900


@pytest.mark.parametrize("script", sorted((ROOT / "examples" / "slurm").glob("*.sh")), ids=lambda path: path.name)
def test_the_job_files_are_bash(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert os.access(script, os.X_OK)
