"""What watching costs a healthy run: python benchmarks/watch_cost.py [--milliseconds=50] [--steps=400] [--gigabytes=1]

In one run, ten steps with all that `training/loop.py` does at each to watch, and ten without, in turn: the ratio of
their medians, and the host's microseconds for each part. Then the seconds of one comparison of copies, and of the
digests of a checkpoint of that size in four files, which are made in the background.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
import jax
import jax.numpy as jnp
from etils import epath

from sft_jax.checkpoint.manifest import hash_files
from sft_jax.config_schema import MeshConfig, SpikeConfig, WatchConfig
from sft_jax.sharding import build_mesh, replicated
from sft_jax.training.replicas import ReplicaCheck
from sft_jax.training.spikes import SpikeWatch
from sft_jax.training.stop_signal import StopSignal
from sft_jax.training.watchdog import Watchdog

_PARTS = ("stop signal", "watchdog", "spikes")


class Watch:
    """All parts, as the loop uses them, with what each has taken."""

    def __init__(self, stop: StopSignal) -> None:
        watch = WatchConfig()
        self.stop, self.watchdog = stop, Watchdog(watch.stall_factor, watch.stall_seconds)
        self.spikes, self.seconds = SpikeWatch(SpikeConfig()), dict.fromkeys(_PARTS, 0.0)

    def look(self, step: int) -> None:
        times = [time.perf_counter()]
        self.stop.check()
        with self.stop.waiting():
            pass
        self.stop.begin_training()
        times.append(time.perf_counter())
        for place in ("reading its batch", "waiting for its devices", "waiting for its devices"):
            with self.watchdog.at(f"step {step}, {place}"):
                pass
        self.watchdog.step_is_over()
        times.append(time.perf_counter())
        self.spikes.add({"loss": 2.0 + step % 7 / 10, "grad_norm": 1.0 + step % 5 / 10})
        times.append(time.perf_counter())
        for name, start, end in zip(_PARTS, times[:-1], times[1:], strict=True):
            self.seconds[name] += end - start


def make_step(seconds: float) -> tuple[jax.stages.Wrapped, jax.Array]:
    """Work of about so long on one device, and its argument."""
    values = jnp.ones((256, 256)) / 256

    def work(values: jax.Array, rounds: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, rounds, lambda _, product: product @ values, values)

    step = jax.jit(work)
    step(values, jnp.int32(1)).block_until_ready()
    start = time.perf_counter()
    step(values, jnp.int32(50)).block_until_ready()
    rounds = jnp.int32(max(1, round(50 * seconds / (time.perf_counter() - start))))
    return jax.jit(lambda values: step(values, rounds)), values


def main(milliseconds: float, num_steps: int, gigabytes: float) -> None:
    step, values = make_step(milliseconds / 1000)
    step(values).block_until_ready()
    durations: dict[bool, list[float]] = {True: [], False: []}
    with StopSignal() as stop:
        watch = Watch(stop)
        for number in range(num_steps):
            watched = number // 10 % 2 == 1
            start = time.perf_counter()
            step(values).block_until_ready()
            if watched:
                watch.look(number)
            durations[watched].append(time.perf_counter() - start)
        watch.watchdog.close()
    on, off = (statistics.median(durations[watched]) for watched in (True, False))
    micros = {name: 1e6 * seconds / len(durations[True]) for name, seconds in watch.seconds.items()}
    for name, value in micros.items():
        print(f"{name:12} {value:8.1f} microseconds per step")
    print(f"watched {1e3 * on:.2f} ms, unwatched {1e3 * off:.2f} ms: ratio {on / off:.4f}")
    print(f"by the parts: {sum(micros.values()) / (1e6 * off):.3%} of a step")

    mesh = build_mesh(MeshConfig(replica=-1, fsdp=1))
    state = jax.device_put(jnp.ones((32, 2**20)), replicated(mesh))
    check = ReplicaCheck(state, mesh)
    check.check(0, state)
    start = time.perf_counter()
    check.check(1, state)
    seconds = time.perf_counter() - start
    print(f"copies of {state.nbytes / 2**20:.0f} MiB on {mesh.size} devices compared in {seconds:.2f} s")

    with tempfile.TemporaryDirectory() as folder:
        names = [f"part-{number}" for number in range(4)]
        for name in names:
            (Path(folder) / name).write_bytes(os.urandom(1 << 20) * int(gigabytes * 1000 / 4 / 1.048576))
        start = time.perf_counter()
        hash_files(epath.Path(folder), names)
        print(f"digests of {gigabytes:g} GB: {time.perf_counter() - start:.2f} s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--milliseconds", type=float, default=50.0)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    given = parser.parse_args()
    main(given.milliseconds, given.steps, given.gigabytes)
