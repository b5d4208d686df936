"""Draws the README's picture: a metric over a training, with its interval, its start and its baseline.

mlflow run . --env-manager local -e pretrain -P seed=1
python docs/curve.py RUN_ID [--metric fitness/test_fitness_probe_spearman] [--out docs/curve.png]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mlflow import MlflowClient

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from pipeline.report.figures.canvas import GREY, figure_style, new_figure, save  # noqa: E402


def main() -> None:
    """Reads the curve of a run from MLflow, and draws it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_id", help="of a training")
    parser.add_argument("--tracking-uri", help="by default as the environment says")
    parser.add_argument("--metric", default="fitness/test_fitness_probe_spearman", help="of a probe")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "curve.png")
    options = parser.parse_args()
    client = MlflowClient(options.tracking_uri)
    task, _, name = options.metric.rpartition("/")
    _, target, *_, kind = name.split("_")
    baseline = f"{task}/test_{target}_baseline_probe_{kind}".removeprefix("/")
    score, low, high, floor = (
        history(client, options.run_id, metric)
        for metric in (options.metric, f"{options.metric}_ci_low", f"{options.metric}_ci_high", baseline)
    )
    print(draw(score, low, high, floor, options.out))


def history(client: MlflowClient, run_id: str, metric: str) -> dict[int, float]:
    """The values of a metric by step."""
    return {
        point.step: point.value for point in sorted(client.get_metric_history(run_id, metric), key=lambda p: p.step)
    }


def draw(
    score: dict[int, float], low: dict[int, float], high: dict[int, float], floor: dict[int, float], out: Path
) -> Path:
    """Writes the picture, and returns its path. All arguments are values by step, in the metric's units."""
    steps = list(score)
    start = score[steps[0]]
    with figure_style():
        title = "Fitness of protein variants, during a pre-training"
        figure = new_figure(
            7, 3.4, title, "Spearman correlation on 500 variants that no head was trained on; band: 95 % interval"
        )
        axes = figure.subplots()
        axes.fill_between(steps, list(low.values()), list(high.values()), alpha=0.2, linewidth=0)
        axes.plot(steps, list(score.values()), marker="o", linewidth=2)
        axes.axhline(start, color=GREY, linestyle="--", linewidth=1)
        axes.axhline(floor[steps[-1]], color=GREY, linestyle=":", linewidth=1.5)
        for height, text in ((start, "the untrained model"), (floor[steps[-1]], "no model: composition alone")):
            axes.annotate(text, (steps[-1], height), xytext=(0, 3), textcoords="offset points", ha="right", color=GREY)
        axes.annotate(
            f"{score[steps[-1]]:.2f}", (steps[-1], score[steps[-1]]), xytext=(6, -3), textcoords="offset points"
        )
        axes.set(xlabel="training step", ylim=(min(0.0, floor[steps[-1]]) - 0.08, 1))
        return save(figure, out)


if __name__ == "__main__":
    main()
