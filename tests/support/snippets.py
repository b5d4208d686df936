"""The pages of the documentation as what they are made of: blocks of code, and what each page takes for granted.

A block is run if it is Python, or a shell command behind the comment `<!-- runnable -->`; a block with a title is
written to that file; a block behind `<!-- not run: REASON -->` is left alone.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.support.programs import ROOT

BLOCK = re.compile(
    r'^(?:<!-- (?P<mark>.+?) -->\n\n?)?```(?P<language>\w+)(?: title="(?P<title>.+?)")?\n(?P<text>.*?)^```$',
    re.MULTILINE | re.DOTALL,
)
FEW = r"\1num_epochs: 1\n\1num_seeds: 1\n\1max_rows: {train: 60, test: 60}"
# The task that the pages call `my.yaml`.
MINE = (ROOT / "configs" / "sequence_regression.yaml").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Block:
    """A block of code in a page: its language, the comment before it, its file if it has one, and its line."""

    language: str
    mark: str
    title: str
    text: str
    line: int


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in their order."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(
            match["language"],
            match["mark"] or "",
            match["title"] or "",
            match["text"],
            text[: match.start("text")].count("\n") + 1,
        )
        for match in BLOCK.finditer(text)
    ]


def clone(folder: Path) -> None:
    """What a reader has in a clone, in `folder`, but with configurations that take seconds; and a `my.yaml`."""
    for name in ("MLproject", "conda.yaml", "examples", "pipeline", "sample"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "models").mkdir()
    (folder / "models" / "esm2").symlink_to(ROOT / "sample" / "checkpoint")
    shutil.copytree(ROOT / "configs", folder / "configs")
    (folder / "my.yaml").write_text(MINE.replace("stability", "fitness").replace("data/proteins", "data/variants"))
    for path in (folder / "my.yaml", *folder.glob("configs/*.yaml")):
        path.write_text(
            re.sub(r"^( +)num_epochs: \d+", FEW, path.read_text().replace("x[000..001]", "x000"), flags=re.M)
        )


def small_model() -> dict[str, Any]:
    """A model that is in training, and its tokenizer."""
    from transformers import EsmConfig, EsmForMaskedLM, EsmTokenizer

    torch.manual_seed(0)
    size: dict[str, Any] = {
        "hidden_size": 12,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 24,
    }
    return {
        "model": EsmForMaskedLM(EsmConfig.from_pretrained("sample/checkpoint", **size)),
        "tokenizer": EsmTokenizer.from_pretrained("sample/checkpoint"),
        "step": 1,
    }


def lightning() -> dict[str, Any]:
    """A module and its data."""
    from examples.pretrain import MaskedLanguageModel, Settings, make_loaders, read_sequences

    settings = Settings(layers=1, hidden_size=12, heads=2, batch_size=4)
    module = MaskedLanguageModel(settings)
    sequences = read_sequences(Path("sample/data/family/train"), "x000")[:40]
    train, val = make_loaders(sequences, module.tokenizer, settings)
    return {"module": module, "train_loader": train, "val_loader": val, "callbacks": []}


def huggingface() -> dict[str, Any]:
    """What a script with the `Trainer` of transformers has anyway."""
    from transformers import DataCollatorForLanguageModeling, TrainingArguments

    made = small_model()
    return {
        **made,
        "data": [made["tokenizer"]("MKVLAAGIVG") for _ in range(8)],
        "collator": DataCollatorForLanguageModeling(made["tokenizer"]),
        "arguments": TrainingArguments(
            "trained",
            max_steps=1,
            eval_strategy="steps",
            eval_steps=1,
            save_strategy="steps",
            save_steps=1,
            report_to="none",
            use_cpu=True,
            load_best_model_at_end=True,
            metric_for_best_model="eval_test_fitness_probe_spearman",
        ),
    }


def readme() -> dict[str, Any]:
    """The names that the README's short excerpts take for granted."""
    from pytorch_lightning import Trainer
    from transformers import Trainer as HuggingFaceTrainer

    from pipeline import Downstream, DownstreamTrainerCallback

    own = {"Trainer": Trainer, "HuggingFaceTrainer": HuggingFaceTrainer, "Downstream": Downstream, "callbacks": []}
    made = {**huggingface(), **own, "DownstreamTrainerCallback": DownstreamTrainerCallback}
    made["arguments"].eval_strategy = "no"  # the excerpt has no data
    return {**made, **frames()}


def frames() -> dict[str, Any]:
    """Two parts of a few labelled rows."""
    import pandas as pd

    rows = pd.read_csv("sample/data/variants/train/x000.csv", nrows=120).drop(columns="id")
    return {"train": rows[:60], "test": rows[60:]}


def notebook() -> dict[str, Any]:
    """The same under other names."""
    names = {"fitness": "stability", "sequence": "protein"}
    return {part: rows.rename(columns=names) for part, rows in frames().items()}


def probe() -> dict[str, Any]:
    """The name that one line needs."""
    from pipeline import DownstreamModelCheckpoint

    return {"DownstreamModelCheckpoint": DownstreamModelCheckpoint}


def shard() -> dict[str, Any]:
    """Stored embeddings, in the current folder."""
    from pipeline import Store, open_encoder, read_config
    from pipeline.embed import embed
    from pipeline.load import load

    store = Store(Path("stored"))
    embed([load(read_config("my.yaml").dataset[0], None)], open_encoder("sample/checkpoint"), store)
    (made,) = Path("stored").glob("embeddings/*/shard-00000.parquet")
    shutil.copy(made, ".")
    return {}


PREPARED: dict[str, Callable[[], dict[str, Any]]] = {
    "README.md": readme,
    "docs/huggingface.md": huggingface,
    "docs/lightning.md": lightning,
    "docs/loop.md": small_model,
    "docs/probe.md": probe,
    "docs/python.md": notebook,
    "docs/store.md": shard,
}
