"""One rank of two: rank 0 alone opens a distributed checkpoint, while the other does something else."""

from __future__ import annotations

import os
import sys
import time
from datetime import timedelta

import torch.distributed as dist

from pipeline.checkpoints.opening import open_encoder
from pipeline.encoders.options import EncoderOptions

if __name__ == "__main__":
    dist.init_process_group("gloo", timeout=timedelta(seconds=20))
    if dist.get_rank() == 0:
        open_encoder(sys.argv[1], EncoderOptions(device="cpu", architecture=sys.argv[2])).hidden_states(["MKV"])
        os._exit(0)
    time.sleep(300)
