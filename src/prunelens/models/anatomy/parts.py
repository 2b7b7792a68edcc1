"""What the parts of a decoder are: modules in chains, sublayers, blocks."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from prunelens.models.anatomy.hooks import Returned

Kind = Literal["attention", "mlp"]


@dataclass(frozen=True)
class Link:
    """A module of a chain, the last dimension of its hidden states, and what else it returns.

    `gain` is what the block multiplies the output of the link before by, where that is not read as it is.
    """

    module: nn.Module
    width: int
    returned: Returned
    gain: float = 1.0


@dataclass(frozen=True)
class Sublayer:
    """What adds its output, times `scale`, to the residual stream of block `layer_idx`.

    Attributes:
        kind: `attention` mixes positions (attention, convolution, state space), `mlp` does not.
        layer_idx: index of its block.
        name: of the modules in `body`.
        module: drops the sublayer by returning zeros, or the residual where it adds that inside.
        norms: names of the norms that serve only this sublayer.
        links: from the module that reads the stream to the one whose output is added (norm, module, norm).
        body: the modules that compute with matrices: one, the two layers of an MLP that is no module, or one of
            each chain.
        scale: what its output is multiplied by.
        residual_at: the argument, by position or name, in which the last module is given the stream it adds inside.
        beside: what else of this kind reads the same tensor and adds to the same stream; it goes with the sublayer.
    """

    kind: Kind
    layer_idx: int
    name: str
    module: nn.Module
    norms: tuple[str, ...]
    links: tuple[Link, ...]
    body: tuple[nn.Module, ...]
    scale: float
    residual_at: int | str | None = None
    beside: tuple["Sublayer", ...] = ()

    @property
    def chain(self) -> tuple[nn.Module, ...]:
        """The modules of `links`."""
        return tuple(link.module for link in self.links)

    @property
    def strands(self) -> tuple["Sublayer", ...]:
        """The sublayer's chains, each as a sublayer by itself."""
        return (self, *self.beside)

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """The modules of all its chains, each once."""
        return tuple(dict.fromkeys(module for strand in self.strands for module in strand.chain))

    @property
    def adds_residual(self) -> bool:
        """Whether the output of the chain holds the stream already."""
        return self.residual_at is not None

    def add_to(self, stream: Tensor, output: Tensor) -> Tensor:
        """The stream after this sublayer: what it read, and what the end of its chain returned, together."""
        return output if self.adds_residual else stream + self.scale * output


@dataclass(frozen=True)
class Block:
    """A decoder layer: reads the residual stream and returns it with its sublayers' outputs added."""

    layer_idx: int
    name: str
    module: nn.Module
    layout: Literal["sequential", "parallel"]
    sublayers: tuple[Sublayer, ...]
    returned: Returned

    def find(self, kind: Kind) -> Sublayer | None:
        """The sublayer of this kind, if the block has one."""
        return next((part for part in self.sublayers if part.kind == kind), None)
