"""Grade-school word problems with worked answers: an unlimited training stream and a fixed, disjoint test set.

Pure functions of a seed; no files, no network. An answer has 2 to 5 computed steps and ends in `#### n`, as in GSM8K.
"""

import functools
import itertools
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from . import templates

if TYPE_CHECKING:
    from datasets import Dataset

TEST_SIZE = 1000
PROMPT = "Question: {question}\nAnswer:"
COMPLETION = " {answer}"
LARGEST_RESULT = 999

# How often the answer uses the paraphrase at the index of the question's paraphrase, and those at the next indices.
PARAPHRASE_WEIGHTS = (0.7, 0.15, 0.1, 0.05)

_ANSWER = re.compile(r"#### (\d+)")
_OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "+": lambda left, right: left + right,
    "-": lambda left, right: left - right,
    "*": lambda left, right: left * right,
    "/": lambda left, right: left // right,
}


@dataclass(frozen=True)
class Problem:
    """A question, its worked answer (ending in a line `#### result`) and the integer result, 1 to 999."""

    question: str
    answer: str
    result: int

    @property
    def prompt(self) -> str:
        """The input of a model. The completion continues it without a separator."""
        return PROMPT.format(question=self.question)

    @property
    def completion(self) -> str:
        """The expected output of a model: reasoning and result."""
        return COMPLETION.format(answer=self.answer)


class _Story:
    """A problem being written: the sentences of the question, the lines of the answer and the words in use."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.facts: list[str] = []
        self.lines: list[str] = []
        women = rng.random() < 0.5
        self.words: dict[str, object] = {
            "name": rng.choice(templates.WOMEN if women else templates.MEN),
            "he": "she" if women else "he",
            "He": "She" if women else "He",
            "item": rng.choice(templates.ITEMS),
            "box": rng.choice(templates.BOXES),
        }

    def tell(self, paraphrases: Sequence[str], **words: object) -> int:
        """Add a sentence to the question and return the index of the paraphrase used."""
        index = self.rng.randrange(len(paraphrases))
        self.facts.append(paraphrases[index].format_map(self.words | words))
        return index

    def conclude(self, paraphrases: Sequence[str], told: int, **words: object) -> None:
        """Add a line to the answer, whose paraphrase usually has the index `told` of the question's paraphrase."""
        weights = PARAPHRASE_WEIGHTS[: len(paraphrases)]
        shift = self.rng.choices(range(len(paraphrases)), weights)[0]
        line = paraphrases[(told + shift) % len(paraphrases)].format_map(self.words | words)
        if line:
            self.lines.append(line)

    def compute(self, paraphrases: Sequence[str], told: int, left: int, sign: str, right: int, **words: object) -> int:
        """Add a reasoning line with the equation `left sign right = result` and return the result."""
        result = _OPERATIONS[sign](left, right)
        self.conclude(paraphrases, told, eq=f"{left} {sign} {right} = {result}", **words)
        return result

    def finish(self, result: int) -> Problem:
        """Close the answer with the result in GSM8K's form and return the problem."""
        self.conclude(templates.CLOSINGS, len(self.facts), total=result)
        return Problem(" ".join(self.facts), " ".join(self.lines) + f"\n#### {result}", result)


_Numbers = dict[str, int]


def _draw_gain(rng: random.Random, value: int) -> _Numbers | None:
    return {"m": rng.randint(5, 60)}


def _draw_lose(rng: random.Random, value: int) -> _Numbers | None:
    return {"m": rng.randint(4, min(value - 3, 60))} if value >= 10 else None


def _draw_gain_groups(rng: random.Random, value: int) -> _Numbers | None:
    return {"k": rng.randint(2, 9), "m": rng.randint(3, 12)}


def _draw_lose_groups(rng: random.Random, value: int) -> _Numbers | None:
    k = rng.randint(2, 9)
    largest = min(12, (value - 3) // k)
    return {"k": k, "m": rng.randint(2, largest)} if largest >= 2 else None


def _draw_multiply(rng: random.Random, value: int) -> _Numbers | None:
    return {"m": rng.choice(list(templates.MULTIPLES))} if value <= 75 else None


def _draw_share(rng: random.Random, value: int) -> _Numbers | None:
    parts = [m for m in range(2, 10) if value % m == 0 and value // m >= 2]
    return {"m": rng.choice(parts)} if parts else None


@dataclass(frozen=True)
class _Choice:
    event: templates.Event
    draw: Callable[[random.Random, int], _Numbers | None]
    weight: int
    ends: bool = False


# A small model learns subtraction, addition and division last, so these are drawn most often.
_EVENTS = (
    _Choice(templates.GAIN, _draw_gain, weight=4),
    _Choice(templates.LOSE, _draw_lose, weight=5),
    _Choice(templates.GAIN_GROUPS, _draw_gain_groups, weight=3),
    _Choice(templates.LOSE_GROUPS, _draw_lose_groups, weight=3),
    _Choice(templates.MULTIPLY, _draw_multiply, weight=2),
    _Choice(templates.SHARE, _draw_share, weight=6, ends=True),
)


def _draw_event(rng: random.Random, value: int, *, steps_left: int, steps_done: int) -> tuple[_Choice, _Numbers]:
    """Draw an event that fits the remaining steps and the running value, and its numbers."""
    fitting = [
        choice
        for choice in _EVENTS
        if len(choice.event.signs) <= steps_left and (not choice.ends or (steps_left == 1 and steps_done > 0))
    ]
    while True:
        choice = rng.choices(fitting, [choice.weight for choice in fitting])[0]
        numbers = choice.draw(rng, value)
        if numbers is not None:
            return choice, numbers


def _happen(story: _Story, event: templates.Event, value: int, numbers: _Numbers) -> int:
    """Add an event to the question and its reasoning to the answer; return the new value."""
    words: dict[str, object] = {**numbers, "friend": story.rng.choice(templates.FRIENDS)}
    if event is templates.MULTIPLY:
        words["times"] = templates.MULTIPLES[numbers["m"]]
    told = story.tell(event.facts, **words)
    amount = numbers["m"]
    if len(event.signs) == 2:
        amount = story.compute(event.lines[0], told, numbers["k"], event.signs[0], amount, **words)
    return story.compute(event.lines[-1], told, value, event.signs[-1], amount, **words)


def _inventory(rng: random.Random) -> Problem:
    """Write a problem about a count that changes in 2 to 4 steps and may be shared out at the end."""
    story = _Story(rng)
    value = rng.randint(12, 80)
    told = story.tell(templates.START, value=value)
    story.conclude(templates.START_LINES, told, value=value)
    steps, done, shared = rng.randint(2, 4), 0, False
    while done < steps:
        choice, numbers = _draw_event(rng, value, steps_left=steps - done, steps_done=done)
        value = _happen(story, choice.event, value, numbers)
        done += len(choice.event.signs)
        shared = choice.ends
    story.tell(templates.HOW_MANY_EACH if shared else templates.HOW_MANY)
    return story.finish(value)


def _shopping(rng: random.Random) -> Problem:
    """Write a problem about two or three purchases and their sum, sometimes also the change."""
    story = _Story(rng)
    items = rng.sample(templates.ITEMS, rng.choice((2, 2, 3)))
    counts = [rng.randint(2, 9) for _ in items]
    prices = [rng.randint(2, 12) for _ in items]
    wording = rng.choice(templates.PURCHASE)
    listed = [wording.format(count=c, item=i, price=p) for c, i, p in zip(counts, items, prices, strict=True)]
    told = story.tell(templates.PURCHASES, list=", ".join(listed[:-1]) + " and " + listed[-1])
    total = 0
    for count, item, price in zip(counts, items, prices, strict=True):
        cost = story.compute(templates.PURCHASE_LINES, told, count, "*", price, count=count, item=item)
        total = story.compute(templates.SUBTOTAL_LINES, told, total, "+", cost) if total else cost
    if len(items) == 3 or rng.random() < 0.4:
        story.tell(templates.PRICE_QUESTIONS)
        return story.finish(total)
    paid = total + rng.randint(3, 60)
    asked = story.tell(templates.CHANGE_QUESTIONS, paid=paid)
    return story.finish(story.compute(templates.CHANGE_LINES, asked, paid, "-", total))


def _comparison(rng: random.Random) -> Problem:
    """Write a problem about two or three people whose counts are given relative to each other, then summed."""
    story = _Story(rng)
    others = [name for name in templates.WOMEN + templates.MEN if name != story.words["name"]]
    story.words["other"], story.words["third"] = rng.sample(others, 2)
    value, more = rng.randint(20, 80), rng.random() < 0.5
    difference = rng.randint(4, 60) if more else rng.randint(4, value - 6)
    words: dict[str, object] = {"value": value, "m": difference, "more": "more" if more else "fewer"}
    told = story.tell(templates.MORE_OR_FEWER, **words)
    second = story.compute(templates.MORE_OR_FEWER_LINES, told, value, "+" if more else "-", difference, **words)
    total = story.compute(templates.PAIR_LINES, told, value, "+", second)
    if second <= 75 and rng.random() < 0.6:
        times = rng.choice(list(templates.MULTIPLES))
        told = story.tell(templates.THIRD_PERSON, times=templates.MULTIPLES[times])
        third = story.compute(templates.THIRD_PERSON_LINES, told, second, "*", times)
        total = story.compute(templates.ALL_THREE_LINES, told, total, "+", third)
    story.tell(templates.TOGETHER_QUESTIONS)
    return story.finish(total)


def _wages(rng: random.Random) -> Problem:
    """Write a problem about hours times days times wage, sometimes minus an expense."""
    story = _Story(rng)
    hours, days, wage = rng.randint(2, 9), rng.randint(2, 7), rng.randint(3, 9)
    words: dict[str, object] = {"hours": hours, "days": days, "wage": wage, "job": rng.choice(templates.JOBS)}
    told = story.tell(templates.WAGES, **words)
    worked = story.compute(templates.HOURS_LINES, told, hours, "*", days, **words)
    earned = story.compute(templates.PAY_LINES, told, worked, "*", wage, **words)
    if earned < 20 or rng.random() < 0.4:
        story.tell(templates.PAY_QUESTIONS)
        return story.finish(earned)
    spent = rng.randint(5, min(earned - 5, 99))
    told = story.tell(templates.SPENDING, spent=spent)
    left = story.compute(templates.SPENDING_LINES, told, earned, "-", spent, spent=spent)
    story.tell(templates.MONEY_LEFT_QUESTIONS)
    return story.finish(left)


def _journey(rng: random.Random) -> Problem:
    """Write a problem about a ride at constant speed, sometimes also a walk, and the remaining distance."""
    story = _Story(rng)
    hours, speed = rng.randint(2, 9), rng.randint(5, 30)
    walk = rng.randint(3, 20) if rng.random() < 0.5 else 0
    distance = hours * speed + walk + rng.randint(5, 60)
    words: dict[str, object] = {"hours": hours, "speed": speed, "distance": distance, "walk": walk}
    told = story.tell(templates.JOURNEY, **words)
    travelled = story.compute(templates.RIDE_LINES, told, hours, "*", speed, **words)
    if walk:
        told = story.tell(templates.WALK, **words)
        travelled = story.compute(templates.WALK_LINES, told, travelled, "+", walk, **words)
    asked = story.tell(templates.MILES_QUESTIONS)
    return story.finish(story.compute(templates.MILES_LINES, asked, distance, "-", travelled))


_STORIES = (_inventory, _shopping, _comparison, _wages, _journey)
_STORY_WEIGHTS = (6, 2, 2, 1, 1)


def _problems(rng: random.Random) -> Iterator[Problem]:
    while True:
        problem = rng.choices(_STORIES, _STORY_WEIGHTS)[0](rng)
        if problem.result <= LARGEST_RESULT:
            yield problem


@functools.cache
def _test_set() -> tuple[Problem, ...]:
    unique: dict[str, Problem] = {}
    for problem in _problems(random.Random("word_problems/test")):
        unique.setdefault(problem.question, problem)
        if len(unique) == TEST_SIZE:
            break
    return tuple(unique.values())


@functools.cache
def _test_questions() -> frozenset[str]:
    return frozenset(problem.question for problem in _test_set())


def train_problems(n: int, *, seed: int) -> list[Problem]:
    """Return the first n problems of the training stream `seed`.

    Questions of the test set never occur. Streams of different seeds are independent.
    """
    if n < 0:
        raise ValueError(f"n must be >= 0, got {n}.")
    stream = _problems(random.Random(f"word_problems/train/{seed}"))
    return list(itertools.islice((p for p in stream if p.question not in _test_questions()), n))


def test_problems(n: int = TEST_SIZE) -> list[Problem]:  # noqa: PT028 (not a test)
    """Return the first n of the 1,000 test problems. The set is fixed, without duplicates, and in no training stream."""
    if not 0 <= n <= TEST_SIZE:
        raise ValueError(f"the test set has {TEST_SIZE} problems, got n={n}; ask for 0 to {TEST_SIZE}.")
    return list(_test_set()[:n])


# The name is public API; pytest must not collect it as a test.
test_problems.__test__ = False  # type: ignore[attr-defined]


def final_answer(text: str) -> int | None:
    """Return the integer after the first `####` of a completion, or None if there is none."""
    match = _ANSWER.search(text)
    return int(match.group(1)) if match else None


def load_dataset(split: str, n: int = TEST_SIZE, seed: int = 0) -> "Dataset":
    """Return problems as a `datasets.Dataset` with columns `prompt` and `completion`.

    Args:
        split: `train` or `test`.
        n: number of problems; at most 1,000 for the test set.
        seed: seed of the training stream.
    """
    from datasets import Dataset

    if split not in ("train", "test"):
        raise ValueError(f"word_problems has the splits 'train' and 'test', got {split!r}.")
    problems = train_problems(n, seed=seed) if split == "train" else test_problems(n)
    return Dataset.from_dict({"prompt": [p.prompt for p in problems], "completion": [p.completion for p in problems]})
