"""drop-attention, drop-mlp, drop-block, drop-sublayers: take whole parts out of a model."""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from pydantic import StrictBool, StrictInt, StrictStr, field_validator, model_validator

from prunelens.errors import PrunelensError, cut, shown
from prunelens.pruning.methods import COSINE, Method
from prunelens.pruning.plugins import find_ranking, from_outside
from prunelens.pruning.steps.base import BaseStep, number, words

if TYPE_CHECKING:
    from prunelens.models.model import Model
    from prunelens.models.surgery.drop import Drop
    from prunelens.pruning.pruned import Pruned, StepInputs
    from prunelens.pruning.redundancy import Ranking

DropMethod = Literal["drop-attention", "drop-mlp", "drop-block", "drop-sublayers"]
DROPS: tuple[DropMethod, ...] = get_args(DropMethod)
WORDS = ("consecutive", "iterative")
SERVED = "saved with --format nemotron-nas, vLLM, SGLang and llama.cpp leave them out"
ZEROED = "single sublayers: plain transformers and vLLM load it with zeros in their place, no smaller and no faster"


class DropStep(BaseStep):
    """Take parts out: the `count` most redundant, or those named in `at`.

    `at` holds layer indices as text, for drop-sublayers with a kind in front (`a25`, `m3`). `iterative` ranks what
    is left anew before each choice. `by` names a ranking other than the built-in cosine.
    """

    takes_indices: ClassVar[bool] = True
    drops_parts: ClassVar[bool] = True

    method: DropMethod
    count: StrictInt | None = None
    at: tuple[str, ...] | None = None
    consecutive: StrictBool = False
    iterative: StrictBool = False
    by: StrictStr | None = None

    @classmethod
    def methods(cls) -> tuple[str, ...]:
        """The names that this kind of step goes by."""
        return DROPS

    @classmethod
    def values(cls, method: str, sign: str, rest: str, part: str) -> dict[str, Any]:
        """METHOD@25,26 or METHOD:8, with `consecutive`, `iterative` and `by=NAME` after commas."""
        items = [item.strip() for item in rest.split(",")]
        if sign == "@":
            return {"method": method, "at": tuple(items)}
        example = f"a count such as {method}:8"
        named = [item.removeprefix("by=") for item in items[1:] if item.startswith("by=")]
        if len(named) > 1:
            raise ValueError(f"expected one ranking, found {shown(part.strip())}")
        others = [item for item in items[1:] if not item.startswith("by=")]
        return {
            "method": method,
            **number(items[0], r"[0-9]{1,6}", "count", example, part),
            **words(others, WORDS, example, part, "consecutive, iterative or by=RANKING"),
            **({"by": named[0]} if named else {}),
        }

    @model_validator(mode="before")
    @classmethod
    def _indices_as_text(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("at"), list | tuple):
            wrong = [item for item in values["at"] if isinstance(item, bool) or not isinstance(item, str | int)]
            if wrong:
                raise ValueError(f"expected indices such as 25, found {shown(wrong[0])}")
            return values | {"at": tuple(str(item) for item in values["at"])}
        return values

    @field_validator("by", mode="after")
    @classmethod
    def _known_ranking(cls, name: str | None) -> str | None:
        if name is not None:
            find_ranking(name)
        return None if name == COSINE else name

    @model_validator(mode="after")
    def _one_choice(self) -> "DropStep":
        if (self.count is None) == (self.at is None):
            raise ValueError("give either a count (METHOD:8) or indices (METHOD@25,26)")
        if self.count is not None and self.count < 1:
            raise ValueError(f"the count must be at least 1, found {self.count}")
        if self.consecutive and (self.method != "drop-block" or self.count is None):
            raise ValueError("consecutive goes with drop-block:COUNT only")
        if self.iterative and self.count is None:
            raise ValueError("iterative goes with a count (METHOD:8,iterative) only")
        if self.iterative and self.consecutive:
            raise ValueError("consecutive blocks are chosen at once, so iterative has no meaning there")
        if self.by is not None and self.count is None:
            raise ValueError(f"by goes with a count (METHOD:8,by={self.by}) only")
        self._check_indices()
        return self

    def _check_indices(self) -> None:
        pattern = r"[am][0-9]{1,6}" if self.method == "drop-sublayers" else r"[0-9]{1,6}"
        for item in self.at or ():
            if not re.fullmatch(pattern, item):
                example = "a25 or m3" if self.method == "drop-sublayers" else "25"
                raise ValueError(f"{self.method} expects indices such as {example}, found {shown(item)}")
        if self.at is not None and (not self.at or len(set(self.parts)) < len(self.at)):
            raise ValueError(f"expected each index once, none twice, found {cut(', '.join(self.at), 60) or 'none'}")

    @property
    def kinds(self) -> tuple[str, ...]:
        """Which parts it takes: attention, mlp, block."""
        return ("attention", "mlp") if self.method == "drop-sublayers" else (self.method.removeprefix("drop-"),)

    @property
    def parts(self) -> tuple[tuple[str, int], ...]:
        """(kind, layer index) of the parts named in `at`, in order of depth."""
        letters = {"a": "attention", "m": "mlp"}
        named = [
            (letters[item[0]], int(item[1:])) if item[0] in letters else (self.kinds[0], int(item))
            for item in self.at or ()
        ]
        return tuple(sorted(named, key=lambda part: (part[1], part[0])))

    def __str__(self) -> str:
        if self.at is not None:
            letters = len(self.kinds) > 1
            items = [f"{kind[0] if letters else ''}{layer_idx}" for kind, layer_idx in self.parts]
            return f"{self.method}@{','.join(items)}"
        found = [word for word in WORDS if getattr(self, word)]
        return ",".join([f"{self.method}:{self.count}", *found, *([f"by={self.by}"] if self.by else [])])

    @property
    def needs_ranking(self) -> bool:
        """Whether the dense model's cosine ranking turns a count into parts."""
        return self.count is not None and not self.iterative and self.by is None

    @property
    def needs_calibration(self) -> bool:
        """Whether anything is measured on calibration texts."""
        return self.count is not None

    @property
    def outside_methods(self) -> tuple[Method, ...]:
        """The ranking, where it is not a built-in one."""
        return from_outside("ranking", self.by)

    def choose(self, model: "Model", ranking: "Ranking | None", drop: "Drop") -> "Drop":
        """The parts that it takes out of what is left: those it names, or the most redundant.

        Args:
            model: the model it refers to.
            ranking: its scores; needed when the step gives a count.
            drop: what is out already.

        Raises:
            PrunelensError: too few parts are left for a count.
        """
        from prunelens.pruning.choosing import best_run, drop_of, most_redundant

        if self.at is not None:
            return drop_of(self.parts)
        assert ranking is not None
        assert self.count is not None
        if self.consecutive:
            return drop_of(best_run(ranking, self.count, len(model.anatomy.blocks), drop))
        return drop_of(most_redundant(ranking, self.kinds, self.count, drop, str(self)))

    def apply(self, pruned: "Pruned", inputs: "StepInputs") -> "Pruned":
        """The parts come out of what is run; no weight changes."""
        if self.iterative:
            return replace(pruned, drop=self._one_by_one(pruned, inputs))
        ranking = inputs.ranking_of(pruned.dense, self.by) if self.count is not None else None
        return replace(pruned, drop=pruned.drop | self.choose(pruned.dense, ranking, pruned.drop))

    def _one_by_one(self, pruned: "Pruned", inputs: "StepInputs") -> "Drop":
        from prunelens.models.surgery.drop import dropped
        from prunelens.pruning.redundancy import rank_redundancy

        assert self.count is not None
        drop, model, texts = pruned.drop, pruned.model, inputs.calibration.texts
        advance = inputs.reporter(f"{self}: ranking anew", self.count * sum(map(len, texts)))
        for _ in range(self.count):
            with dropped(model.anatomy, drop):
                ranking = rank_redundancy(model, texts, advance=advance, by=self.by or COSINE)
            drop |= self.model_copy(update={"count": 1}).choose(model, ranking, drop)
        return drop

    def loads_where(self, model: "Model", steps: Sequence[BaseStep]) -> str:
        """Whole blocks are gone everywhere; single sublayers only where the layout can leave them out."""
        if self.kinds == ("block",):
            return "whole blocks are cut: plain transformers and vLLM load it, smaller and faster"
        served = all(step.fits_nemotron_nas for step in steps) and self._is_served(model)
        return f"{ZEROED}; {SERVED if served else 'prunelens leaves them out'}"

    def _is_served(self, model: "Model") -> bool:
        """Whether the layout of `prune --format nemotron-nas` can express these named drops."""
        import copy

        from prunelens.models.opening.record import KEY, record_of
        from prunelens.models.saving.nemotron_nas import check as check_nemotron_nas
        from prunelens.models.surgery.drop import Drop

        if self.at is None:
            return False
        config = copy.deepcopy(model.network.config)
        setattr(config, KEY, record_of(self.choose(model, None, Drop()), str(self)))
        try:
            check_nemotron_nas(config)
        except PrunelensError:
            return False
        return True
