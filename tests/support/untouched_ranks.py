"""A module with parts of tensors is measured by one rank alone; each rank then writes what it has to a file."""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from pipeline import untouched


def main(folder: Path) -> None:
    distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
    mesh, rank = init_device_mesh("cpu", (2,)), int(os.environ["RANK"])
    module: Any = nn.Module()
    module.register_buffer("buffer", distribute_tensor(torch.zeros(4), mesh, [Shard(0)]))
    module.kept = [distribute_tensor(torch.ones(4), mesh, [Shard(0)])]
    tensors = [module.buffer, *module.kept]
    if rank == 0:
        with suppress(KeyError), untouched(module):
            for one in tensors:
                one.to_local().fill_(5)
            raise KeyError("on this rank alone")
    distributed.barrier()
    (folder / f"rank-{rank}.json").write_text(json.dumps([one.to_local().tolist() for one in tensors]))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
