"""What tasks of lm-evaluation-harness ask, built once for every model of a run, and how answers become samples."""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lm_eval.api.instance import Instance

SEED = 0
"""Of few-shot examples and of answers that are drawn, as lm_eval's own command line has it."""

Row = dict[str, Any]
Template = Callable[..., str]


@dataclass(frozen=True)
class Item:
    """One item of a task: its document, and the requests that it takes, in order."""

    doc: Any
    requests: list[Instance]


@dataclass(frozen=True)
class Questions:
    """The items of a task, or of every task of a group, by the task's name and the item's place in it."""

    tasks: Mapping[str, Any]
    items: Mapping[str, Mapping[int, Item]]

    def chosen(self, places: Mapping[str, Sequence[int]]) -> Iterator[Item]:
        """The items at these places, task by task."""
        for name, own in places.items():
            yield from (self.items[name][place] for place in own)

    def samples(self, places: Mapping[str, Sequence[int]]) -> dict[str, list[Row]]:
        """What the tasks make of the answers that the requests hold: for each filter a sample of every item."""
        return {name: list(self._samples(name, own)) for name, own in places.items() if own}

    def _samples(self, name: str, places: Sequence[int]) -> Iterator[Row]:
        task, items = self.tasks[name], [self.items[name][place] for place in places]
        task._instances = [request for item in items for request in item.requests]
        task.apply_filters()
        for key in items[0].requests[0].filtered_resps:
            for place, item in zip(places, items, strict=True):
                answers = [request.filtered_resps[key] for request in item.requests]
                metrics = task.process_results(item.doc, answers)
                about = {"doc_id": place, "doc": item.doc, "target": task.doc_to_target(item.doc), "filter": key}
                yield about | {"filtered_resps": answers, "metrics": list(metrics)} | metrics


def build(tasks: Mapping[str, Any], places: Mapping[str, Sequence[int]], template: Template | None) -> Questions:
    """The requests of all items at these places, as lm_eval builds them for the same `--samples`.

    Args:
        tasks: the harness's own objects by name.
        places: of each task's items, ascending.
        template: writes a chat as text; None for plain prompts.
    """
    seed_everything()
    found = {}
    for name, task in tasks.items():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=SEED)
        task.build_all_requests(
            samples=frozenset(places[name]),  # a list would be searched once for every document
            apply_chat_template=template is not None,
            chat_template=template,
        )
        found[name] = _items(task, places[name])
    return Questions(tasks, found)


def _items(task: Any, places: Sequence[int]) -> dict[int, Item]:
    requests: dict[int, list[Instance]] = {}
    for request in task.instances:
        assert request.doc_id is not None
        requests.setdefault(request.doc_id, []).append(request)
    wanted = frozenset(places)
    docs = [doc for place, doc in enumerate(task.eval_docs) if place in wanted]
    return {
        place: Item(docs[number], sorted(requests[number], key=lambda request: request.idx))
        for number, place in enumerate(places)
    }


def seed_everything() -> None:
    """Begin all random numbers anew, as each run of lm_eval does."""
    random.seed(SEED)
    np.random.seed(SEED)  # tasks draw from this one
    torch.manual_seed(SEED)
