"""Attention of packed rows by the GPU kernel that comes with jax, in Pallas for Triton: causal, with segments. Queries,
keys and values in, mixed values out, as `attention.reference` gives them. No score matrix exists.

Each device runs the kernel on its own rows and heads, under `shard_map`. The kernel has no grouped heads, so each gets
keys and values of its own; it skips the blocks to the right of a query, and tells segments apart inside the others. On
a CPU it is interpreted: right, and slow.

Source: jax.experimental.pallas.ops.gpu.attention
"""

import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P

from sft_jax.datatypes import ConfigError
from sft_jax.model.attention import Rows, Scores, is_interpreted
from sft_jax.model.remat import ATTENTION
from sft_jax.sharding import BATCH_AXES
from sft_jax.typing import Array, Float

with warnings.catch_warnings():
    # jax 0.12 points to tokamax instead, which would be ten more packages; the kernel is the same as in 0.10.
    warnings.filterwarnings("ignore", "jax.experimental.pallas.ops.gpu.attention is deprecated", DeprecationWarning)
    from jax.experimental.pallas.ops.gpu.attention import mha

NAME = "pallas_gpu"
_BLOCK = 128  # the kernel's own, of queries and of keys
_LARGEST_HEAD = 128


def attend_pallas_gpu(
    q: Float[Array, "B L N H"],
    k: Float[Array, "B L K H"],
    v: Float[Array, "B L K Hv"],
    rows: Rows,
    scores: Scores,
    sinks: Float[Array, " N"] | None,
    mesh: Mesh | AbstractMesh | None,
) -> Float[Array, "B L N Hv"]:
    """Arguments as in `attention.attend`.

    Raises:
      ConfigError: for windows, soft-caps, sinks and split rows, and for sizes, a dtype or a platform that the kernel is
        not made for.
    """
    interpret = is_interpreted(NAME, "gpu", q, mesh)
    _check(q, v, scores, sinks, mesh)
    run = functools.partial(_attend_local, scale=scores.scale, interpret=interpret)
    if mesh is not None:
        heads, tokens = P(BATCH_AXES, None, "tensor", None), P(BATCH_AXES, None)
        # The kernel does not say over which axes its results vary, so that nothing could be checked.
        run = jax.shard_map(run, mesh=mesh, in_specs=(heads, heads, heads, tokens), out_specs=heads, check_vma=False)
    return checkpoint_name(run(q, k, v, rows.segment_ids), ATTENTION)


def _check(q: Array, v: Array, scores: Scores, sinks: Array | None, mesh: Mesh | AbstractMesh | None) -> None:
    """Raises: ConfigError."""
    where = f"config.model.attention: {NAME!r}"
    unknown = {"windows": scores.window, "soft-caps of scores": scores.softcap, "attention sinks": sinks}
    for what, value in unknown.items():
        if value is not None:
            raise ConfigError(f"{where} has no {what}, and this model has. Set 'reference'.")
    length, head_dim, value_dim = q.shape[1], q.shape[3], v.shape[3]
    if head_dim != value_dim:
        raise ConfigError(
            f"{where} has heads of one size, and this model's keys have {head_dim} dims, its values {value_dim}. "
            "Set 'reference'."
        )
    if head_dim % 16 or head_dim > _LARGEST_HEAD:
        raise ConfigError(
            f"{where} has heads of 16 to {_LARGEST_HEAD} dims in steps of 16, and this model's have {head_dim}. "
            "Set 'reference'."
        )
    if mesh is not None and mesh.shape["context"] > 1:
        raise ConfigError(
            f"config.mesh.context: is {mesh.shape['context']}, and config.model.attention {NAME!r} needs whole rows. "
            "Set it to 1, or config.model.attention to 'reference'."
        )
    if length % _BLOCK:
        raise ConfigError(
            f"config.data.max_seq_len: is {length}; config.model.attention {NAME!r} needs a multiple of {_BLOCK}. "
            f"Set {-(-length // _BLOCK) * _BLOCK}."
        )


def _attend_local(q: Any, k: Any, v: Any, segment_ids: Any, scale: float, interpret: bool) -> Any:
    """The rows and heads of one device."""
    k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    out_BLNH = mha(q, k, v, segment_ids, sm_scale=scale, causal=True, interpret=interpret)
    return jnp.where(segment_ids[:, :, None, None] != 0, out_BLNH, 0)  # padding sees padding in there
