"""A config and a number of devices -> which mesh, microbatch and remat policy to take: the fastest that fits, by the
roofline's seconds, of those that were compiled.

All cases do the same work, a step of `config.batch.batch_size` rows. Not all combinations are compiled, minutes each:

1. Meshes with their axes `tensor` and `expert` at 1, 2, 4, 8, fsdp taking what is left; each with 1, 2 and 4 rows a
   shard at a time, as long as fewer have fitted; all at remat `full`, which keeps the least on the device.
2. The two fastest of those, with the policies that keep more: attention, dots, none, as long as they fit. Where none
   has fitted, the one that lacks the least, with what is kept in the host's memory.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from sft_jax.config_schema import Config
from sft_jax.datatypes import ConfigError
from sft_jax.model.families import TransformerConfig, find_moe
from sft_jax.planning.cases import Case, Outcome, Run

_SIZES = (1, 2, 4, 8)  # of the axes that split what is within a layer
_ROWS = (1, 2, 4)  # a shard of the batch works on at a time
_KEEPING_MORE = ("attention", "dots", "none")
_TRIED_FURTHER = 2


class Choice(NamedTuple):
    """What a case sets."""

    fsdp: int
    tensor: int
    expert: int
    grad_accum_steps: int
    remat: str = "full"

    @property
    def label(self) -> str:
        expert = f", expert {self.expert}" if self.expert > 1 else ""
        steps = self.grad_accum_steps
        return f"fsdp {self.fsdp}, tensor {self.tensor}{expert}, {steps} microbatch{'es' * (steps > 1)}, {self.remat}"

    @property
    def options(self) -> tuple[str, ...]:
        mesh = (f"--config.mesh.{axis}={getattr(self, axis)}" for axis in ("fsdp", "tensor", "expert"))
        batch = f"--config.batch.grad_accum_steps={self.grad_accum_steps}"
        return (*mesh, batch, f"--config.model.remat={self.remat}")


def search(args: Sequence[str], config: Config, model: TransformerConfig, num_devices: int, run: Run) -> list[Outcome]:
    """What was tried, the fastest that fits first, and after those the others by the memory that they need.

    Args:
      args: of `sft-jax plan`, which name the config and the topology; those of a case come after them.

    Raises:
      ConfigError: the batch divides over no mesh.
    """
    tried: dict[Choice, Outcome] = {}

    def attempt(choice: Choice) -> bool:
        if choice not in tried:
            tried[choice] = run(Case(choice.label, (*args, *choice.options)))
        return tried[choice].fits

    meshes = list(_meshes(config, model, num_devices))
    if not meshes:
        raise ConfigError(
            f"config.batch.batch_size: {config.batch.batch_size} rows divide over no mesh of {num_devices} devices "
            f"whose axes tensor and expert are at most {_SIZES[-1]}. Choose a multiple of {num_devices}, or set "
            "config.mesh.context."
        )
    for mesh in meshes:
        for choice in mesh:
            if not attempt(choice):
                break
    fitting = [choice for choice in tried if tried[choice].fits]
    for choice in sorted(fitting, key=lambda choice: tried[choice].step_seconds)[:_TRIED_FURTHER]:
        for remat in _KEEPING_MORE:
            if not attempt(choice._replace(remat=remat)):
                break
    if not fitting:
        attempt(min(tried, key=lambda choice: _needed(tried[choice]))._replace(remat="offload"))
    return sorted(tried.values(), key=lambda outcome: (outcome.step_seconds, _needed(outcome)))


def _needed(outcome: Outcome) -> float:
    return float(outcome.plan["peak_bytes"]) if outcome.plan else float("inf")


def _meshes(config: Config, model: TransformerConfig, num_devices: int) -> Iterator[list[Choice]]:
    """For each mesh its choices, the fewest rows at a time first."""
    rows, mesh, moe = config.batch.batch_size, config.mesh, find_moe(model)
    fixed = max(mesh.replica, 1) * max(mesh.context, 1)
    for expert in _SIZES if moe else (1,):
        for tensor in _SIZES:
            within = fixed * tensor * expert
            if num_devices % within or model.num_kv_heads % tensor or (moe and moe.num_experts % expert):
                continue
            fsdp = num_devices // within
            shards = max(mesh.replica, 1) * fsdp
            steps = [rows // (shards * count) for count in _ROWS if rows % (shards * count) == 0]
            if steps and model.embed_dim % fsdp == 0:
                yield [Choice(fsdp, tensor, expert, count) for count in steps]
