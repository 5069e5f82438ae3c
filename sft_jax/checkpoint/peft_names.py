"""config.lora's modules and what trains of them <-> the tensors of an adapter folder, named as PEFT names them.

    ours, of layers.0.0.                    theirs, of base_model.model.model.layers.{layer}.
    attention.query.lora_a     [S, D, R]    self_attn.q_proj.lora_A.weight          [R, D]
    attention.query.lora_b     [S, R, N, H] self_attn.q_proj.lora_B.weight          [N*H, R]
    attention.query.magnitude  [S, N, H]    self_attn.q_proj.lora_magnitude_vector  [N*H]

and what trains whole, such as embed.embedding [V, D], under its own name. Each expert has tensors of its own, under the
names of its files, which PEFT joins when it loads them; a folder that it saves has them joined, and is not read here.

Source of the names: https://huggingface.co/docs/peft/developer_guides/checkpoint, and of those that differ in memory,
`conversion_mapping.py` of https://github.com/huggingface/transformers, version 5.23.0. How experts are joined:
`transformers_weight_conversion.py` of https://github.com/huggingface/peft, version 0.21.2
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from sft_jax.checkpoint.hf_names import EMBEDDING, HEAD, TensorRule, hf_tensors, tensor_rules
from sft_jax.config_schema import LoraConfig
from sft_jax.datatypes import ConfigError
from sft_jax.model.families import TransformerConfig, find_moe

PREFIX = "base_model.model."
SUFFIXES = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
# What every family's maps may be called in config.lora, though its own files hold them under other names, or fused.
_FAMILIAR = {
    "attention.query": "self_attn.q_proj", "attention.key": "self_attn.k_proj", "attention.value": "self_attn.v_proj",
    "attention.out": "self_attn.o_proj", "mlp.gate": "mlp.gate_proj", "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}  # fmt: skip
# PEFT renames what it adds to modules, as transformers renames files, but not what it saves of them whole.
_RENAMED = {".block_sparse_moe.gate.": ".mlp.gate."}
_BESIDE_KERNELS = ("bias", "correction")
_OF_MODULES = ("weight", "bias", "e_score_correction_bias")


class AdapterTensor(NamedTuple):
    """One tensor of an adapter folder, and where its values stand among our parameters."""

    name: str
    rules: tuple[TensorRule, ...]
    """Of the base's tensor: several where it is fused."""
    kind: str
    """`lora_a`, `lora_b` or `magnitude` of the maps; `whole`: the base's tensor itself."""
    place: tuple[int, ...]
    """In the stack of layers and experts; (): the parameter belongs to no layer."""
    shape: tuple[int, ...]

    def path(self, rule: TensorRule) -> str:
        """Our parameter of one of the rules."""
        return rule.path if self.kind == "whole" else f"{_module(rule)}.{self.kind}"

    @property
    def is_of_experts(self) -> bool:
        return bool(self.rules[0].num_experts)

    @property
    def module(self) -> str:
        """Which it belongs to there, such as `model.layers.0.self_attn.q_proj`."""
        name = self.name.removeprefix(PREFIX)
        return name.rpartition(".")[0] if self.kind == "whole" else name.removesuffix(f".{SUFFIXES[self.kind]}")


def _module(rule: TensorRule) -> str:
    return rule.path.removesuffix(".kernel")


def module_names(config: TransformerConfig) -> dict[str, set[str]]:
    """Path of each module with parameters -> all that config.lora may call it. Sinks, of no module, are their own."""
    names: dict[str, set[str]] = {}
    for rule in tensor_rules(config):
        module, _, parameter = rule.path.rpartition(".")
        if parameter in _BESIDE_KERNELS:  # named by their kernel
            continue
        module = rule.path if parameter == "sinks" else module
        called = names.setdefault(module, {module})
        called |= {name.removesuffix(".weight") for name in (rule.hf_name, _in_memory(rule.hf_name))}
        called |= {familiar for ours, familiar in _FAMILIAR.items() if module.endswith(f".{ours}")}
    return names


def parameter_names(config: TransformerConfig) -> dict[str, set[str]]:
    """Path of each module -> what its parameters are called, by which config.lora finds none."""
    names: dict[str, set[str]] = {}
    for rule in tensor_rules(config):
        called = names.setdefault(rule.path.rpartition(".")[0], set())
        called |= {rule.path, rule.hf_name, _in_memory(rule.hf_name)}
    return names


def adapter_tensors(
    config: TransformerConfig, lora: LoraConfig, shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[AdapterTensor]:
    """Every tensor of the folder of a run whose trained parameters have `shapes`.

    Of a fused tensor PEFT knows one adapter. Ours become one of their ranks together: one below the other in lora_A, on
    the diagonal of lora_B.

    Raises:
      ConfigError: PEFT would not load what trains: only some parts of a fused tensor; adapters of MLPs beside
        experts, or of some of the experts' maps; or what is no module's.
    """
    has_experts = find_moe(config) is not None
    _check_experts({rule.path for rule in tensor_rules(config) if rule.num_experts}, lora, shapes)
    for hf_name, rules, place in hf_tensors(config):
        outs_ins = rules[0].hf_shape(config)
        if _all_or_none(rules, [rule.path in shapes for rule in rules]):
            _check_whole(rules[0], hf_name)
            yield AdapterTensor(PREFIX + _in_memory(hf_name), rules, "whole", place, outs_ins)
            if rules[0] is EMBEDDING and config.tie_embeddings:  # PEFT copies what it saves, which unties the two
                yield AdapterTensor(PREFIX + HEAD.hf_name, rules, "whole", place, outs_ins)
        if _all_or_none(rules, [f"{_module(rule)}.lora_a" in shapes for rule in rules]):
            if has_experts and ".mlp." in rules[0].path and not rules[0].num_experts:
                raise ConfigError(  # PEFT takes names of MLPs for those of experts, and gpt-oss's are one tensor
                    f"config.lora.targets: {hf_name} stands beside experts, or is of all of them, and has no "
                    "adapter that PEFT loads. Export the merged model, or take it out."
                )
            rank = sum(shapes[f"{_module(rule)}.lora_a"][-1] for rule in rules)
            named = {"lora_a": (rank, outs_ins[1]), "lora_b": (outs_ins[0], rank), "magnitude": outs_ins[:1]}
            for kind, shape in named.items():
                if f"{_module(rules[0])}.{kind}" in shapes:
                    name = PREFIX + hf_name.removesuffix("weight") + SUFFIXES[kind]
                    yield AdapterTensor(name, rules, kind, place, shape)


def _all_or_none(rules: tuple[TensorRule, ...], train: list[bool]) -> bool:
    if any(train) and not all(train):
        without = ", ".join(rule.path for rule, trains in zip(rules, train, strict=True) if not trains)
        raise ConfigError(
            f"config.lora: {rules[0].hf_name} is one tensor in this family, and {without} of it does not train as the "
            "rest does. PEFT has no form for that: export the merged model."
        )
    return train[0]


def _check_experts(kernels: set[str], lora: LoraConfig, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """PEFT joins gate and up, to twice the rank, and looks for them below an adapter of down; seen with 0.21.2."""
    maps = {path.split(".")[-2] for path in kernels if f"{path.removesuffix('.kernel')}.lora_a" in shapes}
    if maps not in (set(), {"down"}, {"gate", "up", "down"}):
        raise ConfigError(
            f"config.lora.targets: of the experts' maps, {' and '.join(sorted(maps))} alone have adapters, and PEFT "
            "loads those of gate, up and down, or of down alone. Export the merged model, or name the others too."
        )
    if "gate" in maps and lora.use_rslora:
        raise ConfigError(
            "config.lora.use_rslora: is set, and PEFT would scale the adapters of experts' gate and up by sqrt(2) too "
            "much, since it joins the two. Export the merged model, or leave it out."
        )


def _in_memory(hf_name: str) -> str:
    """The name that transformers has for a tensor once it is loaded."""
    for stored, loaded in _RENAMED.items():
        hf_name = hf_name.replace(stored, loaded)
    return hf_name


def _check_whole(rule: TensorRule, hf_name: str) -> None:
    """PEFT copies modules, and takes no notice of a tensor that belongs to none, or writes it over the base's own."""
    if rule.num_experts or hf_name.rpartition(".")[2] not in _OF_MODULES:
        raise ConfigError(
            f"config.lora.modules_to_save: {hf_name} is no module's in transformers, so it cannot be part of an "
            "adapter of PEFT's. Export the merged model, or take it out."
        )
