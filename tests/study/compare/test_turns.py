"""Compressed models in turn: the numbers of each alone, one at a time, everything checked first."""

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import tiny_model, tiny_network, tiny_tokenizer, words
from prunelens.api import compare
from prunelens.errors import PrunelensError
from prunelens.models.model import Model
from prunelens.pruning.pruned import Pruned
from prunelens.results import Comparison
from prunelens.study import candidates, prepare
from prunelens.study.compare import stages
from prunelens.tasks.prompts import PromptText

TEXTS = [(5, 9, 33), (4, 90, 17, 60, 61), (20,), (88, 12, 40, 41, 42, 43, 7)]
MASK, DROP, INT8, OTHER_DROP = "magnitude:0.5", "drop-attention@1", "quantize:int8", "drop-mlp@2"


def checkpoint(folder: Path, seed: int) -> Path:
    tiny_network("llama", seed=seed).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def compared(*models: Any, **more: Any) -> Comparison:
    asked = [PromptText(f"p{ids[0]}", "text", ({"role": "user", "content": words(*ids)},), (), None) for ids in TEXTS]
    return compare(*models, prompts=asked, max_new_tokens=9, chat_template=False, **more)


class Watch:
    """What was made or opened, and how much of it was still there each time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[weakref.ref[Any]] = []
        self.names: list[str] = []
        load, apply, write = candidates.load, prepare.apply, stages.write_dense

        def opened(name: Any, *more: Any) -> Model:
            self.note(Path(name).name)
            model = load(name, *more)
            self.seen.append(weakref.ref(model.network))
            return model

        def applied(recipe: Any, *more: Any) -> Pruned:
            self.note(str(recipe))
            pruned = apply(recipe, *more)
            if not recipe.only_drops:
                self.seen.append(weakref.ref(pruned.model.network))
            return pruned

        def written(*inputs: Any) -> Any:
            self.note("dense writes")
            return write(*inputs)

        monkeypatch.setattr(candidates, "load", opened)
        monkeypatch.setattr(prepare, "apply", applied)
        monkeypatch.setattr(stages, "write_dense", written)

    def note(self, name: str) -> None:
        gc.collect()
        self.names.append(name)
        assert not [one for one in self.seen if one() is not None], f"something is still held when {name} comes"


def test_each_has_the_rows_that_it_has_alone(tmp_path: Path) -> None:
    dense, other = tiny_model(), checkpoint(tmp_path / "other", 1)
    given = (MASK, DROP, other, INT8, OTHER_DROP)
    settings: dict[str, Any] = {"attribute": True, "lens": "both", "lens_steps": 4}
    whole = compared(dense, *given, **settings)
    single = [compared(dense, one, **settings) for one in given]
    assert [record["label"] for record in whole.info["compressed"]] == [str(one) for one in given]
    assert whole.info["compressed"] == [found.info["compressed"][0] for found in single]
    for name, table in whole.tables.items():
        column = {"continuations": "model", "noise": None, "anchors": None, "prompts": None}.get(name, "compressed")
        if column is None:
            assert table.equals(single[0].tables[name])
            continue
        rows = table.to_pylist()
        for one, found in zip(given, single, strict=True):
            own = [row for row in rows if row[column] == str(one)]
            assert own
            assert repr(own) == repr([row for row in found.tables[name].to_pylist() if row[column] == str(one)]), name
        forced = [row[column] for row in rows if row.get("trace") != "free" and row[column] != "dense"]
        assert list(dict.fromkeys(forced)) == [str(one) for one in given]


def test_two_with_weights_of_their_own_are_never_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense, one, two = tiny_model(), checkpoint(tmp_path / "one", 1), checkpoint(tmp_path / "two", 2)
    watch = Watch(monkeypatch)
    compared(dense, one, MASK, DROP, two, INT8, attribute=True)
    assert watch.names == ["one", "two", "dense writes", DROP, "one", MASK, "two", INT8]


def test_a_single_checkpoint_is_opened_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[str] = []
    load = candidates.load
    monkeypatch.setattr(candidates, "load", lambda name, *more: (loads.append(name), load(name, *more))[1])
    compared(tiny_model(), checkpoint(tmp_path / "one", 1), lens_steps=0)
    assert len(loads) == 1


def test_the_last_checkpoint_is_refused_before_the_dense_model_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "write_dense", lambda *inputs: pytest.fail("too late"))
    good, bad = checkpoint(tmp_path / "good", 1), checkpoint(tmp_path / "bad", 2)
    network = tiny_network("llama")
    network.resize_token_embeddings(60)
    network.save_pretrained(bad)
    with pytest.raises(PrunelensError, match="expected the same vocabulary"):
        compared(tiny_model(), DROP, good, bad)


def test_a_checkpoint_that_changes_meanwhile_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, write = checkpoint(tmp_path / "one", 1), stages.write_dense

    def changing(*inputs: Any) -> Any:
        checkpoint(one, 2)
        return write(*inputs)

    monkeypatch.setattr(stages, "write_dense", changing)
    with pytest.raises(PrunelensError, match="as it was when the comparison began"):
        compared(tiny_model(), DROP, one)


def test_models_in_memory_stay() -> None:
    dense, other = tiny_model(), tiny_model(seed=1)
    ids = torch.randint(3, 97, (1, 6))
    before = other.network(ids).logits
    found = compared(dense, other, MASK, lens_steps=0)
    assert torch.equal(other.network(ids).logits, before)
    assert found.info["compressed"][0]["fingerprint"] == other.fingerprint
