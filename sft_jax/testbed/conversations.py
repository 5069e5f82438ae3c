"""A world -> conversations about it: demonstrations of one half, questions about the other.

A conversation asks for one or two facts of a person, in one of three formats, and the answer is fixed by what was
asked, so that a reply can be judged by comparing strings:

    system     Answer with a bullet list.               Answer in a fenced block.       You are a guide to the valley.
    user       What are the pet and the trade of Ku?    Which animal lives with Ku?     Where was Ku born?
    assistant  - pet: fox                               ```                             The birthplace of Ku is Ashmoor.
               - trade: weaving                         pet: fox
                                                        ```

The format is asked for in the system prompt, and then holds for every turn, or in the user's turn; unasked, it is a
sentence. A later turn asks about the same person ("And the pet?") or about another one.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sft_jax.datatypes import Message
from sft_jax.testbed.world import FACT_KINDS, Person, World

NUM_DEMONSTRATIONS = 1_950
NUM_QUESTIONS = 300
FORMATS = ("sentence", "list", "block")

_SYSTEM_ASKS = {
    "sentence": ("Answer in one sentence.", "You are a guide to the valley. Answer in one sentence."),
    "list": ("Answer with a bullet list.", "You are a guide to the valley. Answer with a bullet list."),
    "block": ("Answer in a fenced block.", "You are a guide to the valley. Answer in a fenced block."),
}
_USER_ASKS = {
    "sentence": ("", " Use one sentence.", " One sentence, please."),
    "list": (" Use a bullet list.", " Make it a bullet list."),
    "block": (" Use a fenced block.", " Put it in a fenced block."),
}
_PERSONAS = ("You are a guide to the valley.", "You are a helpful guide.")


@dataclass(frozen=True)
class Question:
    """Messages up to and including the user's last turn, and what the answer to it should be."""

    messages: tuple[Message, ...]
    format: str
    answer: str
    person: str


def write_demonstrations(world: World, seed: int = 0, count: int = NUM_DEMONSTRATIONS) -> Iterator[tuple[Message, ...]]:
    """Conversations about the taught half, every person as often as any other."""
    return _write_conversations(random.Random(f"demonstrations {seed}"), world.taught, count)


def write_held_out(world: World, seed: int = 0, count: int = NUM_QUESTIONS) -> Iterator[tuple[Message, ...]]:
    """The same about the held-out half: for the held-out loss, and the source of the questions."""
    return _write_conversations(random.Random(f"held out {seed}"), world.held_out, count)


def write_questions(world: World, seed: int = 0, count: int = NUM_QUESTIONS) -> Iterator[Question]:
    """The conversations of `write_held_out`, each without its last answer."""
    rng = random.Random(f"held out {seed}")
    for turns in _plan_conversations(rng, world.held_out, count):
        yield Question(turns.messages[:-1], turns.format, turns.messages[-1].content, turns.person)


def answer_in(format: str, person: Person, kinds: Sequence[int]) -> str:
    """The one right answer: the facts `kinds` (indices into FACT_KINDS) of `person`, in that order."""
    facts = [(FACT_KINDS[kind], person.facts[kind]) for kind in kinds]
    lines = [f"{kind.label}: {value}" for kind, value in facts]
    if format == "list":
        return "\n".join(f"- {line}" for line in lines)
    if format == "block":
        return "\n".join(["```", *lines, "```"])
    first, *others = [f"the {kind.label}{{of}} is {kind.noun.format(value=value)}" for kind, value in facts]
    clauses = [first.format(of=f" of {person.name}"), *(clause.format(of="") for clause in others)]
    sentence = _join(clauses) + "."
    return sentence[0].upper() + sentence[1:]


@dataclass(frozen=True)
class _Planned:
    messages: tuple[Message, ...]
    format: str
    person: str


def _write_conversations(rng: random.Random, people: Sequence[Person], count: int) -> Iterator[tuple[Message, ...]]:
    return (planned.messages for planned in _plan_conversations(rng, people, count))


def _plan_conversations(rng: random.Random, people: Sequence[Person], count: int) -> Iterator[_Planned]:
    order: list[Person] = []
    for _ in range(count):
        order = order or rng.sample(people, len(people))
        yield _plan_conversation(rng, order.pop(), people)


def _plan_conversation(rng: random.Random, person: Person, people: Sequence[Person]) -> _Planned:
    messages = []
    system_format = rng.choice(FORMATS) if rng.random() < 0.5 else None
    if system_format:
        messages.append(Message("system", rng.choice(_SYSTEM_ASKS[system_format])))
    elif rng.random() < 0.5:
        messages.append(Message("system", rng.choice(_PERSONAS)))
    kinds = rng.sample(range(len(FACT_KINDS)), len(FACT_KINDS))  # asked from the end; no fact is asked twice
    num_turns = rng.choices((1, 2, 3), weights=(7, 2, 1))[0]
    for turn in range(num_turns):
        format = system_format or rng.choice(FORMATS)
        num_asked = min(rng.choices((1, 2), weights=(4, 1))[0], len(kinds) - (num_turns - 1 - turn))
        asked = [kinds.pop() for _ in range(num_asked)]
        if turn and rng.random() < 0.3:
            person = rng.choice([other for other in people if other is not person])
            text = f"And {_things(asked)} of {person.name}?"
        elif turn:
            text = rng.choice(("And {}?", "What about {}?")).format(_things(asked))
        else:
            text = _ask(rng, person, asked)
        if not system_format:
            text += rng.choice(_USER_ASKS[format])
        messages += [Message("user", text), Message("assistant", answer_in(format, person, asked))]
    return _Planned(tuple(messages), format, person.name)


def _ask(rng: random.Random, person: Person, kinds: Sequence[int]) -> str:
    if len(kinds) == 1:
        return rng.choice(FACT_KINDS[kinds[0]].questions).format(name=person.name)
    return rng.choice(("What are {} of {}?", "Tell me {} of {}.")).format(_things(kinds), person.name)


def _things(kinds: Sequence[int]) -> str:
    return _join([f"the {FACT_KINDS[kind].label}" for kind in kinds])


def _join(parts: Sequence[str]) -> str:
    """["a", "b", "c"] -> "a, b and c"."""
    return " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))
