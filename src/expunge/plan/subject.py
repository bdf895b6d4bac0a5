"""A model that a run works on: what it is, known from its files; and its weights, read when they are first asked for.

subject = Subject("reference", "builtin", loading={"dtype": "float32"})
subject.description.depth, subject.key          # no weight is read
subject.model, subject.tokenizer                # now they are, and stay until `release`
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from expunge.models import Description, Identity, describe, identity_of, load_model, load_outline
from expunge.provenance import digest


@dataclass(eq=False)
class Subject:
    """A model by its role. source: a hub name, a folder, built in; loading: arguments of `load_model`, but the revision."""

    name: Literal["reference", "unlearned"]
    source: str | Path
    revision: str | None = None
    loading: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def identity(self) -> Identity:
        """Hashes of its files, as they were when this was first asked after a `release`."""
        return identity_of(self.source, self.revision)

    @property
    def key(self) -> str:
        """A hash of what it is and of how it is loaded."""
        return digest(self.identity.loaded(self.loading))

    @cached_property
    def outline(self) -> tuple[PreTrainedConfig, PreTrainedTokenizerBase]:
        """Its configuration and its tokenizer."""
        trust = bool(self.loading.get("trust_remote_code"))
        return load_outline(self.source, revision=self.revision, trust_remote_code=trust)

    @property
    def description(self) -> Description:
        """Of the model in memory, or, where it is not loaded, of what would be."""
        if "loaded" in vars(self):
            return describe(self.model)
        config = self.outline[0]
        return Description(config, bool(self.loading.get("quantization") or getattr(config, "quantization_config", None)))

    def load(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """A copy of its own for the caller, who may change it."""
        return load_model(self.source, revision=self.revision, **self.loading)

    @cached_property
    def loaded(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The one that stages share, which none of them changes; in memory until `release`."""
        return self.load()

    @property
    def model(self) -> PreTrainedModel:
        return self.loaded[0]

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.loaded[1] if "loaded" in vars(self) else self.outline[1]

    def release(self) -> None:
        """At the end of a stage: give the memory of its weights back, and hash its files again when that is asked for."""
        for name in ("loaded", "identity"):
            vars(self).pop(name, None)
