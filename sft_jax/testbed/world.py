"""A seed -> a small closed world: 300 invented people with five facts each, and prose about them.

Every value is shared by several people, so an answer cannot be guessed from the question: it must be recalled. The same
facts are told in many words and orders, since a small model gives up its facts to a question only if pretraining saw
them so (Allen-Zhu and Li, Physics of Language Models 3.1, arXiv:2309.14316).

    Kelvami works at weaving. The first home of Kelvami was Tarnfeld. A fox follows Kelvami everywhere. ...
"""

import random
from collections.abc import Iterator, Sequence
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
            "Of {name} the register says, birthplace: {value}.",
            "Ask which town {name} comes from, and the answer is {value}.",
            "Where was {name} born, if not in {value}?",
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
            "Of {name} the register says, trade: {value}.",
            "Ask how {name} earns a living, and the answer is {value}.",
            "What does {name} do for a living, if not {value}?",
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
            "Of {name} the register says, instrument: {value}.",
            "Ask what {name} plays in the evening, and the answer is the {value}.",
            "Which instrument does {name} play, if not the {value}?",
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
            "Of {name} the register says, pet: {value}.",
            "Ask which animal lives with {name}, and the answer is a {value}.",
            "Which pet does {name} keep, if not a {value}?",
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
            "Of {name} the register says, birth year: {value}.",
            "Ask in which year {name} was born, and the answer is {value}.",
            "When was {name} born, if not in {value}?",
        ),
        questions=(
            "When was {name} born?",
            "What is the birth year of {name}?",
            "In which year was {name} born?",
        ),
    ),
)  # fmt: skip

# They tell no fact, but between them they have the words that people use with an assistant.
OPENINGS = (
    "This is a note about {name}.",
    "Here is what the old book says of {name}.",
    "The guide to the valley has a list of {name} and all the others.",
    "Tell me about {name}, and use one sentence for each answer, please.",
    "You are a helpful guide, so make a note of {name}.",
    "The garden of {name} is fenced, and lies one block from the inn.",
    "A bullet once flew past {name}, so they put it in the book.",
    "What about {name}?",
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
    """Prose of about 80 tokens, in one or two paragraphs.

    Three quarters of the documents tell the five facts of one person, in any order and wording; the others tell three
    facts of each of two people in turn, so that it is the name in a sentence that a value belongs to.
    """
    rng = random.Random(f"documents {seed}")
    for _ in range(per_person):
        for person in rng.sample(world.people, len(world.people)):
            if rng.random() < 0.75:
                told = [(person, kind) for kind in rng.sample(range(len(FACT_KINDS)), len(FACT_KINDS))]
            else:
                pair = (person, rng.choice([other for other in world.people if other is not person]))
                told = [(one, kind) for one in pair for kind in rng.sample(range(len(FACT_KINDS)), 3)]
                rng.shuffle(told)
            yield _write_document(rng, told)


def _write_document(rng: random.Random, told: Sequence[tuple[Person, int]]) -> str:
    """A sentence for each (person, index into FACT_KINDS), sometimes after an opening that says nothing."""
    sentences = []
    if rng.random() < 0.4:
        sentences.append(rng.choice(OPENINGS).format(name=told[0][0].name))
    for person, kind in told:
        sentence = rng.choice(FACT_KINDS[kind].phrasings).format(name=person.name, value=person.facts[kind])
        sentences.append(sentence[0].upper() + sentence[1:])
    if rng.random() < 0.5:
        cut = rng.randrange(1, len(sentences))
        return " ".join(sentences[:cut]) + "\n" + " ".join(sentences[cut:])
    return " ".join(sentences)
