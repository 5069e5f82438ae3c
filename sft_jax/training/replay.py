"""A step's gradients, computed twice -> whether the machines compute the same from the same.

A device that computes wrongly now and then leaves no trace in copies of the state that are all made from its one sum.
So the gradients of a batch are taken twice by the same program and compared, through sums of their bits. That takes the
time of about two steps, and no more memory than one.
"""

from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from sft_jax.datatypes import MachineError
from sft_jax.model.transformer import Params
from sft_jax.sharding import Batch
from sft_jax.training.replicas import make_sum
from sft_jax.training.step import GradientFn
from sft_jax.typing import Array


class ReplayCheck:
    """Compiled once.

    Args:
      sum_grads: see `make_gradients`.
      params: trainable, as placed, or their shapes.
    """

    def __init__(self, sum_grads: GradientFn, params: Any, mesh: Mesh | AbstractMesh) -> None:
        assert isinstance(mesh, Mesh)  # a run's is of devices
        self._devices = list(mesh.devices.flat)
        self._names = sorted(params)
        sum_bits = make_sum(mesh, [params[name].sharding.spec for name in self._names])

        def digest(params: Params, frozen: Params, batch: Batch) -> Array:
            grads, _ = sum_grads(params, frozen, batch)
            return sum_bits([grads[name] for name in self._names])

        self._digest = jax.jit(digest)

    def check(self, step: int, params: Params, frozen: Params, batch: Batch) -> None:
        """Every process must call this, before the step, and all find the same.

        Raises:
          MachineError: naming the gradients that differ, and the devices that hold them.
        """
        first, second = (np.asarray(jax.device_get(self._digest(params, frozen, batch))) for _ in range(2))
        differ = first != second
        if differ.any():
            names = [name for name, odd in zip(self._names, differ.any(axis=0), strict=True) if odd]
            devices = [device for device, odd in zip(self._devices, differ.any(axis=1), strict=True) if odd]
            where = ", ".join(f"{device} of process {device.process_index}" for device in devices[:8])
            raise MachineError(
                f"step {step}: computed again, the gradients of {len(names)} arrays, the first of them {names[0]}, are "
                f"others on {len(devices)} of {len(self._devices)} devices: {where}. One of the machines computes "
                "wrongly now and then. The last checkpoint is kept: run the same command to go on, and look for the "
                "machine on smaller meshes if it happens again."
            )
