"""An open model: its network, its tokenizer, where its parts are, and what it is."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunelens.models.anatomy.find import Anatomy
from prunelens.models.anatomy.hooks import head_of
from prunelens.models.anatomy.positions import longest_text
from prunelens.models.placement import AUTO, input_device


@dataclass
class Model:
    """An open model: Hugging Face modules, tokenizer, where its parts are, and what it is.

    Attributes:
        name: what the user called it.
        network: the transformers model, in eval mode.
        tokenizer: its tokenizer, or None where the checkpoint has none.
        anatomy: blocks, sublayers, norms and head.
        fingerprint: hash of configuration and weights.
        notes: remarks that a reader of the results should see.
        trust_remote_code: whether it was opened with code of its own allowed; models compared with it are too.
        spread: whether it was opened for several devices or offloading; models compared with it are too.
        stored_dtype: the floating dtype of its checkpoint, where it is known.
        weight_bytes: size of its weights on disk, or in memory where it was not opened from files; what nothing reads
            is left out.
        source: the folder that it was opened from; None for a model from GGUF or in memory.
    """

    name: str
    network: Any
    tokenizer: Any
    anatomy: Anatomy
    fingerprint: str
    notes: list[str] = field(default_factory=list)
    trust_remote_code: bool = False
    spread: bool = False
    stored_dtype: torch.dtype | None = None
    weight_bytes: int = 0
    source: Path | None = None

    @property
    def device(self) -> torch.device:
        """Where token ids go in, which is where states are collected."""
        return input_device(self.network)

    @property
    def placement(self) -> str | torch.device:
        """The `device` with which a model to be compared is opened."""
        return AUTO if self.spread else self.device

    @property
    def dtype(self) -> torch.dtype:
        """The floating dtype of the states."""
        return self.network.get_input_embeddings().weight.dtype

    @property
    def layers(self) -> list[torch.nn.Module]:
        """The decoder layers in order."""
        return [block.module for block in self.anatomy.blocks]

    @property
    def context_length(self) -> int | None:
        """Longest sequence the positions allow, or None where the family sets no limit."""
        return longest_text(self.network.config)

    @property
    def eos_ids(self) -> list[int]:
        """Tokens that end a text."""
        settings = getattr(self.network, "generation_config", None)
        for holder in (settings, self.network.config, text_config(self.network), self.tokenizer):
            found = getattr(holder, "eos_token_id", None)
            if found is not None:
                return [found] if isinstance(found, int) else list(found)
        return []

    def head(self, states: Tensor) -> Tensor:
        """Logits (rows, V) of states (rows, d) that enter the head."""
        return head_of(self.network)(states)


def text_config(network: Any) -> Any:
    """The settings of the part that writes text; of most networks, all settings."""
    return network.config.get_text_config(decoder=True)
