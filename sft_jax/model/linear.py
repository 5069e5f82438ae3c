"""The linear maps of a decoder: every matrix that a token is multiplied with, but the embedding and the head.

What a map does follows from which parameters it has:

    kernel                [*in_dims, *out_dims]      x @ kernel
    bias                  [*out_dims]                ... + bias
    int8 | int4 | nf4     codes, with `scales`       in place of kernel (model/quantized.py)
    lora_a, lora_b        [*in_dims, R], [R, *out_dims]   x @ kernel + lora_scale * (x @ lora_a) @ lora_b
    magnitude             [*out_dims]                DoRA: the sum's columns scaled to these lengths
"""

import math
from collections.abc import Collection, Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, Mesh
from jax.typing import DTypeLike

from sft_jax.model import adapter_use, gradient_sums, quantized
from sft_jax.typing import Array, Float

STORED = ("kernel", *quantized.FORMATS, quantized.SCALES)
ADAPTERS = ("lora_a", "lora_b", "magnitude")
# Those that a Linear may have or lack; `transformer.forward` gives it what the parameters hold.
OPTIONAL = (*STORED, *ADAPTERS, adapter_use.DROPOUT_KEYS)


class Linear(nnx.Module):
    """A linear map from some trailing dims to others: kernel [*in_dims, *out_dims], and a bias [*out_dims] if asked.
    With `stack`, its parameters are those of as many maps, on leading dims, and who made it multiplies."""

    lora_a: nnx.Param
    lora_b: nnx.Param
    dropout_keys: nnx.Param

    def __init__(
        self,
        in_dims: tuple[int, ...],
        out_dims: tuple[int, ...],
        stddev: float,
        key: Array,
        dtype: DTypeLike,
        use_bias: bool = False,
        stack: tuple[int, ...] = (),
    ):
        self.in_dims, self.out_dims = in_dims, out_dims
        self.dims: tuple[str | None, ...] | None = None  # the kernel's logical ones, known within a transformer
        self.lora_scale = 1.0
        self.lora_dropout = 0.0
        self.kernel = nnx.Param(stddev * jax.random.normal(key, stack + in_dims + out_dims, dtype))
        if use_bias:
            self.bias = nnx.Param(jnp.zeros(stack + out_dims, dtype))

    def hold(
        self, names: Collection[str], dims: tuple[str | None, ...], lora_scale: float, lora_dropout: float
    ) -> None:
        """Have those of OPTIONAL that `names` says, whose arrays come later, and no others; `dims` are the kernel's."""
        for name in OPTIONAL:
            if name in names and not hasattr(self, name):
                setattr(self, name, nnx.Param(jax.ShapeDtypeStruct((), jnp.float32)))
            elif hasattr(self, name) and name not in names:
                delattr(self, name)
        self.dims, self.lora_scale, self.lora_dropout = dims, lora_scale, lora_dropout

    def __call__(self, x: Float[Array, "B L ..."], mesh: Mesh | AbstractMesh | None) -> Float[Array, "B L ..."]:
        x_BLI = x.reshape(*x.shape[:2], math.prod(self.in_dims))
        y_TO = self._multiply(x_BLI, mesh).reshape(-1, math.prod(self.out_dims))
        if hasattr(self, "lora_a"):
            y_TO = self._adapt(x_BLI.reshape(len(y_TO), -1), y_TO)
        y = y_TO.reshape(*x.shape[:2], *self.out_dims)
        return y + self.bias[...].astype(x.dtype)[None, None] if hasattr(self, "bias") else y

    def _multiply(self, x_BLI: Array, mesh: Mesh | AbstractMesh | None) -> Array:
        """Times the kernel. One stored narrower is widened again in the backward pass: wide, it is never kept."""
        stored = self._stored()

        def multiply(x: Array, stored: Mapping[str, Array]) -> Array:
            matrix = self._matrix(stored, x.dtype)
            if self.dims is None:
                return gradient_sums.product(x, matrix)
            return gradient_sums.multiply(x, matrix, (self.dims[0], self.dims[len(self.in_dims)]), mesh)

        wide = next(iter(stored.values())).dtype.itemsize >= x_BLI.dtype.itemsize
        return multiply(x_BLI, stored) if wide else jax.checkpoint(multiply)(x_BLI, stored)

    def read_kernel(self, dtype: DTypeLike) -> Array:
        """The kernel in `dtype`, with the dims that it was made with."""
        return read_kernel(self._stored(), len(self.out_dims), dtype)

    def _stored(self) -> dict[str, Array]:
        return {name: getattr(self, name)[...] for name in STORED if hasattr(self, name)}

    def _matrix(self, stored: Mapping[str, Array], dtype: DTypeLike) -> Array:
        """The kernel as [in, out] in `dtype`."""
        return read_kernel(stored, len(self.out_dims), dtype).reshape(math.prod(self.in_dims), -1)

    def _adapt(self, x_TI: Array, y_TO: Array) -> Array:
        a_IR = self.lora_a[...].astype(x_TI.dtype).reshape(x_TI.shape[1], -1)
        b_RO = self.lora_b[...].astype(x_TI.dtype).reshape(a_IR.shape[1], -1)
        if hasattr(self, adapter_use.DROPOUT_KEYS):
            x_TI = adapter_use.drop(x_TI, self.dropout_keys[...], self.lora_dropout)
        y_TO = y_TO + self.lora_scale * ((x_TI @ a_IR) @ b_RO)
        if not hasattr(self, "magnitude"):
            return y_TO
        wide = jnp.promote_types(x_TI.dtype, jnp.float32)  # squares of bfloat16 would lose the lengths
        lengths_O = column_lengths(
            self._matrix(self._stored(), wide), a_IR.astype(wide), b_RO.astype(wide), self.lora_scale
        )
        factors_O = self.magnitude[...].astype(wide).reshape(-1) / lengths_O
        return y_TO * factors_O.astype(y_TO.dtype)[None, :]


def read_kernel(parts: Mapping[str, Array], num_out: int, dtype: DTypeLike) -> Array:
    """One kernel [*in_dims, *out_dims] in `dtype`, from the parameters that hold it."""
    if "kernel" in parts:
        return parts["kernel"].astype(dtype)
    form = next(form for form in quantized.FORMATS if form in parts)
    return quantized.decode(parts[form], parts[quantized.SCALES], -num_out - 1, form, dtype)


def merge_kernel(parts: Mapping[str, Array], num_out: int, lora_scale: float) -> Array:
    """One kernel with its adapter added in, at least float32: x @ it is what the map with the adapter gives."""
    dtype = jnp.promote_types(parts["lora_a"].dtype, jnp.float32)
    kernel = read_kernel(parts, num_out, dtype)
    rank, size = parts["lora_a"].shape[-1], math.prod(kernel.shape[-num_out:])
    a_IR, b_RO = parts["lora_a"].astype(dtype).reshape(-1, rank), parts["lora_b"].astype(dtype).reshape(rank, -1)
    kernel_IO = kernel.reshape(-1, size)
    merged_IO = kernel_IO + lora_scale * (a_IR @ b_RO)
    if "magnitude" in parts:
        factors_O = parts["magnitude"].astype(dtype).reshape(-1) / column_lengths(kernel_IO, a_IR, b_RO, lora_scale)
        merged_IO = merged_IO * factors_O[None, :]
    return merged_IO.reshape(kernel.shape)


def column_lengths(
    kernel_IO: Float[Array, "I O"], a_IR: Float[Array, "I R"], b_RO: Float[Array, "R O"], scale: float
) -> Float[Array, " O"]:
    """||kernel + scale * a @ b|| of each column, without that sum: no second matrix of the kernel's size. It is a
    constant to the gradient. Source: DoRA (arXiv:2402.09353), section 4.3."""
    kernel_IO, a_IR, b_RO = map(jax.lax.stop_gradient, (kernel_IO, a_IR, b_RO))
    cross_RO = a_IR.T @ kernel_IO
    low_rank_RO = (a_IR.T @ a_IR) @ b_RO
    squares_O = jnp.sum(kernel_IO**2, axis=0) + jnp.sum(b_RO * (2 * scale * cross_RO + scale**2 * low_rank_RO), axis=0)
    return jnp.sqrt(squares_O)
