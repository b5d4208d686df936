"""Lightning, from the package that the training script uses: `lightning` or `pytorch_lightning`.

Each has its own copy of the same classes, and either may be installed without the other.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pipeline.errors import ConfigError

PACKAGES = ("pytorch_lightning", "lightning.pytorch")

if TYPE_CHECKING:
    import pytorch_lightning as pl
else:
    for name in sorted(PACKAGES, key=lambda name: name not in sys.modules):
        try:
            pl = importlib.import_module(name)
            break
        except ImportError:
            continue
    else:
        raise ConfigError("the callback needs Lightning: pip install pytorch-lightning")


class DescribingIO(pl.plugins.CheckpointIO):
    """Writes checkpoints as `inner` does, with one more entry. Lightning calls no callback for weights-only ones."""

    def __init__(self, inner: Any, key: str, value: Callable[[], Any]) -> None:
        """Adds `value()` under `key`, unless it is None or the checkpoint has the key."""
        self.inner, self.key, self.value = inner, key, value

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Writes `checkpoint` with the entry."""
        value = self.value()
        if value is not None:
            checkpoint.setdefault(self.key, value)
        self.inner.save_checkpoint(checkpoint, path, storage_options)

    def load_checkpoint(self, path: Any, *args: Any, **options: Any) -> Any:
        """As `inner`."""
        return self.inner.load_checkpoint(path, *args, **options)

    def remove_checkpoint(self, path: Any) -> None:
        """As `inner`."""
        self.inner.remove_checkpoint(path)

    def teardown(self) -> None:
        """As `inner`."""
        self.inner.teardown()


__all__ = ["DescribingIO", "pl"]
