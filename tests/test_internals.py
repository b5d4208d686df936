"""The private parts of other libraries that are used here exist: a version that takes one away fails, by its name."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from tokenizers import Tokenizer
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from transformers import EsmConfig, EsmModel, T5Config, T5EncoderModel

from pipeline.checkpoints.unpickle import ALLOWED
from pipeline.encoders.internals import (
    attention_of,
    attention_set,
    fsdp1_has,
    fsdp1_order,
    fsdp1_reshard,
    fsdp2_order,
    fsdp2_ranks,
    hooks_of,
    is_compiled,
    panics_as_errors,
    uncompiled_state,
)
from pipeline.encoders.packing import FUSED


@pytest.fixture
def esm() -> Any:
    return EsmModel(
        EsmConfig(vocab_size=33, pad_token_id=1, hidden_size=16, num_attention_heads=2, num_hidden_layers=1)
    )


def test_attn_implementation_of_a_configuration(esm: Any) -> None:
    """A model's own configuration has it once the model is made, and what is set there is what runs."""
    before = attention_of(esm.config)
    assert before == ("sdpa" if hasattr(transformers, "AttentionInterface") else "eager")  # of ESM in release 4.48
    with attention_set(esm.config, "another"):
        assert attention_of(esm.config) == "another"
    assert attention_of(esm.config) == before


def test_forward_hooks_and_forward_pre_hooks(esm: Any) -> None:
    before = hooks_of(esm)
    handle = esm.encoder.register_forward_hook(lambda *_: None)
    esm.register_forward_pre_hook(lambda *_: None)
    assert hooks_of(esm) == before + 2
    handle.remove()
    assert hooks_of(esm) == before + 1


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/ranks", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`")
def test_what_fsdp1_has_of_a_module(esm: Any) -> None:
    wrapped: Any = FullyShardedDataParallel(esm, device_id=torch.device("cpu"), use_orig_params=True)
    assert all(map(fsdp1_has, wrapped.parameters()))
    assert not any(map(fsdp1_has, nn.Linear(2, 2).parameters()))
    ids, order = torch.tensor([[5, 6]]), wrapped._exec_order_data
    with fsdp1_order([wrapped]), torch.no_grad():
        wrapped(input_ids=ids)
        assert order.handles_pre_forward_order
    assert not order.handles_pre_forward_order
    assert wrapped._handle._pre_forward_order_index is None
    fsdp1_reshard(wrapped)  # on one rank there is nothing to be freed; on two, see test_fsdp1.py


@pytest.mark.usefixtures("one_rank")
def test_what_fsdp2_has_of_a_module(esm: Any) -> None:
    sharded: Any = fully_shard(esm)
    (group,) = sharded._get_fsdp_state()._fsdp_param_groups
    with fsdp2_order([sharded]), torch.no_grad():
        sharded(input_ids=torch.tensor([[5, 6]]))
        assert group.comm_ctx.post_forward_order == [group]
    assert group.comm_ctx.post_forward_order == group._post_forward_indices == []
    assert fsdp2_ranks(sharded) == [0]


def test_orig_mod_of_a_compiled_module() -> None:
    linear = nn.Linear(2, 2)
    compiled: Any = torch.compile(linear)
    assert is_compiled(compiled)
    assert not is_compiled(linear)
    assert uncompiled_state(compiled.state_dict()).keys() == linear.state_dict().keys() != compiled.state_dict().keys()


def test_panic_exception_of_rust() -> None:
    """A broken normalizer is no error in the library, but a panic."""
    normalizer = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    model = {"type": "WordLevel", "vocab": {}, "unk_token": "x"}
    with pytest.raises(RuntimeError, match="Cannot parse precompiled_charsmap"), panics_as_errors():
        Tokenizer.from_str(json.dumps({"version": "1.0", "normalizer": normalizer, "model": model}))


@pytest.mark.parametrize("name", FUSED)
def test_classes_that_are_fused_by_name(name: str, esm: Any) -> None:
    gates = T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu")
    models = [esm, T5EncoderModel(gates)]
    assert name in {type(module).__name__ for model in models for module in model.modules()}


@pytest.mark.parametrize("path", [f"{module}.{name}" for module, names in ALLOWED.items() for name in sorted(names)])
def test_names_that_a_file_of_torch_may_hold(path: str) -> None:
    module, _, name = path.rpartition(".")
    assert hasattr(importlib.import_module(module), name)
