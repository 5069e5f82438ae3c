"""Memory and speed of weights in and out, beside a plain copy of the same files on the same disk in the same run.

    python benchmarks/weights_io.py [--gigabytes 6] [--shards 12] [--folder DIR]

A Llama of random bfloat16 weights, with the widths of Llama-3.2-3B and as many layers as fit the size, is written to a
temporary folder, which is removed; the disk needs four times the size. Each case runs in a process of its own, from
files that are not in the page cache, and ends when what it wrote is on disk; what comes out is compared bit for bit.
Memory is the peak of RssAnon, sampled every 5 ms, over what it was when everything was imported (for the export from
devices: when the parameters were there).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

LIMITS = {
    "convert": dict(memory_gb=1.2, copy_rate=0.5),
    "export from disk": dict(memory_gb=1.2, copy_rate=0.5),
    "export from 8 devices": dict(memory_gb=1.2, copy_rate=0.5),
    "load on 8 devices": dict(memory_share=1.15),
    "load the converted on 8 devices": dict(memory_share=1.15),
}
WIDTHS = dict(
    vocab_size=128_256,
    hidden_size=3072,
    intermediate_size=8192,
    num_attention_heads=24,
    num_key_value_heads=8,
    head_dim=128,
)
BLOCK_BYTES = 2**24


def config_fields(num_layers: int) -> dict:
    return WIDTHS | dict(
        model_type="llama", architectures=["LlamaForCausalLM"], num_hidden_layers=num_layers, tie_word_embeddings=False,
        max_position_embeddings=8192, rms_norm_eps=1e-5, rope_theta=500_000.0, torch_dtype="bfloat16",
    )  # fmt: skip


def make_source(folder: Path, gigabytes: float, num_shards: int) -> int:
    """Returns the weights' bytes."""
    import ml_dtypes

    from sft_jax.checkpoint.hf import read_config
    from sft_jax.checkpoint.hf_names import hf_tensors
    from sft_jax.checkpoint.safetensors_writer import TensorSpec, plan_shards, write_tensors

    folder.mkdir()
    sizes = []
    for num_layers in (1, 2):
        (folder / "config.json").write_text(json.dumps(config_fields(num_layers)))
        config, _ = read_config(folder)
        sizes.append(sum(2 * int(np.prod(parts[0].hf_shape(config))) for _, parts, _ in hf_tensors(config)))
    per_layer = sizes[1] - sizes[0]
    num_layers = max(1, round((gigabytes * 1e9 - sizes[0]) / per_layer) + 1)
    (folder / "config.json").write_text(json.dumps(config_fields(num_layers)))
    config, _ = read_config(folder)
    dtype = np.dtype(ml_dtypes.bfloat16)
    specs = [TensorSpec(name, dtype, parts[0].hf_shape(config)) for name, parts, _ in hf_tensors(config)]
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**16, 2**24, np.uint16) & 0xBFFF  # no exponent of all ones: no NaN, no infinity

    def tensors():
        for spec in specs:
            start = int(rng.integers(0, bits.size))
            values = np.resize(np.roll(bits, start), spec.num_bytes // 2)
            yield spec.name, values.view(dtype).reshape(spec.shape)

    total = sum(spec.num_bytes for spec in specs)
    limits = (total * (100 + percent) // (100 * num_shards) for percent in range(1000))
    limit = next(limit for limit in limits if len(plan_shards(specs, limit)) <= num_shards)
    write_tensors(folder, specs, tensors(), max_shard_bytes=limit)
    return total


class Peak:
    """Most RssAnon over that at the start, in bytes, while it is open."""

    def __enter__(self) -> "Peak":
        self._start, self.bytes, self._is_done = anonymous_bytes(), 0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._is_done.wait(0.005):
            self.bytes = max(self.bytes, anonymous_bytes() - self._start)

    def __exit__(self, *_: object) -> None:
        self._is_done.set()
        self._thread.join()


def anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def forget_pages(folder: Path) -> None:
    """Put everything on disk and out of the page cache."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copy(folder: Path) -> None:
    (folder / "copy").mkdir()
    for path in (folder / "source").iterdir():
        with path.open("rb") as source, (folder / "copy" / path.name).open("wb") as target:
            while block := source.read(BLOCK_BYTES):
                target.write(block)
            target.flush()
            os.fsync(target.fileno())


def measure(case: str, folder: Path) -> dict:
    """Of one case, in a process of its own."""
    import jax

    from sft_jax.checkpoint import hf, hf_export
    from sft_jax.cli.convert import main as convert
    from sft_jax.config_schema import MeshConfig
    from sft_jax.data.tokenizer import load_tokenizer
    from sft_jax.model.param_dims import logical_dims
    from sft_jax.model.transformer import abstract_params
    from sft_jax.sharding import build_mesh, shardings_for
    from sft_jax.testbed.make import BASE_MODEL

    config, _ = hf.read_config(folder / "source")
    tokenizer = load_tokenizer(BASE_MODEL)
    shapes = {path: leaf.shape for path, leaf in abstract_params(config, "bfloat16").items()}
    mesh = build_mesh(MeshConfig(fsdp=4, tensor=2))
    shardings = shardings_for(mesh, {path: logical_dims(path) for path in shapes}, shapes)

    def load(name: str) -> dict:
        return jax.block_until_ready(hf.load_pretrained(folder / name, config, shardings, "bfloat16"))

    def export(params: dict) -> None:
        hf_export.export_pretrained(folder / "export", params, config, tokenizer, "{{ messages }}", (2,), "bfloat16")

    params = load("source") if case == "export from 8 devices" else {}
    cases: dict[str, Callable[[], object]] = {
        "copy": lambda: copy(folder),
        "convert": lambda: convert([f"--from={folder}/source", f"--to={folder}/converted"]),
        "load on 8 devices": lambda: load("source"),
        "load the converted on 8 devices": lambda: load("converted"),
        "export from disk": lambda: export(hf.open_sources(folder / "converted", config)),
        "export from 8 devices": lambda: export(params),
    }
    forget_pages(folder)
    start = time.perf_counter()
    with Peak() as peak:
        cases[case]()
    seconds = time.perf_counter() - start
    if "export" in case:
        check_equal(folder / "source", folder / "export")
    return {"seconds": seconds, "peak_bytes": peak.bytes}


def check_equal(first: Path, second: Path) -> None:
    """Every tensor of two folders, bit for bit."""
    from sft_jax.checkpoint.safetensors_io import map_tensor, read_index

    ours, theirs = read_index(first), read_index(second)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype
        assert np.array_equal(map_tensor(tensor).view(np.uint16), map_tensor(theirs[name]).view(np.uint16)), name


def run_case(case: str, folder: Path) -> dict:
    flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    command = [sys.executable, __file__, "--folder", str(folder), "--case", case]
    run = subprocess.run(command, env=os.environ | flags, capture_output=True, text=True)
    if run.returncode:
        raise SystemExit(f"{case} failed:\n{run.stderr[-3000:]}")
    return json.loads(run.stdout.splitlines()[-1])


def remove(folder: Path) -> None:
    subprocess.run(["rm", "-rf", str(folder)], check=True)


def report(case: str, result: dict, total: int, copy_seconds: float) -> bool:
    """Print a row; whether it is within its limits."""
    ratios = {
        "memory_gb": result["peak_bytes"] / 1e9,
        "memory_share": result["peak_bytes"] / total,
        "copy_rate": copy_seconds / result["seconds"],
    }
    limits = LIMITS.get(case, {})
    is_met = all(ratios[key] >= limit if key == "copy_rate" else ratios[key] <= limit for key, limit in limits.items())
    cells = [case, f"{result['seconds']:.1f}", f"{total / 1e9 / result['seconds']:.2f}", f"{ratios['copy_rate']:.2f}"]
    cells += [f"{ratios['memory_gb']:.2f}", f"{ratios['memory_share']:.3f}", "" if case == "copy" else str(is_met)]
    print("| " + " | ".join(cells) + " |", flush=True)
    return is_met


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=6)
    parser.add_argument("--shards", type=int, default=12)
    parser.add_argument("--folder", type=Path, help="where to work; default: a new one where temporary files go")
    parser.add_argument("--only", choices=LIMITS, action="append", help="these cases, beside the copy; default: all")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure(options.case, options.folder)))
        return 0
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        total = make_source(folder / "source", options.gigabytes, options.shards)
        num_shards = len(list((folder / "source").glob("*.safetensors")))
        print(f"{total / 1e9:.2f} GB in {num_shards} shards\n", flush=True)
        print("| | seconds | GB/s | of the copy's rate | peak, GB | peak / weights | within its limits |")
        print("|---|---|---|---|---|---|---|", flush=True)
        are_met = []
        for case in ("copy", *(options.only or LIMITS)):
            result = run_case(case, folder)
            if case == "copy":
                copy_seconds = result["seconds"]
                remove(folder / "copy")
            are_met.append(report(case, result, total, copy_seconds))
    return 0 if all(are_met) else 1


if __name__ == "__main__":
    sys.exit(main())
