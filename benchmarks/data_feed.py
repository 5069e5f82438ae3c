"""How fast packed batches come from a warm store, and how long a second start takes; each case in its own process.

    SFT_JAX_ASSETS=DIR python benchmarks/data_feed.py [--cores 0,1] [--repeat 14] [--seconds 5]

The data is GSM8K as chats, `--repeat` times over, each row made unique by a counter: 14 times are 104,622 examples.
Tokens are positions of the batches, padding included, as a training step has them.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

from child import run_child
from gsm8k import make_config, write_chats

READ_THREADS = (0, 1, 4)


def measure(folder: Path, read_threads: int, batch_size: int, max_seq_len: int, seconds: float) -> dict:
    from sft_jax.data.pipeline import open_dataset
    from sft_jax.data.rendering import open_renderer

    config = make_config(folder, max_seq_len, read_threads=read_threads)
    start = time.perf_counter()
    renderer = open_renderer(config.data, config.model.path)
    data = open_dataset(
        config.data.train, config, renderer, batch_size=batch_size, num_epochs=1000, num_steps=None, shuffle=True
    )
    opened = time.perf_counter()
    batches = data.iterate()
    next(batches)
    start_reading, start_cpu, num_tokens, num_real = time.perf_counter(), time.process_time(), 0, 0
    while num_tokens == 0 or time.perf_counter() - start_reading < seconds:
        batch = next(batches)
        num_tokens += batch.inputs.size
        num_real += int((batch.segment_ids > 0).sum())
    wall, cpu = time.perf_counter() - start_reading, time.process_time() - start_cpu
    return {
        "examples": data.report["examples"],
        "open_seconds": opened - start,
        "tokens_per_second": num_tokens / wall,
        "tokens_per_cpu_second": num_tokens / cpu,
        "fill": num_real / num_tokens,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cores", default="0,1", help="processors to use")
    parser.add_argument("--repeat", type=int, default=14)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--max-seq-len", type=int, default=2048)
    parser.add_argument("--seconds", type=float, default=5, help="of reading, for each case")
    parser.add_argument("--case", nargs=2, metavar=("FOLDER", "THREADS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    shape = (options.batch_size, options.max_seq_len)
    if options.case:
        print(json.dumps(measure(Path(options.case[0]), int(options.case[1]), *shape, options.seconds)))
        return
    cores = [int(core) for core in options.cores.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        write_chats(Path(os.environ["SFT_JAX_ASSETS"]), Path(folder), options.repeat)

        def run_case(threads: int, seconds: float) -> dict:
            arguments = [f"--batch-size={shape[0]}", f"--max-seq-len={shape[1]}", f"--seconds={seconds}"]
            return run_child([sys.executable, __file__, "--case", folder, str(threads), *arguments], cores)

        cold = run_case(0, 0.0)
        print(f"cores {options.cores}; {cold['examples']:,} examples; batches of {shape[0]} rows of {shape[1]:,}")
        print(f"first start, with tokenizing: {cold['open_seconds']:.1f} s")
        print(f"{'threads':>7}{'start, s':>10}{'M tokens/s':>12}{'per CPU second':>16}{'fill':>9}{'peak MiB':>10}")
        for threads in READ_THREADS:
            found = run_case(threads, options.seconds)
            print(
                f"{threads:7}{found['open_seconds']:10.2f}{found['tokens_per_second'] / 1e6:12.1f}"
                f"{found['tokens_per_cpu_second'] / 1e6:16.1f}{found['fill']:9.2%}{found['peak_mib']:10.0f}"
            )


if __name__ == "__main__":
    main()
