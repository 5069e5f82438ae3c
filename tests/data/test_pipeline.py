"""Any batch of a run by its number: the same for every start, number of processes and number of threads."""

import json
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from word_renderer import WordRenderer, make_config

from sft_jax.config_schema import SourceConfig
from sft_jax.data.pipeline import open_dataset
from sft_jax.data.rendering import Renderer
from sft_jax.data.templates import load_template
from sft_jax.data.tokenizer import load_tokenizer
from sft_jax.datatypes import DataError

ARRAYS = ("inputs", "targets", "loss_weights", "segment_ids", "positions", "source_ids")


def write_rows(tmp_path, name, word_counts):
    """A row for each count: so many words, all of them the row's number, as prompt, and one as completion."""
    path = tmp_path / name
    rows = [{"prompt": f"{i} " * count, "completion": f"{i}"} for i, count in enumerate(word_counts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Two files of 30 and 7 rows; examples have 5 to 12 inputs, and rows 16 places."""
    folder = tmp_path_factory.mktemp("sources")
    counts = np.random.default_rng(0).integers(1, 9, 37)
    return write_rows(folder, "a.jsonl", counts[:30]), write_rows(folder, "b.jsonl", counts[30:])


@pytest.fixture(scope="module")
def open_data(sources, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")

    def open_data(batch_size=4, num_epochs=None, num_steps=None, shuffle=True, paths=sources, **options):
        if num_steps is None:
            num_epochs = num_epochs or 2
        config = make_config(folder, *paths, **options)
        return open_dataset(
            config.data.train,
            config,
            WordRenderer(),
            batch_size=batch_size,
            num_epochs=num_epochs,
            num_steps=num_steps,
            shuffle=shuffle,
        )

    return open_data


def assert_equal(batch, other):
    assert (batch.step, batch.origins) == (other.step, other.origins)
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(batch, name), getattr(other, name))


def assert_all_equal(batches, others):
    batches, others = list(batches), list(others)
    assert len(batches) == len(others) > 0
    for batch, other in zip(batches, others, strict=True):
        assert_equal(batch, other)


def origins_of(data):
    return [str(origin) for batch in data.iterate() for row in batch.origins for origin in row]


# --- What a batch holds -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", ["best_fit", "none"])
@pytest.mark.parametrize("shuffle", [True, False])
def test_every_example_is_seen_once_an_epoch(open_data, sources, packing, shuffle):
    seen = Counter(origins_of(open_data(num_epochs=3, packing=packing, shuffle=shuffle)))
    expected = [f"{sources[0]}:{line}" for line in range(1, 31)] + [f"{sources[1]}:{line}" for line in range(1, 8)]
    assert seen == dict.fromkeys(expected, 3)


def test_rows_hold_whole_examples_and_say_where_they_came_from(open_data, sources):
    data = open_data(batch_size=4, num_epochs=1)
    for batch in data.iterate():
        assert all(getattr(batch, name).shape == (4, 16) for name in ARRAYS)
        for row in range(4):
            fields = {name: getattr(batch, name)[row] for name in ARRAYS}
            padding = fields["segment_ids"] == 0
            assert not any(fields[name][padding].any() for name in ARRAYS)
            for segment, origin in enumerate(batch.origins[row], start=1):
                inputs, targets, weights, _, positions, source_ids = (
                    fields[name][fields["segment_ids"] == segment] for name in ARRAYS
                )
                assert positions.tolist() == list(range(len(inputs)))
                assert set(source_ids) == {[str(path) for path in sources].index(origin.path)}
                # 1 [user] words [assistant] word 2: the example of the line that the origin names, and no other.
                words = inputs[2:-2].tolist()
                assert set(words) == {10 + origin.line - 1}
                assert inputs.tolist() == [1, 5, *words, 6, words[0]]
                assert targets.tolist() == [5, *words, 6, words[0], 2]
                assert weights.tolist() == [0.0] * (len(inputs) - 2) + [1.0, 1.0]
            assert fields["segment_ids"].max(initial=0) == len(batch.origins[row])


def test_the_last_batch_is_filled_up_with_padding(open_data):
    data = open_data(batch_size=7, num_epochs=1)
    rows = data.report["rows_per_epoch"]
    assert rows % 7, "the sources should leave a rest"
    assert data.num_steps == -(-rows // 7)
    assert data.num_rows == 7 * data.num_steps
    assert data.report["padding_rows"] == data.num_rows - rows
    *_, last = data.iterate()
    empty = [not origins for origins in last.origins]
    assert sum(empty) == data.num_rows - rows
    assert not last.loss_weights[empty].any()


def test_batches_straddle_the_border_of_epochs(open_data):
    data = open_data(batch_size=7, num_epochs=3)
    per_epoch = data.report["rows_per_epoch"]
    assert data.num_steps == -(-3 * per_epoch // 7) < 3 * -(-per_epoch // 7)
    assert data.steps_per_epoch == per_epoch / 7
    *all_but_last, _ = data.iterate()
    assert all(origins for batch in all_but_last for origins in batch.origins)


def test_steps_take_as_many_epochs_as_they_need(open_data):
    one = open_data(batch_size=4, num_epochs=1)
    data = open_data(batch_size=4, num_steps=2 * one.num_steps + 1)
    assert (data.num_steps, data.report["padding_rows"]) == (2 * one.num_steps + 1, 0)
    assert len(list(data.iterate())) == data.num_steps
    assert_all_equal(open_data(batch_size=4, num_steps=3).iterate(), list(data.iterate())[:3])


def test_a_batch_may_hold_many_epochs_of_little_data(open_data, tmp_path):
    path = write_rows(tmp_path, "few.jsonl", [8, 8, 8])
    data = open_data(batch_size=8, num_epochs=5, paths=[path])
    assert data.num_steps == 2
    assert set(Counter(origins_of(data)).values()) == {5}


def test_each_epoch_and_each_seed_has_its_own_order_and_evaluation_has_one(open_data):
    def epochs(**options):
        origins = origins_of(open_data(batch_size=1, num_epochs=2, packing="none", **options))
        return origins[:37], origins[37:]

    first, second = epochs(seed=0)
    assert first != second
    assert epochs(seed=0) == (first, second)
    assert epochs(seed=1)[0] not in (first, second)
    in_order, again = epochs(shuffle=False)
    assert in_order == again == sorted(in_order, key=lambda origin: (origin.split(":")[0], int(origin.split(":")[1])))


def test_longest_rows_first_and_a_limit_on_segments(open_data):
    def costs_of(batch):
        return [
            sum(int((row == segment).sum()) ** 2 for segment in range(1, row.max() + 1)) for row in batch.segment_ids
        ]

    data = open_data(batch_size=4, num_epochs=1, row_order="longest_first")
    costs = [cost for batch in data.iterate() for cost in sorted(costs_of(batch), reverse=True)]
    assert costs == sorted(costs, reverse=True)
    assert set(Counter(origins_of(data)).values()) == {1}
    single = open_data(batch_size=4, num_epochs=1, max_segments_per_row=1)
    assert single.report["rows_per_epoch"] == 37 > data.report["rows_per_epoch"]
    assert max(batch.segment_ids.max() for batch in single.iterate()) == 1


def test_contiguous_parts_of_batches_cost_about_the_same(open_data, tmp_path):
    """Attention cost is the sum of length^2: without an order, the half with the longer examples would wait."""
    counts = np.random.default_rng(0).choice([1, 1, 1, 9], 400)
    data = open_data(batch_size=16, num_epochs=1, paths=[write_rows(tmp_path, "uneven.jsonl", counts)], packing="none")
    *batches, _ = data.iterate()
    for batch in batches:
        costs = (batch.segment_ids > 0).sum(axis=1) ** 2
        for parts in (2, 4):
            sums = costs.reshape(parts, -1).sum(axis=1)
            assert sums.max() - sums.min() <= costs.max() - costs.min()


# --- Position is a number ---------------------------------------------------------------------------------------------


def test_a_run_resumes_at_any_step(open_data):
    uninterrupted = list(open_data(num_epochs=2).iterate())
    for start in range(len(uninterrupted)):
        assert_all_equal(open_data(num_epochs=2).iterate(start), uninterrupted[start:])  # a new process would do this
    assert list(open_data(num_epochs=2).iterate(len(uninterrupted))) == []


@pytest.mark.parametrize("process_count", [1, 2, 4])
def test_processes_share_out_the_rows_of_every_batch(open_data, process_count):
    data = open_data(batch_size=4)
    share = 4 // process_count
    parts = [data.iterate(rows=range(i * share, (i + 1) * share)) for i in range(process_count)]
    for whole, *shares in zip(data.iterate(), *parts, strict=True):
        assert {share.step for share in shares} == {whole.step}
        assert tuple(row for share in shares for row in share.origins) == whole.origins
        for name in ARRAYS:
            np.testing.assert_array_equal(np.concatenate([getattr(s, name) for s in shares]), getattr(whole, name))


def test_threads_change_nothing(open_data):
    assert_all_equal(open_data(read_threads=4).iterate(), open_data(read_threads=0).iterate())


def test_row_is_what_the_step_receives(open_data):
    data = open_data(batch_size=4)
    rows = [(batch, i) for batch in data.iterate() for i in range(4)]
    assert len(rows) == data.num_rows
    for index in (0, 1, 6, data.num_rows - 1):
        batch, i = rows[index]
        row = data.row(index)
        assert row.origins == batch.origins[i]
        for name in ARRAYS:
            np.testing.assert_array_equal(getattr(row, name), getattr(batch, name)[i])


@given(st.integers(1, 9), st.integers(0, 40), st.sampled_from([1, 3]))
@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_batch_is_a_function_of_its_number(open_data, batch_size, step, threads):
    far = open_data(batch_size=batch_size, num_steps=step + 2, read_threads=threads)
    near = open_data(batch_size=batch_size, num_steps=step + 1, read_threads=0)
    assert_equal(next(far.iterate(step)), next(near.iterate(step)))


def test_iteration_may_stop_early(open_data):
    """Its threads must end: pytest turns a thread's exception, or a pool that is left open, into an error."""
    batches = open_data(read_threads=2).iterate()
    next(batches)
    batches.close()
    assert list(batches) == []


# --- The fingerprint --------------------------------------------------------------------------------------------------


def test_the_fingerprint_names_what_changed(open_data, sources):
    base = open_data().fingerprint_fields
    assert json.loads(json.dumps(base)) == base  # it is kept in checkpoints

    def changed(**options):
        other = open_data(**options)
        assert (other.fingerprint != open_data().fingerprint) == (other.fingerprint_fields != base)
        found = other.fingerprint_fields
        return {name for name in {**base, **found} if name not in found or found[name] != base.get(name, "none")}

    assert changed() == changed(num_epochs=5) == changed(read_threads=2) == changed(max_bad_fraction=0.5) == set()
    assert changed(seed=1) == changed(shuffle=False) == {"config.run.seed"}
    assert changed(batch_size=8) == {"config.batch.batch_size"}
    assert changed(packing="none") == {"config.data.packing"}
    assert changed(row_order="longest_first") == {"config.data.row_order"}
    assert changed(max_segments_per_row=2) == {"config.data.max_segments_per_row"}
    assert changed(max_seq_len=32) == {"config.data.max_seq_len"}
    assert changed(too_long="drop") == {"config.data.too_long"}
    assert changed(paths=sources[::-1]) == {"config.data.train[0].path", "config.data.train[1].path"}
    fewer = changed(paths=sources[:1])
    assert {name.rpartition(".")[0] for name in fewer} == {"config.data.train[1]"}
    assert "config.data.train[1].path" in fewer
    second = [dict(path=str(path)) for path in sources]
    for option in (dict(epochs=2.0), dict(loss_weight=0.5), dict(max_rows=5), dict(format="prompt_completion")):
        train = tuple(SourceConfig(**source, **(option if i else {})) for i, source in enumerate(second))
        assert changed(train=train) == {f"config.data.train[1].{next(iter(option))}"}


# --- The report -------------------------------------------------------------------------------------------------------


def test_the_report_balances(open_data):
    data = open_data(batch_size=7, num_epochs=2)
    report = data.report
    assert json.loads(json.dumps(report)) == report
    assert report["rows_read"] == report["rows_trained"] + report["rows_bad"] + report["rows_dropped"] == 37
    batches = list(data.iterate())
    filled = sum(int((batch.segment_ids > 0).sum()) for batch in batches)
    supervised = sum(int((batch.loss_weights != 0).sum()) for batch in batches)
    assert filled == 2 * report["tokens"]
    assert supervised == 2 * report["supervised_tokens"]
    assert report["supervised_fraction"] == pytest.approx(supervised / filled)
    assert report["fill_fraction"] == pytest.approx(filled / ((data.num_rows - report["padding_rows"]) * 16))
    assert list(report["sources"]) == list(data.source_names) == ["a", "b"]
    assert sum(source["tokens"] for source in report["sources"].values()) == report["tokens"]


# --- Errors -----------------------------------------------------------------------------------------------------------


def test_a_missing_file_is_named_by_its_config_field(open_data, sources, tmp_path):
    with pytest.raises(DataError, match=r"^config\.data\.train\[1\]\.path: '.*none\.jsonl' is not there\."):
        open_data(paths=[sources[0], tmp_path / "none.jsonl"])
    config = make_config(tmp_path, sources[0], eval=make_config(tmp_path, tmp_path / "none.jsonl").data.train)
    with pytest.raises(DataError, match=r"^config\.data\.eval\[0\]\.path"):
        open_dataset(
            config.data.eval, config, WordRenderer(), batch_size=1, num_epochs=1, num_steps=None, shuffle=False
        )


def test_all_sources_over_the_limit_are_reported_together(open_data, sources, tmp_path):
    bad, empty = tmp_path / "bad.jsonl", tmp_path / "empty.jsonl"
    bad.write_text("broken\n")
    empty.write_text("")
    with pytest.raises(DataError) as raised:
        open_data(paths=[bad, sources[0], empty])
    message = str(raised.value)
    assert f"config.data.train[0].path: 1 of 1 rows of {bad} are bad" in message
    assert f"{bad}:1: JSON is malformed" in message
    assert f"config.data.train[2].path: {empty} has no rows" in message


def test_bad_rows_below_the_limit_are_left_out(open_data, sources, tmp_path):
    path = tmp_path / "one_bad.jsonl"
    path.write_text("broken\n" + sources[1].read_text())
    data = open_data(paths=[path], max_bad_fraction=0.2, num_epochs=1)
    assert sorted(origins_of(data)) == [f"{path}:{line}" for line in range(2, 9)]


def test_no_sources(open_data):
    with pytest.raises(DataError, match="names no source"):
        open_data(paths=[])


# --- What it costs ----------------------------------------------------------------------------------------------------


def test_no_jax_backend_is_started(sources, tmp_path):
    """A data process that starts one would take the accelerator from the training process."""
    program = f"""
import sys
sys.path.insert(0, {__file__.rsplit("/", 1)[0]!r})
from word_renderer import WordRenderer, make_config
from sft_jax.config_schema import SourceConfig
from sft_jax.data.pipeline import open_dataset
from sft_jax.data.rendering import Renderer
config = make_config({str(tmp_path)!r}, {str(sources[0])!r}, read_threads=2)
data = open_dataset(
    config.data.train, config, WordRenderer(), batch_size=2, num_epochs=1, num_steps=None, shuffle=True
)
assert len(list(data.iterate())) == data.num_steps
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized()
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_reading_is_much_faster_than_training(open_data, tmp_path):
    path = tmp_path / "long.jsonl"
    row = {"prompt": "1 " * 150, "completion": "2 " * 100}
    path.write_text((json.dumps(row) + "\n") * 2_000)
    data = open_data(paths=[path], batch_size=16, num_epochs=4, max_seq_len=2_048)
    started = time.process_time()
    tokens = sum(batch.inputs.size for batch in data.iterate())
    assert tokens / (time.process_time() - started) > 1e6  # 10^7 on a quiet core without the type checks of tests


def test_gsm8k_with_the_renderer_of_a_run(assets, tmp_path):
    path = tmp_path / "gsm8k.jsonl"
    rows = [json.loads(line) for line in (assets / "sft/gsm8k/test.jsonl").read_text().splitlines()]
    path.write_text("".join(json.dumps({"prompt": r["question"], "completion": r["answer"]}) + "\n" for r in rows))
    tokenizer = load_tokenizer(str(assets / "tokenizers/llama2"))
    renderer = Renderer(tokenizer, load_template("llama2", tokenizer, {}))
    config = make_config(tmp_path, path, max_seq_len=2_048)
    data = open_dataset(config.data.train, config, renderer, batch_size=8, num_epochs=1, num_steps=None, shuffle=True)
    assert data.report["rows_trained"] == data.report["examples"] == len(rows)
    assert data.report["fill_fraction"] > 0.98  # an epoch has few rows here: its last one weighs
    row = data.row(0)
    for segment, origin in enumerate(row.origins, start=1):
        supervised = row.targets[(row.segment_ids == segment) & (row.loss_weights > 0)].tolist()
        assert supervised[-1] in renderer.stop_ids
        assert tokenizer.decode(supervised[:-1]).strip() == rows[origin.line - 1]["answer"].strip()
