"""Downstream validation in a training loop of one's own: two lines, marked (1) and (2).

    python examples/hand_written_loop.py

Run it from the root of the project. Logs to MLflow as the environment says (`MLFLOW_TRACKING_URI`).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import DataCollatorForLanguageModeling, EsmForMaskedLM, EsmTokenizer

from pipeline import DESCRIPTION, Downstream, read_config
from pipeline.data import tables


def main() -> None:
    """Trains the sample checkpoint further, and measures it before and on the way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/pretrain.yaml")
    parser.add_argument("--overrides", default="")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", default="", help="file for the trained weights")
    options = parser.parse_args()
    config = read_config(options.config, options.overrides)
    tokenizer = EsmTokenizer.from_pretrained("sample/checkpoint")
    model = EsmForMaskedLM.from_pretrained("sample/checkpoint")
    sequences = tables.read(Path("sample/data/unlabelled/train"), "x000", ["sequence"]).columns["sequence"]
    collate = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    downstream = Downstream(config, tokenizer=tokenizer)  # (1)
    torch.manual_seed(1234)
    for step in range(options.steps + 1):
        if step % max(1, options.steps // 2) == 0:
            metrics = downstream(model, step)  # (2) every rank calls it; the model itself is left alone
            print(step, {name: round(value, 4) for name, value in metrics.items()})
        some = torch.randint(len(sequences), (8,)).tolist()
        loss = model(**collate([tokenizer(sequences[index]) for index in some])).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if options.out:  # `python -m pipeline --ckpt FILE` opens it as it is
        content = {"state_dict": model.state_dict(), "global_step": options.steps}
        torch.save({**content, DESCRIPTION: downstream.describe(model)}, options.out)
    downstream.close()


if __name__ == "__main__":
    main()
