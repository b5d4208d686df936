"""Writes DeepSpeed checkpoints in their documented layout, by the arithmetic with which DeepSpeed splits weights."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Groups = Sequence[Mapping[str, Tensor]]


class LossScaler:
    """An object of a class that whoever reads the file may not have."""


def split_groups(groups: Groups, ranks: int, padded: bool = False) -> list[list[Tensor]]:
    """ZeRO 1 and 2: for each rank its stretch of each group; early releases keep the padding at the end."""
    found: list[list[Tensor]] = [[] for _ in range(ranks)]
    for weights in groups:
        flat = torch.cat([weight.flatten() for weight in weights.values()])
        size = 2 * ranks * math.ceil(len(flat) / (2 * ranks))
        whole = torch.cat([flat, torch.zeros(size - len(flat))])
        for rank, stretch in enumerate(whole.chunk(ranks)):
            real = max(0, min(len(stretch), len(flat) - rank * len(stretch)))
            found[rank].append(stretch.clone() if padded else stretch[:real].clone())
    return found


def split_each(weights: Mapping[str, Tensor], ranks: int) -> list[dict[str, Tensor]]:
    """ZeRO 3: for each rank its part of each weight, the last one padded."""
    found: list[dict[str, Tensor]] = [{} for _ in range(ranks)]
    for name, weight in weights.items():
        size = math.ceil(weight.numel() / ranks)
        whole = torch.cat([weight.flatten(), weight.new_full((size * ranks - weight.numel(),), math.nan)])
        for rank in range(ranks):
            found[rank][name] = whole[rank * size : (rank + 1) * size].clone()
    return found


def write_zero(
    folder: Path,
    weights: Mapping[str, Tensor],
    stage: int,
    ranks: int = 2,
    dtype: torch.dtype = torch.bfloat16,
    frozen: Collection[str] = (),
    buffers: Mapping[str, Tensor] | None = None,
    shared: Mapping[str, str] | None = None,
    tag: str = "global_step7",
    padded: bool = False,
    client: Mapping[str, Any] | None = None,
) -> Path:
    """A checkpoint of these float32 weights; what is in `frozen` has no optimizer, and is of `dtype` alone.

    Args:
        folder: gets `latest`, and the folder called `tag`.
        weights: by name, shared ones left out.
        stage: 0 to 3.
        ranks: how many there were.
        dtype: of the module in training.
        frozen: names of weights that were not trained.
        buffers: of the module, by name.
        shared: names of weights that are others, and those.
        tag: names the checkpoint.
        padded: as early releases wrote ZeRO 1 and 2.
        client: what the trainer adds.

    Returns:
        The folder called `tag`.
    """
    place = folder / tag
    place.mkdir(parents=True)
    (folder / "latest").write_text(tag)
    (folder / "zero_to_fp32.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\n")
    still = {name: weights[name].to(dtype) for name in frozen}
    trained = {name: weight for name, weight in weights.items() if name not in frozen}
    decayed = {name: weight for name, weight in trained.items() if weight.dim() > 1}
    groups = [decayed, {name: weight for name, weight in trained.items() if name not in decayed}]
    whole = {name: weight.to(dtype) for name, weight in weights.items()}
    whole |= {alias: whole[name] for alias, name in (shared or {}).items()}
    parts_of_frozen = split_each(still, ranks)
    for rank in range(ranks if stage == 3 else 1):
        content = {
            "module": {name: torch.empty(0, dtype=dtype) for name in whole} if stage == 3 else whole,
            "buffer_names": list(buffers or {}),
            "param_shapes": [OrderedDict((n, w.shape) for n, w in group.items()) for group in groups]
            if stage
            else None,
            "frozen_param_shapes": {name: weight.shape for name, weight in still.items()} if stage > 1 else None,
            "frozen_param_fragments": None if stage < 2 else parts_of_frozen[rank] if stage == 3 else still,
            "shared_params": dict(shared or {}) if stage else None,
            "global_steps": 7,
            "dp_world_size": ranks,
            "ds_config": {"zero_optimization": {"stage": stage}},
            **(client or {}),
        }
        content["module"] = {**content["module"], **(buffers or {})}
        name = f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" if stage == 3 else "mp_rank_00_model_states.pt"
        torch.save(content, place / name)
    for rank in range(ranks if stage else 0):
        torch.save(_optimizer(groups, stage, ranks, rank, padded), place / _optimizer_file(rank, dtype))
    return place


def _optimizer(groups: Groups, stage: int, ranks: int, rank: int, padded: bool) -> dict[str, Any]:
    if stage == 3:
        vectors = [torch.cat(list(split_each(group, ranks)[rank].values())) for group in groups]
        for vector in vectors:
            vector.ds_id = 1  # type: ignore[attr-defined]  # it has attributes of its own, as DeepSpeed's have
        parts: dict[str, Any] = {"fp32_flat_groups": vectors, "partition_count": ranks}
    else:
        vectors = split_groups(groups, ranks, padded)[rank]
        parts = {"single_partition_of_fp32_groups": vectors, "partition_count": [ranks] * len(groups)}
    state = {index: {"exp_avg": vector.clone()} for index, vector in enumerate(vectors)}
    return {"optimizer_state_dict": {"loss_scaler": LossScaler(), "base_optimizer_state": {"state": state}, **parts}}


def _optimizer_file(rank: int, dtype: torch.dtype) -> str:
    return f"{'bf16_' if dtype == torch.bfloat16 else ''}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
