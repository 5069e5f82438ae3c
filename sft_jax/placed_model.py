"""A model on a mesh by its config: which parameters train, how each is held, and where it lives."""

import dataclasses
import json
from collections.abc import Mapping
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from sft_jax.checkpoint.hf import digest_weights, held_arrays, load_pretrained
from sft_jax.checkpoint.merged_source import MergedSource
from sft_jax.checkpoint.param_source import ParamSource, read_box
from sft_jax.checkpoint.peft import load_adapter
from sft_jax.checkpoint.peft_names import module_names, parameter_names
from sft_jax.checkpoint.quantized_source import HeldArray
from sft_jax.config_schema import Config
from sft_jax.datatypes import ConfigError
from sft_jax.model.families import TransformerConfig
from sft_jax.model.hf_config import to_hf_config
from sft_jax.model.linear import ADAPTERS
from sft_jax.model.lora import (
    ALL_LINEAR,
    Kernel,
    Leaf,
    find_kernels,
    init_adapters,
    lay_out,
    match_names,
    merge_adapters,
)
from sft_jax.model.param_dims import logical_dims
from sft_jax.model.quantized import SCALES
from sft_jax.model.router import dtype_among
from sft_jax.model.transformer import Params, abstract_params, init_params
from sft_jax.sharding import (
    num_parts,
    shardings_for,
)
from sft_jax.training.optimizer import build_optimizer
from sft_jax.training.state import TrainState, abstract_state, split_params
from sft_jax.typing import Array

BASE_WEIGHTS = "weights in config.model.path"
OF_MODEL = " of the model"
"""Ends the names of what its config.json says."""


@dataclasses.dataclass(frozen=True)
class ModelOnMesh:
    """A model, its optimizer and where every array of both lives; no array yet."""

    config: Config
    model: TransformerConfig
    mesh: Mesh | AbstractMesh

    @cached_property
    def kernels(self) -> dict[str, Kernel]:
        """The linear maps of the layers, those that may have an adapter."""
        return find_kernels(self.model, self._base)

    @cached_property
    def _base(self) -> dict[str, jax.ShapeDtypeStruct]:
        return abstract_params(self.model, self.config.model.param_dtype)

    @cached_property
    def leaves(self) -> tuple[dict[str, Leaf], dict[str, Leaf]]:
        """(the parameters that train, the frozen ones)."""
        section, lora = self.config.model, self.config.lora
        frozen_dtype = section.frozen_dtype or section.param_dtype
        if lora.rank:
            targets, saved = choose_modules(self.config, self.model, self.kernels)
            whole = {path for path in self._base if {path, path.rpartition(".")[0]} & set(saved)}
            return lay_out(self._base, self.kernels, targets, whole, lora, frozen_dtype)
        trainable, frozen = split_params(self._base, section.freeze)
        leaf = lambda path, dtype: Leaf(logical_dims(path), self._base[path].shape, dtype_among(path, dtype))  # noqa: E731
        return {p: leaf(p, section.param_dtype) for p in trainable}, {p: leaf(p, frozen_dtype) for p in frozen}

    @cached_property
    def shardings(self) -> dict[str, NamedSharding]:
        trainable, frozen = self.leaves
        leaves = trainable | frozen
        dims, shapes = ({path: getattr(leaf, name) for path, leaf in leaves.items()} for name in ("dims", "shape"))
        for path in shapes:
            if path.endswith(f".{SCALES}"):  # small enough to be everywhere, where there are fewer blocks than parts
                fits = (
                    size % num_parts(self.mesh, dim) == 0 for dim, size in zip(dims[path], shapes[path], strict=True)
                )
                dims[path] = tuple(dim if fit else None for dim, fit in zip(dims[path], fits, strict=True))
        return shardings_for(self.mesh, dims, shapes)

    @cached_property
    def optimizer(self) -> optax.GradientTransformation:
        return build_optimizer(self.config.optimizer, self.config.run.seed)

    @cached_property
    def abstract_state(self) -> TrainState:
        trainable = {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in self.leaves[0].items()}
        offload = self.config.optimizer.offload
        return abstract_state(trainable, self.shardings, self.optimizer, self.mesh, offload)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What a checkpoint of this model may be resumed as, by name."""
        section, lora = self.config.model, self.config.lora
        identity = {
            "config.model.path": section.path or f"{section.preset} {section.overrides}",
            "config.model.param_dtype": section.param_dtype,
            "config.model.freeze": list(section.freeze),
            "config.optimizer.name": self.config.optimizer.name,
            "config.optimizer.moment_dtype": self.config.optimizer.moment_dtype,
        }
        if self.leaves[1]:
            identity["config.model.frozen_dtype"] = section.frozen_dtype
            identity[BASE_WEIGHTS] = digest_weights(section.path) if section.path else ""
        if lora.rank:
            options = dataclasses.asdict(lora)
            kept = ("rank", "alpha", "use_rslora", "use_dora", "targets", "modules_to_save", "quantize")
            identity |= {f"config.lora.{name}": options[name] for name in kept}
        identity |= {f"{name}{OF_MODEL}": value for name, value in to_hf_config(self.model, "float32").items()}
        return json.loads(json.dumps(identity))  # as a checkpoint gives it back

    def open_params(self) -> tuple[Params, Params]:
        """(those that train, the frozen ones), before the first step: pretrained weights, each tensor straight to its
        shards, or random ones where the config names no folder; and adapters that change nothing yet, or those of
        `config.lora.init_from`."""
        base, lora = self._open_base(), self.config.lora
        trainable = {path: base.pop(path) for path in self.leaves[0] if path in base}
        if lora.init_from:
            shapes = {path: leaf.shape for path, leaf in self.leaves[0].items()}
            dtype = self.config.model.param_dtype
            return load_adapter(lora.init_from, self.model, lora, shapes, self.shardings, dtype), base
        adapters = {path: leaf for path, leaf in self.leaves[0].items() if path not in trainable}
        if adapters:
            init = partial(init_adapters, adapters, self.kernels)
            shardings = {path: self.shardings[path] for path in adapters}
            trainable |= jax.jit(init, out_shardings=shardings)(base, jax.random.key(self.config.run.seed))
        return trainable, base

    def open_frozen(self) -> Params:
        """The frozen parameters; they are in no checkpoint, since they do not change."""
        if not self.leaves[1]:
            return {}
        base = self._open_base()
        return {path: base[path] for path in self.leaves[1]}

    def merge(self, params: Params) -> Params:
        """The plain model of these parameters: adapters added to their kernels, quantized kernels decoded."""
        if not self.config.lora.rank:
            return params
        return dict(
            merge_adapters(params, self.kernels, self.config.lora.scale, jnp.dtype(self.config.model.param_dtype))
        )

    def merge_sources(
        self, base: Mapping[str, ParamSource], trained: Mapping[str, ParamSource]
    ) -> dict[str, MergedSource]:
        """`merge` of sources: those kernels that are not the base's own."""
        merged = {}
        for module, kernel in self.kernels.items():
            path, dtype = f"{module}.kernel", self.config.model.param_dtype
            names = [name for name in ADAPTERS if f"{module}.{name}" in trained]
            if path in trained or (not names and path in self.leaves[1]):
                continue
            held = held_arrays(path, base[path], self._base_dtypes[path], self.model)
            parts = {held_path.rpartition(".")[2]: array for held_path, array in held.items()}
            for name in names:
                source = trained[f"{module}.{name}"]
                parts[name] = HeldArray(source.shape, partial(read_box, source, dtype=dtype))
            merged[path] = MergedSource(base[path], parts, len(kernel.stack), len(kernel.outs), self.config.lora.scale)
        return merged

    @cached_property
    def _base_dtypes(self) -> dict[str, str]:
        """How each parameter of the base is held: a dtype, or a format of quantized.py."""
        trainable, frozen = self.leaves
        return {
            path: str(trainable[path].dtype) if path in trainable
            else str(frozen[path].dtype) if path in frozen
            else self.config.lora.quantize
            for path in self._base
        }  # fmt: skip

    def _open_base(self) -> Params:
        """The parameters of the model without adapters, as they are held."""
        config, dtypes = self.config, self._base_dtypes
        if config.model.path:
            return load_pretrained(config.model.path, self.model, self.shardings, dtypes)

        def init(key: Array) -> Params:
            params = init_params(self.model, key, config.model.param_dtype)
            return {path: value.astype(dtypes[path]) for path, value in params.items()}

        shardings = {path: self.shardings[path] for path in self._base}
        return jax.jit(init, out_shardings=shardings)(jax.random.key(config.run.seed))


def choose_modules(
    config: Config, model: TransformerConfig, kernels: Mapping[str, Kernel]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(modules that get an adapter, modules that train whole), by path.

    Raises:
      ConfigError: a name finds nothing, or a module is both.
    """
    names, parameters, lora = module_names(model), parameter_names(model), config.lora
    of_kernels = {path: called for path, called in names.items() if path in kernels}
    patterns = [pattern for pattern in lora.targets if pattern != ALL_LINEAR]
    found = set(match_names(of_kernels, parameters, patterns, "config.lora.targets"))
    if ALL_LINEAR in lora.targets:
        found |= {path for path, kernel in kernels.items() if not kernel.is_of_experts}
    targets = tuple(path for path in kernels if path in found)
    saved = match_names(names, parameters, lora.modules_to_save, "config.lora.modules_to_save")
    both = sorted(set(targets) & set(saved))
    if both:
        raise ConfigError(f"config.lora: {both[0]} is in targets and in modules_to_save. Take it out of one.")
    of_experts = next((path for path in targets if kernels[path].is_of_experts), None)
    if of_experts and (lora.use_dora or lora.dropout):
        option = "use_dora" if lora.use_dora else "dropout"
        raise ConfigError(
            f"config.lora.{option}: {of_experts} is of experts, whose adapters have no such thing. Leave it out, or "
            "take the experts out of config.lora.targets."
        )
    return targets, saved
