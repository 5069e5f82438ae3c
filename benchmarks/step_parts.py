"""Where a step of W1 goes: its parts compiled and timed alone, as CPU seconds and as shares of the whole step.

W1_DATA=DIR SFT_JAX_ASSETS=DIR python benchmarks/step_parts.py      (W1_DATA as for benchmarks/w1.py)
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from sft_jax.command_line import read_config
from sft_jax.experiment import jit_train_step, open_renderer, open_train_data, place_batches, place_model
from sft_jax.model.transformer import forward
from sft_jax.training.loss import sum_cross_entropy
from sft_jax.training.state import init_state

REPEATS = 3


def measure(function: Callable[..., Any], *args: Any) -> float:
    """Least CPU seconds of a call, compilation left out."""
    jax.block_until_ready(function(*args))
    seconds = []
    for _ in range(REPEATS):
        start = time.process_time()
        jax.block_until_ready(function(*args))
        seconds.append(time.process_time() - start)
    return min(seconds)


def main() -> None:
    config = read_config([f"--config={Path(__file__).parent}/w1.py"])
    renderer = open_renderer(config)
    placed, data = place_model(config, renderer), open_train_data(config, renderer)
    batch = next(place_batches(data, placed.mesh, config.batch.batch_size)(0))
    params, _ = placed.open_params()
    hidden = jnp.ones((*batch.inputs.shape, placed.model.embed_dim))

    def layers(params: Any) -> jax.Array:
        model = config.model
        options: dict[str, Any] = dict(compute_dtype="float32", remat=model.remat, attention=model.attention)
        return jnp.sum(forward(params, placed.model, batch.inputs, batch.positions, batch.segment_ids, **options))

    def head(hidden: Any, table: Any) -> jax.Array:
        return sum_cross_entropy(hidden, table, batch.targets, batch.loss_weights, config.loss, placed.mesh).loss_sum

    parts = {
        "layers, forward and backward": measure(jax.jit(jax.grad(layers)), params),
        "head and loss, forward and backward": measure(
            jax.jit(jax.grad(head, argnums=(0, 1))), hidden, params["embed.embedding"]
        ),
    }
    step, state = jit_train_step(placed, data.num_steps, len(data.source_names)), init_state(params, placed.optimizer)

    def run_step() -> Any:
        nonlocal state
        state, metrics = step(state, {}, batch)
        return metrics

    whole = measure(run_step)
    parts["the rest: optimizer, norms, selection"] = whole - sum(parts.values())
    for name, seconds in (parts | {"whole step": whole}).items():
        print(f"{name:40}{seconds:8.2f} s{seconds / whole:8.0%}")


if __name__ == "__main__":
    main()
