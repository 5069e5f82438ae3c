"""Every example once, no row too long, the same rows for the same seed, and batches whose parts cost the same."""

import json
import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sft_jax.data.packing import assemble_rows, attention_costs, balanced_order, plan_epoch
from sft_jax.data.rendering import Renderer
from sft_jax.data.templates import load_template
from sft_jax.data.tokenizer import load_tokenizer
from sft_jax.datatypes import Conversation, Message, Origin, shift

MAX_SEQ_LEN = 32
LENGTHS = st.lists(st.integers(1, MAX_SEQ_LEN), min_size=1, max_size=80).map(np.array)


def rows_of(plan):
    return [plan.examples_of(row).tolist() for row in range(plan.num_rows)]


def num_rows_by_best_fit(lengths, max_seq_len, max_segments=0):
    """The textbook algorithm, one example at a time."""
    rows = []  # (space, segments)
    for length in sorted(lengths, reverse=True):
        fitting = [row for row in rows if row[0] >= length and (not max_segments or row[1] < max_segments)]
        space, segments = min(fitting) if fitting else (max_seq_len, 0)
        if fitting:
            rows.remove((space, segments))
        rows.append((space - length, segments + 1))
    return len(rows)


def num_rows_by_first_fit(lengths, max_seq_len):
    spaces = []
    for length in sorted(lengths, reverse=True):
        at = next((i for i, space in enumerate(spaces) if space >= length), len(spaces))
        if at == len(spaces):
            spaces.append(max_seq_len)
        spaces[at] -= length
    return len(spaces)


@given(
    LENGTHS,
    st.sampled_from(["best_fit", "none"]),
    st.sampled_from([None, 0, 7, 2**31 - 1]),
    st.integers(0, 3),
    st.sampled_from([0, 1, 2, 5, MAX_SEQ_LEN + 1]),
    st.sampled_from(["shuffled", "longest_first"]),
)
@settings(deadline=None, max_examples=100)
def test_every_example_stands_in_one_row_and_no_row_overflows(lengths, packing, seed, epoch, limit, row_order):
    plan = plan_epoch(lengths, MAX_SEQ_LEN, seed, epoch, packing, max_segments_per_row=limit, row_order=row_order)
    assert sorted(plan.example_ids) == list(range(len(lengths)))
    rows = rows_of(plan)
    assert sum(map(len, rows)) == len(lengths)
    assert all(0 < sum(lengths[row]) <= MAX_SEQ_LEN for row in rows)
    assert all(len(row) <= (limit or MAX_SEQ_LEN) for row in rows)
    costs = attention_costs(plan, lengths)
    assert costs.tolist() == [sum(int(lengths[i]) ** 2 for i in row) for row in rows]
    again = plan_epoch(lengths, MAX_SEQ_LEN, seed, epoch, packing, max_segments_per_row=limit, row_order=row_order)
    assert rows_of(again) == rows


@given(LENGTHS, st.sampled_from([0, 1, 2, 3, 8]))
@settings(deadline=None, max_examples=120)
def test_counting_gives_as_many_rows_as_the_textbook(lengths, limit):
    expected = num_rows_by_best_fit(lengths, MAX_SEQ_LEN, limit)
    for epoch in (0, 1):  # and every epoch the same number
        assert plan_epoch(lengths, MAX_SEQ_LEN, 0, epoch, max_segments_per_row=limit).num_rows == expected


@given(LENGTHS)
@settings(deadline=None, max_examples=80)
def test_rows_are_few(lengths):
    num_rows = plan_epoch(lengths, MAX_SEQ_LEN, 0, 0).num_rows
    # At most 11/9 of the fewest possible and 4 (Johnson 1973, "Near-optimal bin packing algorithms"), and first fit
    # cannot go below those.
    assert num_rows <= 11 / 9 * num_rows_by_first_fit(lengths, MAX_SEQ_LEN) + 4
    assert num_rows < 2 * lengths.sum() / MAX_SEQ_LEN + 1  # any two rows hold more than one row's length


@given(LENGTHS, st.sampled_from([0, 2, 3]))
@settings(deadline=None, max_examples=80)
def test_no_row_could_have_taken_the_longest_example_of_another(lengths, limit):
    rows = rows_of(plan_epoch(lengths, MAX_SEQ_LEN, 0, 0, max_segments_per_row=limit))
    rows.sort(key=lambda row: -lengths[row].max())
    for i, row in enumerate(rows):
        if len(row) != limit:
            space = MAX_SEQ_LEN - lengths[row].sum()
            assert all(
                lengths[later].max() > space for later in rows[i + 1 :] if lengths[later].max() < max(lengths[row])
            )


@given(LENGTHS, st.sampled_from([None, 0, 7]), st.sampled_from(["best_fit", "none"]))
@settings(deadline=None, max_examples=80)
def test_longest_first_changes_the_order_of_rows_and_nothing_else(lengths, seed, packing):
    shuffled = plan_epoch(lengths, MAX_SEQ_LEN, seed, 1, packing)
    plan = plan_epoch(lengths, MAX_SEQ_LEN, seed, 1, packing, row_order="longest_first")
    costs = attention_costs(shuffled, lengths)
    expected = [rows_of(shuffled)[row] for row in np.argsort(-costs, kind="stable")]
    assert rows_of(plan) == expected


def test_the_example_of_the_module_docstring():
    plan = plan_epoch(np.array([3, 6, 2, 5, 4]), 8, None, 0)
    assert rows_of(plan) == [[0, 3], [1, 2], [4]]


def test_without_packing_and_shuffling_rows_are_the_examples_as_they_stand():
    plan = plan_epoch(np.array([3, 6, 2, 5, 4]), 8, None, 0, "none")
    assert rows_of(plan) == [[0], [1], [2], [3], [4]]


def test_the_order_of_one_seed_never_changes():
    """A resumed run takes up this order: whoever changes these numbers must raise PLAN_VERSION."""
    lengths = np.array([5, 3, 3, 3, 3, 7, 1, 1, 2, 8])
    golden = {
        (1, 0): [[9], [4, 6], [5, 7], [8, 2, 1], [3, 0]],
        (1, 1): [[7, 1], [9], [5, 6], [3, 0], [8, 2, 4]],
        (2, 0): [[8, 3, 4], [9], [1, 0], [2, 7], [6, 5]],
    }
    for (seed, epoch), rows in golden.items():
        assert rows_of(plan_epoch(lengths, 8, seed, epoch)) == rows


def test_each_seed_and_epoch_has_its_own_order():
    lengths = np.random.default_rng(0).integers(1, 9, 200)
    plans = [plan_epoch(lengths, 16, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    # Other companions in a row, not only another order of the same rows.
    companies = [{frozenset(row) for row in rows_of(plan)} for plan in plans]
    for i, company in enumerate(companies):
        for other in companies[i + 1 :]:
            assert len(company & other) < 10
    again = plan_epoch(lengths, 16, 1, 1)
    assert np.array_equal(again.example_ids, plans[3].example_ids)
    assert np.array_equal(again.row_offsets, plans[3].row_offsets)


def test_rows_come_in_no_order_of_length():
    """Best fit builds rows from the longest example on; a run must not be trained in that order."""
    lengths = np.random.default_rng(0).integers(1, 65, 5_000)
    plan = plan_epoch(lengths, 64, 0, 0)
    longest = np.maximum.reduceat(lengths[plan.example_ids], plan.row_offsets[:-1])
    assert abs(np.corrcoef(longest, np.arange(plan.num_rows))[0, 1]) < 0.06
    first = lengths[plan.example_ids[plan.row_offsets[:-1]]]
    several = np.diff(plan.row_offsets) > 1
    assert 0.2 < np.mean(first[several] == longest[several]) < 0.8  # nor does the longest come first in its row


def test_long_rows_are_planned_as_short_ones_are():
    """Lengths above 65,535 are held and sorted in another type."""
    lengths = np.array([5, 3, 3, 3, 3, 7, 1, 1, 2, 8])
    short, long = plan_epoch(lengths, 8, 1, 0), plan_epoch(lengths * 10_000, 80_000, 1, 0)
    assert rows_of(short) == rows_of(long)
    assert attention_costs(long, lengths * 10_000).tolist() == (attention_costs(short, lengths) * 10**8).tolist()


def test_a_million_examples_are_planned_in_seconds_and_fill_their_rows():
    lengths = np.clip(np.random.default_rng(0).lognormal(5.1, 0.4, 1_000_000), 40, 2_048).astype(np.int32)
    started = time.process_time()
    tracemalloc.start()
    plan = plan_epoch(lengths, 2_048, 0, 0)
    attention_costs(plan, lengths)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert time.process_time() - started < 3  # 0.4 s on a quiet core
    assert peak_bytes < 40e6
    assert lengths.sum() / (plan.num_rows * 2_048) > 0.986


def test_gsm8k_fills_its_rows(assets):
    """The goal at 2,048 is 98.6%; TRL's best fit reaches 98.67% on ten copies of it."""
    tokenizer = load_tokenizer(str(assets / "tokenizers/llama2"))
    renderer = Renderer(tokenizer, load_template("llama2", tokenizer, {}))
    lengths = []
    for number, line in enumerate((assets / "sft/gsm8k/train.jsonl").read_text().splitlines(), start=1):
        row = json.loads(line)
        chat = (Message("user", row["question"]), Message("assistant", row["answer"]))
        lengths += [len(example) for example in renderer.render(Conversation(chat, Origin("train.jsonl", number)))]
    assert len(lengths) == 7_473
    plan = plan_epoch(np.array(lengths), 2_048, 0, 0)
    assert sum(lengths) / (plan.num_rows * 2_048) > 0.986


def test_the_example_of_balanced_order():
    costs = np.array([6, 8, 1, 2, 3, 7, 5, 4])
    assert costs[balanced_order(costs)].tolist() == [8, 1, 5, 4, 7, 2, 6, 3]


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=65).map(np.array))
@settings(deadline=None, max_examples=100)
def test_a_batch_keeps_its_rows(costs):
    assert sorted(balanced_order(costs)) == list(range(len(costs)))


@pytest.mark.parametrize("num_rows", [16, 24, 64, 256])
def test_contiguous_parts_of_a_batch_cost_about_the_same(num_rows):
    rng = np.random.default_rng(0)
    balanced, as_drawn = [], []
    for _ in range(50):
        costs = (rng.lognormal(0, 0.5, num_rows) * 1000).astype(np.int64)
        for parts in (2, 4, 8) if num_rows >= 32 else (2, 4):  # of 4 rows or more: fewer leave nothing to choose
            for found, order in ((balanced, balanced_order(costs)), (as_drawn, np.arange(num_rows))):
                sums = costs[order].reshape(parts, -1).sum(axis=1)
                found.append(sums.max() / sums.mean())
    assert np.mean(balanced) < 1 + 0.4 * (np.mean(as_drawn) - 1)


def example(ids, weights):
    return shift(np.array(ids, np.int32), np.array(weights, np.float32))


def test_assemble_rows_by_hand():
    examples = [example([1, 5, 6, 2], [0, 0, 1, 1]), example([1, 7, 2], [0, 0.5, 1]), example([1, 9], [0, 1])]
    rows = assemble_rows(examples, np.array([0, 1, 2]), [2, 0, 1], 7)
    empty = [0] * 7
    assert rows.inputs.tolist() == [[1, 5, 6, 1, 7, 0, 0], empty, [1, 0, 0, 0, 0, 0, 0]]
    assert rows.targets.tolist() == [[5, 6, 2, 7, 2, 0, 0], empty, [9, 0, 0, 0, 0, 0, 0]]
    assert rows.loss_weights.tolist() == [[0, 1, 1, 0.5, 1, 0, 0], empty, [1, 0, 0, 0, 0, 0, 0]]
    assert rows.segment_ids.tolist() == [[1, 1, 1, 2, 2, 0, 0], empty, [1, 0, 0, 0, 0, 0, 0]]
    assert rows.positions.tolist() == [[0, 1, 2, 0, 1, 0, 0], empty, empty]
    assert rows.source_ids.tolist() == [[0, 0, 0, 1, 1, 0, 0], empty, [2, 0, 0, 0, 0, 0, 0]]
    kinds = {name: array.dtype for name, array in rows._asdict().items()}
    assert kinds.pop("loss_weights") == np.float32
    assert set(kinds.values()) == {np.dtype(np.int32)}


def test_rows_of_no_examples_are_padding():
    rows = assemble_rows([], np.array([], int), [0, 0], 4)
    assert all(array.shape == (2, 4) and not array.any() for array in rows)


def test_a_row_that_overflows_is_our_mistake():
    with pytest.raises(AssertionError):
        assemble_rows([example([1, 2, 3], [0, 1, 1])] * 2, np.zeros(2, int), [2], 3)
