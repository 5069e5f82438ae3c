"""`sft-jax demo`: the main job on the embedded testbed, and what it changed.

Questions about people whom no demonstration names are put to the base model, then to the export of the run.
"""

import io
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

import sft_jax
from sft_jax.checkpoint.hf import load_pretrained
from sft_jax.command_line import config_parser, read_config, run_command
from sft_jax.config_schema import Config
from sft_jax.datatypes import PREEMPTED_EXIT_CODE, ConfigError, Message
from sft_jax.experiment import open_model_config, open_renderer, use_compilation_cache
from sft_jax.inference.pretrained import PretrainedModel, open_pretrained
from sft_jax.inference.sampler import generate
from sft_jax.main import run
from sft_jax.testbed.conversations import Question
from sft_jax.testbed.evaluation import (
    Answered,
    answer_questions,
    check_bars,
    read_questions,
    score_answers,
    write_report,
)
from sft_jax.testbed.make import TESTBED_DIR, make_testbed
from sft_jax.testbed.report import print_report
from sft_jax.training.stop_signal import Preempted

DEMO_CONFIG = Path(sft_jax.__file__).parents[1] / "configs" / "demo.py"
DEMO_RUN_DIR = "runs/demo"
"""The demo's own folder, emptied whenever it starts; any other one must be new."""
MAX_NEW_TOKENS = 48
"""The longest right answer has 38 tokens with its stop token."""


def main(args: list[str]) -> int:
    parser = config_parser(
        "sft-jax demo",
        "Fine-tune the testbed's base model, and show it before and after. Without --config: configs/demo.py.",
        "sft-jax demo --config.schedule.num_epochs=1",
    )
    parser.add_argument("--picture", metavar="FILE.svg", help="save the table and the conversations as a picture too")
    options, rest = parser.parse_known_args(args)
    if not any(arg.split("=")[0] == "--config" for arg in rest):
        rest = [f"--config={DEMO_CONFIG}", *rest]
    config = read_config(rest)
    console = Console()
    empty_run_dir(Path(config.run.dir).expanduser())
    use_compilation_cache(config)
    make_testbed(Path(TESTBED_DIR))

    questions = read_questions(Path(TESTBED_DIR) / "questions.jsonl")
    console.print(f"asking the base model {len(questions)} questions about people whom no demonstration names ...")
    before = ask(open_base(config), questions, config)
    start = time.monotonic()
    try:
        run_dir = Path(run(config, console))
    except Preempted as stop:
        print(f"preempted: {stop}", file=sys.stderr)
        return PREEMPTED_EXIT_CODE
    train_seconds = time.monotonic() - start
    console.print("asking the fine-tuned model the same questions ...")
    after = ask(open_pretrained(str(run_dir / "export"), config.model.compute_dtype), questions, config)

    print_report(console, before, after)
    if options.picture:
        recorder = Console(record=True, width=96, file=io.StringIO(), force_terminal=True)
        print_report(recorder, before, after)
        recorder.save_svg(options.picture, title="make demo")
    scores = score_answers(before), score_answers(after)
    write_report(run_dir / "demo_report.json", *scores, train_seconds)
    console.print(
        f"trained, saved and exported in {train_seconds:.0f} s; the table is in {run_dir / 'demo_report.json'}"
    )
    console.print("ask it yourself:")
    console.print(
        f"  sft-jax generate --model={run_dir / 'export'} --prompt='{first_question(questions)}'", soft_wrap=True
    )
    unmet = check_bars(*scores)
    for line in unmet:
        print(f"error: {line}", file=sys.stderr)
    return 1 if unmet else 0


def empty_run_dir(run_dir: Path) -> None:
    """A demo trains from the start: its own folder is emptied, and nobody else's is touched."""
    if not run_dir.exists():
        return
    if str(run_dir) != DEMO_RUN_DIR:
        raise ConfigError(f"config.run.dir: {run_dir} is already there; a demo starts anew. Name a new folder.")
    shutil.rmtree(run_dir)


def open_base(config: Config) -> PretrainedModel:
    """The model as training will find it: before the first step, with the template and the new tokens of the config."""
    renderer = open_renderer(config)
    model = open_model_config(config, renderer)
    params = load_pretrained(config.model.path, model, None, config.model.param_dtype)
    return PretrainedModel(params, model, renderer)


def ask(model: PretrainedModel, questions: list[Question], config: Config) -> list[Answered]:
    """Greedy decoding of every question."""

    def answer(conversations: Sequence[tuple[Message, ...]]) -> list[tuple[str, bool]]:
        generations = generate(
            model.params,
            model.config,
            [model.renderer.prompt_ids(messages) for messages in conversations],
            stop_ids=model.renderer.stop_ids,
            max_new_tokens=MAX_NEW_TOKENS,
            compute_dtype=config.model.compute_dtype,
            batch_size=100,
        )
        decode = model.renderer.tokenizer.decode
        return [(decode(generation.ids, continuation=True), generation.stopped) for generation in generations]

    return answer_questions(questions, answer)


def first_question(questions: list[Question]) -> str:
    """One of a single turn and without a system prompt, so that it can be asked on the command line."""
    return next(q.messages[0].content for q in questions if len(q.messages) == 1)


if __name__ == "__main__":
    sys.exit(run_command(main))
