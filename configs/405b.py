"""Llama-3.1-405B, all parameters, 8,192 tokens.

Hardware: 1,024 chips of TPU v5p; each row is on four of them. Put the Hugging Face folder in MODEL_DIR
and the chats in DATA_DIR:

    python -m sft_jax.main --config=configs/405b.py --config.run.dir=runs/405b

Memory: 42.59 of 95.73 GiB a device on v5p:8x8x16 (`make plans`).
"""

import os

from sft_jax.config import default_config


def get_config():
    config = default_config()
    config.run.distributed = True
    config.model.path = os.environ.get("MODEL_DIR", "models/Llama-3.1-405B-Instruct")
    config.model.preset = "llama3.1-405b"
    config.model.attention = "splash"
    data = os.environ.get("DATA_DIR", "data")
    config.data.train = [dict(path=f"{data}/train.jsonl")]
    config.data.eval = [dict(path=f"{data}/held_out.jsonl")]
    config.data.max_seq_len = 8192
    config.batch.batch_size = 256
    config.loss.chunk_tokens = 512
    config.mesh.tensor = 4
    config.optimizer.learning_rate = 2e-6
    config.evaluation.every_steps = 200
    config.checkpoint.every_steps = 200
    return config
