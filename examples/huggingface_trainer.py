"""Downstream validation in a script with the Hugging Face `Trainer`: a `TrainerCallback` that calls `validate`.

    python examples/huggingface_trainer.py --out trained

Needs `pip install accelerate` beside this project. Run it from the root of the project.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from transformers import (
    DataCollatorForLanguageModeling,
    EsmForMaskedLM,
    EsmTokenizer,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from pipeline import Config, LiveModel, Store, read_config, untouched, validate
from pipeline.data import tables


class DownstreamValidationCallback(TrainerCallback):
    """Measures the weights in training at every evaluation; the numbers go to all that the trainer reports to."""

    def __init__(self, config: Config, tokenizer: Any) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.live: LiveModel | None = None
        self.trainer: Trainer | None = None

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **options: Any
    ) -> None:
        """Adds the downstream metrics to the trainer's log, at the step of the weights."""
        model = options["model"]
        if not state.is_world_process_zero or self.trainer is None:
            return
        if self.live is None:
            self.live = LiveModel(model, tokenizer=self.tokenizer)
        with untouched(model, runs_module=False), tempfile.TemporaryDirectory() as folder:
            scores = validate(self.live.encoder(model), self.config.tasks, Store(Path(folder)))
        self.trainer.log({name: value for one in scores for name, value in one.metrics.items()})


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
    callback = DownstreamValidationCallback(read_config(options.config, options.overrides), tokenizer)
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
        callbacks=[callback],
    )
    callback.trainer = trainer
    trainer.train()
    trainer.save_model(options.out)
    tokenizer.save_pretrained(options.out)


if __name__ == "__main__":
    main()
