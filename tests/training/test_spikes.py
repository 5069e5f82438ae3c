"""What a jump is does not depend on jumps, nor on what is not finite; and a resumed run decides alike."""

import dataclasses
import json
import math

import pytest

from sft_jax.config_schema import SpikeConfig
from sft_jax.training.spikes import SpikeWatch

CONFIG = SpikeConfig(window=8, threshold=10.0)


def records(*losses):
    return [{"loss": loss, "grad_norm": 1.0 + loss / 10} for loss in losses]


def watched(config=CONFIG, state=None):
    watch = SpikeWatch(config, state)
    for record in records(2.0, 2.1, 1.9, 2.0, 2.2, 1.8, 2.0, 2.1):
        assert watch.add(record) == {}
    return watch


@pytest.mark.parametrize("between", [[], [math.nan] * 8, [1e30, math.inf, 1e30]])
def test_a_jump_is_a_jump_whatever_was_before_it(between):
    watch = watched()
    for record in records(*between):
        assert bool(watch.add(record)) == math.isfinite(record["loss"])
    assert watch.add(records(2.0)[0]) == {}
    assert watch.add(records(4.0)[0]).keys() == {"spike/loss", "spike/grad_norm"}


def test_a_jump_is_measured_from_the_median_by_the_median_distance():
    found = watched().add({"loss": 4.0, "grad_norm": 1.2})
    assert found == {"spike/loss": pytest.approx((4.0 - 2.0) / (1.4826 * 0.1))}
    assert watched(dataclasses.replace(CONFIG, threshold=14.0)).add({"loss": 4.0, "grad_norm": 1.2}) == {}


def test_a_new_level_becomes_the_usual_one():
    watch = watched()
    assert [bool(watch.add(record)) for record in records(*[9.0] * 8)] == [True] * 4 + [False] * 4


def test_without_a_window_nothing_jumps():
    assert watched(SpikeConfig(window=0)).add(records(1e30)[0]) == {}


def test_it_is_the_same_after_a_resume():
    watch = watched()
    watch.skipped.add(7)
    again = SpikeWatch(CONFIG, json.loads(json.dumps(watch.to_json())))
    assert again.skipped == {7}
    assert again.add(records(4.0)[0]) == watch.add(records(4.0)[0]) != {}


def test_a_run_goes_back_so_often_and_no_more():
    watch = SpikeWatch(SpikeConfig(rewind=True, max_rewinds=2))
    assert watch.may_rewind
    watch.skipped |= {3, 5}
    assert not watch.may_rewind
    assert not SpikeWatch(SpikeConfig()).may_rewind
