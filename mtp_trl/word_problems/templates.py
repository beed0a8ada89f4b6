"""The vocabulary of the benchmark as data: names, things and sentence templates. No randomness, no arithmetic.

Placeholders: {name} is a person, {he} and {He} the pronoun, {item} the things counted, {box} a container, {friend} another
person's role, {eq} the equation of a reasoning line (`12 + 30 = 42`), {total} the result of a problem. Single letters and
words such as {value} are numbers. Paraphrases of a fact and of its reasoning lines have the same index: the most likely
wording of an answer depends on the wording of the question, so an answer is predictable without being constant.
"""

from dataclasses import dataclass

WOMEN = tuple("Mia Anna Sara Lily Emma Nora Zoe Ruth Ella Iris Jane Kate Lucy Maya Olga Tina".split())
MEN = tuple("Tom Sam Leo Max Ben Dan Eli Finn Gus Hugo Ivan Jack Karl Luke Matt Omar".split())
ITEMS = tuple(
    "apples oranges marbles stickers stamps pencils cookies coins books cards shells beads buttons balloons "
    "toys candles tickets eggs".split()
)
BOXES = tuple("boxes bags packs baskets jars trays".split())
FRIENDS = tuple("sister brother cousin neighbor teacher classmate roommate".split())
JOBS = ("paints walls", "washes cars", "walks dogs", "mows lawns", "fixes bikes", "bakes bread", "teaches music")
MULTIPLES = {2: "twice", 3: "three times", 4: "four times"}


@dataclass(frozen=True)
class Event:
    """An event that changes a count. `signs` are its operations; `lines` has one tuple of paraphrases per operation.

    With two signs, the first computes the size of a group (k * m) and the second applies it to the running value.
    """

    facts: tuple[str, ...]
    signs: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]


START = (
    "{name} has {value} {item}.",
    "{name} starts the week with {value} {item}.",
    "There are {value} {item} in the room of {name}.",
    "At first {name} owns {value} {item}.",
)
START_LINES = (
    "{name} starts with {value} {item}.",
    "At the beginning there are {value} {item}.",
    "We know that {name} has {value} {item}.",
    "First, {he} has {value} {item}.",
)

GAIN = Event(
    facts=(
        "{He} buys {m} more {item}.",
        "The {friend} of {name} brings {m} {item}.",
        "Then {he} finds {m} more {item} at home.",
        "Later {he} gets another {m} {item}.",
    ),
    signs=("+",),
    lines=(
        (
            "With these, {he} has {eq} {item}.",
            "That makes {eq} {item} for {name}.",
            "Adding these gives {eq}.",
            "Now there are {eq} {item}.",
        ),
    ),
)
LOSE = Event(
    facts=(
        "{He} sells {m} {item}.",
        "{name} gives {m} {item} to a {friend}.",
        "Sadly, {he} loses {m} of the {item}.",
        "Then {m} {item} are broken and thrown away.",
    ),
    signs=("-",),
    lines=(
        (
            "After this {he} has {eq} {item} left.",
            "That leaves {eq} {item}.",
            "Subtracting these gives {eq}.",
            "{name} is left with {eq} {item}.",
        ),
    ),
)
GAIN_GROUPS = Event(
    facts=(
        "{He} buys {k} {box} with {m} {item} in each.",
        "The {friend} of {name} brings {k} {box} and each of them holds {m} {item}.",
        "Then {he} orders {k} {box} of {m} {item}.",
        "On each of the next {k} days {he} collects {m} {item}.",
    ),
    signs=("*", "+"),
    lines=(
        (
            "The new ones are {eq} {item}.",
            "{m} at a time, {name} gets {eq} more {item}.",
            "All the new {item} are {eq}.",
            "Together {he} gets {eq} {item}.",
        ),
        (
            "So {name} now has {eq} {item}.",
            "This brings the total to {eq}.",
            "Together with those from before that makes {eq} {item}.",
            "Now {he} has {eq} {item}.",
        ),
    ),
)
LOSE_GROUPS = Event(
    facts=(
        "{He} gives {m} {item} to each of {k} friends.",
        "{name} fills {k} {box} with {m} {item} each and sells all of them.",
        "Each of {k} children takes {m} {item}.",
        "For {k} days {he} uses {m} {item} every day.",
    ),
    signs=("*", "-"),
    lines=(
        (
            "That is {eq} {item} less.",
            "{He} parts with {eq} {item}.",
            "All the missing {item} are {eq}.",
            "Together {he} loses {eq} {item}.",
        ),
        (
            "So {name} has {eq} {item} left.",
            "What remains is {eq} {item}.",
            "Taking these away leaves {eq}.",
            "Then {he} has {eq} {item}.",
        ),
    ),
)
MULTIPLY = Event(
    facts=(
        "After a month {he} has {times} as many.",
        "A magic trick turns them into {times} as many {item}.",
        "{He} keeps collecting until {he} has {times} as many {item}.",
        "One year later the number is {times} as large.",
    ),
    signs=("*",),
    lines=(
        (
            "{He} then has {eq} {item}.",
            "This makes {eq} {item}.",
            "As many as that is {eq}.",
            "The number grows to {eq}.",
        ),
    ),
)
SHARE = Event(
    facts=(
        "{He} splits all of them equally into {m} {box}.",
        "{name} then shares everything equally among {m} children.",
        "In the end {he} packs them into {m} {box} evenly.",
        "All of the {item} are divided among {m} friends.",
    ),
    signs=("/",),
    lines=(
        (
            "Each of them gets {eq} {item}.",
            "Every part gets {eq} {item}.",
            "Splitting evenly gives {eq}.",
            "Dividing by {m} gives {eq} {item}.",
        ),
    ),
)
HOW_MANY = (
    "How many {item} does {name} have now?",
    "How many {item} are there in the end?",
    "What is the final number of {item}?",
    "How many {item} does {he} end up with?",
)
HOW_MANY_EACH = (
    "How many {item} are in each share?",
    "How big is one share?",
    "How many {item} does each part have?",
)

PURCHASE = ("{count} {item} for ${price} each", "{count} {item} at ${price} apiece")
PURCHASES = (
    "{name} goes to the market and buys {list}.",
    "At the shop {name} picks {list}.",
    "For a party {name} orders {list}.",
    "{name} needs {list}.",
)
PURCHASE_LINES = (
    "The {item} cost {eq} dollars.",
    "The price of the {item} is {eq}.",
    "For the {item} {he} pays {eq} dollars.",
    "{count} {item} cost {eq} dollars.",
)
SUBTOTAL_LINES = (
    "So far the cost is {eq} dollars.",
    "The sum becomes {eq}.",
    "Together that is {eq} dollars.",
    "Adding up, {he} pays {eq} dollars.",
)
PRICE_QUESTIONS = (
    "How much does {name} pay?",
    "What is the total cost in dollars?",
    "How many dollars does {he} spend?",
)
CHANGE_QUESTIONS = (
    "{He} pays with ${paid}. How much change does {he} get?",
    "{He} had ${paid} before. How many dollars are left?",
    "If {name} brought ${paid}, how much money remains?",
)
CHANGE_LINES = (
    "The change is {eq} dollars.",
    "So {name} has {eq} dollars left.",
    "What remains is {eq} dollars.",
)

MORE_OR_FEWER = (
    "{name} has {value} {item}. {other} has {m} {more} than {name}.",
    "{name} collected {value} {item} and {other} collected {m} {more}.",
    "In the game {name} wins {value} {item}. {other} wins {m} {more} {item} than {name}.",
    "{name} owns {value} {item}, while {other} owns {m} {more}.",
)
MORE_OR_FEWER_LINES = (
    "{other} has {eq} {item}.",
    "{m} {more} than {value} is {eq}.",
    "The number for {other} is {eq}.",
    "So {other} owns {eq} {item}.",
)
THIRD_PERSON = (
    "{third} has {times} as many as {other}.",
    "Then there is {third}, with {times} as many {item} as {other}.",
    "The {item} of {third} are {times} as many as those of {other}.",
)
THIRD_PERSON_LINES = ("{third} has {eq} {item}.", "For {third} we get {eq} {item}.", "As many as that is {eq}.")
PAIR_LINES = (
    "Together they have {eq} {item}.",
    "The sum is {eq}.",
    "Both have {eq} {item}.",
    "The two own {eq} {item}.",
)
ALL_THREE_LINES = (
    "All three have {eq} {item}.",
    "With {third} that makes {eq}.",
    "In total this is {eq} {item}.",
)
TOGETHER_QUESTIONS = (
    "How many {item} do they have together?",
    "How many {item} is that in total?",
    "What is the number of {item} of all of them?",
)

WAGES = (
    "{name} {job} for {hours} hours a day and earns ${wage} per hour. {He} works {days} days.",
    "For {days} days {name} {job}, {hours} hours each day, at ${wage} an hour.",
    "Each day {name} {job} for {hours} hours. The pay is ${wage} per hour and {he} does it on {days} days.",
    "{name} {job}. {He} earns ${wage} per hour, works {hours} hours every day, and does so for {days} days.",
)
HOURS_LINES = (
    "{name} works {eq} hours.",
    "The hours are {eq}.",
    "In {days} days {he} works {eq} hours.",
    "That is {eq} hours of work.",
)
PAY_LINES = (
    "{He} earns {eq} dollars.",
    "At ${wage} an hour this pays {eq} dollars.",
    "The pay is {eq} dollars.",
    "So {he} makes {eq} dollars.",
)
SPENDING = (
    "Then {he} spends ${spent} on {item}.",
    "{He} uses ${spent} of the money to buy {item}.",
    "After that {name} pays ${spent} for {item}.",
)
SPENDING_LINES = (
    "After buying the {item} {he} has {eq} dollars.",
    "Taking away the ${spent} leaves {eq} dollars.",
    "What remains is {eq} dollars.",
)
PAY_QUESTIONS = ("How much does {he} earn in all?", "How much money does {name} make?")
MONEY_LEFT_QUESTIONS = ("How much money is left?", "How many dollars does {name} have left?")

JOURNEY = (
    "{name} wants to travel {distance} miles. {He} rides a bus for {hours} hours at {speed} miles per hour.",
    "A trip of {distance} miles lies ahead of {name}. For {hours} hours {he} drives at {speed} miles per hour.",
    "The lake is {distance} miles away. {name} moves toward it at {speed} miles per hour for {hours} hours.",
)
RIDE_LINES = (
    "That covers {eq} miles.",
    "In {hours} hours {he} does {eq} miles.",
    "The way done is {eq} miles.",
)
WALK = (
    "Then {he} walks {walk} miles.",
    "After a break {he} goes on for {walk} miles.",
    "After that {name} hikes another {walk} miles.",
)
WALK_LINES = (
    "With this it is {eq} miles.",
    "After going on it is {eq} miles.",
    "Together that makes {eq} miles.",
)
MILES_QUESTIONS = ("How many miles are left?", "How far does {he} still have to go?")
MILES_LINES = (
    "So {eq} miles are left.",
    "What remains is {eq} miles.",
    "{name} still has to go {eq} miles.",
)

CLOSINGS = ("The answer is {total}.", "So the answer is {total}.", "", "Therefore the result is {total}.")
