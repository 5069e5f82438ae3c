"""Gradients of what is split over `fsdp`: each device has a sum over its own tokens, and keeps its part of all of them.

Left to itself, the compiler for TPUs sums everything on every device and then cuts out a part, twice the bytes of a
reduce-scatter: `fsdp` lies over several dimensions of the torus, and it scatters along one alone. So the products that
make gradients are written out here, device by device, and their sums go round the rings of the torus, along one
dimension after the other. On 64 chips in a cube, of a gradient of 64 rows:

    rows 0 .. 63   ->  16 of them, along x   ->  4, along y   ->  1, along z

Each step of a ring is a permutation, which goes on while the device computes; no other collective of a v5p does. What a
device adds to a part is made while the part is on its way to it. Half the columns go round one way and half the other.
Only what is left is summed over `replica` and `context`. Where no torus is known, the platform's reduce-scatter does
the same.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P

from sft_jax.sharding import RULES, device_coords, num_parts, spec_for
from sft_jax.typing import Array, Float, Int

_AXIS = "fsdp"
_TOKENS = spec_for(("batch", "seq"))
_OTHERS = tuple(axis for dim in ("batch", "seq") for axis in RULES[dim] if axis != _AXIS)


class _Columns(NamedTuple):
    """Those from `start` to `end` along `axis`."""

    axis: int
    start: int
    end: int

    def of(self, x: Array) -> Array:
        return jax.lax.slice_in_dim(x, self.start, self.end, axis=self.axis)


Make = Callable[[Any, int, _Columns], Array]
"""The first row, how many rows, and which columns of a device's own sum -> those."""


class Torus(NamedTuple):
    """The dimensions of the torus over which `fsdp` lies, the slowest first; one dimension where none is known."""

    sizes: tuple[int, ...]
    is_ring: tuple[bool, ...]
    """Links between neighbours, on which a sum goes round step by step; else the platform's own reduce-scatter."""

    @property
    def order(self) -> tuple[int, ...]:
        """In which to scatter: first along rings, so that least is left for what is slower."""
        return tuple(sorted(range(len(self.sizes)), key=lambda k: not self.is_ring[k]))


@functools.lru_cache
def find_torus(mesh: Any) -> Torus:
    size = mesh.shape[_AXIS]
    if isinstance(mesh, AbstractMesh) or mesh.devices.flat[0].platform != "tpu":
        return Torus((size,), (False,))
    places = device_coords(mesh).reshape(*mesh.devices.shape, -1)
    places = np.moveaxis(places, mesh.axis_names.index(_AXIS), 0).reshape(size, -1, places.shape[-1])[:, 0]
    sizes: list[int] = []
    is_ring: list[bool] = []
    while len(places) > 1:
        runs = ((size, changes) for size, changes in _runs(places) if sum(changes) == 1)
        size, changes = next(runs, (len(places), [True]))
        sizes.insert(0, size)
        is_ring.insert(0, not changes[0])  # the first is the slice
        places = places[::size]
    return Torus(tuple(sizes), tuple(is_ring))


def multiply(
    x: Float[Array, "B L I"], kernel: Float[Array, "I O"], dims: tuple[str | None, str | None], mesh: Any
) -> Float[Array, "B L O"]:
    """The product x @ kernel.

    Args:
      dims: the logical dims of the kernel, of which one is `embed`.
    """
    plain = mesh is None or num_parts(mesh, "embed") == 1
    return product(x, kernel) if plain else _multiply(x, kernel, dims, mesh)


def product(x_BLI: Float[Array, "B L I"], kernel: Float[Array, "I O"]) -> Float[Array, "B L O"]:
    # One plain matrix product over [B * L]: with B and L apart, XLA on CPU takes twice as long for the gradient of
    # the kernel (33 against 18 ms for 4,096 x 288 x 768). Rows stay local, since L is not sharded.
    return (x_BLI.reshape(-1, x_BLI.shape[-1]) @ kernel).reshape(*x_BLI.shape[:2], -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _multiply(x: Any, kernel: Any, dims: Any, mesh: Any) -> Any:
    return product(x, kernel)


def _multiply_fwd(x: Any, kernel: Any, dims: Any, mesh: Any) -> Any:
    # Each is kept for the gradient of the other: of a frozen kernel no x.
    kept = (x.value if kernel.perturbed else None, kernel.value if x.perturbed else None)
    return product(x.value, kernel.value), kept


def _multiply_bwd(dims: Any, mesh: Any, kept: Any, y_grad: Any) -> Any:
    x, kernel = kept
    x_grad = None if kernel is None else product(y_grad, kernel.T)
    if x is None:
        return x_grad, None
    into, out = (None if dim == "embed" else dim for dim in dims)
    by_rows = dims[0] == "embed"
    local = functools.partial(_kernel_grad, by_rows=by_rows, mesh=mesh)
    in_specs = (P(*_TOKENS, *spec_for((into,))), P(*_TOKENS, *spec_for((out,))))
    kernel_grad = jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=spec_for(dims), check_vma=False)
    return x_grad, kernel_grad(x, y_grad)


def _kernel_grad(x_BLI: Any, grad_BLO: Any, by_rows: bool, mesh: Any) -> Any:
    """Of one device: its part of the rows of the kernel, or of its columns. The first dim is scattered, because the
    compiler scatters no last dim into parts of less than 128."""
    left, right = (x_BLI, grad_BLO) if by_rows else (grad_BLO, x_BLI)
    torus = find_torus(mesh)
    left_TR = _rings_first(left.reshape(-1, left.shape[-1]), 1, torus)
    right_TC = right.reshape(-1, right.shape[-1])

    def make(start: Any, size: int, columns: _Columns) -> Array:
        return jax.lax.dynamic_slice_in_dim(left_TR, start, size, axis=1).T @ columns.of(right_TC)

    part = _sum_others(_scatter(make, (left_TR.shape[1], right_TC.shape[1]), 0, torus), mesh)
    return part if by_rows else part.T


_multiply.defvjp(_multiply_fwd, _multiply_bwd, symbolic_zeros=True)


def look_up(table: Float[Array, "V D"], ids: Int[Array, "B L"], mesh: Any) -> Float[Array, "B L D"]:
    """Rows of the table, which is whole in its `embed`. An id outside the table becomes NaN."""
    if mesh is None or num_parts(mesh, "embed") == 1:
        return table.at[ids].get(mode="fill", fill_value=jnp.nan)
    return _look_up(table, ids, mesh)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _look_up(table: Any, ids: Any, mesh: Any) -> Any:
    return table.at[ids].get(mode="fill", fill_value=jnp.nan)


def _look_up_fwd(table: Any, ids: Any, mesh: Any) -> Any:
    return _look_up(table, ids, mesh), (ids, jnp.zeros((len(table), 0)))


def _look_up_bwd(mesh: Any, kept: Any, grad: Any) -> Any:
    ids, like = kept

    def local(ids_BL: Any, grad_BLD: Any) -> Any:
        num_rows = len(like) // num_parts(mesh, "vocab")
        first = jax.lax.axis_index(RULES["vocab"]) * num_rows
        rows = jnp.where(ids_BL >= first, ids_BL - first, num_rows).reshape(-1)  # those of others fall off the end
        partial = jnp.zeros((num_rows, grad_BLD.shape[-1]), grad_BLD.dtype)
        return scatter_sum(partial.at[rows].add(grad_BLD.reshape(len(rows), -1), mode="drop"), 1, mesh)

    specs, out_specs = (_TOKENS, P(*_TOKENS, None)), spec_for(("vocab", "embed"))
    grad = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=out_specs, check_vma=False)(ids, grad)
    return grad, None


_look_up.defvjp(_look_up_fwd, _look_up_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def gather(part: Array, dim: int, mesh: Mesh | AbstractMesh) -> Array:
    """The whole of what `fsdp` splits along `dim`; the sum of its gradients is scattered. Under `shard_map`."""
    return jax.lax.all_gather(part, _AXIS, axis=dim, tiled=True)


def _gather_fwd(part: Any, dim: int, mesh: Any) -> Any:
    return gather(part, dim, mesh), None


def _gather_bwd(dim: int, mesh: Any, _: None, grad: Any) -> Any:
    return (_scatter_array(grad, dim, mesh),)


gather.defvjp(_gather_fwd, _gather_bwd)


def scatter_sum(partial: Array, dim: int, mesh: Mesh | AbstractMesh) -> Array:
    """The sum over the tokens of all devices, of which this one keeps its part along `dim`. Under `shard_map`, with all
    axes manual."""
    return _sum_others(_scatter_array(partial, dim, mesh), mesh)


def _sum_others(part: Array, mesh: Mesh | AbstractMesh) -> Array:
    others = tuple(axis for axis in _OTHERS if mesh.shape[axis] > 1)
    return jax.lax.psum(part, others) if others else part


def _scatter_array(partial: Array, dim: int, mesh: Mesh | AbstractMesh) -> Array:
    torus = find_torus(mesh)
    partial = _rings_first(partial, dim, torus)
    return _scatter(functools.partial(_cut, partial, dim), partial.shape, dim, torus)


def _scatter(make: Make, shape: tuple[int, ...], dim: int, torus: Torus) -> Array:
    """This device's part of the sum over `fsdp` of what `make` makes on each."""
    across = len(shape) - (2 if dim == len(shape) - 1 else 1)
    size = shape[across]
    half = size // 2 // 128 * 128 if any(torus.is_ring) else 0
    both_ways = [(_Columns(across, 0, half), 1), (_Columns(across, half, size), -1)]
    parts = [_scatter_columns(make, shape[dim], dim, torus, *way) for way in (both_ways if half else both_ways[1:])]
    return jnp.concatenate(parts, axis=across)


def _scatter_columns(make: Make, rows: int, dim: int, torus: Torus, columns: _Columns, direction: int) -> Array:
    for k in torus.order:
        groups = _groups_along(torus.sizes, k)
        if torus.is_ring[k]:
            place = jax.lax.axis_index(_AXIS) // math.prod(torus.sizes[k + 1 :])
            part = _go_round(make, rows, columns, groups, place, direction)
        else:
            of_all, whole = None if len(groups) == 1 else groups, make(0, rows, columns)
            part = jax.lax.psum_scatter(whole, _AXIS, scatter_dimension=dim, axis_index_groups=of_all, tiled=True)
        make, rows = functools.partial(_cut, part, dim), part.shape[dim]
        columns = _Columns(columns.axis, 0, part.shape[columns.axis])
    return make(0, rows, columns)


def _cut(partial: Array, dim: int, start: Any, size: int, columns: _Columns) -> Array:
    return columns.of(jax.lax.dynamic_slice_in_dim(partial, start, size, axis=dim))


def _go_round(make: Make, rows: int, columns: _Columns, groups: list[list[int]], place: Array, direction: int) -> Array:
    """One part goes round each ring and takes up what every device has for it; the last to add is whose part it is.
    What is added is made while the part is on its way."""
    size = len(groups[0])
    chunk = rows // size
    onward = [(ring[p], ring[(p + direction) % size]) for ring in groups for p in range(size)]

    def part_of(other: Array) -> Array:
        return make(other % size * chunk, chunk, columns)

    total = part_of(place - direction)
    for turn in range(2, size + 1):
        total = jax.lax.ppermute(total, _AXIS, onward) + part_of(place - turn * direction)
    return total


def _rings_first(partial: Array, dim: int, torus: Torus) -> Array:
    """Rows in the order in which they are scattered: parts of slices, which are the slowest, behind those of rings."""
    if torus.order == tuple(range(len(torus.sizes))):
        return partial
    whole, places = partial.shape, [dim + k for k in range(len(torus.sizes))]
    split = partial.reshape(*whole[:dim], *torus.sizes, -1, *whole[dim + 1 :])
    moved = [*range(dim), *(places[k] for k in torus.order), *range(dim + len(places), split.ndim)]
    return split.transpose(moved).reshape(whole)


def _runs(places: np.ndarray) -> Iterator[tuple[int, list[bool]]]:
    """(length, which coordinates change within a run) for every length of equal runs, the longest first."""
    for size in range(len(places), 1, -1):
        if len(places) % size == 0:
            runs = places.reshape(-1, size, places.shape[1])
            yield size, (runs != runs[:, :1]).any(axis=(0, 1)).tolist()


def _groups_along(sizes: tuple[int, ...], k: int) -> list[list[int]]:
    """Places on the axis that differ only in dimension k of the torus."""
    ids = np.arange(math.prod(sizes)).reshape(sizes)
    return np.moveaxis(ids, k, -1).reshape(-1, sizes[k]).tolist()
