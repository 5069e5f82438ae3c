"""Llama-3.1-8B, all parameters, 131,072 tokens: each row is split over 16 chips, and keys go round the ring of them.

Hardware: 64 chips of TPU v5p. Put the Hugging Face folder in MODEL_DIR and the chats in DATA_DIR:

    python -m sft_jax.main --config=configs/long_context_8b.py --config.run.dir=runs/long_context_8b

Memory: 33.66 of 95.73 GiB a device on v5p:4x4x4 (`make plans`).
"""

import os

from sft_jax.config import default_config


def get_config():
    config = default_config()
    config.run.distributed = True
    config.model.path = os.environ.get("MODEL_DIR", "models/Llama-3.1-8B-Instruct")
    config.model.preset = "llama3.1-8b"
    config.model.attention = "splash"
    data = os.environ.get("DATA_DIR", "data")
    config.data.train = [dict(path=f"{data}/train.jsonl")]
    config.data.eval = [dict(path=f"{data}/held_out.jsonl")]
    config.data.max_seq_len = 131072
    config.batch.batch_size = 4
    config.loss.chunk_tokens = 512
    config.mesh.fsdp = 4
    config.mesh.context = 16
    config.optimizer.learning_rate = 1e-5
    config.evaluation.every_steps = 200
    config.checkpoint.every_steps = 200
    return config
