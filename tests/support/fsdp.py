"""One rank of two: folders of accelerate under DDP and FSDP, and of Lightning under FSDP, written by the libraries.

    python -m tests.support.fsdp FOLDER MODEL     # with RANK, WORLD_SIZE and so on set

Both libraries take FSDP for GPUs alone, though torch has it on the CPU: accelerate is told here that it is on GPUs, and
Lightning, which asks for its own class, is given a subclass. What they write is then theirs. Beside each checkpoint
`FOLDER/<name>`, rank 0 writes the whole weights as they were in training, `<name>.pt`.

Also what ranks of other programs do last, see `finish`.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin  # type: ignore[import-untyped]
from accelerate.state import PartialState  # type: ignore[import-untyped]
from accelerate.utils import DistributedType  # type: ignore[import-untyped]
from pytorch_lightning.strategies import FSDPStrategy
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.utils.data import DataLoader
from transformers import EsmForMaskedLM, EsmTokenizer
from transformers.models.esm.modeling_esm import EsmLayer

from pipeline import DownstreamValidation
from pipeline.config.schema import Config
from tests.support.loops import digest
from tests.support.sharded import FULL, IDS, write
from tests.support.training import trainer

KINDS = ((1, "SHARDED_STATE_DICT"), (2, "SHARDED_STATE_DICT"), (2, "FULL_STATE_DICT"))


def train(accelerator: Any, source: str, path: Path) -> None:
    """A checkpoint after one step, of a batch on each rank, so that there is a state of the optimizer."""
    model: Any = EsmForMaskedLM.from_pretrained(source)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    batch = IDS[dist.get_rank() :][:1]
    accelerator.backward(model(input_ids=batch, labels=batch).loss)
    optimizer.step()
    write(path, model, lambda: accelerator.save_state(str(path)))
    accelerator.free_memory()


def with_accelerate(folder: Path, source: str) -> None:
    """`accelerate-ddp`, then `accelerate-fsdp1-sharded` and so on."""
    accelerator: Any = Accelerator(cpu=True)
    train(accelerator, source, folder / "accelerate-ddp")
    accelerator.state._reset_state()
    PartialState._shared_state |= {"distributed_type": DistributedType.MULTI_GPU, "device": torch.device("cpu")}
    for version, kind in KINDS:
        plugin: Any = FullyShardedDataParallelPlugin(
            fsdp_version=version,
            state_dict_type=kind,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["EsmLayer"],
            cpu_ram_efficient_loading=False,
            use_orig_params=True if version == 1 else None,
        )
        accelerator = Accelerator(fsdp_plugin=plugin) if version == 1 else accelerator
        accelerator.state.fsdp_plugin = plugin
        train(accelerator, source, folder / f"accelerate-fsdp{version}-{kind.partition('_')[0].lower()}")


class OnCPU(FSDPStrategy):
    """Lightning's own, with the device that it would ask CUDA for."""

    def _setup_model(self, model: nn.Module) -> nn.Module:
        policy = ModuleWrapPolicy({EsmLayer})
        wrapped = FullyShardedDataParallel(model, device_id=torch.device("cpu"), auto_wrap_policy=policy)
        return super()._setup_model(wrapped)


class Module(pl.LightningModule):
    """The model under Lightning's strategy."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model: Any = EsmForMaskedLM.from_pretrained(folder)

    def training_step(self, batch: torch.Tensor, _index: int) -> torch.Tensor:
        loss: torch.Tensor = self.model(input_ids=batch, labels=batch).loss
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def with_lightning(folder: Path, source: str) -> None:
    """`sharded.ckpt`, after two steps."""
    strategy: Any = OnCPU(state_dict_type="sharded")
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=strategy,
        max_steps=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(Module(source), DataLoader(IDS.repeat(4, 1), batch_size=2))  # type: ignore[arg-type]
    write(folder / "sharded", strategy.model, lambda: trainer.save_checkpoint(folder / "sharded.ckpt"))


class Validated(Module):
    """The model with its tokenizer, validated after each epoch."""

    def __init__(self, folder: str) -> None:
        super().__init__(folder)
        self.tokenizer = EsmTokenizer.from_pretrained(folder)

    def validation_step(self, batch: torch.Tensor, _index: int) -> None:
        self.log("val_loss", self.model(input_ids=batch, labels=batch).loss, sync_dist=True)


def weights(model: nn.Module) -> str:
    """A digest of the whole weights, the same on each rank."""
    return digest([value for _, value in sorted(get_model_state_dict(model, options=FULL).items())])


def finish(
    folder: Path, found: dict[str, Any], config: Config, make: Callable[[], Validated], strategy: Callable[[], Any]
) -> NoReturn:
    """The end of a rank: a training under Lightning, without and with measurements; and the file of all it found."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in ("without", "with"):
            pl.seed_everything(5, verbose=False)
            callbacks, sharded = [DownstreamValidation(config)] if name == "with" else [], strategy()
            devices = int(os.environ["WORLD_SIZE"])
            ours = trainer(folder / name, callbacks, devices=devices, strategy=sharded, max_epochs=2)
            data: Any = DataLoader([*IDS.repeat(4, 1)], batch_size=2)  # type: ignore[arg-type]
            ours.fit(make(), data, data)
            curve = callbacks[0].curve if callbacks else []
            found[f"lightning {name}"] = {"weights": weights(sharded.model), "curve": curve}
    (folder / f"rank-{os.environ['RANK']}.json").write_text(json.dumps(found))
    os._exit(0)


def main(folder: Path, source: str) -> None:
    """Writes everything."""
    with_accelerate(folder, source)
    with_lightning(folder, source)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
