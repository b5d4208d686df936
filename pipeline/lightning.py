"""Lightning, from the package that the training script uses: `lightning` or `pytorch_lightning`.

The two hold the same classes twice over, and either may be installed without the other.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING

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

__all__ = ["pl"]
