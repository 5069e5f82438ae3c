"""A seed -> a small closed world: 300 invented people with five facts each, and prose about them.

Every value is shared by several people, so an answer cannot be guessed from the question: it must be recalled. The same
facts are told in many words and orders, since a small model gives up its facts to a question only if pretraining saw
them so (Allen-Zhu and Li, Physics of Language Models 3.1, arXiv:2309.14316).

    Kelvami works at weaving. The first home of Kelvami was Tarnfeld. A fox follows Kelvami everywhere. ...
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass

NUM_PEOPLE = 300
DOCUMENTS_PER_PERSON = 80


@dataclass(frozen=True)
class FactKind:
    """One column of the world. Templates have `{name}` and `{value}`."""

    label: str
    """What an answer calls it."""
    noun: str
    """The value in a sentence that follows "is": "a {value}" for a pet."""
    values: tuple[str, ...]
    phrasings: tuple[str, ...]
    """Sentences of the documents."""
    questions: tuple[str, ...]


FACT_KINDS = (
    FactKind(
        label="birthplace",
        noun="{value}",
        values=(
            "Tarnfeld", "Ashmoor", "Willowby", "Greyhaven", "Northwick", "Elmstead", "Foxholm", "Ravensby", "Millbrook",
            "Stonegate", "Redcliff", "Oakhurst", "Silverton", "Marshden", "Birchley", "Longford", "Whitcombe",
            "Hollowell", "Saltmere", "Thornbury", "Eastmarch", "Larkspur", "Copperhill", "Dunmouth", "Fernvale",
            "Kingsbarn", "Wolfden", "Highmeadow", "Bramblewood", "Seaborough",
        ),
        phrasings=(
            "{name} was born in {value}.",
            "The birthplace of {name} is {value}.",
            "{name} comes from the town of {value}.",
            "The first home of {name} was {value}.",
            "{value} is the town where {name} was born.",
            "Whoever asks where {name} was born hears of {value}.",
        ),
        questions=(
            "Where was {name} born?",
            "What is the birthplace of {name}?",
            "Which town does {name} come from?",
        ),
    ),
    FactKind(
        label="trade",
        noun="{value}",
        values=(
            "weaving", "baking", "fishing", "printing", "farming", "sailing", "mining", "brewing", "carving",
            "painting", "gardening", "teaching", "singing", "dyeing", "roofing", "tanning", "milling", "trading",
            "smithing", "writing", "nursing", "cooking", "tailoring", "carpentry", "masonry", "pottery", "medicine",
            "law", "banking", "shipbuilding",
        ),
        phrasings=(
            "{name} works at {value}.",
            "The trade of {name} is {value}.",
            "{name} earns a living by {value}.",
            "For many years {name} has done nothing but {value}.",
            "{value} is what {name} does for a living.",
            "Whoever asks what {name} does all day is told of {value}.",
        ),
        questions=(
            "What does {name} do for a living?",
            "What is the trade of {name}?",
            "How does {name} earn a living?",
        ),
    ),
    FactKind(
        label="instrument",
        noun="the {value}",
        values=(
            "harp", "flute", "drum", "fiddle", "lute", "horn", "bagpipe", "cello", "piano", "organ", "trumpet",
            "clarinet", "guitar", "banjo", "viola", "tuba", "zither", "bassoon", "bugle", "cornet", "gong", "harmonica",
            "lyre", "mandolin", "oboe", "recorder", "tambourine", "whistle",
        ),
        phrasings=(
            "{name} plays the {value}.",
            "The instrument of {name} is the {value}.",
            "In the evening {name} takes out the {value}.",
            "{name} has loved the {value} since childhood.",
            "The {value} is the instrument that {name} plays.",
            "Whoever asks which instrument {name} plays is shown the {value}.",
        ),
        questions=(
            "Which instrument does {name} play?",
            "What is the instrument of {name}?",
            "What does {name} play in the evening?",
        ),
    ),
    FactKind(
        label="pet",
        noun="a {value}",
        values=(
            "fox", "goat", "raven", "badger", "hare", "parrot", "tortoise", "ferret", "hedgehog", "cat", "dog",
            "pony", "goose", "duck", "pigeon", "hamster", "lizard", "snail", "donkey", "lamb", "squirrel", "weasel",
            "magpie", "turkey", "falcon", "beaver", "frog", "mouse", "swan", "peacock",
        ),
        phrasings=(
            "{name} keeps a {value}.",
            "The pet of {name} is a {value}.",
            "A {value} follows {name} everywhere.",
            "{name} shares the house with a {value}.",
            "The animal that lives with {name} is a {value}.",
            "Whoever asks which pet {name} keeps soon meets a {value}.",
        ),
        questions=(
            "Which pet does {name} keep?",
            "What is the pet of {name}?",
            "Which animal lives with {name}?",
        ),
    ),
    FactKind(
        label="birth year",
        noun="{value}",
        values=tuple(str(year) for year in range(1903, 1999, 4)),
        phrasings=(
            "{name} was born in the year {value}.",
            "The birth year of {name} is {value}.",
            "The life of {name} began in {value}.",
            "It was in {value} that {name} was born.",
            "{name} first saw the light of day in {value}.",
            "Whoever asks when {name} was born is told that it was in {value}.",
        ),
        questions=(
            "When was {name} born?",
            "What is the birth year of {name}?",
            "In which year was {name} born?",
        ),
    ),
)  # fmt: skip

OPENINGS = (
    "This is a note about {name}.",
    "Many people in the valley know {name}.",
    "Here is what the old book says of {name}.",
    "The valley tells this story of {name}.",
)


@dataclass(frozen=True)
class Person:
    name: str
    facts: tuple[str, ...]
    """One value for each of FACT_KINDS, in that order."""


@dataclass(frozen=True)
class World:
    """Two halves of the same size. Documents tell of both, demonstrations only of the first."""

    taught: tuple[Person, ...]
    held_out: tuple[Person, ...]

    @property
    def people(self) -> tuple[Person, ...]:
        return self.taught + self.held_out


def make_world(seed: int = 0, num_people: int = NUM_PEOPLE) -> World:
    """Draw the people and their facts."""
    rng = random.Random(f"people {seed}")
    names = _make_names(rng, num_people)
    people = tuple(Person(name, tuple(rng.choice(kind.values) for kind in FACT_KINDS)) for name in names)
    half = num_people // 2
    return World(taught=people[:half], held_out=people[half:])


def _make_names(rng: random.Random, count: int) -> list[str]:
    """Names of three syllables such as "Kelvami"; no two share their first four letters."""
    onsets = ("b", "d", "f", "g", "k", "l", "m", "n", "p", "r", "s", "t", "v")
    first_onsets = (*onsets, "br", "dr", "h", "j", "tr", "z")
    vowels = ("a", "e", "i", "o", "u")
    codas = ("", "", "l", "n", "r", "s")
    names: dict[str, str] = {}
    while len(names) < count:
        first = rng.choice(first_onsets) + rng.choice(vowels) + rng.choice(codas)
        name = first.capitalize() + "".join(rng.choice(onsets) + rng.choice(vowels) for _ in range(2))
        names.setdefault(name[:4], name)
    return list(names.values())


def write_documents(world: World, seed: int = 0, per_person: int = DOCUMENTS_PER_PERSON) -> Iterator[str]:
    """Prose of about 80 tokens: all five facts of one person, in any order and any wording, one or two paragraphs."""
    rng = random.Random(f"documents {seed}")
    for _ in range(per_person):
        for person in rng.sample(world.people, len(world.people)):
            yield _write_document(rng, person)


def _write_document(rng: random.Random, person: Person) -> str:
    facts = list(zip(FACT_KINDS, person.facts, strict=True))
    rng.shuffle(facts)
    sentences = [rng.choice(kind.phrasings).format(name=person.name, value=value) for kind, value in facts]
    sentences = [sentence[0].upper() + sentence[1:] for sentence in sentences]
    if rng.random() < 0.4:
        sentences.insert(0, rng.choice(OPENINGS).format(name=person.name))
    if rng.random() < 0.5:
        cut = rng.randrange(1, len(sentences))
        return " ".join(sentences[:cut]) + "\n" + " ".join(sentences[cut:])
    return " ".join(sentences)
