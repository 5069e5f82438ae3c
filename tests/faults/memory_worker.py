"""python memory_worker.py RUN_DIR MEGABYTES SAVES: saves a state again and again, and says as JSON what memory it took:
`copies`, the most above what the process held before, as a multiple of the state; and `growth`, by how much more it
holds in the last of the saves than in early ones."""

import json
import os
import sys
import threading

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from sft_jax.checkpoint.manager import CheckpointManager
from sft_jax.checkpoint.retention import Retention
from sft_jax.config_schema import MeshConfig
from sft_jax.sharding import build_mesh

NUM_LEAVES = 8


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Peak:
    """The most that is resident within, by looking every 2 ms."""

    def __enter__(self) -> "Peak":
        self.bytes, self._over = resident_bytes(), threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def _look(self) -> None:
        while not self._over.wait(0.002):
            self.bytes = max(self.bytes, resident_bytes())

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


def main(run_dir: str, megabytes: int, saves: int) -> dict[str, float]:
    mesh = build_mesh(MeshConfig(fsdp=8))
    rows = NamedSharding(mesh, PartitionSpec("fsdp"))
    shape = (megabytes * 2**18 // NUM_LEAVES // 1024, 1024)
    params = {
        f"layers.{number}.kernel": jax.device_put(np.full(shape, number, np.float32), rows)
        for number in range(NUM_LEAVES)
    }
    size = sum(leaf.nbytes for leaf in params.values())
    peaks = []
    with CheckpointManager(run_dir, Retention(2)) as manager:
        manager.save(1, {"params": {"small": params["layers.0.kernel"][:8]}}, {})
        manager.wait()
        before = resident_bytes()
        for step in range(2, saves + 2):
            with Peak() as peak:
                manager.save(step, {"params": params}, {})
                manager.wait()
            peaks.append(peak.bytes)
    tenth = max(1, saves // 10)
    early, late = max(peaks[tenth : 2 * tenth]), max(peaks[-tenth:])
    return {"copies": (max(peaks) - before) / size, "growth": late / early - 1, "state_megabytes": size / 2**20}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
