"""Llama-3.1-70B, all parameters, 8,192 tokens.

Hardware: 64 chips of TPU v5p or more. Put the Hugging Face folder in MODEL_DIR and the chats in DATA_DIR:

    python -m sft_jax.main --config=configs/70b.py --config.run.dir=runs/70b

Memory: 30.83 of 95.73 GiB a device on v5p:4x4x4 (`make plans`).
Time: by the roofline 7.1 hours for a billion tokens.
"""

import os

from sft_jax.config import default_config


def get_config():
    config = default_config()
    config.run.distributed = True
    config.model.path = os.environ.get("MODEL_DIR", "models/Llama-3.1-70B-Instruct")
    config.model.preset = "llama3.1-70b"
    config.model.attention = "splash"
    data = os.environ.get("DATA_DIR", "data")
    config.data.train = [dict(path=f"{data}/train.jsonl")]
    config.data.eval = [dict(path=f"{data}/held_out.jsonl")]
    config.data.max_seq_len = 8192
    config.batch.batch_size = 64
    config.loss.chunk_tokens = 512
    config.optimizer.learning_rate = 5e-6
    config.evaluation.every_steps = 200
    config.checkpoint.every_steps = 200
    return config
