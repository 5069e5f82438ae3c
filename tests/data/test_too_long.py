"""Over-long rows: what is left fits and is trained as before, each turn once; what is lost is counted to the token."""

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tiny_tokenizers import SENTENCES
from word_renderer import BOS, FIRST_WORD, ROLE_IDS, STOP, WordRenderer, make_config

from sft_jax.data.rendering import Renderer, RenderOptions
from sft_jax.data.store import open_store
from sft_jax.data.templates import load_template
from sft_jax.data.tokenizer import load_tokenizer
from sft_jax.data.too_long import Lost, OverLongError, fit_examples
from sft_jax.datatypes import Conversation, Document, Message, Origin

ORIGIN = Origin("a.jsonl", 3)
POLICIES = ("error", "drop", "drop_early_turns", "split_turns", "truncate")


def chat(*texts, system=None, weights=()):
    """User and assistant turns by turns."""
    messages = [Message("system", system)] if system is not None else []
    for i, text in enumerate(texts):
        weight = weights[i // 2] if weights and i % 2 else None
        messages.append(Message("assistant" if i % 2 else "user", text, loss_weight=weight))
    return Conversation(tuple(messages), ORIGIN)


def totals(examples):
    """(tokens, supervised tokens)."""
    return sum(map(len, examples)), sum(int(np.count_nonzero(example.loss_weights)) for example in examples)


def supervised_ids(examples):
    return [example.targets[example.loss_weights != 0].tolist() for example in examples]


def num_turns(renderer, examples):
    """By their supervised stop tokens."""
    return sum(int((np.isin(one.targets, renderer.stop_ids) & (one.loss_weights != 0)).sum()) for one in examples)


def words(ids):
    return [int(id) - FIRST_WORD for id in ids if id >= FIRST_WORD]


# --- By hand ----------------------------------------------------------------------------------------------------------

# Five exchanges of 5 ids each, [user] word [assistant] word 2, after 1 [system] word.
FIVE = chat(*"0123456789", system="99")
ROOM_FOR_THREE = 3 + 3 * 5 - 1


def test_the_example_of_the_module_docstring():
    result = fit_examples(FIVE, WordRenderer(), ROOM_FOR_THREE, "drop_early_turns")
    assert [words(example.ids) for example in result.examples] == [[99, 4, 5, 6, 7, 8, 9]]
    assert (result.lost, result.is_changed) == (Lost(2, 10, 4), True)
    result = fit_examples(FIVE, WordRenderer(), ROOM_FOR_THREE, "split_turns")
    assert [words(example.ids) for example in result.examples] == [[99, 0, 1, 2, 3, 4, 5], [99, 6, 7, 8, 9]]
    assert (result.lost, result.is_changed) == (Lost(), True)


def test_truncate_ends_in_mid_answer():
    row = chat("0 0", "1 2 3 4", "5", "6")
    ((example,), lost, is_changed, *_) = fit_examples(row, WordRenderer(), 7, "truncate")
    assert example.ids.tolist() == [BOS, ROLE_IDS["user"], 10, 10, ROLE_IDS["assistant"], 11, 12, 13]
    assert supervised_ids([example]) == [[11, 12, 13]]
    assert (lost, is_changed) == (Lost(turns=2, tokens=7, supervised_tokens=4), True)


@pytest.mark.parametrize("policy", POLICIES)
def test_what_fits_is_left_alone(policy):
    result = fit_examples(FIVE, WordRenderer(), 27, policy)
    assert (len(result.examples), result.lost, result.is_changed) == (1, Lost(), False)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("error", "is 12 tokens long; config.data.max_seq_len is 5. Raise it, shorten the row, or set "),
        ("drop", "is 12 tokens long; config.data.max_seq_len is 5. Raise it, or shorten the row."),
        ("drop_early_turns", "is 5, for which its last exchange is too long."),
        ("split_turns", "is 5, for which each exchange is too long."),
        ("truncate", "is 5, and no token to train on comes before that."),
    ],
)
def test_a_row_of_which_nothing_fits_is_refused_with_what_is_lost(policy, message):
    row = chat("0 0 0 0", "1 1 1", "2", "3") if policy == "error" else chat("0 0 0 0 0 0", "1 1 1")
    with pytest.raises(OverLongError) as raised:
        fit_examples(row, WordRenderer(), 5, policy)
    assert raised.value.reason == "too_long"
    if policy != "error":
        assert raised.value.lost == Lost(1, 12, 4)
        assert message in str(raised.value)
    assert str(raised.value).startswith("a.jsonl:3: is 1")


def test_calls_stay_with_their_results():
    turns = [("user", "0"), ("assistant", "1"), ("tool", "2"), ("assistant", "3"), ("user", "4"), ("assistant", "5")]
    row = Conversation(tuple(Message(role, content) for role, content in turns), ORIGIN)
    (example,), lost, *_ = fit_examples(row, WordRenderer(), 14, "drop_early_turns")  # one too few
    assert words(example.ids) == [4, 5]
    assert lost == Lost(turns=2, tokens=10, supervised_tokens=4)


def test_only_the_last_turn_of_the_row_is_trained_if_that_is_the_choice():
    renderer = WordRenderer(supervise="last")
    examples, lost, *_ = fit_examples(FIVE, renderer, ROOM_FOR_THREE, "split_turns", supervise="last")
    assert [words(example.ids) for example in examples] == [[99, 4, 5, 6, 7, 8, 9]]  # with the history that fits
    assert supervised_ids(examples) == [[FIRST_WORD + 9, STOP]]
    assert lost == Lost(turns=0, tokens=10, supervised_tokens=0)


def test_turns_without_a_weight_serve_as_history_if_weighted_ones_are_trained():
    row = chat(*"0123456789", weights=[None, 1.0, None, None, 1.0])
    renderer = WordRenderer(supervise="weighted")
    examples, lost, *_ = fit_examples(row, renderer, 10, "split_turns", supervise="weighted")
    assert [words(example.ids) for example in examples] == [[0, 1, 2, 3], [6, 7, 8, 9]]
    assert supervised_ids(examples) == [[FIRST_WORD + 3, STOP], [FIRST_WORD + 9, STOP]]
    assert lost == Lost(turns=0, tokens=5, supervised_tokens=0)


@pytest.mark.parametrize("policy", ["drop_early_turns", "split_turns"])
def test_of_several_examples_only_the_over_long_ones_change(policy):
    row = chat("0", "1", "2", "3 3 3", "4", "5", system="rewrites")
    renderer = WordRenderer()
    untouched = renderer.render(row)
    assert [len(example) for example in untouched] == [6, 13, 18]
    examples, lost, *_ = fit_examples(row, renderer, 13, policy)
    assert [example.ids.tolist() for example in examples[:2]] == [example.ids.tolist() for example in untouched[:2]]
    assert words(examples[2].ids) == [2, 3, 3, 3, 4, 5]
    assert supervised_ids(examples) == supervised_ids(untouched)
    assert lost == Lost(turns=0, tokens=5, supervised_tokens=0)


def test_documents():
    document = Document("0 1 2 3 4 5 6", ORIGIN)  # 9 ids
    whole = WordRenderer().render(document)[0]
    pieces, lost, is_changed, *_ = fit_examples(document, WordRenderer(), 3, "split_turns")
    assert [len(piece) for piece in pieces] == [3, 3, 2]
    assert np.concatenate([piece.targets for piece in pieces]).tolist() == whole.targets.tolist()
    assert np.concatenate([piece.inputs for piece in pieces]).tolist() == whole.inputs.tolist()
    assert (lost, is_changed) == (Lost(), True)
    (piece,), lost, *_ = fit_examples(document, WordRenderer(), 3, "truncate")
    assert piece.ids.tolist() == [BOS, 10, 11, 12]
    assert lost == Lost(turns=0, tokens=5, supervised_tokens=5)
    for policy in ("error", "drop", "drop_early_turns"):
        with pytest.raises(OverLongError) as raised:
            fit_examples(document, WordRenderer(), 3, policy)
        assert raised.value.lost == Lost(turns=0, tokens=8, supervised_tokens=8)


def test_an_example_that_is_cut_keeps_the_sum_of_its_weights():
    class PerExample(WordRenderer):
        def render_row(self, row):
            rendered = super().render_row(row)
            rendered.examples[0].example.loss_weights[:] /= rendered.examples[0].example.loss_weights.sum()
            return rendered

    row = chat("0", "1 2 3 4 5 6")
    for averaging, expected in (("example", 1.0), ("token", 3 / 7)):
        (example,), *_ = fit_examples(row, PerExample(), 6, "truncate", averaging=averaging)
        assert example.loss_weights.sum() == pytest.approx(expected)
        assert example.loss_weights.dtype == np.float32


def test_the_store_accounts_for_what_is_lost(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [FIVE, chat("0", "1"), chat("0 " * 20, "1")]
    messages = [[{"role": m.role, "content": m.content} for m in row.messages] for row in rows]
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in messages))

    def prepare(policy):
        data = make_config(tmp_path, path, max_seq_len=ROOM_FOR_THREE, too_long=policy).data
        return open_store(data.train[0], [str(path)], data, WordRenderer(), WordRenderer).account

    account = prepare("drop_early_turns")
    assert (account.rows_read, account.rows_trained, account.rows_dropped, account.rows_shortened) == (3, 2, 1, 1)
    assert (account.turns_lost, account.tokens_lost, account.supervised_tokens_lost) == (3, 10 + 24, 4 + 2)
    assert (account.tokens, account.supervised_tokens) == (17 + 5, 6 + 2)
    assert account.turns == 3 + 1  # those that are trained
    account = prepare("split_turns")
    assert (account.rows_trained, account.examples, account.rows_shortened, account.turns_lost) == (2, 3, 1, 1)
    assert account.turns == 5 + 1


# --- Any conversation -------------------------------------------------------------------------------------------------

NUMBERS = st.integers(0, 4)


@st.composite
def conversations(draw, tools=True):
    """Fields of messages. The content of each is a run of its own number: it is known wherever it comes to stand."""
    shapes = draw(st.lists(st.tuples(NUMBERS, st.lists(NUMBERS, max_size=2 * tools), NUMBERS), min_size=1, max_size=7))
    system = draw(st.sampled_from(["", "rewrites", "words"]))
    lengths = [("system", draw(NUMBERS))] if system else []
    for asks, results, answers in shapes:
        lengths.append(("user", asks))
        for result in results:
            lengths += [("assistant", 1), ("tool", result)]
        lengths.append(("assistant", answers))
    fields = []
    for number, (role, length) in enumerate(lengths):
        weight = draw(st.sampled_from([None, None, None, 0.0, 1.0])) if role == "assistant" else None
        fields.append((role, " ".join([str(number)] * (length + 1)), weight))
    if system == "rewrites":
        fields[0] = ("system", "rewrites", None)
    if fields[-1][-1] == 0:  # what is behind the last turn that is trained is not rendered
        fields[-1] = (*fields[-1][:-1], None)
    return fields


def converse(fields):
    """Made outside the strategy: the type checks of tests draw random numbers."""
    return Conversation(tuple(Message(role, text, loss_weight=weight) for role, text, weight in fields), ORIGIN)


def fit(row, renderer, max_seq_len, policy, supervise):
    """(examples, lost); a row that is refused has no examples."""
    try:
        examples, lost, is_changed, turns, num_supervised, counts = fit_examples(
            row, renderer, max_seq_len, policy, supervise=supervise
        )
    except OverLongError as error:
        return [], error.lost
    assert examples
    assert counts == WordRenderer(supervise=supervise).render_row(row).counts
    assert turns == num_turns(renderer, examples)
    assert num_supervised == sum(int((example.loss_weights > 0).sum()) for example in examples)
    assert is_changed == (max(map(len, WordRenderer(supervise=supervise).render(row))) > max_seq_len)
    return examples, lost


@given(conversations(), st.integers(4, 60), st.sampled_from(POLICIES), st.sampled_from(["all", "last", "weighted"]))
@settings(deadline=None, max_examples=400)
def test_what_is_left_and_what_is_lost_are_the_whole(fields, max_seq_len, policy, supervise):
    row = converse(fields)
    renderer, untouched = WordRenderer(supervise=supervise), WordRenderer(supervise=supervise)
    assume(supervise != "weighted" or any(message.loss_weight for message in row.messages))
    before = untouched.render(row)
    examples, lost = fit(row, renderer, max_seq_len, policy, supervise)
    assert all(1 <= len(example) <= max_seq_len for example in examples)
    assert all(example.loss_weights.any() for example in examples)

    # Every supervised turn is trained once, whole; or it is lost, and counted.
    before_ids, after_ids = Counter(), Counter()
    for ids, counter in ((before, before_ids), (examples, after_ids)):
        counter.update(id for run in supervised_ids(ids) for id in run)
    assert before_ids.total() == after_ids.total() + lost.supervised_tokens
    assert before_ids[STOP] == after_ids[STOP] + lost.turns
    if policy == "truncate":
        assert after_ids <= before_ids
    else:
        whole = [word for word in after_ids if word != STOP]
        assert all(after_ids[word] == before_ids[word] for word in whole)
        assert after_ids[STOP] == len(whole)

    # A supervised stop token stands behind a whole turn.
    for example in examples:
        for at in np.flatnonzero((example.targets == STOP) & (example.loss_weights != 0)):
            number = int(example.inputs[at]) - FIRST_WORD
            num_words = len(row.messages[number].content.split())
            assert example.targets[at - num_words : at].tolist() == [FIRST_WORD + number] * num_words
            assert (example.loss_weights[at - num_words : at] != 0).all()


@given(conversations(), st.integers(4, 60), st.sampled_from(["drop_early_turns", "split_turns"]))
@settings(deadline=None, max_examples=300)
def test_parts_are_whole_exchanges_that_follow_each_other(fields, max_seq_len, policy):
    row = converse(fields)
    examples, _ = fit(row, WordRenderer(), max_seq_len, policy, "all")
    head = int(row.messages[0].role == "system")
    for example in examples:
        numbers = list(dict.fromkeys(words(example.ids)))
        if head and row.messages[0].content != "rewrites":
            assert numbers.pop(0) == 0
        assert row.messages[numbers[0]].role == "user"
        assert numbers == list(range(numbers[0], numbers[-1] + 1))
        kept = row.messages[:head] + row.messages[numbers[0] : numbers[-1] + 1]
        assert example.ids.tolist() == WordRenderer().render(Conversation(kept, ORIGIN))[-1].ids.tolist()


@given(conversations(tools=False), st.integers(4, 60), st.sampled_from(["drop_early_turns", "split_turns", "truncate"]))
@settings(deadline=None, max_examples=300)
def test_lost_tokens_are_those_of_the_messages_left_off(fields, max_seq_len, policy):
    row = converse([(role, text, None) for role, text, _ in fields if text != "rewrites"])
    (before,) = WordRenderer().render(row)
    examples, lost = fit(row, WordRenderer(), max_seq_len, policy, "all")
    system = row.messages[0].content.split() if row.messages[0].role == "system" else None
    head = 0 if system is None else 1 + len(system)
    repeated = head * (len(examples) - 1) if examples else 0
    assert len(before) == totals(examples)[0] + lost.tokens - repeated


@given(st.lists(NUMBERS, min_size=2, max_size=10), st.integers(4, 40))
@settings(deadline=None, max_examples=200)
def test_each_part_has_as_many_exchanges_as_fit(lengths, max_seq_len):
    row = chat(*(text for i, n in enumerate(lengths) for text in (f"{i}", " ".join([f"{i}"] * (n + 1)))))
    sizes = [4 + n + 1 for n in lengths]  # [user] word [assistant] words 2, after one BOS
    examples, _ = fit(row, WordRenderer(), max_seq_len, "split_turns", "all")
    for example in examples:
        numbers = sorted(set(words(example.ids)))
        following = numbers[-1] + 1
        assert len(example) == sum(sizes[i] for i in numbers)
        assert following == len(lengths) or len(example) + sizes[following] > max_seq_len
    examples, _ = fit(row, WordRenderer(), max_seq_len, "drop_early_turns", "all")
    for example in examples:
        first = min(words(example.ids))
        assert len(example) <= max_seq_len < len(example) + sizes[first - 1] if first else True


# --- A real template --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chatml(tiny_byte_level):
    tokenizer = load_tokenizer(str(tiny_byte_level))
    return Renderer(tokenizer, load_template("chatml", tokenizer, {}))


@pytest.fixture(scope="module")
def llama2(tiny_sentencepiece):
    tokenizer = load_tokenizer(str(tiny_sentencepiece))
    return Renderer(tokenizer, load_template("llama2", tokenizer, {}))


def test_a_weight_of_prompts_alone_makes_no_example(tiny_byte_level):
    tokenizer = load_tokenizer(str(tiny_byte_level))
    template = load_template("chatml", tokenizer, {})
    renderer = Renderer(tokenizer, template, RenderOptions(prompt_loss_weight=0.1))
    row = chat("Hi " * 5, "Yes.", "And?", "No.")
    ((whole, turns, answers),), _ = renderer.render_row(row)
    assert turns == (1, 3)
    shown = [tokenizer.decode(whole.targets[start:stop].tolist(), continuation=True) for start, stop in answers]
    assert shown == ["Yes.<|im_end|>", "No.<|im_end|>"]
    (first, stop), (second, end) = answers
    for max_seq_len, num_turns in ((first + 1, 0), (stop - 1, 0), (stop, 1), (second, 1), (end - 1, 1)):
        (piece,), lost, _, kept, *_ = fit_examples(row, renderer, max_seq_len, "truncate")
        assert (len(piece), kept, lost.turns) == (max_seq_len, num_turns, 2 - num_turns)
    with pytest.raises(OverLongError) as raised:
        fit_examples(row, renderer, first, "truncate")
    assert (raised.value.lost.turns, raised.value.lost.tokens) == (2, len(whole))


TEXTS = st.lists(st.sampled_from([*SENTENCES, "Hi", "\n<|im_end|> </s>", "72."]), min_size=2, max_size=10)


@pytest.mark.parametrize("name", ["chatml", "llama2"])
@given(TEXTS, st.sampled_from([None, "Be brief."]), st.integers(10, 300), st.sampled_from(POLICIES))
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_real_template(request, name, texts, system, max_seq_len, policy):
    renderer = request.getfixturevalue(name)
    row = chat(*texts[: len(texts) // 2 * 2], system=system)
    before = renderer.render(row)
    examples, lost = [], None
    try:
        examples, lost, _, turns, _, counts = fit_examples(row, renderer, max_seq_len, policy)
        assert counts == renderer.render_row(row).counts
        assert turns == num_turns(renderer, examples)
    except OverLongError as error:
        lost = error.lost

    assert all(1 <= len(example) <= max_seq_len for example in examples)
    assert totals(before)[1] == totals(examples)[1] + lost.supervised_tokens

    def turns_of(examples):
        """Supervised ids, cut behind each stop token."""
        turns = [[]]
        for id in (id for run in supervised_ids(examples) for id in run):
            turns[-1].append(id)
            if id in renderer.stop_ids:
                turns.append([])
        return turns[:-1]

    all_turns, kept_turns = turns_of(before), turns_of(examples)
    assert len(all_turns) == len(kept_turns) + lost.turns
    if policy == "drop_early_turns":
        assert kept_turns == all_turns[lost.turns :]
    elif policy == "truncate":
        assert kept_turns == all_turns[: len(kept_turns)]
        assert totals(before)[0] == totals(examples)[0] + lost.tokens
    else:
        rest = iter(all_turns)
        assert all(turn in rest for turn in kept_turns)  # in their order
