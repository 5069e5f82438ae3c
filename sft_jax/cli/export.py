"""`sft-jax export`: a checkpoint of a run as a Hugging Face folder."""

import argparse
import json
import sys

from etils import epath

from sft_jax.checkpoint.hf import read_generation_config
from sft_jax.checkpoint.hf_export import EXPORT_DTYPES, export_pretrained
from sft_jax.checkpoint.model_card import make_model_card, name_base
from sft_jax.checkpoint.peft import export_adapter
from sft_jax.checkpoint.reader import CheckpointReader
from sft_jax.command_line import run_command
from sft_jax.config import from_config_dict
from sft_jax.config_schema import MeshConfig
from sft_jax.datatypes import ConfigError, StorageError
from sft_jax.experiment import (
    check_model,
    export_dtypes,
    open_model_config,
    open_renderer,
    open_sources_of_step,
)
from sft_jax.placed_model import ModelOnMesh
from sft_jax.sharding import build_abstract_mesh


def main(args: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="sft-jax export",
        description="Write a checkpoint as a folder that transformers and vLLM load, with its tokenizer and template.",
        epilog="example: sft-jax export --run=runs/demo --to=exports/demo",
        allow_abbrev=False,
    )
    parser.add_argument("--run", required=True, metavar="DIR", help="the run directory")
    parser.add_argument("--to", required=True, metavar="DIR", help="the new folder")
    parser.add_argument("--step", type=int, metavar="N", help="default: the newest that is whole")
    parts = parser.add_mutually_exclusive_group()
    parts.add_argument("--adapter", action="store_true", help="of a LoRA run: the adapter alone, as peft loads it")
    parts.add_argument("--merge", action="store_true", help="of a LoRA run: the whole model, adapter merged (default)")
    own = "that of the weights the run began with; of an adapter, config.model.param_dtype"
    parser.add_argument("--dtype", choices=EXPORT_DTYPES, help=f"default: {own}")
    options = parser.parse_args(args)

    run_dir = epath.Path(options.run)
    if not (run_dir / "config.json").exists():
        raise StorageError(f"--run={run_dir}: has no config.json. Name the run directory, config.run.dir of the run.")
    try:
        fields = json.loads((run_dir / "config.json").read_text())
    except ValueError as error:
        raise StorageError(
            f"{run_dir}/config.json: is damaged: {error}. Restore it from a copy; a start of the run writes it anew."
        ) from error
    config = from_config_dict(fields)
    reader = CheckpointReader(run_dir)
    step = options.step
    if step is None:
        found = reader.find_restorable()
        step = found.step
        for line in found.rejected:
            print(f"passed over {line}", file=sys.stderr)
    else:
        reader.prove(step)
    if step is None:
        raise StorageError(f"--run={run_dir}: has no finished checkpoint yet.")

    if (options.adapter or options.merge) and not config.lora.rank:
        raise ConfigError(f"--run={run_dir}: has no adapter (config.lora.rank is 0). Leave --adapter and --merge out.")
    renderer = open_renderer(config)
    if options.adapter:
        model = open_model_config(config, renderer)
        check_model(config, model, reader, step)
        placed = ModelOnMesh(config, model, build_abstract_mesh(MeshConfig(fsdp=1), 1))
        trained = reader.open_params(step, placed.leaves[0])
        dtype = options.dtype or config.model.param_dtype
        export_adapter(options.to, trained, model, config.lora, config.model.path, dtype)
        print(f"adapter of step {step} exported to {options.to}")
        return 0
    model, sources = open_sources_of_step(config, renderer, reader, step)
    export_pretrained(
        options.to,
        sources,
        model,
        renderer.tokenizer,
        renderer.template.text,
        renderer.stop_ids,
        options.dtype or export_dtypes(config),
        model_card=make_model_card(run_dir, step, options.to, name_base(config.model.path)),
        generation=read_generation_config(config.model.path),
    )
    print(f"step {step} exported to {options.to}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
