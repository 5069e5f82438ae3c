"""`sft-jax plan`: the train step compiled for hardware that is not here: whether it fits, what it is made of, how long
it would take."""

import argparse
import json
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from sft_jax.command_line import config_parser, read_config, run_command
from sft_jax.config_schema import Config
from sft_jax.datatypes import ConfigError
from sft_jax.planning.cases import Case, Outcome, run_case
from sft_jax.planning.compiled_step import planned_model
from sft_jax.planning.plan import Plan, make_plan
from sft_jax.planning.search import search
from sft_jax.planning.topology import parse_topology

_SHOWN_BUFFERS = 10


def main(args: list[str]) -> int:
    """0: it fits, or one of the cases does. 1: it does not."""
    parser = config_parser(
        "sft-jax plan",
        "Compile the train step for a topology, which need not be here; print whether it fits and what it would take.",
        "sft-jax plan --config=configs/70b.py --topology=v5p:4x4x4",
    )
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--topology", help="such as v5p:4x4x4, v6e-256, or cpu:8 for fake devices")
    where.add_argument("--topologies", help="several, with commas between: a table of them")
    parser.add_argument("--num-slices", type=int, default=1, help="so many such slices")
    parser.add_argument(
        "--search", action="store_true", help="try meshes, microbatches and remat policies; many compiles"
    )
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    options, rest = parser.parse_known_args(args)
    config = read_config(rest)
    if options.topologies or options.search:
        return _compare(options, config, rest)
    plan = make_plan(config, parse_topology(options.topology, options.num_slices))
    if options.json:
        print(json.dumps(plan.to_json(), indent=1))
    else:
        describe_plan(Console(), plan)
    return 0 if plan.fits else 1


def _compare(options: argparse.Namespace, config: Config, rest: list[str]) -> int:
    slices = f"--num-slices={options.num_slices}"
    topologies = [
        parse_topology(name, options.num_slices) for name in (options.topologies or options.topology).split(",")
    ]
    if options.search and len(topologies) > 1:
        raise ConfigError("--search: is of one topology, and --topologies names more. Name one with --topology.")
    cases = [
        Case(topology.name, (*rest, f"--topology={topology.chip.name}:{'x'.join(map(str, topology.dims))}", slices))
        for topology in topologies
    ]
    if options.search:
        outcomes = search(cases[0].args, config, planned_model(config), topologies[0].num_devices, _run_aloud)
    else:
        outcomes = [_run_aloud(case) for case in cases]
    if options.json:
        print(json.dumps({"cases": [outcome.to_json() for outcome in outcomes]}, indent=1))
    else:
        describe_outcomes(Console(), outcomes)
        if options.search and outcomes[0].fits:
            Console().print("best: " + " ".join(outcomes[0].case.args), soft_wrap=True, highlight=False)
    return 0 if any(outcome.fits for outcome in outcomes) else 1


def _run_aloud(case: Case) -> Outcome:
    """Each outcome is said as soon as it is there: an hour's search that is interrupted is not lost."""
    print(f"compiling: {case.label}", file=sys.stderr, flush=True)
    outcome = run_case(case)
    said = f"NO: {outcome.problem}"
    if outcome.plan is not None:
        fits = f"{_seconds(outcome.step_seconds)} s" if outcome.fits else "does NOT fit"
        said = f"{_size(outcome.plan['peak_bytes'])} of {_size(outcome.plan['hbm_bytes'])}, {fits}"
    print(f"  {said}", file=sys.stderr, flush=True)
    return outcome


def describe_outcomes(console: Console, outcomes: Sequence[Outcome]) -> None:
    table = Table(
        "case", "fits", "peak of", "memory", "step s", "bound by", "MFU", "tokens/s/chip", "sent", "chip-hours"
    )
    for outcome in outcomes:
        plan = outcome.plan
        if plan is None:
            table.add_row(outcome.case.label, "NO", outcome.problem)
            continue
        row = [outcome.case.label, "yes" if plan["fits"] else "NO", _size(plan["peak_bytes"]), _size(plan["hbm_bytes"])]
        if plan["step_seconds"]:
            per_chip = plan["tokens_per_second"] / plan["num_chips"]
            row += [_seconds(plan["step_seconds"]), plan["bound"], f"{plan['mfu']:.1%}", f"{per_chip:,.0f}"]
            row += [_size(plan["collective_bytes"]), f"{plan['chip_hours']:,.1f}" if plan["num_steps"] else ""]
        table.add_row(*row)
    console.print(table)


def describe_plan(console: Console, plan: Plan) -> None:
    def say(name: str, text: str) -> None:
        console.print(f"{name:14}{text}", soft_wrap=True, highlight=False)

    axes = ", ".join(f"{axis} {size}" for axis, size in plan.mesh.items() if size > 1) or "one device"
    say("hardware", f"{plan.topology.name}: {plan.topology.num_chips} chips; {axes}")
    over = plan.peak_bytes - plan.hbm_bytes
    if plan.fits:
        say("fits", f"yes: {_size(plan.peak_bytes)} of {_size(plan.hbm_bytes)} per device")
    else:
        say("fits", f"NO: {_size(plan.peak_bytes)} of {_size(plan.hbm_bytes)} per device, {_size(over)} too much")
        for hint in ways_to_fit(plan):
            say("", hint)
    say("bytes", ", ".join(f"{kind.replace('_', ' ')} {_size(size)}" for kind, size in plan.bytes.items()))
    if plan.host_bytes:
        say("host", f"{_size(plan.host_bytes)} of the optimizer for each device; moving it is not in the time")
    if plan.buffers:
        table = Table("size", "shape", "made at", "of", title="temporaries at the peak")
        for buffer in plan.buffers[:_SHOWN_BUFFERS]:
            shape = f"{buffer.shape.dtype}{list(buffer.shape.dims)}"
            table.add_row(_size(buffer.num_bytes), shape, buffer.source, buffer.op_name[-60:])
        console.print(table)
    if plan.work:
        _describe_work(console, plan)
    say("compiled", f"in {plan.compile_seconds:.0f} s by " + ", ".join(" ".join(v) for v in plan.versions.items()))


def _describe_work(console: Console, plan: Plan) -> None:
    work = plan.work
    assert work is not None
    table = Table("collective", "along", "how", "times", "sent", "s", title="collectives of one device in a step")
    for (kind, axes, is_async), (count, sent, seconds) in sorted(work.collectives.items()):
        row = (f"{count:,.0f}", _size(sent), f"{seconds:.3f}")
        table.add_row(kind, axes, "overlapped" if is_async else "alone", *row)
    console.print(table)
    for name in sorted(work.uncounted):
        console.print(f"not counted: the kernel {name}", soft_wrap=True, highlight=False)
    lines = {
        "step": f"{work.step_seconds:.3f} s by the roofline, most of it {work.bound}; MFU {plan.mfu:.1%}",
        "work": f"{work.flops / 1e12:,.2f} TFLOP in {work.compute_seconds:.3f} s at peak, "
        f"{work.product_seconds:.3f} s by the compiler's cycles, "
        f"{_size(work.memory_bytes)} of memory in {work.memory_seconds:.3f} s, "
        f"{_size(work.collective_bytes)} sent",
        "speed": f"{plan.tokens_per_second:,.0f} tokens/s, "
        f"{plan.tokens_per_second / plan.topology.num_chips:,.0f} per chip",
    }
    if plan.supervised_fraction:
        lines["speed"] += f"; {plan.tokens_per_second * plan.supervised_fraction:,.0f} supervised"
    if plan.num_steps:
        chip_hours = plan.hours * plan.topology.num_chips
        lines["run"] = f"{plan.num_steps:,} steps in {plan.hours:.2f} hours, {chip_hours:,.1f} chip-hours"
    else:
        lines["run"] = "hours are not known: sft-jax check writes the data report that they are counted from"
    for name, text in lines.items():
        console.print(f"{name:14}{text}", soft_wrap=True, highlight=False)


def ways_to_fit(plan: Plan) -> list[str]:
    """What may be changed, the cheapest first: only what this config leaves open."""
    config, ways = plan.config, []
    state = plan.bytes["parameters"] + plan.bytes["optimizer"]
    if state > plan.hbm_bytes:
        ways.append("parameters and optimizer alone are too much: take more chips, or set config.lora.rank")
    rows = config.batch.micro_batch_size // (plan.mesh["replica"] * plan.mesh["fsdp"])
    if rows > 1:
        ways.append(f"config.batch.grad_accum_steps: {rows} rows are on a device at a time; {rows} times as many steps")
    if config.model.remat != "full":
        ways.append(f"config.model.remat: is {config.model.remat}; full keeps the least")
    if config.model.attention == "reference":
        ways.append("config.model.attention: is reference, which makes score matrices; splash makes none")
    optimizer = config.optimizer
    if optimizer.moment_dtype != "bfloat16" and optimizer.name != "adafactor" and not optimizer.offload:
        held = _size(plan.bytes["optimizer"])
        ways.append(f"config.optimizer.moment_dtype: is {optimizer.moment_dtype}; bfloat16 halves {held}")
        ways.append("config.optimizer.offload: is False; True keeps the layers' moments in the host's memory")
    if plan.mesh["fsdp"] == 1 and plan.topology.num_devices > 1:
        ways.append("config.mesh.fsdp: is 1, so that every device has all parameters")
    if config.loss.chunk_tokens > 1024:
        ways.append(f"config.loss.chunk_tokens: is {config.loss.chunk_tokens}; less needs less")
    return [*ways, "shorter rows (config.data.max_seq_len), or more chips"]


def _seconds(seconds: float) -> str:
    """With hundredths, and three digits below one."""
    return f"{seconds:.2f}" if seconds >= 1 else f"{seconds:.3g}"


def _size(num_bytes: int | float) -> str:
    """In GiB, and MiB below one."""
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.2f} MiB"


if __name__ == "__main__":
    sys.exit(run_command(main))
