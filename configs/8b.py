"""Llama-3.1-8B, all parameters, 8,192 tokens.

Hardware: 16 chips of TPU v6e, or 8 of v5p. Put the Hugging Face folder in MODEL_DIR and the chats in DATA_DIR:

    python -m sft_jax.main --config=configs/8b.py --config.run.dir=runs/8b

Memory: 12.04 of 31.24 GiB a device on v6e:4x4 with --config.batch.batch_size=16 (`make plans`).
Time: by the roofline 2.9 hours for a billion tokens.
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
    config.data.max_seq_len = 8192
    config.batch.batch_size = 64
    config.optimizer.learning_rate = 1e-5
    config.evaluation.every_steps = 200
    config.checkpoint.every_steps = 200
    return config
