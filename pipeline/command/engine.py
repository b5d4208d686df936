"""Where the command line's work runs: in this process, or on Ray (`engine: ray`)."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial

import torch

from pipeline.checkpoints.opening import open_encoder
from pipeline.config.schema import Config
from pipeline.encoders.options import EncoderOptions
from pipeline.encoders.protocol import Encoder
from pipeline.encoders.remote import RemoteEncoder
from pipeline.engines.ray_engine import Needs, RayEngine, connected
from pipeline.heads.threads import on_threads
from pipeline.store.temporary import remove_left

logger = logging.getLogger(__name__)


@contextmanager
def engine_of(config: Config) -> Iterator[RayEngine | None]:
    """The engine that a configuration names; None for this process.

    Raises:
        ConfigError: Ray is not installed, or no machine has what a worker takes.
        EngineError: the cluster cannot be reached.
    """
    if config.engine == "local":
        yield None
        return
    own = config.ray
    gpus = own.gpus if config.device in ("auto", "cuda") else 0.0
    if gpus is None and config.device == "cuda":
        gpus = 1.0
    with ExitStack() as stack:
        stack.callback(remove_left)  # worker processes are killed, and what they downloaded stays
        if own.threads:  # here too: what is said of how embeddings were made is said here
            stack.enter_context(on_threads(own.threads))
        engine = stack.enter_context(connected(Needs(torch.get_num_threads(), gpus, own.workers)))
        logger.info("engine      ray: %s", engine)
        yield engine


def device_on(engine: RayEngine, device: str) -> str:
    """The device that a worker is told to use: one without a GPU of its own may see those of others."""
    return "cpu" if device == "auto" and not engine.gpus else device


def open_on(engine: RayEngine | None, ckpt: str, options: EncoderOptions) -> Encoder:
    """The encoder in a stored checkpoint, which the engine's processes open; see `open_encoder`."""
    if engine is None:
        return open_encoder(ckpt, options)
    there = replace(options, device=device_on(engine, options.device))
    return RemoteEncoder(engine, partial(open_encoder, ckpt, there))
