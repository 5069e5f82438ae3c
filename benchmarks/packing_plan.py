"""Time, memory and fill of one epoch's packing plan, each case in a process of its own.

    python benchmarks/packing_plan.py [--examples 1000000 10000000] [--max-seq-len 2048] [--core 0]

Seconds and memory are those of `plan_epoch` and `attention_costs`, above a process that has the lengths already.
"""

import argparse
import json
import resource
import sys
import time

import numpy as np
from child import run_child

from sft_jax.data.packing import attention_costs, plan_epoch

# Log-normal: the mean and the deviation of log(length), the shortest, the longest.
DISTRIBUTIONS = {
    "gsm8k": (5.29, 0.33, 81, 584),  # as GSM8K's chats are with Llama-2's tokenizer
    "log-normal": (5.5, 1.2, 4, 1_000_000),  # as chats of all kinds are
}


def draw_lengths(name: str, num_examples: int, max_seq_len: int) -> np.ndarray:
    mean, deviation, shortest, longest = DISTRIBUTIONS[name]
    lengths = np.random.default_rng(0).lognormal(mean, deviation, num_examples)
    return np.clip(lengths, shortest, min(longest, max_seq_len)).astype(np.int32)


def measure(name: str, num_examples: int, max_seq_len: int) -> dict:
    def peak_mib() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    lengths = draw_lengths(name, num_examples, max_seq_len)
    plan_epoch(lengths[:1000], max_seq_len, seed=0, epoch=0)  # what numpy loads at the first use
    before, start = peak_mib(), time.perf_counter()
    plan = plan_epoch(lengths, max_seq_len, seed=0, epoch=0)
    attention_costs(plan, lengths)
    seconds, grown = time.perf_counter() - start, peak_mib() - before
    fill = int(lengths.sum(dtype=np.int64)) / (plan.num_rows * max_seq_len)
    return {"seconds": seconds, "mib": grown, "rows": plan.num_rows, "fill": fill}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, nargs="+", default=[1_000_000, 10_000_000])
    parser.add_argument("--max-seq-len", type=int, default=2048)
    parser.add_argument("--core", type=int, default=0)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure(options.case, options.examples[0], options.max_seq_len)))
        return
    print(f"rows of {options.max_seq_len:,}; core {options.core}")
    print(f"{'lengths':12}{'examples':>12}{'rows':>12}{'seconds':>9}{'peak MiB':>10}{'fill':>9}")
    for name in DISTRIBUTIONS:
        for num_examples in options.examples:
            case = ["--case", name, "--examples", str(num_examples), "--max-seq-len", str(options.max_seq_len)]
            found = run_child([sys.executable, __file__, *case], [options.core])
            print(
                f"{name:12}{num_examples:12,}{found['rows']:12,}{found['seconds']:9.2f}{found['mib']:10.0f}"
                f"{found['fill']:9.2%}"
            )


if __name__ == "__main__":
    main()
