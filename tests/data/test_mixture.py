"""How often each source is seen, that every example gets its turn, and that nothing held out is trained on."""

import json
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from word_renderer import WordRenderer, make_config

from sft_jax.config_schema import SourceConfig
from sft_jax.data.mixture import Mixture, passes_per_epoch
from sft_jax.data.pipeline import open_dataset
from sft_jax.datatypes import ConfigError, DataError


def make(sizes, passes, seed=0):
    starts = np.cumsum([0, *sizes])
    examples = [start + np.arange(size) for start, size in zip(starts[:-1], sizes, strict=True)]
    return Mixture(examples, [Fraction(str(share)) for share in passes], seed)


# --- The examples of an epoch -----------------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.integers(10, 40), st.sampled_from([0.1, 0.25, 0.3, 0.5, 1, 1.5, 2, 2.75])), min_size=1),
    st.integers(0, 5),
)
@settings(deadline=None, max_examples=60)
def test_every_example_gets_its_turn(sources, seed):
    """Over twenty epochs every example of a source is seen equally often, and over any stretch nearly so."""
    sizes, passes = zip(*sources, strict=True)
    mixture = make(sizes, passes, seed)
    seen = np.zeros(sum(sizes), int)
    starts = np.cumsum([0, *sizes])
    for epoch in range(20):
        ids = mixture.epoch(epoch)
        np.add.at(seen, ids, 1)
        for source, (start, size) in enumerate(zip(starts[:-1], sizes, strict=True)):
            counts = seen[start : start + size]
            assert counts.max() - counts.min() <= 1
            taken = np.sum((ids >= start) & (ids < start + size))
            assert taken == mixture.count(source, epoch)
            assert abs(taken - size * passes[source]) < 1
    for start, size, share in zip(starts[:-1], sizes, passes, strict=True):
        assert set(seen[start : start + size]) == {round(20 * share)}


def test_whole_passes_hold_every_example_so_often():
    mixture = make([3, 2], [1, 2])
    assert mixture.is_constant
    assert mixture.epoch(0).tolist() == mixture.epoch(7).tolist() == [0, 1, 2, 3, 4, 3, 4]


def test_an_epoch_takes_up_where_the_one_before_left_off():
    """Without a seed in the order of the ids."""
    mixture = make([5], [0.4], seed=None)
    assert [mixture.epoch(epoch).tolist() for epoch in range(5)] == [[0, 1], [2, 3], [4, 0], [1, 2], [3, 4]]
    assert not mixture.is_constant


def test_the_draw_of_one_seed_never_changes():
    """A resumed run takes it up: whoever changes these numbers must raise MIXTURE_VERSION."""
    mixture = make([7, 5], [0.5, 1.2], seed=3)
    assert [mixture.epoch(epoch).tolist() for epoch in range(4)] == [
        [1, 3, 6, 7, 8, 9, 10, 11, 8],
        [0, 2, 4, 5, 7, 9, 10, 11, 7, 11],
        [0, 2, 6, 8, 9, 10, 8, 10, 11],
        [1, 3, 4, 5, 7, 9, 7, 8, 9, 11],
    ]


def test_each_seed_and_source_and_pass_has_its_own_draw():
    draws = [make([40, 40], [0.5, 0.5], seed).epoch(epoch) for seed in (0, 1) for epoch in (0, 2)]
    halves = {tuple(draw[:20]) for draw in draws} | {tuple(draw[20:] - 40) for draw in draws}
    assert len(halves) == 8


# --- Weights ----------------------------------------------------------------------------------------------------------


def passes(sizes, **options):
    sources = [
        SourceConfig(path="x", **{name: values[i] for name, values in options.items()}) for i in range(len(sizes))
    ]
    return passes_per_epoch(sources, sizes, [f"config.data.train[{i}]" for i in range(len(sizes))])


def test_weights_are_shares_of_an_epochs_examples():
    assert passes([100, 900], weight=[1.0, 3.0]) == [1, Fraction(1, 3)]
    assert passes([100, 900], weight=[0.1, 0.3]) == [1, Fraction(1, 3)]  # exactly, whatever the floats
    assert passes([100, 900], weight=[1.0, 100.0]) == [Fraction(9, 100), 1]
    assert passes([7, 7, 7], weight=[2.0, 2.0, 2.0]) == [1, 1, 1]


def test_a_share_of_nothing_is_refused():
    with pytest.raises(
        ConfigError, match=r"config\.data\.train\[1\]\.epochs: is 0\.1, which of its 5 examples takes 0"
    ):
        passes([5, 5], epochs=[1.0, 0.1])
    with pytest.raises(ConfigError, match=r"config\.data\.train\[0\]\.weight: is 0\.001, which of its 5 examples"):
        passes([5, 5], weight=[0.001, 1.0])


# --- A mixture that is trained on -------------------------------------------------------------------------------------


def write(tmp_path, name, rows):
    path = tmp_path / name
    path.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in rows))
    return str(path)


@pytest.fixture
def paths(tmp_path):
    """24 rows and 6 rows, of lengths that differ from half to half."""
    long = write(tmp_path, "long.jsonl", [("1 " * (i % 7 + 1), f"{i}") for i in range(24)])
    return long, write(tmp_path, "short.jsonl", [("2", f"{i}") for i in range(6)])


def open_data(tmp_path, sources, num_epochs=2, batch_size=2, held_out=(), num_steps=None, **options):
    config = make_config(tmp_path, train=tuple(sources), eval=tuple(held_out), **options)
    return open_dataset(
        config.data.train,
        config,
        WordRenderer(),
        batch_size=batch_size,
        num_epochs=None if num_steps else num_epochs,
        num_steps=num_steps,
        shuffle=True,
        held_out=config.data.eval,
    )


def lines_seen(data, path):
    seen = [origin for batch in data.iterate() for row in batch.origins for origin in row]
    return Counter(origin.line for origin in seen if origin.path == path)


@pytest.mark.parametrize("packing", ["best_fit", "none"])
def test_epochs_of_a_source(tmp_path, paths, packing):
    sources = [SourceConfig(path=paths[0], epochs=0.5), SourceConfig(path=paths[1], epochs=2.0)]
    data = open_data(tmp_path, sources, packing=packing)
    assert lines_seen(data, paths[0]) == dict.fromkeys(range(1, 25), 1)
    assert lines_seen(data, paths[1]) == dict.fromkeys(range(1, 7), 4)
    assert set(lines_seen(open_data(tmp_path, sources, num_epochs=1, packing=packing), paths[0]).values()) == {1}
    report = data.report
    assert report["examples_per_epoch"] == 12 + 12
    assert [source["examples_per_epoch"] for source in report["sources"].values()] == [12, 12]
    assert report["num_epochs"] == 2


def test_weights_of_sources(tmp_path, paths):
    data = open_data(tmp_path, [SourceConfig(path=paths[0], weight=2.0), SourceConfig(path=paths[1], weight=1.0)])
    assert lines_seen(data, paths[0]) == dict.fromkeys(range(1, 25), 1)  # 12 an epoch
    assert lines_seen(data, paths[1]) == dict.fromkeys(range(1, 7), 2)


def test_epochs_of_different_numbers_of_rows(tmp_path, paths):
    """Lengths differ between the halves of a source, hence rows between epochs: every row is served all the same."""
    sources = [SourceConfig(path=paths[0], epochs=0.3)]
    data = open_data(tmp_path, sources, num_epochs=10, batch_size=1)
    per_epoch = np.diff(data._row_starts)
    assert len(set(per_epoch)) > 1, "the lengths should differ"
    assert data.num_steps == per_epoch.sum()
    assert data.steps_per_epoch == pytest.approx(data.num_steps / 10)
    assert lines_seen(data, paths[0]) == dict.fromkeys(range(1, 25), 3)
    assert all(batch.origins[0] for batch in data.iterate())  # no padding
    by_steps = open_data(tmp_path, sources, num_steps=data.num_steps - 1, batch_size=1)
    whole = [batch.origins for batch in data.iterate()]
    assert [batch.origins for batch in by_steps.iterate()] == whole[:-1]
    assert [next(data.iterate(step)).origins for step in range(data.num_steps)] == whole


def test_loss_weight_multiplies_the_weights_of_a_source(tmp_path, paths):
    plain = open_data(tmp_path, [SourceConfig(path=path) for path in paths])
    sources = [SourceConfig(path=paths[0], loss_weight=0.25), SourceConfig(path=paths[1], loss_weight=3.0)]
    for batch, other in zip(plain.iterate(), open_data(tmp_path, sources).iterate(), strict=True):
        factor = np.where(batch.source_ids == 0, 0.25, 3.0)
        np.testing.assert_array_equal(other.loss_weights, batch.loss_weights * factor)
        np.testing.assert_array_equal(other.inputs, batch.inputs)
        assert other.loss_weights.dtype == np.float32


def test_the_report_of_a_split_balances(tmp_path, paths):
    source = SourceConfig(path=paths[0], split="train", held_out_fraction=0.3, max_rows=20)
    report = open_data(tmp_path, [source]).report
    assert report["rows_read"] == report["rows_trained"] + report["rows_not_taken"] == 24
    assert 4 < report["rows_not_taken"] < 20
    assert json.loads(json.dumps(report)) == report


# --- Held out is held out ---------------------------------------------------------------------------------------------


def test_a_held_out_example_that_is_trained_on_is_refused(tmp_path, paths):
    shared = write(tmp_path, "shared.jsonl", [("7 7", "7"), ("2", "3"), ("2", "5"), ("8", "8")])
    other = write(tmp_path, "other.jsonl", [("1 1 1", "2")])
    train = [SourceConfig(path=path) for path in paths]
    held_out = [SourceConfig(path=path) for path in (shared, other, write(tmp_path, "apart.jsonl", [("9", "9")]))]
    with pytest.raises(DataError) as raised:
        open_data(tmp_path, train, held_out=held_out)
    assert str(raised.value) == (
        f"config.data.eval[0].path: 2 of the 4 held-out examples of {shared} are also trained on:\n"
        f"  {shared}:2 is {paths[1]}:4\n"
        f"  {shared}:3 is {paths[1]}:6\n"
        f"config.data.eval[1].path: 1 of the 1 held-out examples of {other} are also trained on:\n"
        f"  {other}:1 is {paths[0]}:3\n"
        "Take them out of one of the two, or set config.data.eval_overlap = 'drop', which takes them out of training, "
        "or 'keep'."
    )
    kept = open_data(tmp_path, train, held_out=held_out, eval_overlap="keep")
    assert kept.report["examples_held_out"] == 0
    assert lines_seen(kept, paths[1]) == dict.fromkeys(range(1, 7), 2)
    dropped = open_data(tmp_path, train, held_out=held_out, eval_overlap="drop")
    assert lines_seen(dropped, paths[1]) == dict.fromkeys([1, 2, 3, 5], 2)
    assert lines_seen(dropped, paths[0]) == dict.fromkeys([1, 2, *range(4, 25)], 2)
    report = dropped.report
    assert [source["examples_held_out"] for source in report["sources"].values()] == [1, 2]
    assert report["examples"] == report["examples_held_out"] + report["examples_per_epoch"] == 30
    changed = [name for name, value in kept.fingerprint_fields.items() if dropped.fingerprint_fields[name] != value]
    assert changed == ["config.data.eval_overlap"]


def test_a_source_that_is_all_held_out(tmp_path, paths):
    train = [SourceConfig(path=paths[0])]
    held_out = [SourceConfig(path=write(tmp_path, "copy.jsonl", [("1 " * (i % 7 + 1), f"{i}") for i in range(24)]))]
    with pytest.raises(DataError, match=r"config\.data\.train\[0\]\.path: all examples of .* are held out too"):
        open_data(tmp_path, train, held_out=held_out, eval_overlap="drop")


def test_the_two_sides_of_a_split_do_not_overlap(tmp_path, paths):
    train, held_out = (
        SourceConfig(path=paths[0], split=split, held_out_fraction=0.3, name=split) for split in ("train", "held_out")
    )
    data = open_data(tmp_path, [train], held_out=[held_out])
    evaluated = open_data(tmp_path, [held_out])
    assert sorted([*lines_seen(data, paths[0]), *lines_seen(evaluated, paths[0])]) == list(range(1, 25))
