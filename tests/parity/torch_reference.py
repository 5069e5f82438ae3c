"""The same mathematics by transformers and torch, written apart from ours: no packing, one segment at a time."""

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

SEGMENT_LENGTHS = ((9, 7, 5), (24,), (3, 2, 12), (11, 10))
ROW_LENGTH = 24

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


def random_packed_batch(seed: int, vocab_size: int) -> dict[str, np.ndarray]:
    """Rows of several segments and padding, with float weights, some 0, and one segment without any."""
    rng = np.random.default_rng(seed)
    shape = (len(SEGMENT_LENGTHS), ROW_LENGTH)
    names = ("inputs", "targets", "segment_ids", "positions", "source_ids")
    batch = {name: np.zeros(shape, np.int32) for name in names} | {"loss_weights": np.zeros(shape, np.float32)}
    for row, lengths in enumerate(SEGMENT_LENGTHS):
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


def loss_and_grads(model: LlamaForCausalLM, batch: dict[str, np.ndarray]) -> tuple[float, dict[str, np.ndarray]]:
    """Sum of weighted cross-entropies over the sum of weights, each segment alone at positions 0, 1, 2, ..."""
    model.zero_grad()
    weight_sum = float(batch["loss_weights"].sum(dtype=np.float64))
    loss = 0.0
    for row, lengths in enumerate(SEGMENT_LENGTHS):
        start = 0
        for length in lengths:
            here = (row, slice(start, start + length))
            logits = model(input_ids=torch.tensor(batch["inputs"][here], dtype=torch.long)[None]).logits[0]
            targets = torch.tensor(batch["targets"][here], dtype=torch.long)
            nll = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
            part = (torch.tensor(batch["loss_weights"][here]) * nll).sum() / weight_sum
            part.backward()  # gradients of the parts add up
            loss += part.item()
            start += length
    return loss, {name: parameter.grad.numpy().copy() for name, parameter in model.named_parameters()}
