"""The demo: a 1M-parameter completer of documents learns to answer, from demonstrations about half of its world.

    make demo

makes the files, trains, and asks questions before and after (python -m sft_jax.cli.demo). The training alone:

    python -m sft_jax.testbed.make --to=build/testbed
    python -m sft_jax.main --config=configs/demo.py

About a minute of training on 2 cores. The base answers nothing and never stops; afterwards it answers at least 90% of
the questions about people whom no demonstration names, in the format asked for, and stops.
"""

from sft_jax.config import default_config
from sft_jax.testbed.make import BASE_MODEL, TESTBED_DIR


def get_config():
    config = default_config()
    config.run.dir = "runs/demo"
    config.model.path = BASE_MODEL
    config.model.compute_dtype = "float32"
    config.model.remat = "none"
    config.data.train = [dict(path=f"{TESTBED_DIR}/demonstrations.jsonl")]
    config.data.eval = [dict(path=f"{TESTBED_DIR}/held_out.jsonl")]
    config.data.chat_template = "chatml"
    config.data.new_tokens = ("<|im_start|>", "<|im_end|>")
    config.data.max_seq_len = 256
    config.batch.batch_size = 8
    config.optimizer.learning_rate = 1e-3  # a tiny model bears a large one
    # The output rows of people whom no demonstration names get tiny gradients, all of one sign. With its usual epsilon
    # Adam would step those rows as far as any other, and the model would forget how to say their names.
    config.optimizer.eps = 3e-5
    config.schedule.num_epochs = 5
    config.schedule.warmup_steps = 10
    config.checkpoint.every_steps = 0
    config.log.every_steps = 20
    return config
