"""Downstream validation in a script with the Hugging Face `Trainer`: the line that is marked (1).

    python examples/huggingface_trainer.py --out trained

Needs `pip install accelerate` beside this project. Run it from the root of the project.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from transformers import DataCollatorForLanguageModeling, EsmForMaskedLM, EsmTokenizer, Trainer, TrainingArguments

from pipeline import DownstreamTrainerCallback, read_config
from pipeline.data import tables


def main() -> None:
    """Trains the sample checkpoint further on the sample sequences."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="trained")
    parser.add_argument("--config", default="configs/pretrain.yaml")
    parser.add_argument("--overrides", default="")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--report-to", default="none", help="mlflow, tensorboard, wandb: what the trainer logs to")
    options = parser.parse_args()
    tokenizer = EsmTokenizer.from_pretrained("sample/checkpoint")
    model = EsmForMaskedLM.from_pretrained("sample/checkpoint")
    sequences = tables.read(Path("sample/data/unlabelled/train"), "x000", ["sequence"]).columns["sequence"]
    data: Any = [tokenizer(sequence) for sequence in sequences]
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=options.out,
            max_steps=options.steps,
            eval_strategy="steps",
            eval_steps=max(1, options.steps // 2),
            logging_steps=max(1, options.steps // 4),
            save_strategy="no",
            per_device_train_batch_size=8,
            report_to=options.report_to,
            use_cpu=True,
            seed=1234,
        ),
        train_dataset=data[20:],
        eval_dataset=data[:20],
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15),
        processing_class=tokenizer,
        callbacks=[DownstreamTrainerCallback(read_config(options.config, options.overrides))],  # (1)
    )
    trainer.train()
    trainer.save_model(options.out)
    tokenizer.save_pretrained(options.out)


if __name__ == "__main__":
    main()
