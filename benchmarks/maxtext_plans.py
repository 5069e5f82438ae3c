"""MaxText's compiled steps beside ours, both read by the same roofline: docs/plans_maxtext.json, and a table.

    .venv-tpu/bin/python benchmarks/maxtext_plans.py --maxtext-python PYTHON [--only NAME] [--again]

PYTHON needs maxtext[tpu]==0.2.2, without triton. Ours are those of docs/plans.json, which `make plans` makes: the same
model, length and rows a chip on the same chips, with parameters and AdamW in float32. MaxText's is as it comes, with
rows split over all chips (fsdp).
"""

import argparse
import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import plans

from sft_jax.planning.hlo import parse_program
from sft_jax.planning.roofline import READING, count_work
from sft_jax.planning.topology import parse_topology

TABLE = plans.ROOT / "docs" / "plans_maxtext.json"
ENV = {
    "TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5p-8", "TPU_WORKER_HOSTNAMES": "localhost",
    "JAX_PLATFORMS": "cpu", "DECOUPLE_GCLOUD": "TRUE",
}  # fmt: skip
_ROWS = ("per_device_batch_size=1", "max_target_length=8192", "ici_fsdp_parallelism=-1")
# By name of the case in plans.py.
CASES = {
    "70b": ("compile_topology=v5p-128", "model_name=llama3.1-70b", *_ROWS),
    "70b on v6e": ("compile_topology=v6e-256", "model_name=llama3.1-70b", *_ROWS),
    "8b": ("compile_topology=v6e-16", "model_name=llama3.1-8b", *_ROWS),
}


def make_row(name: str, python: str) -> dict[str, Any]:
    script, args = Path(__file__).with_name("maxtext_step.py"), CASES[name]
    with tempfile.TemporaryDirectory() as folder:
        command = [python, str(script), folder, *args]
        child = subprocess.run(
            command, env=os.environ | ENV, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        if not (Path(folder) / "step.json").exists():
            raise SystemExit(f"{' '.join(command)} failed:\n{child.stdout[-3000:]}")
        step = json.loads((Path(folder) / "step.json").read_text())
        program = parse_program((Path(folder) / "program.txt").read_text())
    coords = np.array(step.pop("coords"))
    mesh = {"replica": 1, "fsdp": len(coords), "context": 1, "tensor": 1, "expert": 1}
    work = count_work(program, parse_topology(plans.CASES[name][1]), mesh, coords, unknown_trips=1)
    return step | {
        "args": list(args),
        "reading": READING,
        "step_seconds": work.step_seconds,
        "collective_bytes": work.collective_bytes,
        "seconds": {"products": work.product_seconds, "busy": work.busy_seconds, "collectives_sync": work.sync_seconds},
        "flops": work.flops,
        "uncounted_kernels": sorted(work.uncounted),
    }


def describe(table: dict[str, Any], ours: dict[str, Any]) -> str:
    """The lines of docs/scaling.md."""
    lines = [
        "| command | peak per device: ours, MaxText's | sent a step | step by the roofline | as fast as MaxText's |"
    ]
    lines.append("|---|---|---|---|---|")
    for name, theirs in table.items():
        row = ours[name]
        cells = [f"`{row['command']}`", _pair(row, theirs, "peak_bytes", 2**30, "GiB")]
        cells += [_pair(row, theirs, "collective_bytes", 2**30, "GiB"), _pair(row, theirs, "step_seconds", 1, "s")]
        lines.append("| " + " | ".join([*cells, f"{theirs['step_seconds'] / row['step_seconds']:.2f} times"]) + " |")
    return "\n".join(lines)


def _pair(row: dict[str, Any], theirs: dict[str, Any], field: str, unit: int, name: str) -> str:
    return f"{row[field] / unit:,.2f}, {theirs[field] / unit:,.2f} {name}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--maxtext-python", required=True)
    parser.add_argument("--only", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--again", action="store_true", help="those that are there too")
    options = parser.parse_args()
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    for name in options.only:
        if options.again or table.get(name, {}).get("reading") != READING:
            print(f"{name}: compiling", flush=True)
            table[name] = make_row(name, options.maxtext_python)
            TABLE.write_text(json.dumps(table, indent=1) + "\n")
    print(describe(table, json.loads(plans.TABLE.read_text())))


if __name__ == "__main__":
    main()
