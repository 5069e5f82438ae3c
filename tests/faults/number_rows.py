"""Rows of wrong numbers: each a trial by its number, which says what went wrong, or nothing."""

import dataclasses
import functools
import random
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from faults import flip_copy
from jax.sharding import NamedSharding

from sft_jax.config_schema import (
    BatchConfig,
    Config,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    ScheduleConfig,
    SpikeConfig,
)
from sft_jax.datatypes import MachineError
from sft_jax.model.families import LayerConfig, TransformerConfig, same_layers
from sft_jax.model.param_dims import logical_dims
from sft_jax.model.rope import RopeConfig
from sft_jax.model.transformer import abstract_params
from sft_jax.sharding import Batch, build_mesh, shardings_for, spec_for
from sft_jax.training import step as step_module
from sft_jax.training.optimizer import build_optimizer, build_schedule
from sft_jax.training.replicas import ReplicaCheck
from sft_jax.training.spikes import SpikeWatch
from sft_jax.training.state import TrainState, init_state

MODEL = TransformerConfig(
    vocab_size=48, layers=same_layers(2, LayerConfig(rope=RopeConfig(theta=100.0))), embed_dim=16, mlp_dim=24,
    num_heads=4, num_kv_heads=4, head_dim=4, norm_eps=1e-5, tie_embeddings=True, max_position=64, initializer_range=0.3,
)  # fmt: skip
B, L, PARTS, DEVICES = 16, 16, 2, 8
BAD = (float("nan"), float("inf"), 3e38, float("-inf"))
PLACES = ("loss", "leaf", "rank", "microbatch")


class NumberLab:
    """A step of training on eight devices, into which a number can be put."""

    def __init__(self, scratch: Any = None, seed: int = 0) -> None:
        self.seed = seed

    @functools.cached_property
    def config(self) -> Config:
        return Config(
            model=ModelConfig(preset="testbed", compute_dtype="float32", remat="none"),
            batch=BatchConfig(batch_size=B, grad_accum_steps=PARTS),
            optimizer=OptimizerConfig(learning_rate=1e-2),
            schedule=ScheduleConfig(name="constant", warmup_steps=0),
        )

    @functools.cached_property
    def mesh(self) -> jax.sharding.Mesh:
        return build_mesh(MeshConfig(replica=2, fsdp=4))

    @functools.cached_property
    def state(self) -> TrainState:
        """After a good step, so that no moment is zero."""
        shapes = abstract_params(MODEL, "float32")
        shardings = shardings_for(
            self.mesh, {path: logical_dims(path) for path in shapes}, {p: s.shape for p, s in shapes.items()}
        )
        keys = jax.random.split(jax.random.key(0), len(shapes))
        params = {
            path: jax.device_put(0.3 * jax.random.normal(key, leaf.shape, leaf.dtype), shardings[path])
            for key, (path, leaf) in zip(keys, shapes.items(), strict=True)
        }
        optimizer = build_optimizer(self.config.optimizer, seed=0)
        return self.step(init_state(params, optimizer), self.batch(0), *self.nowhere)[0]

    def batch(self, seed: int) -> Batch:
        rng = np.random.default_rng(seed)
        ids = rng.integers(0, MODEL.vocab_size, (2, B, L), dtype=np.int32)
        ones = np.ones((B, L), np.int32)
        positions = np.broadcast_to(np.arange(L, dtype=np.int32), (B, L))
        batch = Batch(ids[0], ids[1], ones.astype(np.float32), ones, positions, 0 * ones, np.arange(B, dtype=np.int32))
        rows = NamedSharding(self.mesh, spec_for(("batch",)))
        return jax.tree.map(lambda values: jax.device_put(values, rows), batch)

    @functools.cached_property
    def replicas(self) -> ReplicaCheck:
        return ReplicaCheck(self.state, self.mesh)

    @property
    def nowhere(self) -> tuple[Any, Any, Any]:
        return jnp.float32(0), jnp.int32(-1), jnp.int32(-1)

    @functools.cached_property
    def step(self) -> Any:
        """(state, batch, value, leaf, element) -> (state, metrics): leaf -1 is nothing, the number after the last leaf
        the loss."""
        config = self.config
        schedule = build_schedule(config.schedule, config.optimizer.learning_rate, 10)
        step = step_module.make_train_step(
            config, MODEL, build_optimizer(config.optimizer, seed=0), schedule, self.mesh
        )
        inner = step_module._accumulate_grads

        def poisoned(state: TrainState, batch: Batch, value: Any, leaf: Any, element: Any) -> Any:
            def accumulate(*args: Any) -> Any:
                grads, sums = inner(*args)
                for number, (path, grad) in enumerate(grads.items()):
                    flat = grad.reshape(-1)
                    hit = (jnp.arange(flat.size) == element % flat.size) & (leaf == number)
                    grads[path] = jnp.where(hit, value, flat).reshape(grad.shape)
                loss_sum = jnp.where(leaf == len(grads), value, sums.loss_sum)
                return grads, dataclasses.replace(sums, loss_sum=loss_sum)

            with mock.patch.object(step_module, "_accumulate_grads", accumulate):
                return step(state, {}, batch)

        return jax.jit(poisoned)

    def close(self) -> None:
        pass


def bad_step(lab: NumberLab, trial: int) -> str:
    """A bad number in the loss, in one element of one leaf's gradient, in what one device or one microbatch has."""
    rng = random.Random(f"{lab.seed} {trial}")
    place, value = PLACES[trial % 4], BAD[trial // 4 % 4]
    before, batch = lab.state, lab.batch(trial)
    num_leaves = len(before.params)
    leaf, element = -1, rng.randrange(1 << 20)
    if place in ("rank", "microbatch"):
        weights = np.array(batch.loss_weights)
        row = slice(k := rng.randrange(DEVICES) * B // DEVICES, k + B // DEVICES)
        weights[row if place == "rank" else slice(rng.randrange(PARTS), None, PARTS)] = value
        batch = dataclasses.replace(batch, loss_weights=jax.device_put(weights, batch.loss_weights.sharding))
    else:
        leaf = num_leaves if place == "loss" else rng.randrange(num_leaves)
    after, metrics = lab.step(before, batch, jnp.float32(value), jnp.int32(leaf), jnp.int32(element))
    where = f"{value} in {place} (leaf {leaf}): loss {metrics['loss']}, norm {metrics['grad_norm']}"
    if (changes := int(after.num_updates) - int(before.num_updates)) or int(after.num_skipped) != 1:
        return f"{where}: was taken ({changes})"
    old, new = (jax.tree.leaves((state.params, state.opt_state)) for state in (before, after))
    for one, other in zip(old, new, strict=True):
        for mine, theirs in zip(one.addressable_shards, other.addressable_shards, strict=True):
            if np.asarray(mine.data).tobytes() != np.asarray(theirs.data).tobytes():
                return f"{where}: changed {one.shape} on {mine.device}"
    good, _ = lab.step(after, lab.batch(0), *lab.nowhere)
    return "" if int(good.num_updates) == int(before.num_updates) + 1 else f"{where}: the next step was not taken"


def spike(lab: NumberLab, trial: int) -> str:
    """A jump among 200 steps of a falling, noisy loss, and some that are not finite: it is flagged, nothing else is.
    And a gradient of a step that jumps: it is taken, clipped, and the normal one after it is taken and not flagged."""
    rng = np.random.default_rng([lab.seed, trial])
    watch, at = SpikeWatch(SpikeConfig()), int(rng.integers(40, 190))
    bad = set(rng.choice(200, 10, replace=False).tolist()) - {at}
    flagged = {}
    for step in range(200):
        noise = rng.normal(1, 0.05, 2) * (rng.lognormal(0, 0.2, 2))
        record = {"loss": (1 + 6 * np.exp(-step / 50)) * noise[0] ** 0.2, "grad_norm": noise[1]}
        if step == at:
            record[str(rng.choice(["loss", "grad_norm"]))] *= float(rng.choice([30, 1e3, 1e30]))
        if step in bad:
            record[str(rng.choice(["loss", "grad_norm"]))] = float(rng.choice([np.nan, np.inf]))
        if found := watch.add(record):
            flagged[step] = found
    if set(flagged) != {at}:
        return f"flagged {flagged}, and the jump is at {at}"
    watch, state, flagged = SpikeWatch(SpikeConfig(window=8)), lab.state, {}
    leaf, at = int(rng.integers(len(state.params))), int(rng.integers(8, 11))
    for step in range(12):
        where = (jnp.float32(1e12), jnp.int32(leaf), jnp.int32(0)) if step == at else lab.nowhere
        state, metrics = lab.step(state, lab.batch(step), *where)
        if watch.add({name: float(metrics[name]) for name in ("loss", "grad_norm")}):
            flagged[step] = float(metrics["grad_norm"])
        if int(state.num_updates) != int(lab.state.num_updates) + step + 1:
            return f"step {step} was not taken, jump at {at}"
    return "" if set(flagged) == {at} else f"a real step: flagged {flagged}, and the jump is at {at}"


def replica_flip(lab: NumberLab, trial: int) -> str:
    """One bit of one device's copy of some array of the state: found, and laid to that device; and nothing without."""
    rng = random.Random(f"{lab.seed} {trial}")
    leaves, treedef = jax.tree.flatten(lab.state)
    lab.replicas.check(trial, lab.state)
    number = rng.randrange(len(leaves))
    leaf = leaves[number]
    odd = rng.randrange(DEVICES)
    leaves[number] = flip_copy(leaf, odd, rng.randrange(1 << 20), rng.randrange(8))
    device = str(leaf.addressable_shards[odd].device)
    try:
        lab.replicas.check(trial, jax.tree.unflatten(treedef, leaves))
    except MachineError as error:
        return "" if device in str(error) else f"{leaf.shape} on {device}: {error}"
    return f"{leaf.shape} on {device}: not found"


NUMBER_ROWS = {"replica-flip": replica_flip, "bad-step": bad_step, "spike": spike}
