"""The closed world: the same bytes everywhere, facts in many words, no held-out person in a demonstration."""

import hashlib
import json
import re

from sft_jax.datatypes import Message
from sft_jax.testbed.conversations import (
    FORMATS,
    answer_in,
    write_demonstrations,
    write_held_out,
    write_questions,
)
from sft_jax.testbed.evaluation import read_questions
from sft_jax.testbed.world import FACT_KINDS, Person, make_world, write_documents

WORLD = make_world()
DEMONSTRATIONS = list(write_demonstrations(WORLD))
QUESTIONS = list(write_questions(WORLD))
NAMES = {person.name for person in WORLD.people}

# The committed base model knows this world: a change here means that it must be pretrained again.
GOLDEN = {
    "demonstrations.jsonl": "fe607b1d3a306dbcde21d1b4f410b96f63c7816f282e2e46e2918eb9cd435def",
    "documents.jsonl": "9d0a778a1b618c42fa2d2d0e7f5d47a1ca8d75612c7a1ff9e310ca9afd957155",
    "held_out.jsonl": "5002d8559d40af042f17e3ae8054305b0750577ddd4b8fbc275f0ae76ca3bf6d",
    "questions.jsonl": "95596281f83baa837468a814293c7863feecab306686bf3dd58c097b27a98da4",
}


def names_in(messages):
    return NAMES & {word for message in messages for word in re.findall("[A-Za-z]+", message.content)}


def test_same_bytes_everywhere(testbed):
    assert {name: hashlib.sha256((testbed / name).read_bytes()).hexdigest() for name in GOLDEN} == GOLDEN


def test_another_seed_is_another_world():
    assert make_world(seed=1) != WORLD
    assert list(write_demonstrations(WORLD, seed=1)) != DEMONSTRATIONS


def test_halves_share_no_person_and_all_values():
    taught, held_out = ({person.name for person in half} for half in (WORLD.taught, WORLD.held_out))
    assert len(taught) == len(held_out) == 150
    assert not taught & held_out
    for i, kind in enumerate(FACT_KINDS):
        assert {person.facts[i] for person in WORLD.held_out} <= set(kind.values)
        assert {person.facts[i] for person in WORLD.taught} == set(kind.values)


def test_names_part_early_and_are_no_other_word():
    assert len({name[:4] for name in NAMES}) == len(NAMES) == 300
    assert not NAMES & {value for kind in FACT_KINDS for value in kind.values}


def test_documents_tell_every_fact_of_everyone_in_many_words_and_orders():
    sentences = {}
    for i, kind in enumerate(FACT_KINDS):
        for j, phrasing in enumerate(kind.phrasings):
            for person in WORLD.people:
                sentence = phrasing.format(name=person.name, value=person.facts[i])
                sentences[sentence[0].upper() + sentence[1:]] = (person.name, i, j)
    told, orders, num_pairs = {}, {}, 0
    for document in write_documents(WORLD):
        found = [sentences[s] for s in re.findall(r"[^ ][^.?]*[.?]", document.replace("\n", " ")) if s in sentences]
        names = {name for name, _, _ in found}
        assert names_in([Message("user", document)]) == names
        if len(names) == 1:
            order = tuple(i for _, i, _ in found)
            assert sorted(order) == [0, 1, 2, 3, 4]
            orders.setdefault(*names, set()).add(order)
        else:
            assert len(names) == 2
            assert sorted(name for name, _, _ in found) == sorted([*names] * 3)
            num_pairs += 1
        for name, i, j in found:
            told.setdefault((name, i), set()).add(j)
    assert told.keys() == {(name, i) for name in NAMES for i in range(5)}
    assert min(len(wordings) for wordings in told.values()) >= 7
    assert min(len(found) for found in orders.values()) >= 20
    assert 5_000 < num_pairs < 7_000


def test_demonstrations_are_about_the_taught_half_alone():
    assert 1_000 < len(DEMONSTRATIONS) <= 2_000
    named = [names_in(messages) for messages in DEMONSTRATIONS]
    assert all(named)
    assert set().union(*named) == {person.name for person in WORLD.taught}


def test_demonstrations_vary():
    roles = {tuple(message.role for message in messages) for messages in DEMONSTRATIONS}
    assert roles == {system + ("user", "assistant") * turns for system in ((), ("system",)) for turns in (1, 2, 3)}
    answers = [message.content for messages in DEMONSTRATIONS for message in messages if message.role == "assistant"]
    for format in FORMATS:
        share = sum(format_of(answer) == format for answer in answers) / len(answers)
        assert 0.2 < share < 0.5, format


def format_of(answer):
    return {"-": "list", "`": "block"}.get(answer[0], "sentence")


def test_questions_ask_everyone_of_the_held_out_half_and_no_other():
    assert set().union(*(names_in(question.messages) for question in QUESTIONS)) == {p.name for p in WORLD.held_out}
    assert all(question.messages[-1].role == "user" for question in QUESTIONS)
    assert {len(question.messages) for question in QUESTIONS} == {1, 2, 3, 4, 5, 6}


def test_questions_are_the_held_out_conversations_without_their_last_answers():
    for question, messages in zip(QUESTIONS, write_held_out(WORLD), strict=True):
        assert (*question.messages, Message("assistant", question.answer)) == messages
        assert question.format == format_of(question.answer)


def test_answers_in_each_format():
    person = Person("Ku", ("Ashmoor", "law", "harp", "fox", "1999"))
    assert answer_in("sentence", person, [0]) == "The birthplace of Ku is Ashmoor."
    assert (
        answer_in("sentence", person, [3, 1, 2])
        == "The pet of Ku is a fox, the trade is law and the instrument is the harp."
    )
    assert answer_in("list", person, [4, 3]) == "- birth year: 1999\n- pet: fox"
    assert answer_in("block", person, [2]) == "```\ninstrument: harp\n```"


def test_files_hold_what_the_functions_give(testbed):
    rows = [json.loads(line) for line in (testbed / "demonstrations.jsonl").read_text().splitlines()]
    assert [tuple(Message(**message) for message in row["messages"]) for row in rows] == DEMONSTRATIONS
    assert read_questions(testbed / "questions.jsonl") == QUESTIONS
