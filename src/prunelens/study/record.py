"""What the run.json of every kind of result holds: models, sizes, intervals, and how each is checked on reading."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StrictFloat, StrictInt, StrictStr

MOST_TOKENS = 10**6
"""Written after a prompt."""
Number = StrictFloat | None
"""A measured number; null where it could not be computed."""
Count = Annotated[StrictInt, Field(ge=0, le=MOST_TOKENS)]
Size = Annotated[StrictInt, Field(ge=0, le=10**18)]
Share = Annotated[StrictFloat, Field(ge=0, le=1)]
Texts = list[StrictStr]


class Part(BaseModel):
    """An object in run.json: what is named here is checked, more may stand beside it."""

    model_config = ConfigDict(extra="allow", frozen=True)


class Interval(Part):
    """A mean with its 95 % interval."""

    mean: Number
    low: Number
    high: Number


class Model(Part):
    """A model: name, fingerprint and shape."""

    name: StrictStr
    fingerprint: StrictStr
    family: StrictStr
    dtype: StrictStr
    device: StrictStr
    num_layers: Count
    hidden_size: Size
    vocab_size: Size


class Sized(Part):
    """Parameters that are read, bytes of weights, share of zeros."""

    parameters: Size
    bytes: Size
    zeros: Number


class Dense(Model, Sized):
    """The dense model."""


class Made(Sized):
    """A compressed model, and how it was made."""

    label: StrictStr
    recipe: StrictStr | None = None
    dropped: dict[StrictStr, list[Count] | dict[StrictStr, list[Count]]] = {}
    notes: Texts = []
