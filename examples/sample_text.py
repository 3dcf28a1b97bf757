"""Text for small models, generated from templates: nothing is downloaded.

A document is either plain text or a dialogue (a list of `{"role", "content"}` messages). Everything
follows from the seed, so the same call gives the same text on every machine.
"""

import random
from collections.abc import Iterator
from typing import NamedTuple

Message = dict[str, str]
Document = str | list[Message]


class Animal(NamedTuple):
    """One row of the facts that the questions ask for."""

    name: str
    colour: str
    home: str
    food: str
    habit: str


ANIMALS = [
    Animal("fox", "red", "in the forest", "berries", "hunts at night"),
    Animal("owl", "brown", "in an old barn", "mice", "sleeps all day"),
    Animal("bear", "black", "in a mountain cave", "honey", "sleeps in winter"),
    Animal("frog", "green", "by the pond", "flies", "sings after rain"),
    Animal("swan", "white", "on the lake", "water plants", "swims slowly"),
    Animal("mole", "grey", "under the garden", "worms", "digs long tunnels"),
    Animal("seal", "silver", "on the rocky coast", "fish", "dives for hours"),
    Animal("camel", "yellow", "in the desert", "dry grass", "walks for days"),
    Animal("parrot", "blue", "in the jungle", "nuts", "talks to everyone"),
    Animal("tiger", "orange", "near the river", "meat", "hides in tall grass"),
    Animal("rabbit", "grey", "in a sandy burrow", "carrots", "runs very fast"),
    Animal("horse", "brown", "on the farm", "apples", "pulls the cart"),
    Animal("crab", "pink", "on the beach", "seaweed", "walks sideways"),
    Animal("bat", "black", "in the church tower", "moths", "sees with its ears"),
    Animal("goat", "white", "on the hill", "leaves", "climbs steep rocks"),
    Animal("snail", "yellow", "under the hedge", "lettuce", "carries its house"),
]
PEOPLE = (
    "Anna Ben Clara David Emma Felix Grace Henry Iris Jack Kate Leo Maria Noah Olga Paul".split()
)
THINGS = (
    "apples books coins flowers pencils shells stamps candles tickets buttons cards keys".split()
)
PLACES = "garden kitchen library market school station theatre village harbour museum".split()
ADJECTIVES = "old small quiet bright heavy happy tired clever gentle busy strange careful".split()
NOUNS = "teacher baker sailor doctor farmer painter neighbour student gardener musician".split()
VERBS = "opened found carried cleaned painted repaired watched borrowed counted measured".split()
OBJECTS = "door window letter basket clock lamp bridge boat picture table blanket ladder".split()
TIMES = "in the morning|after lunch|before sunset|on Monday|last week|every day|at noon".split("|")
WEATHER = "sunny rainy cold windy warm foggy cloudy dry".split()


def question_and_answer(rng: random.Random) -> tuple[str, str]:
    """One question about an animal with its plain answer."""
    animal = rng.choice(ANIMALS)
    name = animal.name
    return rng.choice(
        [
            (f"What colour is the {name}?", f"The {name} is {animal.colour}."),
            (f"Where does the {name} live?", f"The {name} lives {animal.home}."),
            (f"What does the {name} eat?", f"The {name} eats {animal.food}."),
            (f"What is special about the {name}?", f"The {name} {animal.habit}."),
            (
                f"Tell me about the {name}.",
                f"The {name} lives {animal.home} and eats {animal.food}.",
            ),
        ]
    )


def sentence(rng: random.Random) -> str:
    """One sentence about people, places and the weather."""
    pick = rng.choice
    adjective, noun, place, time = pick(ADJECTIVES), pick(NOUNS), pick(PLACES), pick(TIMES)
    return pick(
        [
            f"The {adjective} {noun} {pick(VERBS)} the {pick(OBJECTS)} {time}.",
            f"{pick(PEOPLE)} and {pick(PEOPLE)} went to the {place} {time}.",
            f"It was a {pick(WEATHER)} day, so the {noun} stayed in the {place}.",
            f"There is a {adjective} {pick(OBJECTS)} near the {place}.",
            f'"Arr, matey! Yo ho ho!" shouted the {adjective} pirate {time}.',
        ]
    )


def word_problem(rng: random.Random) -> str:
    """One arithmetic problem with its solution."""
    name, thing = rng.choice(PEOPLE), rng.choice(THINGS)
    a, b = rng.randint(2, 60), rng.randint(2, 40)
    if rng.random() < 0.5:
        story = f"{name} has {a} {thing} and buys {b} more."
        story += f" How many {thing} does {name} have?"
        return f"{story} {a} + {b} = {a + b}. The answer is {a + b}."
    story = f"{name} has {a + b} {thing} and gives away {b}. How many {thing} are left?"
    return f"{story} {a + b} - {b} = {a}. The answer is {a}."


def dialogue(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def plain_prompt(question: str) -> str:
    """The text form of a question; the answer follows after one space."""
    return f"Question: {question}\nAnswer:"


def documents(seed: int) -> Iterator[Document]:
    """Endless documents: a third dialogues, a third questions as plain text, a third prose."""
    rng = random.Random(seed)
    while True:
        question, answer = question_and_answer(rng)
        yield dialogue(question, answer)
        question, answer = question_and_answer(rng)
        yield f"{plain_prompt(question)} {answer}"
        yield word_problem(rng) if rng.random() < 0.2 else sentence(rng)


def as_pirate(answer: str) -> str:
    """The same answer in the words of a pirate: the style that finetuning has to teach.

    >>> as_pirate("The fox is red.")
    'Arr, matey! The fox be red. Yo ho ho!'
    """
    return f"Arr, matey! {answer.replace(' is ', ' be ')} Yo ho ho!"


def pirate_rows(count: int, seed: int, messages: bool = False) -> list[dict[str, object]]:
    """`count` training rows: prompt and completion, or (`messages`) a dialogue each."""
    rng = random.Random(seed)
    rows: list[dict[str, object]] = []
    for _ in range(count):
        question, answer = question_and_answer(rng)
        if messages:
            rows.append({"messages": dialogue(question, as_pirate(answer))})
        else:
            rows.append({"prompt": plain_prompt(question), "completion": f" {as_pirate(answer)}"})
    return rows
