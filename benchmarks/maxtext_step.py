"""MaxText's train step, compiled by its own program for TPUs that are not here; run by a Python that has maxtext[tpu].

    PYTHON maxtext_step.py FOLDER compile_topology=v5p-128 model_name=llama3.1-70b key=value...

FOLDER gets program.txt, the compiled HLO, and step.json: where each device of the mesh is, peak memory, versions.
"""

import importlib.metadata
import json
import sys
import time
from pathlib import Path
from typing import Any

from absl import app
from maxtext.trainers.pre_train import train_compile


def main() -> None:
    start, folder = time.monotonic(), Path(sys.argv.pop(1))
    compile_step = train_compile.jit_and_compile

    def compile_and_write(*args: Any) -> Any:
        mesh = args[3]
        compiled = compile_step(*args)
        (folder / "program.txt").write_text(compiled.as_text())
        step = {
            "coords": [[getattr(device, "slice_index", 0) or 0, *device.coords] for device in mesh.devices.flat],
            "peak_bytes": compiled.memory_analysis().peak_memory_in_bytes,
            "seconds_in_all": round(time.monotonic() - start),
            "versions": {name: importlib.metadata.version(name) for name in ("maxtext", "jax", "libtpu")},
        }
        (folder / "step.json").write_text(json.dumps(step))
        return compiled

    train_compile.jit_and_compile = compile_and_write
    config = Path(train_compile.__file__).parents[2] / "configs" / "base.yml"
    fixed = ["compile_topology_num_slices=1", f"base_output_directory={folder}", "run_name=compiled"]
    fixed += ["enable_checkpointing=false", "dataset_type=synthetic"]
    app.run(train_compile.main, [sys.argv[0], str(config), *fixed, *sys.argv[1:]])


if __name__ == "__main__":
    main()
