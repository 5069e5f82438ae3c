"""What every large config needs and would take: each compiled for its hardware, which need not be here.

    make plans                                    cases whose config, jax or libtpu have changed
    .venv-tpu/bin/python benchmarks/plans.py --only 70b_lora --again

One case a process, minutes each. The table, docs/plans.json, is written after every case, so that an interrupted run
goes on where it stopped; the figures in docs/scaling.md and in the heads of the configs follow from it.
"""

import argparse
import dataclasses
import json
import re
import time
from pathlib import Path
from typing import Any

from sft_jax.command_line import read_config
from sft_jax.config_schema import Config, digest_json
from sft_jax.experiment import COMPILER_OPTIONS
from sft_jax.planning.cases import Case, Outcome, run_case
from sft_jax.planning.plan import versions
from sft_jax.planning.roofline import READING

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "docs" / "plans.json"
PAGE = ROOT / "docs" / "scaling.md"
MARKS = ("<!-- benchmarks/plans.py writes from here -->\n", "<!-- to here -->\n")
_GIB = 2**30

# By name: the config, the topology, and what else the command says. The first case of a config is in its docstring.
CASES: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "70b": ("70b", "v5p:4x4x4", ()),
    "8b": ("8b", "v6e:4x4", ("--config.batch.batch_size=16",)),
    "70b_lora": ("70b_lora", "v5e:8x8", ()),
    "long_context_8b": ("long_context_8b", "v5p:4x4x4", ()),
    "qwen3_30b_a3b": ("qwen3_30b_a3b", "v5p:2x4x4", ()),
    "405b": ("405b", "v5p:8x8x16", ()),
    "gemma3_27b": ("gemma3_27b", "v5p:2x4x4", ()),
    "mixtral_8x7b": ("mixtral_8x7b", "v5p:4x4x4", ()),
    "1b_single_host": ("1b_single_host", "v5e:2x4", ()),
    "8b on two slices": ("8b", "v6e:4x4", ("--num-slices=2", "--config.batch.batch_size=32")),
    "70b on 256 chips": ("70b", "v5p:4x8x8", ("--config.batch.batch_size=256",)),
    "70b on 1024 chips": ("70b", "v5p:8x8x16", ("--config.batch.batch_size=1024",)),
    "70b on v6e": ("70b", "v6e:16x16", ("--config.batch.batch_size=256",)),
    "8b on v6e": ("8b", "v6e:16x16", ("--config.batch.batch_size=512", "--config.batch.grad_accum_steps=2")),
    "llama2_70b on v5p": (
        "70b",
        "v5p:8x8x8",
        ("--config.model.preset=llama2-70b", "--config.data.max_seq_len=4096", "--config.batch.batch_size=512"),
    ),
    "mixtral on v5p": (
        "mixtral_8x7b",
        "v5p:4x4x8",
        ("--config.data.max_seq_len=4096", "--config.batch.batch_size=128"),
    ),
}

# Tokens a second and chip, and MFU, that MaxText publishes of pre-training the same model at the same length on the
# same chips. https://maxtext.readthedocs.io/en/latest/reference/models/tiering.html
PUBLISHED = {
    "8b on v6e": (7207, 0.4546),
    "70b on v6e": (960, 0.5033),
    "llama2_70b on v5p": (692, 0.654),
    "mixtral on v5p": (2909, 0.5256),
}

# One row a chip of the same model, on more and more of them.
WEAK_SCALING = ("70b", "70b on 256 chips", "70b on 1024 chips")


def case_args(name: str) -> tuple[str, ...]:
    """Of `sft-jax plan`."""
    config, topology, rest = CASES[name]
    return (f"--config=configs/{config}.py", f"--topology={topology}", *rest)


def digest(name: str) -> str:
    """sha256 of what the case's config changes of the defaults, and of its topology. What neither the program nor its
    memory depends on is left out: the run, its files and its intervals."""
    config, topology, rest = CASES[name]
    where = [option for option in rest if not option.startswith("--config.")]
    options = [option for option in rest if option not in where]
    read, default = read_config([f"--config={ROOT}/configs/{config}.py", *options]), Config()
    changed: dict[str, Any] = {"topology": " ".join([topology, *where]), "sources": len(read.data.train)}
    for section in ("model", "data", "batch", "loss", "optimizer", "mesh", "lora"):
        fields = dataclasses.asdict(getattr(read, section)).items()
        changed[section] = {
            field: value
            for field, value in fields
            if value != getattr(getattr(default, section), field)
            and (section, field) not in {("model", "path"), ("data", "train"), ("data", "eval"), ("data", "tokenizer")}
        }
    return digest_json(changed)[:16]


def make_row(name: str) -> dict[str, Any]:
    start = time.monotonic()
    outcome = run_case(Case(name, case_args(name)))
    return row_of(name, outcome) | {"seconds_in_all": round(time.monotonic() - start)}


def row_of(name: str, outcome: Outcome) -> dict[str, Any]:
    row: dict[str, Any] = {"digest": digest(name), "command": " ".join(("sft-jax plan", *case_args(name)))}
    row |= {"versions": versions(), "reading": READING, "told": COMPILER_OPTIONS["tpu"]}
    if outcome.plan is None:
        return row | {"problem": outcome.problem}
    kept = ("fits", "peak_bytes", "hbm_bytes", "bytes", "mesh", "num_params", "flops", "memory_bytes",
            "collective_bytes", "collectives", "step_seconds", "seconds", "bound", "mfu", "tokens_per_second",
            "num_chips", "compile_seconds", "compiler_says", "uncounted_kernels")  # fmt: skip
    return row | {field: outcome.plan[field] for field in kept}


def is_current(name: str, table: dict[str, Any]) -> bool:
    row = table.get(name, {})
    found = (row.get("digest"), row.get("versions"), row.get("reading"), row.get("told"))
    return found == (digest(name), versions(), READING, COMPILER_OPTIONS["tpu"])


def has_time(row: dict[str, Any]) -> bool:
    """It fits, and what the step takes was read as it is now."""
    return row.get("fits", False) and row.get("reading") == READING


def page_table(table: dict[str, Any]) -> str:
    """The lines of docs/scaling.md."""
    lines = ["| command | peak per device | parameters and optimizer | sent a step | step by the roofline | MFU |"]
    lines.append("|---|---|---|---|---|---|")
    for name in CASES:
        row = table.get(name)
        if row is None:
            continue
        if "problem" in row:
            lines.append(f"| `{row['command']}` | {row['problem']} | | | | |")
            continue
        over = "" if row["fits"] else ": does NOT fit"
        cells = [f"`{row['command']}`", f"{_gib(row['peak_bytes'])} of {_gib(row['hbm_bytes'])} GiB{over}"]
        cells.append(f"{_gib(row['bytes']['parameters'] + row['bytes']['optimizer'])} GiB")
        if row["fits"] and not has_time(row):
            cells += ["", "to be read again", ""]
        elif row["fits"]:
            cells += [f"{row['collective_bytes'] / _GIB:,.0f} GiB", f"{row['step_seconds']:.2f} s ({row['bound']})"]
            cells.append(f"{row['mfu']:.1%}")
        lines.append("| " + " | ".join(cells) + " |" + " |" * (6 - len(cells)))
    lines += published_table(table)
    lines += weak_scaling_table(table)
    used = {" and ".join(f"{k} {v}" for k, v in row["versions"].items()) for row in table.values()}
    return "\n".join(lines) + f"\n\nCompiled by {'; '.join(sorted(used))}.\n"


def published_table(table: dict[str, Any]) -> list[str]:
    rows = {name: table[name] for name in PUBLISHED if has_time(table.get(name, {}))}
    lines = [
        "",
        "| tokens a second and chip | by the roofline | MaxText publishes | ratio | MFU, each by its own count |",
    ]
    lines.append("|---|---|---|---|---|")
    for name, row in rows.items():
        tokens, mfu = PUBLISHED[name]
        ours = row["tokens_per_second"] / row["num_chips"]
        cells = [f"`{row['command']}`", f"{ours:,.0f}", f"{tokens:,}", f"{ours / tokens:.2f}"]
        lines.append("| " + " | ".join([*cells, f"{row['mfu']:.1%}, {mfu:.1%}"]) + " |")
    return lines if rows else []


def weak_scaling_table(table: dict[str, Any]) -> list[str]:
    rows = [table[name] for name in WEAK_SCALING if has_time(table.get(name, {}))]
    lines = ["", "| one row a chip | chips | peak per device | sent by each a step | step by the roofline | MFU |"]
    lines.append("|---|---|---|---|---|---|")
    for row in rows:
        cells = [f"`{row['command']}`", f"{row['num_chips']:,}", f"{_gib(row['peak_bytes'])} GiB"]
        cells += [f"{row['collective_bytes'] / _GIB:,.0f} GiB", f"{row['step_seconds']:.2f} s", f"{row['mfu']:.1%}"]
        lines.append("| " + " | ".join(cells) + " |")
    return lines if rows else []


def head_lines(name: str, table: dict[str, Any]) -> str:
    """What the head of a config says of memory and of time."""
    _, topology, rest = CASES[name]
    row, where = table.get(name), " ".join((topology, *(("with", *rest) if rest else ())))
    if row is None:
        return "Memory: not planned yet; make plans does it."
    if "problem" in row:
        return f"Memory: make plans found no plan for {where}; docs/plans.json says why."
    memory = f"Memory: {_gib(row['peak_bytes'])} of {_gib(row['hbm_bytes'])} GiB a device on {where}"
    if not row["fits"]:
        return f"{memory}, which does NOT fit (`make plans`)."
    if not has_time(row):
        return f"{memory} (`make plans`)."
    hours = 1e9 / row["tokens_per_second"] / 3600
    return f"{memory} (`make plans`).\nTime: by the roofline {hours:,.1f} hours for a billion tokens."


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / _GIB:.2f}"


def write(table: dict[str, Any]) -> None:
    TABLE.write_text(json.dumps({name: table[name] for name in CASES if name in table}, indent=1) + "\n")
    before, _, after = _split_page(PAGE.read_text())
    PAGE.write_text(before + MARKS[0] + page_table(table) + MARKS[1] + after)
    for name, (config, _, _) in CASES.items():
        if name == config:
            path = ROOT / "configs" / f"{config}.py"
            path.write_text(re.sub(r"^Memory: .*(\nTime: .*)?", head_lines(name, table), path.read_text(), flags=re.M))


def _split_page(text: str) -> tuple[str, str, str]:
    before, rest = text.split(MARKS[0])
    table, after = rest.split(MARKS[1])
    return before, table, after


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--again", action="store_true", help="those that are current too")
    options = parser.parse_args()
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    for name in options.only:
        if is_current(name, table) and not options.again:
            print(f"{name}: current")
            continue
        print(f"{name}: compiling", flush=True)
        table[name] = make_row(name)
        write(table)
        print(table[name].get("problem") or head_lines(name, table), flush=True)
    write(table)


if __name__ == "__main__":
    main()
