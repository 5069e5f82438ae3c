"""`sft-jax export`: a checkpoint of a run as a Hugging Face folder."""

import argparse
import json
import sys

import jax
from etils import epath

from sft_jax.checkpoint.hf import export_pretrained
from sft_jax.checkpoint.manager import CheckpointManager
from sft_jax.command_line import run_command
from sft_jax.config import from_config_dict
from sft_jax.datatypes import StorageError
from sft_jax.main import open_model_config, open_params, open_renderer
from sft_jax.model.transformer import abstract_params, logical_dims
from sft_jax.sharding import build_mesh, shardings_for
from sft_jax.training.state import split_params


def main(args: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="sft-jax export",
        description="Write a checkpoint as a folder that transformers and vLLM load, with its tokenizer and template.",
        epilog="example: sft-jax export --run=runs/demo --to=exports/demo",
        allow_abbrev=False,
    )
    parser.add_argument("--run", required=True, metavar="DIR", help="the run directory")
    parser.add_argument("--to", required=True, metavar="DIR", help="the new folder")
    parser.add_argument("--step", type=int, metavar="N", help="default: the newest")
    options = parser.parse_args(args)

    run_dir = epath.Path(options.run)
    if not (run_dir / "config.json").exists():
        raise StorageError(f"--run={run_dir}: has no config.json. Name the run directory, config.run.dir of the run.")
    config = from_config_dict(json.loads((run_dir / "config.json").read_text()))
    manager = CheckpointManager(run_dir / "checkpoints", config.checkpoint.keep_latest)
    step = manager.latest_step() if options.step is None else options.step
    if step is None:
        raise StorageError(f"--run={run_dir}: has no finished checkpoint yet.")

    renderer = open_renderer(config)
    model = open_model_config(config, renderer)
    shapes = abstract_params(model, config.model.param_dtype)
    dims = {path: logical_dims(path) for path in shapes}
    shardings = shardings_for(build_mesh(config.mesh), dims, {path: leaf.shape for path, leaf in shapes.items()})
    trainable, frozen = split_params(shapes, config.model.freeze)
    abstract = {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=shardings[path]) for path, leaf in trainable.items()
    }
    params = manager.restore_params(step, abstract)
    if frozen:
        params |= split_params(open_params(config, model, shardings), config.model.freeze)[1]
    dtype = config.model.param_dtype
    export_pretrained(options.to, params, model, renderer.tokenizer, renderer.template.text, renderer.stop_ids, dtype)
    print(f"step {step} exported to {options.to}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
