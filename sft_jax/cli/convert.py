"""`sft-jax convert`: a Hugging Face folder as an Orbax checkpoint that many hosts read in parallel."""

import argparse
import sys

from sft_jax.checkpoint.converted import convert_folder, is_converted
from sft_jax.checkpoint.hf import digest_weights, open_sources, read_config
from sft_jax.checkpoint.model_files import list_folder
from sft_jax.checkpoint.peft_options import CONFIG_FILE
from sft_jax.command_line import run_command
from sft_jax.data.stored_files import is_url
from sft_jax.datatypes import ConfigError


def main(args: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="sft-jax convert",
        description="Make a model folder's weights an Orbax checkpoint, parameter by parameter. Its folder is a "
        "config.model.path as the source was: hosts read only their own chunks, which have checksums.",
        epilog="example: sft-jax convert --from=gs://models/llama-3.1-8b --to=models/llama-3.1-8b",
        allow_abbrev=False,
    )
    parser.add_argument("--from", required=True, metavar="DIR", dest="source", help="folder or URL of the model")
    parser.add_argument("--to", required=True, metavar="DIR", help="the new folder, on disk")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: as stored")
    options = parser.parse_args(args)
    if is_url(options.to):
        raise ConfigError(f"--to={options.to}: is a URL. Convert to a folder on disk, and copy that.")
    if is_converted(options.source):
        raise ConfigError(f"--from={options.source}: is a converted folder already. Name it as config.model.path.")
    if CONFIG_FILE in list_folder(options.source):
        raise ConfigError(f"--from={options.source}: is an adapter's. Name it as config.lora.init_from, as it is.")
    config, _ = read_config(options.source)
    sources = open_sources(options.source, config)
    is_new = convert_folder(options.source, options.to, sources, digest_weights(options.source), options.dtype)
    print(f"{options.to}: {'converted' if is_new else 'is already converted'} from {options.source}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
