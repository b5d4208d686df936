"""Downstream validation in a training loop of one's own: `validate`, and a tracker for the results.

    python examples/hand_written_loop.py

Run it from the root of the project. Logs to MLflow as the environment says (`MLFLOW_TRACKING_URI`).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import DataCollatorForLanguageModeling, EsmForMaskedLM, EsmTokenizer

from pipeline import LiveModel, Store, read_config, validate
from pipeline.data import tables
from pipeline.tracking.training_run import TrainingRun


def main() -> None:
    """Trains the sample checkpoint further, and measures it before and on the way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/pretrain.yaml")
    parser.add_argument("--overrides", default="")
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    config = read_config(options.config, options.overrides)
    tokenizer = EsmTokenizer.from_pretrained("sample/checkpoint")
    model = EsmForMaskedLM.from_pretrained("sample/checkpoint")
    sequences = tables.read(Path("sample/data/unlabelled/train"), "x000", ["sequence"]).columns["sequence"]
    collate = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    live = LiveModel(model, tokenizer=tokenizer)  # finds its way to the hidden states once
    run = TrainingRun([], "hand-written loop", config)  # the active run, or MLFLOW_RUN_ID's, or one of its own
    torch.manual_seed(1234)
    for step in range(options.steps + 1):
        if step % max(1, options.steps // 2) == 0:
            encoder = live.encoder(model)  # the weights of this moment; the model itself is left alone
            with run.measurement(step, encoder.digest) as tracker:
                scores = validate(encoder, config.tasks, Store(Path(config.store)), tracker)
            print(step, {name: round(value, 4) for one in scores for name, value in one.metrics.items()})
        some = torch.randint(len(sequences), (8,)).tolist()
        loss = model(**collate([tokenizer(sequences[index]) for index in some])).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    run.end("FINISHED")
    print(run.place)


if __name__ == "__main__":
    main()
