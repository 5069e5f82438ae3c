"""A real pretrained model on real demonstrations: TinyStories-656K, Open Assistant and self-instruct.

    python -m sft_jax.testbed.real_data --assets=$SFT_JAX_ASSETS --to=build/tinystories
    python -m sft_jax.main --config=configs/tinystories.py

Under a minute on 2 cores. The model's vocabulary has no brackets, slashes or symbols: about half of the rows cannot be
said in it, and are dropped and counted as unknown_token in data_report.json, as are those over 512 tokens.
"""

import os
from pathlib import Path

from sft_jax.config import default_config
from sft_jax.testbed.real_data import TINYSTORIES_DIR


def get_config():
    config = default_config()
    config.run.dir = "runs/tinystories"
    config.model.path = os.environ.get("SFT_JAX_ASSETS", "assets") + "/models/TinyStories-656K"
    config.model.compute_dtype = "float32"
    config.model.remat = "none"
    sources = ("oasst", "self_instruct")
    config.data.train = [dict(path=f"{TINYSTORIES_DIR}/{name}_train.jsonl", name=name) for name in sources]
    config.data.eval = [dict(path=f"{TINYSTORIES_DIR}/{name}_held_out.jsonl", name=name) for name in sources]
    config.data.chat_template = str(Path(__file__).with_suffix(".jinja"))
    config.data.unknown_tokens = "drop"
    config.data.too_long = "drop"
    config.data.max_seq_len = 512
    config.batch.batch_size = 4
    config.optimizer.learning_rate = 5e-4  # a tiny model bears a large one
    config.schedule.num_epochs = 4
    config.evaluation.every_steps = 20
    config.log.every_steps = 5
    return config
