"""A folder and a packed batch through our own import and our own step: the loss, and the gradients that it applies."""

from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
import optax

from sft_jax.checkpoint.hf import load_pretrained, read_config
from sft_jax.checkpoint.hf_names import hf_tensors, tensor_rules
from sft_jax.config_schema import BatchConfig, Config, LossConfig, MeshConfig, ModelConfig, OptimizerConfig
from sft_jax.datatypes import HostBatch
from sft_jax.model.families import TransformerConfig
from sft_jax.model.param_dims import logical_dims
from sft_jax.model.transformer import Params
from sft_jax.sharding import build_mesh, place_batch, shardings_for
from sft_jax.training.optimizer import build_optimizer
from sft_jax.training.state import init_state
from sft_jax.training.step import make_train_step

# An update so large that the old parameter vanishes beside it: minus the update is the gradient, to the last bits.
_LEARNING_RATE = 2.0**20


def step_loss_and_grads(
    folder: Path, batch: dict[str, np.ndarray], mesh_config: MeshConfig, num_devices: int, grad_accum_steps: int = 1
) -> tuple[float, dict[str, np.ndarray]]:
    """(loss, gradients under the folder's names) of one step in float32."""
    model, params, trained, loss = train_one_step(
        folder, batch, mesh_config, num_devices, grad_accum_steps, learning_rate=_LEARNING_RATE
    )
    grads = {
        path: (np.asarray(params[path], np.float64) - np.asarray(trained[path])) / _LEARNING_RATE for path in params
    }
    return loss, named_tensors(grads, model)


def train_one_step(
    folder: Path,
    batch: dict[str, np.ndarray],
    mesh_config: MeshConfig,
    num_devices: int,
    grad_accum_steps: int = 1,
    *,
    learning_rate: float,
) -> tuple[TransformerConfig, Params, Params, float]:
    """(config, parameters before and after, loss) of plain gradient descent in float32."""
    config = Config(
        model=ModelConfig(compute_dtype="float32"),
        batch=BatchConfig(batch_size=len(batch["inputs"]), grad_accum_steps=grad_accum_steps),
        loss=LossConfig(chunk_tokens=7),
        optimizer=OptimizerConfig(name="sgd", grad_clip_norm=0.0),
    )
    model, _ = read_config(folder)
    mesh = build_mesh(mesh_config, jax.devices()[:num_devices])
    shapes = {rule.path: rule.shape(model) for rule in tensor_rules(model)}
    shardings = shardings_for(mesh, {path: logical_dims(path) for path in shapes}, shapes)
    params = load_pretrained(folder, model, shardings, "float32")
    optimizer = build_optimizer(config.optimizer, seed=0)
    step = make_train_step(config, model, optimizer, optax.constant_schedule(learning_rate), mesh)
    origins = ((),) * len(batch["inputs"])
    placed = place_batch(HostBatch(step=0, **batch, origins=origins), mesh, config.batch.batch_size)
    state, metrics = jax.jit(step)(init_state(params, optimizer), {}, placed)
    return model, params, state.params, float(metrics["loss"])


def named_tensors(params: Mapping[str, np.ndarray], config: TransformerConfig) -> dict[str, np.ndarray]:
    """By the names of a folder, as an export has them."""
    tensors = {}
    for name, rules, place in hf_tensors(config):
        tensors[name] = np.empty(rules[0].hf_shape(config), params[rules[0].path].dtype)
        for rule in rules:
            rule.from_hf(tensors[name], config)[...] = params[rule.path][place]
    return tensors


def relative_difference(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> float:
    """The largest ||a - b|| / ||b|| of any tensor. Where b is 0 but for rounding, as of an expert that no token chose,
    so must a be."""
    assert ours.keys() == theirs.keys()
    norms = {name: float(np.linalg.norm(values)) for name, values in theirs.items()}
    zero = 1e-6 * max(norms.values())
    assert all(np.linalg.norm(ours[name]) <= zero for name, norm in norms.items() if norm <= zero)
    return max(float(np.linalg.norm(ours[name] - theirs[name])) / norm for name, norm in norms.items() if norm > zero)
