"""Every family beside transformers, on configs drawn at random: the same logits for packed segments as for each segment
alone, the same loss, the same gradients, and the same config and tensors after a trip through ours.

The first few configs of each family are quick; the rest run with the slow ones.
"""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sft_jax.checkpoint.hf import load_pretrained, read_config
from sft_jax.config_schema import LossConfig, MeshConfig
from sft_jax.model.hf_config import read_hf_config, to_hf_config
from sft_jax.model.transformer import forward, output_head
from sft_jax.training.loss import sum_cross_entropy

torch = pytest.importorskip("torch", reason="torch is not installed here; make test-parity installs it")

from packed_step import named_tensors, relative_difference, step_loss_and_grads  # noqa: E402
from random_configs import DRAWN_FAMILIES, draw_config  # noqa: E402
from torch_reference import (  # noqa: E402
    as_stored,
    loss_and_grads,
    loss_of,
    random_model,
    random_packed_batch,
    rebuilt,
    segment_logits,
    segments_of,
)

pytestmark = pytest.mark.parity

NUM_QUICK, NUM_DRAWN = 3, 28
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_QUICK_TO_COMPILE = {"xla_backend_optimization_level": 0}  # each runs once
SEGMENT_LENGTHS = ((40,), (26, 14), (5, 17, 11))  # some of them past random_configs.ORIGINAL_LENGTH
DRAWS = [
    pytest.param(family, seed, marks=[] if seed < NUM_QUICK else pytest.mark.slow)
    for family in DRAWN_FAMILIES
    for seed in range(NUM_DRAWN)
]


@pytest.fixture
def saved(tmp_path: Path):
    """(family, seed) -> the fields, their model, the folder it saved in transformers 5's spelling."""

    def save(family: str, seed: int) -> tuple[dict[str, Any], Any, Path]:
        fields = draw_config(family, seed)
        model = random_model(seed, json.loads(json.dumps(fields)))  # transformers changes what it is given
        model.save_pretrained(tmp_path / "model")
        return fields, model, tmp_path / "model"

    return save


@pytest.mark.parametrize(("family", "seed"), DRAWS)
def test_packed_logits_and_loss_equal_those_of_each_segment_alone(
    saved, record_property, family: str, seed: int
) -> None:
    fields, model, folder = saved(family, seed)
    config, _ = read_config(folder)
    params = load_pretrained(folder, config, None, "float32")
    assert_the_trip_changes_nothing(fields, model, config, params)

    batch = random_packed_batch(seed, fields["vocab_size"], SEGMENT_LENGTHS)
    logits, loss = logits_and_loss(params, config, batch)
    with torch.no_grad():
        pairs = [(logits[here], segment_logits(model, batch, here)) for here in segments_of(batch)]
    scale = float(torch.cat([theirs for _, theirs in pairs]).std())
    assert 0.2 < scale < 4  # about unit scale
    worst = max(np.abs(ours - theirs.numpy()).max() for ours, theirs in pairs) / min(1, scale)
    record_property("logit_difference", worst)
    assert worst <= 2e-4
    again = rebuilt(model, to_hf_config(config, "float32") | {name: fields[name] for name in _TOKEN_IDS})
    *_, last = segments_of(batch)
    assert torch.equal(segment_logits(again, batch, last), pairs[-1][1])  # what we export means the same there
    expected = loss_of([theirs for _, theirs in pairs], batch)
    record_property("loss_difference", abs(loss - expected) / expected)
    assert loss == pytest.approx(expected, rel=1e-6)


def logits_and_loss(params: Any, config: Any, batch: dict[str, np.ndarray]) -> tuple[np.ndarray, float]:
    def run(params: Any, batch: dict[str, Any]) -> tuple[Any, Any]:
        rows = {name: batch[name] for name in ("inputs", "positions", "segment_ids")}
        hidden = forward(params, config, **rows, compute_dtype=jnp.float32, remat="none", attention="reference")
        head = output_head(params)
        sums = sum_cross_entropy(
            hidden, head, batch["targets"], batch["loss_weights"], LossConfig(), logit_shape=config.logit_shape
        )
        logits = config.logit_shape.apply(jnp.einsum("bld,vd->blv", hidden, head))
        return logits, sums.loss_sum / sums.weight_sum

    logits, loss = jax.jit(run, compiler_options=_QUICK_TO_COMPILE)(params, batch)
    return np.asarray(logits), float(loss)


def assert_the_trip_changes_nothing(fields: dict[str, Any], model: Any, config: Any, params: Any) -> None:
    assert read_hf_config(fields, "config.json") == config  # both spellings say the same
    assert read_hf_config(to_hf_config(config, "float32"), "config.json") == config
    expected = as_stored(model, model.state_dict())
    if "head.kernel" not in params:
        del expected["lm_head.weight"]
    ours = named_tensors({path: np.asarray(values) for path, values in params.items()}, config)
    assert ours.keys() == expected.keys()
    assert all(np.array_equal(ours[name], values) for name, values in expected.items())


@pytest.mark.parametrize(("family", "seed"), [(family, NUM_DRAWN) for family in DRAWN_FAMILIES])
def test_gradients_of_a_packed_batch_are_equal(saved, record_property, family: str, seed: int) -> None:
    fields, model, folder = saved(family, seed)
    batch = random_packed_batch(seed, fields["vocab_size"], SEGMENT_LENGTHS)
    loss, grads = loss_and_grads(model, batch)
    our_loss, our_grads = step_loss_and_grads(folder, batch, MeshConfig(), num_devices=1)
    assert our_loss == pytest.approx(loss, rel=1e-6)
    difference = relative_difference(our_grads, grads)
    record_property("gradient_difference", difference)
    assert difference <= 1e-5
