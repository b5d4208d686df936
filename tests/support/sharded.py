"""One rank of two: trains for a step under DDP, FSDP2 and Lightning, and writes distributed checkpoints.

    python -m tests.support.sharded FOLDER MODEL     # with RANK, WORLD_SIZE and so on set

Beside each checkpoint `FOLDER/<name>`, rank 0 writes the whole weights as they were in training, `<name>.pt`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
import torch.distributed.checkpoint.state_dict_saver as dcp
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, EsmConfig, EsmForMaskedLM, EsmModel

from pipeline.encoders.huggingface import HuggingFaceEncoder
from pipeline.encoders.options import EncoderOptions

FULL = StateDictOptions(full_state_dict=True)
IDS = torch.tensor([[0, 5, 6, 7, 8, 2], [0, 9, 10, 11, 12, 2]])


def shard(model: Any) -> Any:
    """Each layer, and the rest; the 33 rows of the embeddings are shared out unevenly."""
    for layer in model.esm.encoder.layer:
        fully_shard(layer)
    return fully_shard(model)


def step(model: nn.Module) -> torch.optim.Optimizer:
    """One step of training, so that there is a state of the optimizer."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    return optimizer


def write(path: Path, model: nn.Module, save: Callable[[], Any]) -> None:
    """The checkpoint, and on rank 0 the whole weights."""
    save()
    whole = get_model_state_dict(model, options=FULL)
    if dist.get_rank() == 0:
        torch.save(whole, path.with_suffix(".pt"))
    dist.barrier()


def in_training(folder: Path, name: str) -> HuggingFaceEncoder:
    """The encoder with the weights that the ranks had, of the model in `folder/esm`."""
    whole = torch.load(folder / f"{name}.pt", weights_only=True)
    weights = {key.rpartition("esm.")[2]: value for key, value in whole.items() if "esm." in key}
    model = EsmModel(EsmConfig.from_pretrained(folder / "esm"), add_pooling_layer=False)
    model.load_state_dict(weights)
    tokenizer = AutoTokenizer.from_pretrained(folder / "esm")
    return HuggingFaceEncoder(model.float(), tokenizer, EncoderOptions(device="cpu"))


class Module(pl.LightningModule):
    """The model under Lightning's strategy."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model: Any = EsmForMaskedLM.from_pretrained(folder)

    def configure_model(self) -> None:
        shard(self.model)

    def training_step(self, batch: torch.Tensor, _index: int) -> torch.Tensor:
        loss: torch.Tensor = self.model(input_ids=batch, labels=batch).loss
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def with_lightning(folder: Path, model: str) -> None:
    """`lightning.ckpt`, after two steps."""
    module = Module(model)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
        max_steps=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(module, DataLoader(IDS.repeat(4, 1), batch_size=2))  # type: ignore[arg-type]
    write(folder / "lightning", module, lambda: trainer.save_checkpoint(folder / "lightning.ckpt"))


def main(folder: Path, model: str) -> None:
    """Writes everything."""
    dist.init_process_group("gloo")
    load = EsmForMaskedLM.from_pretrained
    sharded = shard(load(model))
    weights, optimizer = get_state_dict(sharded, step(sharded))
    everything = {"model": weights, "optimizer": optimizer, "step": 7}
    write(folder / "fsdp2", sharded, lambda: dcp.save(everything, checkpoint_id=folder / "fsdp2"))
    nested = {"app": {"model": weights, "train": {"global_step": torch.tensor(7)}}}
    in_background: Any = dcp.async_save
    write(folder / "async", sharded, lambda: in_background(nested, checkpoint_id=folder / "async").result())
    half = shard(load(model, torch_dtype=torch.bfloat16))
    write(folder / "bf16", half, lambda: dcp.save(get_model_state_dict(half), checkpoint_id=folder / "bf16"))
    both = DistributedDataParallel(torch.compile(load(model), backend="eager"))
    step(both)
    content = {"state": both.state_dict(), "epoch": 3}
    write(folder / "ddp", both, lambda: dcp.save(content, checkpoint_id=folder / "ddp"))
    with_lightning(folder, model)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
