"""Which steps of a run are kept."""

import pytest

from sft_jax.checkpoint.manifest import Manifest
from sft_jax.checkpoint.retention import Retention


def saved(losses):
    return {
        step: Manifest(
            run_id="r", step=step, config_digest="", data_fingerprint="", mesh={}, num_processes=1, best_loss=loss
        )
        for step, loss in losses.items()
    }


@pytest.mark.parametrize(
    ("retention", "kept"),
    [
        (Retention(latest=1), [50]),
        (Retention(latest=2), [40, 50]),
        (Retention(latest=9), [10, 20, 30, 40, 50]),
        (Retention(latest=1, every=20), [20, 40, 50]),
        (Retention(latest=1, best=True), [20, 50]),
        (Retention(latest=1, every=30, best=True), [20, 30, 50]),
    ],
)
def test_what_is_kept(retention, kept):
    steps = saved({10: 3.0, 20: 2.0, 30: None, 40: None, 50: 2.5})
    assert retention.superfluous(steps) == sorted(set(steps) - set(kept))
    assert len(kept) <= retention.most(50)


def test_without_losses_there_is_no_best():
    assert Retention(latest=1, best=True).superfluous(saved({1: None, 2: None})) == [1]
