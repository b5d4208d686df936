"""The options with which a checkpoint or a module is opened as an encoder."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.config.schema import Config


@dataclass(frozen=True)
class EncoderOptions:
    """How a checkpoint or a module becomes an encoder.

    Attributes:
        infer_target: `auto`, a short name that the architecture must agree with, or the path of an encoder class.
        device: `auto`, `cpu`, `cuda`, `cuda:1` or `mps`.
        precision: `auto`, `fp32`, `bf16` or `fp16`.
        architecture: the Hugging Face folder or id of the model in a checkpoint that does not describe itself.
        trust_pickle: unpickle a checkpoint as it is, with the code that it names.
        trust_remote_code: run the code that a folder or hub id brings for a model of its own class.
        weights: the name of one of several sets of weights in a file, or `ema`; see `bare.weights_of`.
        layer: the hidden states to take: 0 are the token embeddings, 1 those behind the first layer; negative numbers
            count from the last. None is the last.
        model_factory: the path of a class or function of the user's that makes the `nn.Module` that the weights are of;
            it is called with the stored configuration.
        pooling: how token states become the embedding of a sequence; see `Encoder`.
        compile: have `torch.compile` compile the layers of a Hugging Face model.
    """

    infer_target: str = "auto"
    device: str = "auto"
    precision: str = "auto"
    architecture: str | None = None
    trust_pickle: bool = False
    trust_remote_code: bool = False
    weights: str | None = None
    layer: int | None = None
    model_factory: str | None = None
    pooling: str = "mean"
    compile: bool = False

    @classmethod
    def from_config(cls, config: Config) -> EncoderOptions:
        """The options that a configuration has for all of its tasks."""
        target, *others = (field.name for field in fields(cls))
        return cls(getattr(config.dataset[0], target), **{name: getattr(config, name) for name in others})
