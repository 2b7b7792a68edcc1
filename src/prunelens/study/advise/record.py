"""What the run.json of advice holds."""

from pydantic import StrictFloat, StrictStr

from prunelens.study.evaluate.record import Line
from prunelens.study.record import Interval, Number, Part, Share, Texts


class Goal(Part):
    """What was asked: a use, and the share of it to keep."""

    use: StrictStr
    keep: Share
    tasks: Texts


class Trial(Part):
    """A recipe that was tried, and what decided on it."""

    recipe: StrictStr
    number: StrictStr
    bytes_saved: Number
    zeros: Number
    loads: StrictStr


class KL(Interval):
    """Mean KL(dense ‖ compressed) of a recipe on the held-out prompts, nats."""

    role: StrictStr
    recipe: StrictStr


class Pair(Part):
    """Two recipes compared on the held-out prompts."""

    left: StrictStr
    right: StrictStr
    difference: Interval
    better: StrictStr | None


class HeldOut(Part):
    """What was measured on prompts that the search did not see."""

    kl: list[KL]
    against_cosine: Pair | None = None
    against_random: Pair | None = None
    against_unrepaired: Pair | None = None


class Used(Part):
    """What a recipe loses of the use on held-out items."""

    role: StrictStr
    recipe: StrictStr
    loss: Number
    number: StrictStr


class Ratio(Part):
    """A ratio to the dense model over the repeats."""

    median: StrictFloat
    low: StrictFloat
    high: StrictFloat


class Speed(Part):
    """How fast a recipe runs beside the dense model."""

    recipe: StrictStr
    decode_ratio: Ratio | None
    decode_tokens_per_second: Number
    kv_bytes_per_token: StrictFloat
    device: StrictStr


class Named(Part):
    """The dense model by its name."""

    name: StrictStr


class AdviceInfo(Part):
    """Of advice."""

    dense: Named
    aim: Goal
    chosen: Trial | None
    runner_up: Trial | None
    closest: Trial | None
    held_out: HeldOut
    verdicts: list[Line]
    held_out_use: list[Used]
    speeds: list[Speed]
    notes: Texts
