"""A config and a topology -> the compiled train step, or how much memory it lacks. Nothing is loaded or allocated."""

import dataclasses
import math
import re
import time

import jax
from jax.sharding import Mesh

from sft_jax.config_schema import Config
from sft_jax.datatypes import ConfigError
from sft_jax.experiment import jit_train_step, read_model_config
from sft_jax.model.families import TransformerConfig
from sft_jax.placed_model import ModelOnMesh
from sft_jax.planning.topology import Topology, open_devices
from sft_jax.sharding import abstract_batch, build_mesh, check_batch_divides


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """The step that `sft_jax.main` would run there. `compiled` is None where the compiler found too little memory, and
    then `needed_bytes` is what it asked for."""

    placed: ModelOnMesh
    compiled: jax.stages.Compiled | None
    compile_seconds: float
    """Of tracing, lowering and compiling."""
    needed_bytes: int = 0
    compiler_says: str = ""

    @property
    def mesh(self) -> Mesh:
        assert isinstance(self.placed.mesh, Mesh)
        return self.placed.mesh


def compile_step(config: Config, topology: Topology) -> CompiledStep:
    """
    Raises:
      ConfigError: the model, the batch or the mesh does not suit the topology, or a kernel cannot do what is asked.
    """
    model = planned_model(config)
    mesh = build_mesh(config.mesh, open_devices(topology))
    check_batch_divides(config, mesh)
    placed = ModelOnMesh(config, model, mesh)
    start = time.monotonic()
    frozen = {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed.shardings[path])
        for path, leaf in placed.leaves[1].items()
    }
    batch = abstract_batch(mesh, config.batch.batch_size, config.data.max_seq_len)
    num_steps = config.schedule.num_steps or 1000  # it shapes the learning rate and nothing of the program
    lowered = jit_train_step(placed, num_steps, len(config.data.train)).lower(placed.abstract_state, frozen, batch)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        needed = needed_hbm_bytes(str(error))
        if needed is None:
            raise ConfigError(
                f"--topology={topology.name}: the compiler refuses the step: {str(error)[:2000]}. Change what it "
                "names, or set config.model.attention='reference' where it is a kernel."
            ) from error
        return CompiledStep(placed, None, time.monotonic() - start, needed, str(error))
    return CompiledStep(placed, compiled, time.monotonic() - start)


def planned_model(config: Config) -> TransformerConfig:
    """The architecture, for which the preset's folder need not be here."""
    if config.lora.init_from or not config.model.preset:
        return read_model_config(config)
    return read_model_config(dataclasses.replace(config, model=dataclasses.replace(config.model, path="")))


def needed_hbm_bytes(message: str) -> int | None:
    """What the compiler asked for, by its message; None where it complains of something else."""
    for pattern in (  # of two versions of libtpu
        r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm",
        r"\(([\d.]+)([KMGT])\) exceeds available HBM",
    ):
        match = re.search(pattern, message)
        if match and "RESOURCE_EXHAUSTED" in message:
            return int(float(match[1]) * 1024 ** ("KMGT".index(match[2]) + 1))
    return None


def shard_bytes(tree: object) -> int:
    """What one device holds of arrays or abstract arrays with shardings."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)
