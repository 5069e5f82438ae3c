"""adapter_config.json -> nothing, or an error for each option under which the adapter would mean something else here.

Source of the options: `LoraConfig` of https://github.com/huggingface/peft, version 0.21.2, and those that it reads of
older versions.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sft_jax.checkpoint.model_files import file_in, read_json_object
from sft_jax.config_schema import LoraConfig
from sft_jax.datatypes import ConfigError

CONFIG_FILE = "adapter_config.json"
# Options that change no number of a trained adapter: where it came from and what happens in training. Which modules it
# has is seen in its tensors.
_HARMLESS = frozenset({
    "auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "inference_mode", "lora_dropout", "megatron_core",
    "modules_to_save", "peft_version", "qalora_group_size", "revision", "target_modules", "task_type",
})  # fmt: skip
# Options that would change the numbers, unless they have one of these values.
_ONLY_VALUES: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal"),  # others change the base when they are loaded
    "runtime_config": (None, {}, {"ephemeral_gpu_offload": False}),
    **{
        name: (None, False, {}, [])
        for name in ("alora_invocation_tokens", "arrow_config", "corda_config", "eva_config", "exclude_modules",
                     "kasa_config", "layer_replication", "layers_pattern", "layers_to_transform", "loftq_config",
                     "lora_bias", "lora_ga_config", "megatron_config", "monteclora_config", "target_parameters",
                     "trainable_token_indices", "use_bdlora", "use_qalora", "velora_config")
    },
}  # fmt: skip


def read_options(folder: Path) -> dict[str, Any]:
    """The fields of a folder's adapter_config.json.

    Raises:
      StorageError: the file cannot be read, or is a link out of the folder.
      ConfigError: it is no JSON object, or too large for one.
    """
    return read_json_object(file_in(folder, CONFIG_FILE))


def check_options(
    fields: Mapping[str, Any], lora: LoraConfig, patterns: tuple[Mapping[str, Any], Mapping[str, Any]], folder: Path
) -> bool:
    """Args:
      patterns: the ranks and alphas by module that config.lora's adapter of fused tensors has.

    Returns:
      Whether it has them. PEFT's own have none, and the parts of a fused tensor share one rank.

    Raises:
      ConfigError: an option is not what config.lora says, not supported, or not known.
    """
    where = folder / CONFIG_FILE
    ours = {"r": ("rank", lora.rank), "lora_alpha": ("alpha", lora.alpha)}
    ours |= {"use_rslora": ("use_rslora", lora.use_rslora), "use_dora": ("use_dora", lora.use_dora)}
    errors = [
        f"config.lora.{name}: is {value!r}, and {where} has {key} {fields.get(key, False)!r}. Set it to that."
        for key, (name, value) in ours.items()
        if fields.get(key, False) != value
    ]
    errors += [
        f"{where}: {key} is {fields[key]!r}; only {accepted[0]!r} is supported."
        for key, accepted in _ONLY_VALUES.items()
        if key in fields and not any(type(fields[key]) is type(value) and fields[key] == value for value in accepted)
    ]
    by_module = ("rank_pattern", "alpha_pattern")
    found = (fields.get("rank_pattern") or {}, fields.get("alpha_pattern") or {})
    if found not in (patterns, ({}, {})):  # one of them alone is another factor
        errors += [
            f"{where}: {key} is {value!r}; only one rank and alpha for all is supported."
            for key, value in zip(by_module, found, strict=True)
            if value
        ]
    errors += [
        f"{where}: {key} = {value!r}: not a known option, so it might change the adapter's numbers. Remove it if it "
        "does not."
        for key, value in fields.items()
        if key not in _HARMLESS | _ONLY_VALUES.keys() | ours.keys() | set(by_module)
    ]
    if errors:
        raise ConfigError("\n".join(errors))
    return found == patterns
