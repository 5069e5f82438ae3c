"""A compiled step -> the plan: does it fit, what of, how long would it take, what would the data set cost."""

import importlib.metadata
import json
import math
from dataclasses import dataclass, field
from typing import Any

import jax
from etils import epath

from sft_jax.config_schema import Config
from sft_jax.model.families import num_params, train_flops_per_token
from sft_jax.planning.compiled_step import CompiledStep, compile_step, shard_bytes
from sft_jax.planning.hlo import parse_program
from sft_jax.planning.live import Buffer, find_peak
from sft_jax.planning.roofline import Work, count_work
from sft_jax.planning.topology import Topology
from sft_jax.sharding import device_coords, is_on_host


@dataclass(frozen=True)
class Plan:
    """`bytes` are of one device, by kind; `work` is None where the step does not fit."""

    topology: Topology
    config: Config
    num_params: int
    mesh: dict[str, int]
    fits: bool
    peak_bytes: int
    bytes: dict[str, int]
    compile_seconds: float
    host_bytes: int = 0
    """Of the state, in the host's memory for each device; not in `bytes` and `peak_bytes`."""
    work: Work | None = None
    buffers: tuple[Buffer, ...] = ()
    """Temporaries at the peak by our own reading, the largest first."""
    mfu: float = 0.0
    rows_per_epoch: int = 0
    supervised_fraction: float = 0.0
    """From the run's data report; 0 where there is none."""
    compiler_says: str = ""
    unknown_trips: int = 0
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def hbm_bytes(self) -> int:
        return self.topology.chip.hbm_bytes

    @property
    def tokens_per_second(self) -> float:
        tokens = self.config.batch.batch_size * self.config.data.max_seq_len
        return tokens / self.work.step_seconds if self.work else 0.0

    @property
    def num_steps(self) -> int:
        """Of the whole run; 0 where the data is not known."""
        if self.config.schedule.num_steps is not None:
            return self.config.schedule.num_steps
        return math.ceil(self.rows_per_epoch * self.config.schedule.num_epochs / self.config.batch.batch_size)

    @property
    def hours(self) -> float:
        return self.num_steps * self.work.step_seconds / 3600 if self.work else 0.0

    def to_json(self) -> dict[str, Any]:
        work = self.work or Work()
        return {
            "topology": self.topology.name,
            "num_chips": self.topology.num_chips,
            "num_devices": self.topology.num_devices,
            "mesh": self.mesh,
            "num_params": self.num_params,
            "fits": self.fits,
            "peak_bytes": self.peak_bytes,
            "hbm_bytes": self.hbm_bytes,
            "bytes": self.bytes,
            "host_bytes": self.host_bytes,
            "largest_buffers": [
                {"bytes": int(b.num_bytes), "shape": f"{b.shape.dtype}{list(b.shape.dims)}", "source": b.source,
                 "op_name": b.op_name}
                for b in self.buffers[:20]
            ],
            "flops": work.flops,
            "memory_bytes": work.memory_bytes,
            "collective_bytes": work.collective_bytes,
            "collectives": [
                {"kind": kind, "axes": axes, "async": is_async, "count": entry[0], "bytes": entry[1],
                 "seconds": entry[2]}
                for (kind, axes, is_async), entry in sorted(work.collectives.items())
            ],
            "uncounted_kernels": sorted(work.uncounted),
            "loop_rounds_assumed": self.unknown_trips,
            "seconds": {
                "compute": work.compute_seconds, "products": work.product_seconds, "memory": work.memory_seconds,
                "busy": work.busy_seconds,
                "collectives_sync": work.sync_seconds, "collectives_async": work.async_seconds,
            },
            "step_seconds": work.step_seconds,
            "bound": work.bound if self.work else "",
            "mfu": self.mfu,
            "tokens_per_second": self.tokens_per_second,
            "supervised_tokens_per_second": self.tokens_per_second * self.supervised_fraction,
            "num_steps": self.num_steps,
            "hours": self.hours,
            "chip_hours": self.hours * self.topology.num_chips,
            "compile_seconds": self.compile_seconds,
            "compiler_says": self.compiler_says,
            "versions": self.versions,
        }  # fmt: skip


def make_plan(config: Config, topology: Topology) -> Plan:
    """
    Raises:
      ConfigError: the config cannot run there, whatever the memory.
    """
    step = compile_step(config, topology)
    return _without_work(step, config, topology) if step.compiled is None else _with_work(step, config, topology)


def _common(step: CompiledStep, config: Config, topology: Topology) -> dict[str, Any]:
    report = _read_report(config)
    return dict(
        topology=topology,
        config=config,
        num_params=num_params(step.placed.model),
        mesh=dict(step.mesh.shape),
        compile_seconds=step.compile_seconds,
        host_bytes=_host_bytes(step),
        rows_per_epoch=report.get("rows_per_epoch", 0),
        supervised_fraction=report.get("supervised_fraction", 0.0) * report.get("fill_fraction", 0.0),
        versions=versions(),
    )


def _state_bytes(step: CompiledStep) -> dict[str, int]:
    state, placed = step.placed.abstract_state, step.placed
    frozen = sum(
        math.prod(placed.shardings[path].shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for path, leaf in placed.leaves[1].items()
    )
    optimizer = shard_bytes(state.opt_state) - _host_bytes(step)
    return {"parameters": shard_bytes(state.params) + frozen, "optimizer": optimizer}


def _host_bytes(step: CompiledStep) -> int:
    return shard_bytes([leaf for leaf in jax.tree.leaves(step.placed.abstract_state) if is_on_host(leaf)])


def _without_work(step: CompiledStep, config: Config, topology: Topology) -> Plan:
    kinds = _state_bytes(step)
    kinds["gradients_and_temporaries"] = max(0, step.needed_bytes - sum(kinds.values()))
    return Plan(
        fits=False,
        peak_bytes=step.needed_bytes,
        bytes=kinds,
        compiler_says=step.compiler_says,
        **_common(step, config, topology),
    )


def _with_work(step: CompiledStep, config: Config, topology: Topology) -> Plan:
    assert step.compiled is not None
    memory, text = step.compiled.memory_analysis(), step.compiled.as_text()
    assert memory is not None  # jax's CPU and TPU compilers give both
    assert text is not None
    program = parse_program(text)
    # The compilers' peaks are of both memories; the CPU's knows no host, and its peak no temporaries.
    peak_bytes = memory.peak_memory_in_bytes - _host_bytes(step)
    argument_bytes, output_bytes = memory.argument_size_in_bytes, memory.output_size_in_bytes
    if topology.chip.name == "cpu":
        argument_bytes, output_bytes = argument_bytes - _host_bytes(step), output_bytes - _host_bytes(step)
        aliased = memory.alias_size_in_bytes - _host_bytes(step)
        peak_bytes = argument_bytes + output_bytes - aliased + memory.temp_size_in_bytes
    kinds = _state_bytes(step)
    kinds["batch"] = argument_bytes - sum(kinds.values())
    temporaries = find_peak(program)
    gradient_shapes = {
        step.placed.shardings[path].shard_shape(leaf.shape) for path, leaf in step.placed.leaves[0].items()
    }
    gradients = sum((b.num_bytes for b in temporaries.buffers if b.shape.dims in gradient_shapes), 0.0)
    at_peak = peak_bytes - argument_bytes
    # By our reading of what lives at the peak, scaled to the compiler's figure.
    kinds["shaped_as_parameters"] = int(min(1.0, gradients / max(temporaries.num_bytes, 1)) * at_peak)
    kinds["activations_and_temporaries"] = at_peak - kinds["shaped_as_parameters"]
    kinds["arguments"], kinds["outputs"] = argument_bytes, output_bytes
    tokens_per_device = config.batch.micro_batch_size * config.data.max_seq_len // _batch_parts(step)
    rounds = -(-tokens_per_device // min(config.loss.chunk_tokens, tokens_per_device))
    work = count_work(program, topology, dict(step.mesh.shape), device_coords(step.mesh), rounds)
    tokens = config.batch.batch_size * config.data.max_seq_len
    useful = train_flops_per_token(step.placed.model, config.data.max_seq_len) * tokens
    peak_flops = topology.chip.flops_per_second * topology.num_devices
    return Plan(
        fits=peak_bytes <= topology.chip.hbm_bytes,
        peak_bytes=peak_bytes,
        bytes=kinds,
        work=work,
        buffers=temporaries.buffers,
        mfu=useful / (work.step_seconds * peak_flops),
        unknown_trips=rounds,
        **_common(step, config, topology),
    )


def _batch_parts(step: CompiledStep) -> int:
    return step.mesh.shape["replica"] * step.mesh.shape["fsdp"] * step.mesh.shape["context"]


def _read_report(config: Config) -> dict[str, Any]:
    """What `sft-jax check`, or a run, has written of its data; empty where neither was there."""
    path = epath.Path(config.run.dir).expanduser() / "data_report.json"
    return json.loads(path.read_text()) if path.exists() else {}


def versions() -> dict[str, str]:
    """Of what compiles."""
    found = {"jax": jax.__version__}
    try:
        return found | {"libtpu": importlib.metadata.version("libtpu")}
    except importlib.metadata.PackageNotFoundError:
        return found
