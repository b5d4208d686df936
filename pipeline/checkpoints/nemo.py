"""A `.nemo` archive of the reference: ESM-1nv, ProtT5nv or MegaMolBART, of which the encoder is read.

The archive is a tar file, of which some members are read where they are: nothing is extracted, and no code is run.
"""

from __future__ import annotations

import io
import lzma
import pickle
import re
import shutil
import tarfile
import warnings
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from tempfile import TemporaryFile
from typing import IO, Any

import torch
import yaml

from pipeline.checkpoints.nemo_options import MODELS, Settings, most_tokens, read_options, shown
from pipeline.checkpoints.nemo_weights import encoder_weights, fill, is_bert
from pipeline.checkpoints.stored import Format
from pipeline.encoders.megatron import MegatronOptions
from pipeline.encoders.megatron_encoder import MegatronEncoder
from pipeline.encoders.megatron_tokens import MegatronTokens, ProteinTokens, SmilesTokens
from pipeline.encoders.options import EncoderOptions
from pipeline.errors import CheckpointError

CONFIGURATION, WEIGHTS = "model_config.yaml", "model_weights.ckpt"
RANK = re.compile(rf"mp_rank_(\d+)/{re.escape(WEIGHTS)}")
GLOBAL = re.compile(r"GLOBAL (\S+)")  # in torch's message on a class or function that is not read
BROKEN = (tarfile.TarError, OSError, EOFError, zlib.error, lzma.LZMAError)


def _holds(path: Path) -> bool:
    """Whether a file is a tar with NeMo's members, or is called `.nemo`: then reading it raises the error to show."""
    if not path.is_file() or path.suffix == ".nemo":
        return path.is_file()
    try:
        with tarfile.open(path) as tar:
            return any(PurePosixPath(member.name).name in (CONFIGURATION, WEIGHTS) for member in tar)
    except BROKEN:
        return False


def _read(source: str, options: EncoderOptions, factory: Any) -> MegatronEncoder:
    if factory is not None:
        raise CheckpointError(f"ckpt: '{source}': a .nemo archive needs no model_factory; leave it out")
    where = f"ckpt: '{source}'"
    with _opened(source) as archive:
        config = archive.configuration()
        shards = archive.shards(config)
        bert = is_bert(shards[0], where)
        model = _which(config, bert)
        _check_target(options.infer_target, model, where)
        tokens = archive.tokens(config, model)
    settings, ranks = Settings.of_encoder(config, bert), len(shards)
    weights = encoder_weights(shards, bert, settings, where)
    described = read_options(config, settings, bert, weights, ranks)
    most = most_tokens(config, described)
    _check_tokens(tokens, described, most, where)
    return MegatronEncoder(fill(described, weights, where), tokens, options, most)


class _Archive:
    """The members of an open archive, by their names without a leading `./`."""

    def __init__(self, tar: tarfile.TarFile, source: str) -> None:
        self.where = f"ckpt: '{source}'"
        self._tar = tar
        self._members = {_plain(member.name): member for member in tar if member.isreg()}

    def configuration(self) -> Settings:
        """The settings of the model."""
        try:
            found = yaml.safe_load(self._bytes(CONFIGURATION))
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{self.where}: {CONFIGURATION}: expected YAML, found none ({error})") from error
        if isinstance(found, Mapping) and isinstance(found.get("model"), Mapping):
            found = found["model"]
        if not isinstance(found, Mapping):
            expected = "expected the settings of a model"
            raise CheckpointError(f"{self.where}: {CONFIGURATION}: {expected}, found {shown(found)}")
        return Settings(found, f"{self.where}: {CONFIGURATION}")

    def shards(self, config: Settings) -> list[dict[str, Any]]:
        """The weights of each rank of the training."""
        names = self._shard_names()
        ranks = config.number("tensor_model_parallel_size", 1)
        pipeline = config.number("pipeline_model_parallel_size", 1)
        if pipeline != 1:
            raise self._parallel(f"pipeline_model_parallel_size {pipeline}")
        if len(names) != ranks:
            expected = f"expected the weights of {ranks} ranks (tensor_model_parallel_size)"
            raise CheckpointError(f"{self.where}: {expected}, found {len(names)}: {', '.join(names[:8])}")
        return [self._weights(name) for name in names]

    def tokens(self, config: Settings, model: str) -> MegatronTokens:
        """The tokenizer."""
        given = config.section("tokenizer")
        name = self._artifact(given, "model")
        vocabulary = self._artifact(given, "vocab_file") if model == "MegaMolBART" else None
        try:
            if vocabulary is None:
                return ProteinTokens(self._bytes(name), around=model == "ESM-1nv")
            return SmilesTokens(self._bytes(name).decode(), self._bytes(vocabulary).decode())
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{self.where}: tokenizer: expected UTF-8, found other bytes ({error})") from error
        except CheckpointError as error:
            raise CheckpointError(f"{self.where}: '{name}': {error}") from error

    def _artifact(self, tokenizer: Settings, key: str) -> str:
        """The name of the member that a setting of the tokenizer refers to."""
        value = tokenizer.get(key)
        if not isinstance(value, str) or not value:
            raise CheckpointError(f"{tokenizer.where}.{key}: expected the name of a file, found {shown(value)}")
        if value.startswith("nemo:"):
            fitting = [name for name in self._members if name == value.removeprefix("nemo:")]
        else:
            base = PurePosixPath(value).name
            fitting = [name for name in self._members if PurePosixPath(name).name == base]
            fitting = fitting or [name for name in self._members if name.endswith(f"_{base}")]
        if not fitting:
            raise CheckpointError(f"{tokenizer.where}.{key}: expected '{value}' in the archive, found no such file")
        return fitting[0]

    def _shard_names(self) -> list[str]:
        names = self._members
        stage = next((name for name in names if re.match(r"tp_rank_\d+_pp_rank_\d+/", name)), None)
        if stage is not None:
            raise self._parallel(f"'{stage}'")
        if any(name.startswith("model_weights/") for name in names):
            found = "found the folder model_weights/ of a distributed checkpoint, which is not read"
            raise CheckpointError(
                f"{self.where}: expected {WEIGHTS}, {found}; export the model as a Hugging Face folder"
            )
        ranks = sorted((int(rank[1]), name) for name in names if (rank := RANK.fullmatch(name)))
        shards = [name for _, name in ranks]
        if WEIGHTS in names:
            shards.insert(0, WEIGHTS)
        elif not ranks:
            raise CheckpointError(f"{self.where}: expected {WEIGHTS}, found {', '.join(list(names)[:5]) or 'no file'}")
        elif [number for number, _ in ranks] != list(range(len(ranks))):
            expected = "expected the weights of every rank from mp_rank_00 on"
            raise CheckpointError(f"{self.where}: {expected}, found {', '.join(shards[:8])}")
        return shards

    def _parallel(self, found: str) -> CheckpointError:
        expected = "expected weights that are not cut into stages of a pipeline"
        remedy = "merge them with NeMo's megatron_change_num_partitions.py"
        return CheckpointError(f"{self.where}: {expected}, found {found}; {remedy}")

    def _weights(self, name: str) -> dict[str, Any]:
        """What a member holds by name, tensors on the CPU; read piece by piece, so that it is in memory once."""
        with self._open(name) as stream, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about what the file seems to be; the error below names it
            try:
                found = torch.load(stream, map_location="cpu", weights_only=True)
            except pickle.UnpicklingError as error:
                named = GLOBAL.search(str(error))
                found = named[1] if named else "other objects, or damage"
                raise CheckpointError(f"{self.where}: '{name}': expected weights alone, found {found}") from error
            except Exception as error:  # damaged bytes may raise anything
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
                raise CheckpointError(f"{self.where}: '{name}' is damaged ({reason})") from error
        if not isinstance(found, Mapping):
            raise CheckpointError(f"{self.where}: '{name}': expected weights by name, found a {type(found).__name__}")
        return dict(found)

    @contextmanager
    def _open(self, name: str) -> Iterator[IO[bytes]]:
        """A member, to be read from any place on: of a compressed archive, a copy in an unnamed temporary file."""
        inner = self._tar.extractfile(self._members[name])
        assert inner is not None  # a regular file
        if isinstance(self._tar.fileobj, io.BufferedReader):
            yield inner
            return
        with TemporaryFile() as copy:  # it has no name, so that nothing is left behind
            shutil.copyfileobj(inner, copy)
            copy.seek(0)
            yield copy

    def _bytes(self, name: str) -> bytes:
        if name not in self._members:
            found = ", ".join(list(self._members)[:5]) or "no file"
            raise CheckpointError(f"{self.where}: expected '{name}' in the archive, found {found}")
        inner = self._tar.extractfile(self._members[name])
        return b"" if inner is None else inner.read()


@contextmanager
def _opened(source: str) -> Iterator[_Archive]:
    """The archive in a file. Raises CheckpointError where it is none, or ends early."""
    try:
        with tarfile.open(source) as tar:
            yield _Archive(tar, source)
    except BROKEN as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise CheckpointError(
            f"ckpt: '{source}': expected a .nemo archive (a tar file), found none, or part of one ({reason})"
        ) from error


def _plain(name: str) -> str:
    return name.removeprefix("./")


def _which(config: Settings, bert: bool) -> str:
    """The model, by its weights and tokenizer. Raises CheckpointError where `target` names another."""
    tokenizer = config.section("tokenizer")
    library = tokenizer.choice("library", "sentencepiece" if bert else None, ("sentencepiece", "regex"))
    if bert and library != "sentencepiece":
        raise CheckpointError(f"{tokenizer.where}.library: expected sentencepiece for ESM-1nv, found {library}")
    model = "ESM-1nv" if bert else {"sentencepiece": "ProtT5nv", "regex": "MegaMolBART"}[library]
    target = str(config.get("target") or "").rpartition(".")[2]
    named = next((name for word, name in MODELS.items() if word in target.lower()), model)
    if named != model:
        remedy = "its encoder is not read, or the archive holds weights of another model"
        raise CheckpointError(
            f"{config.where}: target: expected a class of {model}, as the weights are, found {target}; {remedy}"
        )
    return model


def _check_target(infer_target: str, model: str, where: str) -> None:
    expected = {"esm": "ESM-1nv", "prott5": "ProtT5nv", "megamolbart": "MegaMolBART"}.get(infer_target, model)
    if expected != model:
        raise CheckpointError(
            f"infer_target '{infer_target}' is for {expected}, but {where.removeprefix('ckpt: ')} is {model}; use auto"
        )


def _check_tokens(tokens: MegatronTokens, described: MegatronOptions, most: int | None, where: str) -> None:
    """Raises CheckpointError where the model lacks tokens of the tokenizer, or has room for special ones alone."""
    if tokens.size > described.vocabulary:
        expected = f"expected a tokenizer of at most {described.vocabulary} tokens, as the model has"
        raise CheckpointError(f"{where}: {expected}, found one of {tokens.size}")
    special = len(tokens.before) + len(tokens.after)
    if most is not None and most <= special:
        raise CheckpointError(f"{where}: expected room for more than {special} special tokens, found {most}")


NEMO = Format(_holds, _read)
