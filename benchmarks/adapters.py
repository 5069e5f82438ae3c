"""The demo trained in full, by LoRA, by DoRA and by QLoRA: what is learned, and what it takes.

    python benchmarks/adapters.py [--only lora,rslora,qlora_int8] [--json FILE]

Each case is `configs/demo.py` with the fields of CASES changed, in a process of its own, and must reach the demo's
bars. About two minutes each on 2 idle cores.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from child import run_child

_ADAPTED = {
    "lora.rank": 8,
    "lora.modules_to_save": ("embed_tokens",),  # the template's tokens are new
    "lora.alpha": 64.0,
    "optimizer.learning_rate": 3e-3,
    # configs/demo.py says what a small one does to rows of the embedding; that goes with the rate.
    "optimizer.eps": 3e-4,
}
CASES: dict[str, dict] = {
    "full": {},
    "lora": _ADAPTED,
    "rslora": _ADAPTED | {"lora.use_rslora": True, "lora.alpha": 22.6},  # about the same factor: alpha / sqrt(rank)
    "dora": _ADAPTED | {"lora.use_dora": True},
    "qlora_int8": _ADAPTED | {"lora.quantize": "int8"},
    "qlora_nf4": _ADAPTED | {"lora.quantize": "nf4"},
}


def run_case(name: str, folder: Path) -> dict:
    """Train, ask the questions, and weigh what there is."""
    from sft_jax.cli.demo import DEMO_CONFIG, ask
    from sft_jax.command_line import read_config
    from sft_jax.experiment import open_renderer, place_model, use_compilation_cache
    from sft_jax.inference.pretrained import open_pretrained
    from sft_jax.main import run
    from sft_jax.testbed.evaluation import read_questions, score_answers
    from sft_jax.testbed.make import TESTBED_DIR, make_testbed

    make_testbed(Path(TESTBED_DIR))
    fields = CASES[name] | {"run.dir": str(folder / name)}
    config = read_config([f"--config={DEMO_CONFIG}", *(f"--config.{path}={value}" for path, value in fields.items())])
    use_compilation_cache(config)
    start, cpu_start = time.monotonic(), time.process_time()
    run_dir = Path(run(config))
    seconds, cpu_seconds = time.monotonic() - start, time.process_time() - cpu_start
    trainable, frozen = place_model(config, open_renderer(config)).leaves
    model = open_pretrained(str(run_dir / "export"), config.model.compute_dtype)
    scores = score_answers(ask(model, read_questions(Path(TESTBED_DIR) / "questions.jsonl"), config))
    records = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    losses = [record["eval/held_out/loss"] for record in records if "eval/held_out/loss" in record]
    return vars(scores) | {
        "held_out_loss": losses[-1],
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "trainable": sum(map(_size, trainable.values())),
        "frozen_bytes": sum(_size(leaf) * leaf.dtype.itemsize for leaf in frozen.values()),
        "trained_bytes": sum(_size(leaf) * leaf.dtype.itemsize for leaf in trainable.values()),
        "adapter_file_bytes": sum(file.stat().st_size for file in (run_dir / "adapter").glob("*.safetensors")),
    }


def _size(leaf: Any) -> int:
    size = 1
    for dim in leaf.shape:
        size *= dim
    return size


def print_table(results: dict[str, dict]) -> None:
    print(
        "| | held-out answers exact | stop | format | held-out loss | parameters that train | frozen, KiB "
        "| trained, gradients and moments, KiB | adapter file, KiB | seconds | of the CPU |\n" + "|---" * 11 + "|"
    )
    for name, row in results.items():
        rates = " | ".join(f"{row[rate]:.1%}" for rate in ("held_out_exact", "stop_rate", "format_obeyed"))
        sizes = (row["frozen_bytes"], 4 * row["trained_bytes"], row["adapter_file_bytes"])
        weights = " | ".join(f"{size / 1024:,.0f}" for size in sizes)
        print(
            f"| {name} | {rates} | {row['held_out_loss']:.4f} | {row['trainable']:,} | {weights} "
            f"| {row['seconds']:.0f} | {row['cpu_seconds']:.0f} |"
        )


def unmet_bars(results: dict[str, dict]) -> list[str]:
    """The demo's bars, as `sft_jax.testbed.evaluation` has them."""
    from sft_jax.testbed.evaluation import Scores, check_bars

    before = Scores(0.0, 0.0, 0.0)
    rates = ("held_out_exact", "stop_rate", "format_obeyed")
    after = {name: Scores(*(row[rate] for rate in rates)) for name, row in results.items()}
    return [f"{name}: {line}" for name, scores in after.items() for line in check_bars(before, scores)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="full,lora,dora,qlora_nf4", help=f"of {', '.join(CASES)}")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--cores", default="0,1")
    parser.add_argument("--case", nargs=2, metavar=("NAME", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        name, folder = options.case
        print(json.dumps(run_case(name, Path(folder))))
        return 0
    cores, results = [int(core) for core in options.cores.split(",")], {}
    with tempfile.TemporaryDirectory() as folder:
        for name in options.only.split(","):
            command = [sys.executable, __file__, "--case", name, folder]
            results[name] = run_child(command, cores, {"JAX_PLATFORMS": "cpu"})
            print(f"{name}: {json.dumps(results[name])}", file=sys.stderr, flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    print_table(results)
    unmet = unmet_bars(results)
    for line in unmet:
        print(f"error: {line}", file=sys.stderr)
    return 1 if unmet else 0


if __name__ == "__main__":
    sys.exit(main())
