"""A base model and config.lora -> which parameters there are, which of them train, and the values adapters start at.

    base                             with an adapter                     quantized too
    ....query.kernel [S, D, N, H]    ....query.kernel    frozen          ....query.nf4    [S, D/2, N, H]   frozen
                                     ....query.lora_a    [S, D, R]       ....query.scales [S, D/64, N, H]  frozen
                                     ....query.lora_b    [S, R, N, H]    (the same)

`S` are the dims that stack a kernel: layers, and experts. Functions here see paths and shapes; `linear.py` multiplies.
"""

import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sft_jax.config_schema import LoraConfig
from sft_jax.datatypes import ConfigError
from sft_jax.model import quantized
from sft_jax.model.adapter_use import fold_in_path
from sft_jax.model.families import TransformerConfig
from sft_jax.model.linear import ADAPTERS, STORED, column_lengths, merge_kernel, read_kernel
from sft_jax.model.name_patterns import named_branches
from sft_jax.model.param_dims import logical_dims
from sft_jax.model.router import dtype_among
from sft_jax.model.transformer import Params, linears
from sft_jax.typing import Array, Key

ALL_LINEAR = "all-linear"  # as PEFT has it


class Leaf(NamedTuple):
    """A parameter before there is any: its logical dims, its shape and how it is stored (a dtype)."""

    dims: tuple[str | None, ...]
    shape: tuple[int, ...]
    dtype: Any


class Kernel(NamedTuple):
    """The dims of a kernel, as (logical name, size): those that stack it, those summed over, and the others."""

    stack: tuple[tuple[str | None, int], ...]
    ins: tuple[tuple[str | None, int], ...]
    outs: tuple[tuple[str | None, int], ...]

    @property
    def is_of_experts(self) -> bool:
        return len(self.stack) > 1


def find_kernels(model: TransformerConfig, base: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, Kernel]:
    """Every linear map of the layers by its path, such as `layers.0.0.attention.query`."""
    kernels = {}
    for path, linear in linears(model).items():
        dims = tuple(zip(logical_dims(f"{path}.kernel"), base[f"{path}.kernel"].shape, strict=True))
        num_out = len(linear.out_dims)
        num_stack = len(dims) - len(linear.in_dims) - num_out
        kernels[path] = Kernel(dims[:num_stack], dims[num_stack:-num_out], dims[-num_out:])
    return kernels


def match_names(
    names: Mapping[str, Collection[str]],
    parameters: Mapping[str, Collection[str]],
    patterns: Iterable[str],
    where: str,
) -> tuple[str, ...]:
    """The keys of `names` of which a pattern matches the end: `q_proj`, `attention.(query|value)`, `.*norm`.

    Args:
      names: path -> all that the module there is called, its path and the name in Hugging Face folders.
      parameters: path -> what the parameters of the module there are called, which is no way to name it.

    Raises:
      ConfigError: a pattern, or a branch of one, matches none.
    """
    found: set[str] = set()
    for branch, named in named_branches(patterns):
        ends_like = re.compile(rf"(?:.*\.)?(?:{branch})")
        matched, of_parameters = (
            {path for path, called in table.items() if any(ends_like.fullmatch(name) for name in called)}
            for table in (names, parameters)
        )
        if not matched:
            listed = sorted(of_parameters & names.keys())
            known = ", ".join(sorted({" = ".join(sorted(names[path])) for path in listed or names}))
            if listed:
                raise ConfigError(f"{where}: {named} finds parameters only. Name modules: {known}.")
            raise ConfigError(f"{where}: {named} matches nothing. There are {known}.")
        found |= matched
    return tuple(path for path in names if path in found)


def lay_out(
    base: Mapping[str, jax.ShapeDtypeStruct],
    kernels: Mapping[str, Kernel],
    targets: Collection[str],
    saved: Collection[str],
    lora: LoraConfig,
    frozen_dtype: Any,
) -> tuple[dict[str, Leaf], dict[str, Leaf]]:
    """(the parameters that train, the frozen ones), each by path.

    Args:
      base: the parameters of the model without adapters.
      targets: paths of the linear maps that get an adapter.
      saved: paths of parameters that train whole.
    """
    trainable: dict[str, Leaf] = {}
    frozen: dict[str, Leaf] = {}
    for path, leaf in base.items():
        dims = logical_dims(path)
        module = path.removesuffix(".kernel")
        if path in saved:
            trainable[path] = Leaf(dims, leaf.shape, leaf.dtype)
        elif lora.quantize != "none" and module in kernels:
            frozen |= _quantized_leaves(module, kernels[module], lora.quantize)
        else:
            frozen[path] = Leaf(dims, leaf.shape, dtype_among(path, frozen_dtype))
    for module in targets:
        dtype = base[f"{module}.kernel"].dtype
        for name, pairs in _adapter_dims(kernels[module], lora).items():
            trainable[f"{module}.{name}"] = Leaf(tuple(n for n, _ in pairs), tuple(size for _, size in pairs), dtype)
    return trainable, frozen


def _adapter_dims(kernel: Kernel, lora: LoraConfig) -> dict[str, tuple[tuple[str | None, int], ...]]:
    rank = (("rank", lora.rank),)
    dims = {"lora_a": kernel.stack + kernel.ins + rank, "lora_b": kernel.stack + rank + kernel.outs}
    return dims | ({"magnitude": kernel.stack + kernel.outs} if lora.use_dora else {})


def _quantized_leaves(module: str, kernel: Kernel, form: str) -> dict[str, Leaf]:
    length = kernel.ins[-1][1]
    names, shape = zip(*kernel.stack, *kernel.ins, *kernel.outs, strict=True)

    def divided(by: int) -> tuple[int, ...]:
        axis = len(kernel.stack) + len(kernel.ins) - 1  # the last that is summed over
        return (*shape[:axis], length // by, *shape[axis + 1 :])

    codes = Leaf(names, divided(quantized.codes_per_byte(form)), quantized.codes_dtype(form))
    scales = Leaf(names, divided(quantized.block_size(length, module)), quantized.scales_dtype())
    return {f"{module}.{form}": codes, f"{module}.{quantized.SCALES}": scales}


def init_adapters(
    leaves: Mapping[str, Leaf], kernels: Mapping[str, Kernel], frozen: Params, key: Key[Array, ""]
) -> Params:
    """The parameters of `leaves` (those of adapters) before the first step: an adapter changes nothing yet.

    `lora_a` is uniform in +-1 / sqrt(inputs), which is PEFT's kaiming_uniform(a=sqrt(5)); `lora_b` is 0; `magnitude` is
    the lengths of the kernel's columns. May be jitted with out_shardings.
    """
    params = {}
    for path, leaf in leaves.items():
        module, name = path.rsplit(".", 1)
        if name == "lora_a":
            bound = 1 / math.sqrt(math.prod(size for _, size in kernels[module].ins))
            params[path] = jax.random.uniform(fold_in_path(key, path), leaf.shape, leaf.dtype, -bound, bound)
        elif name == "lora_b":
            params[path] = jnp.zeros(leaf.shape, leaf.dtype)
        else:
            lengths = _kernel_lengths(frozen, module, kernels[module], jnp.promote_types(leaf.dtype, jnp.float32))
            params[path] = lengths.reshape(leaf.shape).astype(leaf.dtype)
    return params


def merge_adapters(
    params: Params, kernels: Mapping[str, Kernel], lora_scale: float, dtype: Any
) -> Iterator[tuple[str, Array]]:
    """(path, value) of each parameter of the plain model in `dtype`: adapters added to kernels, codes decoded."""
    for path, value in params.items():
        module, name = path.rsplit(".", 1)
        if name in ADAPTERS or name == quantized.SCALES:
            continue
        is_stored = name == "kernel" or name in quantized.FORMATS
        if is_stored and f"{module}.lora_a" in params:
            merge = partial(merge_kernel, lora_scale=lora_scale)
            yield f"{module}.kernel", _map_stack(merge, params, module, kernels[module], dtype)
        elif name in quantized.FORMATS:
            read = partial(read_kernel, dtype=dtype)
            yield f"{module}.kernel", _map_stack(read, params, module, kernels[module], dtype)
        else:
            yield path, value.astype(dtype)


def _kernel_lengths(frozen: Params, module: str, kernel: Kernel, dtype: Any) -> Array:
    """The length of each column of every kernel of a stack."""

    def lengths(parts: Mapping[str, Array], num_out: int) -> Array:
        matrix_IO = read_kernel(parts, num_out, dtype).reshape(math.prod(size for _, size in kernel.ins), -1)
        none_IR, none_RO = jnp.zeros((len(matrix_IO), 1), dtype), jnp.zeros((1, matrix_IO.shape[1]), dtype)
        return column_lengths(matrix_IO, none_IR, none_RO, 1.0)

    return _map_stack(lengths, frozen, module, kernel, None)


def _map_stack(function: Callable[..., Array], params: Params, module: str, kernel: Kernel, dtype: Any) -> Array:
    """`function(parts, num_out)` of every kernel of a stack, layer by layer: only one layer's result is ever wide."""
    parts = {name: params[f"{module}.{name}"] for name in (*STORED, *ADAPTERS) if f"{module}.{name}" in params}

    def of_one(parts: Mapping[str, Array]) -> Array:
        value = function(parts, len(kernel.outs))
        return value if dtype is None else value.astype(dtype)

    for _ in kernel.stack[1:]:  # the experts of a layer
        of_one = jax.vmap(of_one)
    return jax.lax.map(of_one, parts)
