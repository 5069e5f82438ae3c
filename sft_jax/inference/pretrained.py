"""A Hugging Face folder -> everything that decoding and scoring need."""

from dataclasses import dataclass
from pathlib import Path

from sft_jax.checkpoint.hf import load_pretrained, read_config
from sft_jax.data.rendering import Renderer
from sft_jax.data.templates import load_template
from sft_jax.data.tokenizer import load_tokenizer
from sft_jax.datatypes import ConfigError
from sft_jax.model.families import TransformerConfig
from sft_jax.model.transformer import Params


@dataclass(frozen=True)
class PretrainedModel:
    params: Params
    config: TransformerConfig
    renderer: Renderer


def open_pretrained(folder: str, dtype: str) -> PretrainedModel:
    """Load a folder onto the default device, in `dtype`, with the folder's own tokenizer and chat template.

    Raises:
      ConfigError: no such folder, or a model, tokenizer or template that we cannot run.
      StorageError: its weights are damaged.
    """
    if not Path(folder).is_dir():
        raise ConfigError(f"--model={folder}: is not a folder. Name one with config.json and safetensors.")
    config, _ = read_config(folder)
    tokenizer = load_tokenizer(folder)
    renderer = Renderer(tokenizer, load_template("", tokenizer, {}))
    return PretrainedModel(load_pretrained(folder, config, None, dtype), config, renderer)
