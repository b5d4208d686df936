"""What a served model answers: sequences to predictions, as in a measurement, without its store."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.data.parts import Target
from pipeline.encoders.forward import POOLED, batches, misaligned
from pipeline.encoders.protocol import Encoder
from pipeline.errors import DataError
from pipeline.heads.architectures import Head, standard_head
from pipeline.serving.encoder_files import read_encoder

CONTENT, TASK, HEAD, ENCODER = "served", "task.json", "head.safetensors", "encoder"  # a folder, and what is in it


@dataclass(frozen=True)
class Predictor:
    """An encoder and the head of a task.

    Attributes:
        encoder: gives the hidden states.
        head: one of this project's, trained.
        targets: what it predicts.
        level: `sequence` or `token`.
        sequence_column: the name of the column that answers are given for.
        limit: most characters of a sequence; None for no limit.
        batch_tokens: most tokens of a batch, by the kind of device.
        batch_size: most sequences of a batch.
        dtype: of the embeddings that the head was trained on, `float32` or `float16`.
    """

    encoder: Encoder
    head: Head
    targets: tuple[Target, ...]
    level: str
    sequence_column: str
    limit: int | None
    batch_tokens: Mapping[str, int]
    batch_size: int
    dtype: str = "float32"
    _lock = threading.Lock()  # a server has a thread for each request

    def write(self, folder: Path, how: Mapping[str, Any]) -> None:
        """Writes all but the encoder, which `write_encoder` writes into `encoder` there, into a folder.

        `how` is what that returns.
        """
        state = {name: value.detach().cpu().contiguous() for name, value in self.head.state_dict().items()}
        content = {name: getattr(self, name) for name in PLAIN}
        targets = [[target.name, target.classes, target.outputs] for target in self.targets]
        head = {"hidden_size": self.encoder.hidden_size, "label_scale": self.head.label_scale}
        text = json.dumps({**content, "targets": targets, **head, "encoder": how}, indent=2)
        (folder / TASK).write_text(text, encoding="utf-8")
        save_file(state, folder / HEAD)
        shutil.copymode(folder / TASK, folder / HEAD)  # the library makes a file that the user alone can read

    @classmethod
    def read(cls, folder: Path, device: str = "auto") -> Predictor:
        """The predictor that `write` wrote, on a device; see `EncoderOptions`."""
        content = json.loads((folder / TASK).read_text(encoding="utf-8"))
        encoder = read_encoder(folder / ENCODER, content["encoder"], device)
        targets = tuple(Target(name, classes and tuple(classes), out) for name, classes, out in content["targets"])
        head = standard_head(content["level"], content["hidden_size"], [target.outputs for target in targets])
        head.load_state_dict(load_file(folder / HEAD))
        head.label_scale = content["label_scale"]
        return cls(encoder, head.to(encoder.device).eval(), targets, **{name: content[name] for name in PLAIN})

    def predict(self, sequences: Sequence[Any]) -> dict[str, list[Any]]:
        """Predictions by column, as in the table of `Scores`, in the order of the sequences.

        Of a target `<target>_prediction`, a number or a label, and for classes `<target>_probabilities`, by label. In a
        token-level task each is a list with an entry for each token.

        Raises:
            DataError: something is no sequence, longer than the limit, or not known to the encoder.
        """
        with self._lock:
            texts = self._checked(sequences)
            found = dict[str, list[Tensor]]()
            by_key = {text.encode(): text for text in texts}
            most = self.batch_tokens.get(self.encoder.device.type, self.batch_tokens["cpu"])
            for keys in batches(by_key, most, self.batch_size, self.encoder.packs):
                some = [by_key[key] for key in keys]
                found.update(zip(some, self._outputs(some), strict=True))
        columns: dict[str, list[Any]] = {}
        for index, target in enumerate(self.targets):
            answers = [self._answer(found[text][index], target) for text in texts]
            columns[f"{target.name}_prediction"] = [answer[0] for answer in answers]
            if target.classes is not None:
                columns[f"{target.name}_probabilities"] = [answer[1] for answer in answers]
        return columns

    @torch.no_grad()
    def _outputs(self, sequences: list[str]) -> list[list[Tensor]]:
        """For each sequence what the head gives for each target, float64, shape (units, outputs)."""
        encoder, pooling = self.encoder, self.encoder.pooling
        first = self.level == "sequence" and pooling == "cls"
        states = (encoder.states_from_first if first else encoder.hidden_states)(sequences)
        if self.level == "sequence":
            units = [POOLED[pooling](one) for one in states]
        else:
            units = [encoder.per_character(text, one) for text, one in zip(sequences, states, strict=True)]
        counts = [len(one) for one in units]
        rows = torch.cat(units).to(getattr(torch, self.dtype)).float()
        outputs = self.head.in_own_units(self.head(rows, torch.tensor(counts, device=rows.device)))
        return [list(parts) for parts in zip(*(output.split(counts) for output in outputs), strict=True)]

    def _answer(self, output: Tensor, target: Target) -> tuple[Any, Any]:
        """The prediction and, for classes, the probabilities of a sequence, from outputs of shape (units, outputs)."""
        if target.classes is None:
            numbers = output[:, 0].tolist()
            return (numbers if self.level == "token" else numbers[0]), None
        names, shares = target.labels, torch.softmax(output, dim=1)
        labels = [names[index] for index in shares.argmax(1).tolist()]
        by_label = dict(zip(names, shares.T.tolist(), strict=True))
        if self.level == "token":
            return labels, by_label
        return labels[0], {name: values[0] for name, values in by_label.items()}

    def _checked(self, sequences: Sequence[Any]) -> list[str]:
        """The sequences; see `predict` for what is raised."""
        for row, text in enumerate(sequences):
            if not isinstance(text, str) or not text:
                missing = text is None or text != text  # in a column of a DataFrame, None may become NaN
                found = "nothing" if missing else f"{text!r:.60}"
                raise self._refused(row, "a text that is not empty", found, "leave the row out")
            if self.limit is not None and len(text) > self.limit:
                expected = f"at most {self.limit} characters, as in the measurement"
                raise self._refused(row, expected, str(len(text)), "cut it, or leave it out")
        texts = list(dict.fromkeys(sequences))
        for text, (unknown, tokens) in zip(texts, self.encoder.count_unknown(texts), strict=True):
            if unknown == tokens:
                why = self.encoder.why_unknown(text).removeprefix("; ") or "leave the row out"
                raise self._refused(
                    sequences.index(text), "a sequence with characters the encoder knows", f"{text!r:.60}", why
                )
            if self.level == "token" and tokens != len(text):
                raise DataError(f"row {sequences.index(text)}: {misaligned(text, tokens)}")
        return list(sequences)

    def _refused(self, row: int, expected: str, found: str, remedy: str) -> DataError:
        return DataError(f"row {row}: column '{self.sequence_column}': expected {expected}, found {found}; {remedy}")


PLAIN = ("level", "sequence_column", "limit", "batch_tokens", "batch_size", "dtype")
