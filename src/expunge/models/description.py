"""What is known of a model without its weights: enough to say what cannot be done with it before it is loaded, or is there.

config, tokenizer = load_outline("models/mine")
Description(config).depth == describe(load_model("models/mine")[0]).depth
"""

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedConfig

from expunge.models.forward import context_of, inner_model, known_of


@dataclass(frozen=True)
class Description:
    """A model's configuration, and whether its weights are quantized once it is loaded."""

    config: PreTrainedConfig
    quantized: bool = False

    @property
    def depth(self) -> int:
        """The number of blocks."""
        return self.config.get_text_config().num_hidden_layers

    @property
    def context(self) -> int:
        """The most tokens that the model takes at once; no bound where its positions are relative."""
        return context_of(self.config)

    @property
    def known(self) -> int | None:
        """How many token ids it has embeddings of; None where the configuration does not say."""
        return known_of(self.config)


def describe(model: nn.Module) -> Description:
    """The same of a model in memory."""
    return Description(inner_model(model).config, bool(getattr(model, "is_quantized", False)))
