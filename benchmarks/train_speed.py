"""Training speed and memory on W1 against TRL and a minimal torch loop, in turn, on the same cores; prints ratios.

    python benchmarks/train_speed.py --assets DIR --peer-python VENV/bin/python [--cores 0]

The peer's Python needs torch==2.13.0 transformers==5.23.0 trl==1.16.0 datasets accelerate sentencepiece. Peaks are the
kernel's own figure for each finished process (ru_maxrss), and the time to the first step counts from process start.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
WARMUP = 2


def run_measured(command: list[str], env: dict[str, str], first_output: Path | None = None) -> dict:
    """Run to the end: its stdout, peak memory, and the seconds until `first_output` had content."""
    start, first = time.time(), None
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen(command, env=env, stdout=out, stderr=subprocess.STDOUT, text=True)
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if first is None and first_output and first_output.exists() and first_output.stat().st_size:
                first = time.time() - start
            if pid:
                break
            time.sleep(0.05)
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        text = out.read()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{text[-3000:]}")
    return {"stdout": text, "peak_mib": usage.ru_maxrss / 1024, "first_step_seconds": first, "start": start}


def measure_ours(env: dict[str, str], run_dir: Path) -> dict:
    shutil.rmtree(run_dir, ignore_errors=True)
    metrics = run_dir / "metrics.jsonl"
    result = run_measured([sys.executable, "-m", "sft_jax.main", f"--config={HERE}/w1.py"], env, metrics)
    rows = [json.loads(line) for line in metrics.read_text().splitlines()][WARMUP:]
    seconds = sum(row["weight_sum"] / row["supervised_tokens_per_second"] for row in rows)
    return result | {"supervised_tokens_per_second": sum(row["weight_sum"] for row in rows) / seconds}


def measure_peer(python: str, what: str, env: dict[str, str], data: Path) -> dict:
    result = run_measured([python, f"{HERE}/peers.py", what, "--data", str(data), "--warmup", str(WARMUP)], env)
    fields = json.loads(next(line for line in reversed(result["stdout"].splitlines()) if line.startswith("{")))
    return result | fields | {"first_step_seconds": fields["first_step_at"] - result["start"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, required=True)
    parser.add_argument("--peer-python", required=True)
    parser.add_argument("--cores", default="0", help="processors to use, such as 0 or 0,1")
    options = parser.parse_args()
    cores = {int(core) for core in options.cores.split(",")}
    os.sched_setaffinity(0, cores)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder)
        env = os.environ | {
            "W1_DATA": folder, "SFT_JAX_ASSETS": str(options.assets.absolute()), "JAX_PLATFORMS": "cpu",
            "OMP_NUM_THREADS": str(len(cores)), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
        }  # fmt: skip
        prepare = [options.peer_python, f"{HERE}/peers.py", "prepare", "--assets", str(options.assets), "--to", folder]
        subprocess.run(prepare, env=env, check=True, capture_output=True)
        measure_ours(env, data / "run")  # fills the data store and the compilation cache
        results = {
            "sft_jax": measure_ours(env, data / "run"),
            "trl best fit": measure_peer(options.peer_python, "trl", env, data),
            "torch loop": measure_peer(options.peer_python, "torch", env, data),
        }
    ours = results["sft_jax"]
    print(f"cores {options.cores}; W1: 8 rows of 512, float32, AdamW")
    print(f"{'':14}{'supervised tokens/s':>20}{'ours is':>9}{'peak MiB':>10}{'ours is':>9}{'first step, s':>15}")
    for name, result in results.items():
        speed, peak = result["supervised_tokens_per_second"], result["peak_mib"]
        print(
            f"{name:14}{speed:20.0f}{ours['supervised_tokens_per_second'] / speed:8.2f}x{peak:10.0f}"
            f"{ours['peak_mib'] / peak:8.2f}x{result['first_step_seconds']:15.1f}"
        )


if __name__ == "__main__":
    main()
