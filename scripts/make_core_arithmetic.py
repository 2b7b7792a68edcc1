"""Write the items of core_arithmetic: sums of one and two steps and word problems, from a seed."""

import json
import random
from pathlib import Path

TARGET = Path(__file__).parent.parent / "src/prunelens/tasks/suites/core/core_arithmetic.jsonl"
SEED = 20261
EACH = 24
NAMES = "Anna Ben Clara David Emma Felix Greta Henry Iris Jonas Karin Leo Maria Nils Olga Paul".split()
THINGS = "apples books coins stamps marbles pencils cards eggs shells stickers buttons flowers".split()


def one_step(rng: random.Random) -> tuple[str, int]:
    """a + b or a - b, results from 0 to 40."""
    first, second = rng.randint(1, 20), rng.randint(1, 20)
    if rng.random() < 0.5:
        return f"What is {first} + {second}?", first + second
    return f"What is {max(first, second)} - {min(first, second)}?", abs(first - second)


def two_steps(rng: random.Random) -> tuple[str, int]:
    """a + b + c or a + b - c, results not below 0."""
    first, second, third = rng.randint(1, 12), rng.randint(1, 12), rng.randint(1, 9)
    if rng.random() < 0.5 or third > first + second:
        return f"What is {first} + {second} + {third}?", first + second + third
    return f"What is {first} + {second} - {third}?", first + second - third


def word_problem(rng: random.Random) -> tuple[str, int]:
    """Somebody has things and gets more, gives some away, or owns several equal boxes."""
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    first, second = rng.randint(2, 12), rng.randint(2, 9)
    kind = rng.randrange(3)
    if kind == 0:
        return (
            f"{name} has {first} {thing} and gets {second} more. How many {thing} does {name} have now?",
            first + second,
        )
    if kind == 1:
        have = first + second
        return f"{name} has {have} {thing} and gives away {second}. How many {thing} are left?", first
    boxes = rng.randint(2, 5)
    return f"{name} has {boxes} boxes with {second} {thing} in each. How many {thing} are there in all?", boxes * second


def items() -> list[dict[str, object]]:
    """All items, none twice."""
    rng, found = random.Random(SEED), {}
    for kind, make in (("one step", one_step), ("two steps", two_steps), ("words", word_problem)):
        start = len(found)
        while len(found) < start + EACH:
            question, answer = make(rng)
            found.setdefault(question, (kind, answer))
    return [
        {"id": f"sum-{number:02d}", "kind": kind, "question": question, "answer": answer}
        for number, (question, (kind, answer)) in enumerate(found.items(), 1)
    ]


def text() -> str:
    """The file's content."""
    return "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items())


if __name__ == "__main__":
    TARGET.write_text(text(), encoding="utf-8")
