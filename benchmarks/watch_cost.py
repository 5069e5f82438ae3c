"""What watching costs the host at each step, without any device: python benchmarks/watch_cost.py [--steps=20000]

The calls are those of `training/loop.py`. It prints microseconds per step; compare them with the time of a step.
"""

import argparse
import time

from sft_jax.config_schema import SpikeConfig, WatchConfig
from sft_jax.training.spikes import SpikeWatch
from sft_jax.training.stop_signal import StopSignal
from sft_jax.training.watchdog import Watchdog


def measure(num_steps: int) -> dict[str, float]:
    watch = WatchConfig()
    spikes, watchdog = SpikeWatch(SpikeConfig()), Watchdog(watch.stall_factor, watch.stall_seconds)
    seconds = dict.fromkeys(("stop signal", "watchdog", "spikes"), 0.0)
    with StopSignal() as stop:
        stop.begin_training()
        for step in range(num_steps):
            start = time.perf_counter()
            stop.check()
            with stop.waiting():
                pass
            stop.begin_training()
            stopped = time.perf_counter()
            for place in ("reading its batch", "waiting for its devices", "waiting for its devices"):
                with watchdog.at(f"step {step}, {place}"):
                    pass
            watchdog.step_is_over()
            watched = time.perf_counter()
            spikes.add({"loss": 2.0 + step % 7 / 10, "grad_norm": 1.0 + step % 5 / 10})
            end = time.perf_counter()
            for name, part in zip(seconds, (stopped - start, watched - stopped, end - watched), strict=True):
                seconds[name] += part
    watchdog.close()
    return {name: 1e6 * total / num_steps for name, total in seconds.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20_000)
    micros = measure(parser.parse_args().steps)
    for name, value in {**micros, "together": sum(micros.values())}.items():
        print(f"{name:12} {value:8.1f} microseconds per step")
