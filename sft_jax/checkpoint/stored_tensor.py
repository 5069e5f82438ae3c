"""A tensor of a model folder, however it is stored, and a view of it that a rule asks for -> the values of that view.

A view is named by a function of the whole tensor, such as `lambda w: w.reshape(N, H, D).transpose(2, 0, 1)[:64]`. It is
first tried on an array of the tensor's shape that holds nothing, which shows the box of the tensor that it needs; only
that box is read or decoded.
"""

import abc
from collections.abc import Callable

import numpy as np

Index = tuple[slice, ...]
Select = Callable[[np.ndarray], np.ndarray]
"""A view of its argument: dims split, transposed, sliced; never a copy."""

_ROWS, _CAST_ROWS = 16, 64  # by trial: half or twice as many of 2 bytes take 1.2 or 1.5 times as long
_CACHE_BYTES, _BLOCK_BYTES = 2**20, 2**18
_EXPONENTS = {"float16": 0x7C00, "bfloat16": 0x7F80, "float32": 0x7F80_0000, "float64": 0x7FF0 << 48}


class StoredTensor(abc.ABC):
    """`shape` is that of the tensor as the model means it. `dtype` is that in which it is stored, or, of a tensor that
    is stored as codes, the one that a decoded copy of it should have. `str()` says where it lies."""

    __slots__ = ()
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype

    @abc.abstractmethod
    def read_box(self, box: Index) -> np.ndarray:
        """The values of a box, with start and stop in every dim; a view of the file where that can be."""

    def read_view(self, select: Select, out: np.ndarray) -> None:
        """`out[...] = select(whole tensor)`, cast to `out`'s dtype."""
        nothing = np.empty(self.shape, np.uint8)  # address space only: no page of it is touched
        view = select(nothing)
        assert view.shape == out.shape, f"{self}: {view.shape} does not fill {out.shape}"
        if not view.size:
            return
        offset = view.__array_interface__["data"][0] - nothing.__array_interface__["data"][0]
        assert np.shares_memory(view, nothing), "select makes a copy"
        last_offset = offset + sum((size - 1) * stride for size, stride in zip(view.shape, view.strides, strict=True))
        first, last = _unravel(offset, self.shape), _unravel(last_offset, self.shape)
        box = self.read_box(tuple(slice(start, stop + 1) for start, stop in zip(first, last, strict=True)))
        bits = box.view(f"u{box.dtype.itemsize}")  # numpy can restride its own types only
        strides = [
            sum(by * at for by, at in zip(bits.strides, _unravel(stride if size > 1 else 0, self.shape), strict=True))
            for size, stride in zip(view.shape, view.strides, strict=True)
        ]
        values = np.lib.stride_tricks.as_strided(bits, view.shape, strides, writeable=False)
        copy_in_blocks(out, values.view(box.dtype))


def _unravel(offset: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    """How far an offset goes in each dim: 7 in [3, 5] -> (1, 2)."""
    return tuple(int(at) for at in np.unravel_index(offset, shape)) if shape else ()


def copy_in_blocks(out: np.ndarray, values: np.ndarray) -> None:
    """`out[...] = values` for a transposed view, about five times as fast: a few rows of its memory at a time, so that
    each page of a file is read once and in order, and what is written together lies together."""
    out, values = out.squeeze(), values.squeeze()
    if out.dtype == values.dtype and out.dtype.itemsize == 2:  # numpy copies its own types faster than ml_dtypes'
        out, values = out.view(np.uint16), values.view(np.uint16)
    with np.errstate(over="ignore", invalid="ignore"):  # the caller refuses what overflows
        _copy(out, values)


def _copy(out: np.ndarray, values: np.ndarray) -> None:
    if values.ndim < 2 or np.array_equal(np.argsort(out.strides), np.argsort(values.strides)):
        out[...] = values
        return
    outermost = int(np.argmax(values.strides))
    out, values = np.moveaxis(out, outermost, 0), np.moveaxis(values, outermost, 0)
    if values.ndim > 2 and values.strides[0] * _ROWS > _CACHE_BYTES:
        for part, row in zip(out, values, strict=True):
            _copy(part, row)
    else:
        step = _ROWS if out.dtype == values.dtype else _CAST_ROWS
        for start in range(0, len(values), step):
            out[start : start + step] = values[start : start + step]


def all_finite(values: np.ndarray) -> bool:
    """Whether no value is NaN or infinite: `np.isfinite(values).all()`, several times as fast and without its copy."""
    mask = _EXPONENTS[values.dtype.name]
    kind = np.dtype(f"u{values.dtype.itemsize}")
    bits = values.view(kind).ravel(order="K")
    step = _BLOCK_BYTES // kind.itemsize
    blocks = (bits[start : start + step] for start in range(0, len(bits), step))
    return not any(((block & kind.type(mask)) == mask).any() for block in blocks)
