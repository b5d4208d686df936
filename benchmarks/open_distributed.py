"""Peak memory of opening a distributed checkpoint that holds the state of Adam too, beside the encoder's own size.

    python benchmarks/open_distributed.py [--layers 25] [--json FILE]

Makes an ESM of width 768 and a checkpoint of its weights and of two moments for each, as `torch.distributed.checkpoint`
writes them, in a temporary folder: 2 GB with 25 layers. A fresh process then imports what opening takes, opens the
checkpoint, and says by how much its peak memory rose. Everything of the checkpoint read at once would be four times
the encoder's size: random weights, stored weights and moments.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory

WIDTH = 768


def write(folder: Path, layers: int) -> None:
    """The checkpoint in `folder/saved`, and configuration and tokenizer in `folder/model`."""
    import torch
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save
    from transformers import EsmConfig, EsmForMaskedLM

    from pipeline.encoders.esm import VOCABULARY, make_tokenizer

    tokenizer = make_tokenizer()
    config = EsmConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=12,
        intermediate_size=4 * WIDTH,
        pad_token_id=tokenizer.pad_token_id,
        mask_token_id=tokenizer.mask_token_id,
        position_embedding_type="rotary",
    )
    config.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    weights = EsmForMaskedLM(config).state_dict()
    moments = {
        name: {key: torch.rand_like(value) for key in ("exp_avg", "exp_avg_sq")} for name, value in weights.items()
    }
    content = {"model": weights, "optimizer": {"state": moments}, "step": 1000}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is a single process
        save(content, storage_writer=FileSystemWriter(folder / "saved", thread_count=4))


def open_it(folder: Path) -> None:
    """Prints the peak memory before and after opening, and the encoder's size, in MB."""
    from pipeline.checkpoints.opening import open_encoder
    from pipeline.encoders.options import EncoderOptions

    small = folder / "small"
    open_encoder(str(small / "saved"), EncoderOptions(device="cpu", architecture=str(small / "model")))  # imports all
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
    before = peak()
    encoder = open_encoder(str(folder / "saved"), EncoderOptions(device="cpu", architecture=str(folder / "model")))
    rise = peak() - before
    size = sum(value.nbytes for value in encoder.model.state_dict().values())  # type: ignore[attr-defined]
    print(json.dumps({"before": before, "rise": rise, "encoder": size / 2**20}))


def peak() -> float:
    """Peak resident memory of this process, in MB; Linux alone says it."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) / 1024


def main() -> None:
    """Makes the checkpoints, and opens them in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=25)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--open", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.open:
        open_it(options.open)
        return
    with TemporaryDirectory() as name:
        folder = Path(name)
        write(folder, options.layers)
        write(folder / "small", 1)
        stored = sum(path.stat().st_size for path in (folder / "saved").iterdir()) / 2**20
        command = [sys.executable, __file__, "--open", name]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    found = {"stored": stored, **json.loads(printed.splitlines()[-1])}
    print(f"stored {found['stored']:.0f} MB, encoder {found['encoder']:.0f} MB")
    share = found["rise"] / found["encoder"]
    print(f"opening adds {found['rise']:.0f} MB = {share:.3f} encoders to {found['before']:.0f} MB after the imports")
    if options.json:
        options.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
