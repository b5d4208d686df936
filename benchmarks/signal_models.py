"""What `signal_noise.py` measures: models over a pre-training, data sets, and a simple baseline as an encoder."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import EsmForMaskedLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from examples.pretrain import MaskedLanguageModel, Settings, make_loaders, read_sequences
from pipeline import Encoder, EncoderOptions, Files, Task, open_encoder
from pipeline.data import tables
from pipeline.encoders.tokens import RESIDUES, SMILES_TOKEN

OPTIONS = EncoderOptions(device="cpu", precision="fp32")
CLASSES = {"task_type": "classification"}


@dataclass(frozen=True)
class Set:
    """A data set: its folder, what its sequences are, the labels, and the task's options."""

    name: str
    target: str
    options: dict[str, Any] = field(default_factory=dict)
    smiles: bool = False

    def task(self, data: Path, train: int | None, test: int | None, **settings: Any) -> Task:
        """The task, with every file of its parts but at most so many sequences."""
        folder = data / self.name
        files = {part: len(list((folder / part).glob("x*.csv"))) for part in ("train", "test")}
        task = Task(
            task_name=self.name,
            dataset_path=str(folder),
            dataset=Files(**{part: f"x[000..{count - 1:03d}]" for part, count in files.items()}),
            sequence_column="smiles" if self.smiles else "sequence",
            target_column=[self.target],
            **{**self.options, **settings},
        )
        task.max_rows = replace(task.max_rows, train=train, test=test)
        return task


TOKENS = {"level": "token", "probe_window": 7}
SETS = [
    Set("gb1_fitness", "target"),
    Set("meltome", "target"),
    Set("membrane_soluble", "membrane", CLASSES),
    Set("scl10", "location", CLASSES),
    Set("bace", "Class", CLASSES, smiles=True),
    Set("esol", "measured log solubility in mols per litre", smiles=True),
    Set("ss3_flip", "3state", {**CLASSES, **TOKENS, "mask_column": ["resolved"]}),
    Set("conservation_score", "score", TOKENS),
]


class Keep(pl.Callback):
    """Writes a folder `step=N` for the untrained model, and at each validation."""

    def __init__(self, folder: Path) -> None:
        """Below which folder."""
        self.folder = folder

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Before the first step."""
        self._write(trainer, pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """In training, not in the sanity check before."""
        if not trainer.sanity_checking:
            self._write(trainer, pl_module)

    def _write(self, trainer: pl.Trainer, pl_module: Any) -> None:
        path = self.folder / f"step={trainer.global_step:05d}"
        pl_module.model.save_pretrained(path)
        pl_module.tokenizer.save_pretrained(path)


def checkpoints(data: Path, out: Path, steps: int, count: int, smiles: bool = False, seed: int = 1234) -> list[Path]:
    """A masked language model of 2 layers and width 96 over a training: untrained, and `count` times on the way.

    Args:
        data: folder of the data sets.
        out: where the checkpoints are; what an earlier call has left there is taken as it is.
        steps: of the training.
        count: how many checkpoints beside that of step 0.
        smiles: of molecules, not of proteins.
        seed: of the weights and batches.
    """
    if not out.exists():
        folder, files = ("pretrain_smiles_zinc", 8) if smiles else ("pretrain_protein_uniprot", 5)
        settings = Settings(steps=steps, validations=count, crop=64 if smiles else 48, seed=seed)
        _train(_sequences(data / folder / "train", f"x[000..{files - 1:03d}]", smiles), out, settings, smiles)
    return sorted(out.iterdir())


def _sequences(folder: Path, files: str, smiles: bool) -> list[str]:
    return tables.read(folder, files, ["smiles"]).columns["smiles"] if smiles else read_sequences(folder, files)


def _train(sequences: Sequence[str], out: Path, settings: Settings, smiles: bool) -> None:
    pl.seed_everything(settings.seed, verbose=False)
    module: Any = MaskedLanguageModel(settings)
    if smiles:
        module.tokenizer = _smiles_tokenizer(sequences)
        config = module.model.config
        config.vocab_size = len(module.tokenizer)
        config.pad_token_id, config.mask_token_id = module.tokenizer.pad_token_id, module.tokenizer.mask_token_id
        module.model = EsmForMaskedLM(config)
    train, val = make_loaders(sequences, module.tokenizer, settings)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=settings.steps,
        val_check_interval=settings.steps // settings.validations,
        check_val_every_n_epoch=None,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        callbacks=[Keep(out)],
    )
    trainer.fit(module, train, val)


def _smiles_tokenizer(sequences: Sequence[str]) -> PreTrainedTokenizerFast:
    """A token per atom or sign, those of the sequences and of the usual alphabet."""
    usual = [*"CNOSPFIBcnopsb()[]=#-+\\/.@H123456789", "Cl", "Br"]
    found = sorted({word for text in sequences for word in SMILES_TOKEN.findall(text)} - set(usual))
    words = ["<cls>", "<pad>", "<eos>", "<unk>", *usual, *found, "<mask>"]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(SMILES_TOKEN.pattern), "isolated")
    ends = [("<cls>", 0), ("<eos>", 2)]
    tokenizer.post_processor = processors.TemplateProcessing(single="<cls> $A <eos>", special_tokens=ends)
    names = {f"{name}_token": f"<{name}>" for name in ("cls", "pad", "eos", "unk", "mask")}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def encoder_of(path: Path) -> Encoder:
    """The model of a checkpoint."""
    return open_encoder(str(path), OPTIONS)


class Composition(Encoder):
    """A baseline that knows no context, as an encoder: its mean over a sequence is the sequence's composition.

    A residue's hidden state is one-hot, its own and, in `pairs`, that of it and the next; so is a SMILES character's,
    with the next one and the next two, in 1,024 places by their digest. A probe with a window sees a one-hot window.
    """

    device = torch.device("cpu")

    def __init__(self, smiles: bool = False, pairs: bool = True) -> None:
        """Of residues or of SMILES."""
        self.smiles, self.pairs = smiles, pairs
        single = len(RESIDUES) + 1
        self.hidden_size = 1024 if smiles else single + (single**2 if pairs else 0)
        self.digest = f"composition {smiles} {pairs}"

    def hidden_states(self, sequences: Sequence[str]) -> list[Tensor]:
        """See `Encoder`."""
        return [self._states(text) for text in sequences]

    def _states(self, text: str) -> Tensor:
        states = torch.zeros(len(text), self.hidden_size)
        place = torch.arange(len(text))
        if self.smiles:
            for size in (1, 2, 3):
                grams = [text[begin : begin + size] for begin in range(len(text) - size + 1)]
                states[place[: len(grams)], [_bucket(gram, self.hidden_size) for gram in grams]] += 1
            return states
        residues = torch.tensor([RESIDUES.find(one) + 1 for one in text])
        states[place, residues] = 1
        if self.pairs:
            single = len(RESIDUES) + 1
            states[place[:-1], single + residues[:-1] * single + residues[1:]] = 1
        return states


def _bucket(gram: str, buckets: int) -> int:
    return int.from_bytes(hashlib.sha256(gram.encode()).digest()[:4], "big") % buckets
