"""A layer -> the same layer, of which the backward pass finds only some activations kept and recomputes the others.

By the names in config.model.remat, of a layer with an input x of [B, L, D]:

    none               nothing is recomputed
    dots               kept: outputs of the projections and the MLP's matmuls; recomputed: attention, norms, products
    attention          kept: x and attention's output; recomputed: everything but attention
    full               kept: x
    offload            kept in the host's memory: x
    offload_attention  kept in the host's memory: x and attention's output

`attention` spares attention's forward pass where the kernel says what its backward pass needs, as splash and the ring
do: the output and a float32 for each query and head. The reference and pallas_gpu are recomputed whatever is kept.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from sft_jax.datatypes import ConfigError
from sft_jax.typing import Array

ATTENTION = "attention"
"""Name of what attention gives and what its backward pass needs beside queries, keys and values."""
_INPUT = "layer_input"


def rematerialized(body: Callable[..., Any], name: str) -> Callable[..., Any]:
    """
    Args:
      body: an activation [B, L, D] and a layer's parameters -> its results.

    Raises:
      ConfigError: for an unknown name.
    """
    policies, offloaded = jax.checkpoint_policies, {"offload": [_INPUT], "offload_attention": [_INPUT, ATTENTION]}
    if name == "none":
        return body
    if name == "full":
        return jax.checkpoint(body, prevent_cse=False)
    if name == "dots":
        return jax.checkpoint(body, policy=policies.dots_with_no_batch_dims_saveable, prevent_cse=False)
    if name == "attention":
        return jax.checkpoint(body, policy=policies.save_only_these_names(ATTENTION), prevent_cse=False)
    if name not in offloaded:
        raise ConfigError(
            f"config.model.remat: is {name!r}; expected none, dots, attention, full, offload or offload_attention."
        )
    policy = policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=offloaded[name],
        offload_src="device",
        offload_dst="pinned_host",
    )

    def named(x: Array, layer: Any) -> Any:
        return body(checkpoint_name(x, _INPUT), layer)

    return jax.checkpoint(named, policy=policy, prevent_cse=False)
