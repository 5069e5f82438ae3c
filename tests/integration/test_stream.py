"""The stream of rows is one sequence: whoever takes it up, at any step, on any number of hosts and threads, goes on
exactly where it was. With a golden, so that no dependency changes it unnoticed."""

import itertools
import json

import numpy as np
import pytest

from sft_jax.config_schema import BatchConfig, Config, DataConfig, RunConfig, SourceConfig
from sft_jax.data.pipeline import open_dataset
from sft_jax.data.rendering import open_renderer
from sft_jax.testbed.make import BASE_MODEL

BATCH_SIZE = 4
SOURCES = [dict(epochs=1.0), dict(epochs=0.5, loss_weight=0.5), dict(epochs=2.0, split="train", held_out_fraction=0.3)]
ARRAYS = ("inputs", "targets", "loss_weights", "segment_ids", "positions", "source_ids")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three files of 24, 11 and 7 chats of 1 to 6 words."""
    folder = tmp_path_factory.mktemp("stream")
    rng = np.random.default_rng(0)
    for name, count in (("a", 24), ("b", 11), ("c", 7)):
        rows = []
        for i in range(count):
            asked, said = (" ".join(["fox"] * size) for size in rng.integers(1, 7, 2))
            rows.append({"prompt": f"{name} {i} {asked}", "completion": said})
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def open_data(folder):
    """As a new process would: nothing is shared but the files and the store."""
    renderers = {}

    def open_data(num_sources, packing="best_fit", read_threads=0, seed=0):
        train = [SourceConfig(path=str(folder / f"{name}.jsonl"), **SOURCES[i]) for i, name in enumerate("abc")]
        data = DataConfig(
            train=tuple(train[:num_sources]),
            tokenizer=str(BASE_MODEL),
            chat_template="chatml",
            new_tokens=("<|im_start|>", "<|im_end|>"),
            max_seq_len=64,
            packing=packing,
            read_threads=read_threads,
            prepare_processes=2,
            store_dir=str(folder / "store"),
        )
        config = Config(run=RunConfig(seed=seed), data=data, batch=BatchConfig(batch_size=BATCH_SIZE))
        if "renderer" not in renderers:
            renderers["renderer"] = open_renderer(data, "")
        options = dict(batch_size=BATCH_SIZE, num_epochs=2, num_steps=None, shuffle=True)
        return open_dataset(data.train, config, renderers["renderer"], **options)

    return open_data


def global_batches(data, start, num_hosts, stop=None):
    """What all hosts see together: (step, origins, the arrays) of each batch from `start` on."""
    share = BATCH_SIZE // num_hosts
    hosts = [data.iterate(start, range(host * share, (host + 1) * share)) for host in range(num_hosts)]
    batches = []
    for shares in itertools.islice(zip(*hosts, strict=True), None if stop is None else stop - start):
        assert len({share.step for share in shares}) == 1
        arrays = [np.concatenate([getattr(share, name) for share in shares]) for name in ARRAYS]
        origins = [[str(origin) for origin in row] for share in shares for row in share.origins]
        batches.append((shares[0].step, origins, np.stack([array.astype(np.float64) for array in arrays])))
    for host in hosts:
        host.close()
    return batches


def assert_same(batches, others):
    assert [batch[:2] for batch in batches] == [other[:2] for other in others]
    for (*_, arrays), (*_, expected) in zip(batches, others, strict=True):
        np.testing.assert_array_equal(arrays, expected)


@pytest.mark.parametrize("read_threads", [0, 4])
@pytest.mark.parametrize("num_sources", [1, 2, 3])
@pytest.mark.parametrize("packing", ["best_fit", "none"])
def test_a_resume_at_any_step_equals_no_interruption(open_data, packing, num_sources, read_threads):
    """Also on other hosts, and on others again after some steps more."""
    uninterrupted = global_batches(open_data(num_sources, packing), 0, 1)
    assert [step for step, *_ in uninterrupted] == list(range(len(uninterrupted)))
    assert len(uninterrupted) >= 5
    for step in range(len(uninterrupted) + 1):
        data = open_data(num_sources, packing, read_threads)
        for num_hosts in (1, 2, 4):
            assert_same(global_batches(data, step, num_hosts), uninterrupted[step:])
        change = min(step + 2, len(uninterrupted))
        on_two = global_batches(data, step, 2, stop=change)
        on_four = global_batches(open_data(num_sources, packing, read_threads), change, 4)
        assert_same(on_two + on_four, uninterrupted[step:])


def test_two_epochs_hold_what_the_mixture_says(open_data):
    seen = [o.rpartition("/")[2] for _, rows, _ in global_batches(open_data(3), 0, 1) for row in rows for o in row]
    assert len(set(seen)) == 24 + 11 + 6  # one of the last seven is held out
    counts = {name: [seen.count(o) for o in sorted(set(seen)) if o.startswith(name)] for name in "abc"}
    assert counts == {"a": [2] * 24, "b": [1] * 11, "c": [4] * 6}


GOLDEN = [
    "a24 a16 | a22 a3 | a17 b5 | c2 a2",
    "c3 a8 | a21 c1 | a13 a15 | a18 c2",
    "a10 a6 | a4 | c5 c4 | c4 a12",
]


def test_the_order_of_one_seed_never_changes(open_data):
    """The first steps, row by row. Whoever changes them must raise a version that is in the fingerprint."""
    batches = global_batches(open_data(3, seed=7), 0, 1)[:3]
    found = [
        " | ".join(" ".join(o.rpartition("/")[2].replace(".jsonl:", "") for o in row) for row in rows)
        for _, rows, _ in batches
    ]
    assert found == GOLDEN
