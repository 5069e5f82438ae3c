"""Data preparation against a bare tokenizer loop and TRL, on the same cores, one after the other; prints ratios.

    SFT_JAX_ASSETS=DIR python benchmarks/data_prep.py [--trl-python VENV/bin/python] [--repeat 10] [--rounds 1]

From JSON lines to tokens, masks and a packing plan at 2,048. The data is GSM8K as chats, `--repeat` times over, each
row made unique by a counter. The loop reads JSON, encodes prompt and answer, and keeps ids and mask; it checks nothing
and writes nothing. sft_jax remembers the ids of words, which come again with each time over; the forgetful run drops
them at the end of each, so that it knows no more than one reading of GSM8K teaches. TRL's Python needs torch==2.13.0
transformers==5.23.0 trl==1.16.0 datasets sentencepiece.

Each run has a process of its own. Its imports are not timed; opening the tokenizer is. All but one run have one core.
Beside the wall's, the seconds of all its processes on their cores are shown: those hold on a busy machine too. With
`--rounds`, speeds are medians, and ratios the medians of those within a round.
"""

import argparse
import itertools
import json
import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from child import run_child
from gsm8k import CHATS, NUM_ROWS, make_config, write_chats

HERE = Path(__file__).parent
MAX_SEQ_LEN = 2048
LOOP, LOOP_TWICE = "loop", "two loops at once"
OURS, OURS_FORGETFUL, OURS_BY_TWO = "sft_jax", "sft_jax, forgetful", "sft_jax, 2 processes"
TRL = "trl"
BYTE_LEVEL = " (byte-level)"

Encode = Callable[[str, str], tuple[list[int], list[int], list[int]]]
"""(question, answer) -> ids of the prompt, of the supervised answer with its stop token, and of what stands behind."""


def open_sentencepiece() -> Encode:
    """As Llama-2's template has them."""
    import sentencepiece

    assets = Path(os.environ["SFT_JAX_ASSETS"])
    model = sentencepiece.SentencePieceProcessor(model_file=str(assets / "tokenizers/llama2/tokenizer.model"))

    def encode(question: str, answer: str) -> tuple[list[int], list[int], list[int]]:
        return [1, *model.encode(f"[INST] {question} [/INST]")], [*model.encode(f"{answer} "), 2], []

    return encode


def open_byte_level() -> Encode:
    """As ChatML has them, with a tokenizer.json."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(byte_level_folder() / "tokenizer.json"))

    newline = tokenizer.encode("\n").ids

    def encode(question: str, answer: str) -> tuple[list[int], list[int], list[int]]:
        prompt = tokenizer.encode(f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n")
        return prompt.ids, tokenizer.encode(f"{answer}<|im_end|>").ids, newline

    return encode


def byte_level_folder() -> Path:
    return Path(os.environ["SFT_JAX_ASSETS"]) / "tokenizers/minimind"


def run_loop(folder: Path, open_encode: Callable[[], Encode]) -> dict:
    encode = open_encode()
    num_examples = num_ids = num_supervised = 0
    with (folder / CHATS).open() as file:
        for line in file:
            question, answer = (message["content"] for message in json.loads(line)["messages"])
            prompt_ids, answer_ids, rest = encode(question, answer)
            ids = np.array(prompt_ids + answer_ids + rest, np.int32)
            mask = np.zeros(len(ids), np.float32)
            mask[len(prompt_ids) : len(prompt_ids) + len(answer_ids)] = 1
            num_examples += 1
            num_ids += len(ids)
            num_supervised += len(answer_ids)
    return {"examples": num_examples, "ids": num_ids, "supervised": num_supervised}


def run_ours(folder: Path, processes: int, byte_level: bool) -> dict:
    from sft_jax.data.pipeline import open_dataset
    from sft_jax.data.rendering import open_renderer

    def prepare() -> dict:
        tokenizer = {"tokenizer": str(byte_level_folder()), "chat_template": "chatml"} if byte_level else {}
        config = make_config(folder, MAX_SEQ_LEN, prepare_processes=processes, **tokenizer)
        shutil.rmtree(config.data.store_dir, ignore_errors=True)
        renderer = open_renderer(config.data, config.model.path)
        report = open_dataset(
            config.data.train, config, renderer, batch_size=64, num_epochs=1, num_steps=None, shuffle=True
        ).report
        num_ids = report["tokens"] + report["examples"]  # tokens are the positions at which one is predicted
        return {
            "examples": report["examples"],
            "ids": num_ids,
            "supervised": report["supervised_tokens"],
            "fill": report["fill_fraction"],
        }

    return timed(prepare)


def forget_words(every: int) -> None:
    """After so many texts, in this process."""
    from sft_jax.data.sentencepiece_words import Words

    encode, num_texts = Words.encode, itertools.count(1)

    def encode_and_forget(words: Words, text: str) -> bytes:
        if next(num_texts) % every == 0:
            words.clear()
        return encode(words, text)

    Words.encode = encode_and_forget  # type: ignore[assignment, method-assign]


def run_forgetful(folder: Path) -> dict:
    forget_words(every=2 * NUM_ROWS)  # a question and an answer each
    return run_ours(folder, 1, byte_level=False)


def timed(run: Callable[[], dict]) -> dict:
    """What `run` returns, with its seconds: on the wall, and on the cores, those of processes it has ended included."""

    def cpu_seconds() -> float:
        usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        return sum(usage.ru_utime + usage.ru_stime for usage in usages)

    start, start_cpu = time.perf_counter(), cpu_seconds()
    found = run()
    return found | {"seconds": time.perf_counter() - start, "cpu_seconds": cpu_seconds() - start_cpu}


CASES: dict[str, Callable[[Path], dict]] = {
    LOOP: lambda folder: timed(lambda: run_loop(folder, open_sentencepiece)),
    OURS: lambda folder: run_ours(folder, 1, byte_level=False),
    OURS_FORGETFUL: run_forgetful,
    OURS_BY_TWO: lambda folder: run_ours(folder, 2, byte_level=False),
    LOOP + BYTE_LEVEL: lambda folder: timed(lambda: run_loop(folder, open_byte_level)),
    OURS + BYTE_LEVEL: lambda folder: run_ours(folder, 1, byte_level=True),
}


def measure(folder: Path, cores: list[int], trl_python: str, rounds: int) -> dict[str, list[dict]]:
    """By case, what each round gave; of TRL there is one."""
    env = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu"}
    results: dict[str, list[dict]] = {}
    for case in [*CASES] * rounds:
        used = cores if case == OURS_BY_TWO else cores[:1]
        found = run_child([sys.executable, __file__, "--case", case, str(folder)], used, env)
        results.setdefault(case, []).append(found)
        if case == OURS_BY_TWO:  # what the machine itself gives to two at once
            commands = [([sys.executable, __file__, "--case", LOOP, str(folder)], [core], env) for core in cores]
            with ThreadPoolExecutor(len(cores)) as threads:
                both = list(threads.map(run_child, *zip(*commands, strict=True)))
            joined = {name: sum(one[name] for one in both) for name in both[0]}
            results.setdefault(LOOP_TWICE, []).append(joined | {"seconds": max(one["seconds"] for one in both)})
    if trl_python:
        command = [trl_python, str(HERE / "data_prep_trl.py"), str(folder)]
        run_child([*command, "--tokenizer-from", os.environ["SFT_JAX_ASSETS"]], cores, env)
        results[TRL] = [run_child(command, cores[:1], env)]
    else:
        print("trl: skipped, for want of --trl-python")
    return results


def print_table(results: dict[str, list[dict]]) -> None:
    print(f"{'':24}{'examples/s':>11}{'per CPU s':>11}{'tokens/s':>12}{'of loop':>9}{'x trl':>7}{'MiB':>7}{'fill':>9}")
    rounds = {case: np.array([one["examples"] / one["seconds"] for one in found]) for case, found in results.items()}
    speeds = {case: float(np.median(found)) for case, found in rounds.items()}
    for case, found in results.items():
        loop = rounds[LOOP + BYTE_LEVEL if case.endswith(BYTE_LEVEL) else LOOP]
        per_trl = f"{speeds[case] / speeds[TRL]:7.2f}" if TRL in speeds and BYTE_LEVEL not in case else f"{'':7}"
        fill = f"{found[0]['fill']:9.2%}" if "fill" in found[0] else ""
        ids_per_example = found[0]["ids"] / found[0]["examples"]
        per_cpu = np.median([one["examples"] / one["cpu_seconds"] for one in found])
        print(
            f"{case:24}{speeds[case]:11,.0f}{per_cpu:11,.0f}{speeds[case] * ids_per_example:12,.0f}"
            f"{np.median(rounds[case] / loop):9.2f}{per_trl}{max(one['peak_mib'] for one in found):7.0f}{fill}"
        )
    for one, two in ((OURS, OURS_BY_TWO), (LOOP, LOOP_TWICE)):
        print(f"{two}: {np.median(rounds[two] / rounds[one]):.2f} times {one}")
    for name in ("examples", "ids", "supervised"):
        for suffix in ("", BYTE_LEVEL):
            of_one = [case for case in results if case.endswith(BYTE_LEVEL) == bool(suffix) and case != LOOP_TWICE]
            totals = {case: sorted({one[name] for one in results[case]}) for case in of_one}
            values = {value for found in totals.values() for value in found}
            verdict = "agree" if len(values) == 1 else f"DIFFER: {totals}"
            print(f"{name}{suffix}: {max(values):,}, {verdict}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl-python", default="", help="a Python that has trl; without it, TRL is not run")
    parser.add_argument("--repeat", type=int, default=10, help=f"times {NUM_ROWS:,} examples")
    parser.add_argument(
        "--rounds", type=int, default=1, help="each case but TRL so often, in turns; medians count, of ratios too"
    )
    parser.add_argument("--cores", default="0,1", help="two processors; all but one run have the first alone")
    parser.add_argument("--case", nargs=2, metavar=("NAME", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        name, folder = options.case
        print(json.dumps(CASES[name](Path(folder))))
        return
    with tempfile.TemporaryDirectory() as folder:
        write_chats(Path(os.environ["SFT_JAX_ASSETS"]), Path(folder), options.repeat)
        print(f"{options.repeat * NUM_ROWS:,} examples; cores {options.cores}; rows of {MAX_SEQ_LEN:,}")
        print_table(
            measure(Path(folder), [int(core) for core in options.cores.split(",")], options.trl_python, options.rounds)
        )


if __name__ == "__main__":
    main()
