"""Tokens and their experts -> the weighted sum of what the experts make of them. No token is ever dropped.

Each token stands once for each of its experts; the copies are sorted by expert, so that the tokens of one expert lie
together and `jax.lax.ragged_dot` multiplies each stretch with its expert's matrix. Three tokens, experts 2 0, 0 1, 2 1:

    copies    0a 0b 1a 1b 2a 2b        experts   2 0 0 1 2 1
    sorted    0b 1a | 1b 2b | 0a 2a    sizes     2 2 2

On a mesh every device of a batch shard has the same tokens, each part of the `expert` axis some experts, and each part
of `tensor` some of their hidden dims. A device puts copies for experts elsewhere, and padding, behind its last stretch,
where nothing multiplies them; one sum over both axes joins the parts.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from sft_jax.model.families import TransformerConfig
from sft_jax.model.gradient_sums import gather
from sft_jax.model.layers import activate
from sft_jax.model.linear import Linear
from sft_jax.model.moe_config import MoeConfig
from sft_jax.sharding import RULES, spec_for
from sft_jax.typing import Array, Bool, Float, Int, Key

Parts = dict[str, dict[str, Array]]  # by map (gate, up, down) and parameter (kernel, ...)
_ADDED = ("bias", "lora_a", "lora_b")
# gpt-oss's sigmoid is steeper. Source: https://github.com/openai/gpt-oss, gpt_oss/torch/model.py, swiglu
_ALPHA = 1.702


class ExpertLinear(Linear):
    """A linear map for each expert: kernel [E, in, out], and a bias [E, out] if asked."""

    def parts(self, dtype: DTypeLike) -> dict[str, Array]:
        """What multiplies tokens, in `dtype`; a quantized kernel is decoded."""
        held = {name: getattr(self, name)[...].astype(dtype) for name in _ADDED if hasattr(self, name)}
        return held | {"kernel": self.read_kernel(dtype)}


class Experts(nnx.Module):
    """The gated MLPs of all experts, stacked."""

    def __init__(self, config: TransformerConfig, moe: MoeConfig, key: Key[Array, ""], dtype: DTypeLike):
        embed_dim, stddev = config.embed_dim, config.initializer_range
        keys, outer, inner = jax.random.split(key, 3), (embed_dim,), (moe.expert_dim,)
        make = partial(ExpertLinear, stddev=stddev, dtype=dtype, use_bias=moe.expert_bias, stack=(moe.num_experts,))
        self.moe, self.activation = moe, config.activation
        self.gate, self.up = make(outer, inner, key=keys[0]), make(outer, inner, key=keys[1])
        self.down = make(inner, outer, key=keys[2])

    def __call__(
        self,
        x: Float[Array, "B L D"],
        experts: Int[Array, "B L k"],
        weights: Float[Array, "B L k"],
        live: Bool[Array, "B L"],
        mesh: Mesh | AbstractMesh | None,
    ) -> Float[Array, "B L D"]:
        """sum_k weights[k] * expert[experts[k]](x), in the dtype of x; 0 for tokens that are not live."""
        maps = {name: getattr(self, name) for name in _DIMS}
        parts = {name: linear.parts(x.dtype) for name, linear in maps.items()}
        scales = {name: linear.lora_scale for name, linear in maps.items()}
        gate = partial(_gate, activation=self.activation, clamp=self.moe.clamp)
        run = partial(_run_local, gate=gate, lora_scales=scales, mesh=mesh)
        if mesh is None:
            return run(x, experts, weights, live, parts)
        tokens = spec_for(("batch", "seq"))
        specs = {name: {part: spec_for(_DIMS[name][part]) for part in held} for name, held in parts.items()}
        in_specs = (P(*tokens, None), P(*tokens, None), P(*tokens, None), tokens, specs)
        return jax.shard_map(run, mesh=mesh, in_specs=in_specs, out_specs=P(*tokens, None))(
            x, experts, weights, live, parts
        )


def _dims_of(into: str, out: str, bias: str | None) -> dict[str, tuple[str | None, ...]]:
    return {
        "kernel": ("expert", into, out), "lora_a": ("expert", into, "rank"), "lora_b": ("expert", "rank", out),
        "bias": ("expert", bias),
    }  # fmt: skip


# The logical dims of each map's parameters; inside, those of `embed` are gathered and the others stay in parts.
_DIMS: dict[str, dict[str, tuple[str | None, ...]]] = {
    "gate": _dims_of("embed", "mlp", "mlp"),
    "up": _dims_of("embed", "mlp", "mlp"),
    "down": _dims_of("mlp", "embed", None),
}
_JOINED = (*RULES["expert"], *RULES["mlp"])  # each device has a part of the sum


def _run_local(
    x: Any,
    experts: Any,
    weights: Any,
    live: Any,
    parts: Parts,
    gate: Callable[[Array, Array], Array],
    lora_scales: dict[str, float],
    mesh: Mesh | AbstractMesh | None,
) -> Any:
    """The work of one device: its experts, its hidden dims, all tokens of its batch shard."""
    shape, per_token, dtype = x.shape, experts.shape[-1], x.dtype
    axes = {} if mesh is None else dict(mesh.shape)
    if mesh is not None:
        parts = {
            name: {part: _whole(w, _DIMS[name][part], mesh) for part, w in held.items()} for name, held in parts.items()
        }
        x, experts, weights, live = (_vary(value, ("batch", "seq"), axes) for value in (x, experts, weights, live))
        parts = _bias_once(parts)
    num_experts = len(parts["gate"]["kernel"])  # of this device
    first = _index(RULES["expert"], axes) * num_experts
    here = (experts >= first) & (experts < first + num_experts) & live[..., None]
    expert_of_copy = jnp.where(here, experts - first, num_experts).reshape(-1)
    order = jnp.argsort(expert_of_copy, stable=True)
    inverse, sorted_experts = jnp.argsort(order), expert_of_copy[order]
    sizes = jnp.diff(jnp.searchsorted(sorted_experts, jnp.arange(num_experts + 1))).astype(jnp.int32)
    mine = (sorted_experts < num_experts)[:, None]

    def multiply(rows: Array, name: str) -> Array:
        held = parts[name]
        out = jax.lax.ragged_dot(rows, held["kernel"], sizes)
        if "lora_a" in held:
            out += lora_scales[name] * jax.lax.ragged_dot(
                jax.lax.ragged_dot(rows, held["lora_a"], sizes), held["lora_b"], sizes
            )
        return out + held["bias"].at[sorted_experts].get(mode="fill", fill_value=0) if "bias" in held else out

    # Selected on both ends: what a kernel leaves behind the last stretch reaches neither the sum nor a gradient.
    rows = jnp.where(mine, _spread(x.reshape(-1, shape[-1]), order, inverse), 0)
    hidden = gate(multiply(rows, "gate"), multiply(rows, "up"))
    made = jnp.where(mine, multiply(hidden, "down"), 0)
    made_TkD = _permute(made, inverse, order).reshape(-1, per_token, shape[-1])
    out = jnp.einsum("tkd,tk->td", made_TkD, weights.reshape(-1, per_token), preferred_element_type=weights.dtype)
    out = out.astype(dtype).reshape(shape)
    return jax.lax.psum(out, _JOINED) if axes else out


def _gate(gate: Array, up: Array, activation: str, clamp: float | None) -> Array:
    if clamp is None:
        return activate(activation, gate) * up
    gate, up = jnp.minimum(gate, clamp), jnp.clip(up, -clamp, clamp)
    return gate * jax.nn.sigmoid(_ALPHA * gate) * (up + 1)


def _whole(value: Array, dims: tuple[str | None, ...], mesh: Mesh | AbstractMesh) -> Array:
    """Gathered along `embed`. Varied before, so that of the gradient a part alone is summed over the other axes."""
    value = _vary(value, dims, dict(mesh.shape))
    return gather(value, dims.index("embed"), mesh) if "embed" in dims else value


def _vary(value: Array, dims: tuple[str | None, ...], axes: dict[str, int]) -> Array:
    """Marked as different from device to device: its gradient is summed over the axes that split none of its dims."""
    split = {axis for dim in dims for axis in RULES[dim]}
    return jax.lax.pcast(value, tuple(axis for axis in axes if axis not in split), to="varying")


def _bias_once(parts: Parts) -> Parts:
    """Where hidden dims are in parts, only the first adds what is added after them."""
    if "bias" not in parts["down"]:
        return parts
    bias = jnp.where(jax.lax.axis_index(RULES["mlp"]) == 0, parts["down"]["bias"], 0)
    return parts | {"down": parts["down"] | {"bias": bias}}


def _index(names: tuple[str, ...], axes: dict[str, int]) -> Any:
    return jax.lax.axis_index(names) if axes else 0


@jax.custom_vjp
def _permute(rows: Array, order: Array, inverse: Array) -> Array:
    """rows[order]. The gradient is read by the inverse: no scatter, whose sums come in any order on GPUs."""
    return rows[order]


@jax.custom_vjp
def _spread(x: Array, order: Array, inverse: Array) -> Array:
    """Copies of the rows of x [T, D] in order [T * k], copy c being one of row c // k."""
    return x[order // (len(order) // len(x))]


def _permute_fwd(rows: Array, order: Array, inverse: Array) -> tuple[Array, Array]:
    return rows[order], inverse


def _permute_bwd(inverse: Array, grad: Array) -> tuple[Array, None, None]:
    return grad[inverse], None, None


def _spread_fwd(x: Array, order: Array, inverse: Array) -> tuple[Array, tuple[Array, Array]]:
    return _spread(x, order, inverse), (inverse, jnp.zeros((len(x), 0)))


def _spread_bwd(kept: tuple[Array, Array], grad: Array) -> tuple[Array, None, None]:
    inverse, like = kept
    return jnp.sum(grad[inverse].reshape(len(like), -1, grad.shape[-1]), axis=1), None, None


_permute.defvjp(_permute_fwd, _permute_bwd)
_spread.defvjp(_spread_fwd, _spread_bwd)
