"""The same mathematics by transformers and torch, written apart from ours: no packing, one segment at a time."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

SEGMENT_LENGTHS = ((9, 7, 5), (24,), (3, 2, 12), (11, 10))
SegmentLengths = tuple[tuple[int, ...], ...]

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def random_llama(seed: int, **fields) -> LlamaForCausalLM:
    """A model whose every parameter is random, norm scales too, and large enough that every part matters."""
    fields = {"attn_implementation": "eager", "max_position_embeddings": 256, "rms_norm_eps": 1e-5} | fields
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**fields)).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0, 0.1)
    return model


def random_model(seed: int, fields: dict[str, Any]) -> Any:
    """A model of any family, every part of which matters, with logits of about unit scale."""
    config = AutoConfig.for_model(**fields)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    lowest_scale = -0.5 if fields["model_type"].startswith("gemma") else 0.5  # their norms add 1
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(lowest_scale, lowest_scale + 1)
            elif parameter.ndim == 1:
                parameter.normal_(0, 0.5)
            else:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
    return model


def rebuilt(model: Any, fields: dict[str, Any]) -> Any:
    """The same weights in a model of another config.json."""
    again = type(model)._from_config(AutoConfig.for_model(**fields), attn_implementation="eager").float().eval()
    again.load_state_dict(model.state_dict())
    return again


def random_packed_batch(
    seed: int, vocab_size: int, segment_lengths: SegmentLengths = SEGMENT_LENGTHS
) -> dict[str, np.ndarray]:
    """Rows of several segments and padding, with float weights, some 0, and one segment without any."""
    rng = np.random.default_rng(seed)
    shape = (len(segment_lengths), max(map(sum, segment_lengths)))
    names = ("inputs", "targets", "segment_ids", "positions", "source_ids")
    batch = {name: np.zeros(shape, np.int32) for name in names} | {"loss_weights": np.zeros(shape, np.float32)}
    for row, lengths in enumerate(segment_lengths):
        start = 0
        for segment, length in enumerate(lengths, 1):
            here = (row, slice(start, start + length))
            ids = rng.integers(vocab_size, size=length + 1)
            batch["inputs"][here], batch["targets"][here] = ids[:-1], ids[1:]
            batch["segment_ids"][here], batch["positions"][here] = segment, np.arange(length)
            batch["loss_weights"][here] = rng.uniform(0.1, 2.0, length) * (rng.random(length) < 0.7)
            start += length
    batch["loss_weights"][batch["segment_ids"] == 3] = 0
    return batch


def segments_of(batch: dict[str, np.ndarray]) -> Iterator[tuple[int, slice]]:
    """(row, columns) of every segment."""
    for row, ids in enumerate(batch["segment_ids"]):
        for segment in range(1, ids.max() + 1):
            (columns,) = np.nonzero(ids == segment)
            yield row, slice(columns[0], columns[-1] + 1)


def segment_logits(model: Any, batch: dict[str, np.ndarray], here: tuple[int, slice]) -> torch.Tensor:
    """Logits [length, V] of one segment alone, at positions 0, 1, 2, ..."""
    for module in model.modules():  # dynamic rope would keep the base of a longer text that it saw before
        for name in [name for name in vars(module) if name.endswith("max_seq_len_cached")]:
            setattr(module, name, 0)
    return model(input_ids=torch.tensor(batch["inputs"][here], dtype=torch.long)[None], use_cache=False).logits[0]


def loss_of(logits: list[torch.Tensor], batch: dict[str, np.ndarray]) -> float:
    """Sum of weighted cross-entropies over the sum of weights, from the logits of every segment."""
    parts = zip(logits, segments_of(batch), strict=True)
    return sum(_loss_part(of_segment, batch, here).item() for of_segment, here in parts)


def _loss_part(logits: torch.Tensor, batch: dict[str, np.ndarray], here: tuple[int, slice]) -> torch.Tensor:
    """What one segment adds to the loss."""
    targets = torch.tensor(batch["targets"][here], dtype=torch.long)
    nll = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    return (torch.tensor(batch["loss_weights"][here]) * nll).sum() / float(batch["loss_weights"].sum(dtype=np.float64))


def loss_and_grads(model: Any, batch: dict[str, np.ndarray]) -> tuple[float, dict[str, np.ndarray]]:
    """The loss as in `loss_of`, and its gradients."""
    model.zero_grad()
    loss = 0.0
    for here in segments_of(batch):
        part = _loss_part(segment_logits(model, batch, here), batch, here)
        part.backward()  # gradients of the parts add up
        loss += part.item()
    return loss, {name: parameter.grad.numpy().copy() for name, parameter in model.named_parameters()}
