"""Remove a behaviour or body of knowledge from a causal language model, and prove that it is gone.

from expunge import REPO, UnlearnConfig, UnlearnTrainer, load_model, load_pairs
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from expunge.config import RunConfig
    from expunge.data import load_pairs
    from expunge.errors import ExpungeError
    from expunge.methods.dpo import DPO
    from expunge.methods.repo import REPO
    from expunge.models import load_model
    from expunge.pipeline import run
    from expunge.training import UnlearnConfig, UnlearnTrainer

_HOMES = {
    "DPO": "expunge.methods.dpo",
    "ExpungeError": "expunge.errors",
    "REPO": "expunge.methods.repo",
    "RunConfig": "expunge.config",
    "UnlearnConfig": "expunge.training",
    "UnlearnTrainer": "expunge.training",
    "load_model": "expunge.models",
    "load_pairs": "expunge.data",
    "run": "expunge.pipeline",
}

__all__ = [
    "DPO",
    "REPO",
    "ExpungeError",
    "RunConfig",
    "UnlearnConfig",
    "UnlearnTrainer",
    "load_model",
    "load_pairs",
    "run",
]


def __getattr__(name: str) -> object:
    """Import a public name when it is first asked for, so that `import expunge` does not wait for torch."""
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'expunge' has no attribute {name!r}")
