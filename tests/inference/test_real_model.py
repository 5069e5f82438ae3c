"""A real pretrained model gives the figures that an independent numpy implementation computed."""

import json

import numpy as np
import pytest
from tokenizers import Tokenizer

from sft_jax.checkpoint.hf import load_pretrained, read_config
from sft_jax.inference.sampler import generate, score_tokens


@pytest.fixture(scope="module")
def model(assets):
    folder = assets / "models" / "TinyStories-656K"
    config, _ = read_config(folder)
    params = load_pretrained(folder, config, None, "float32")
    return params, config, json.loads((folder / "expected.json").read_text())


def test_log_probabilities_of_a_real_model(model):
    params, config, expected = model
    (scores,) = score_tokens(params, config, [expected["prompt_ids"]], compute_dtype="float32")
    np.testing.assert_allclose(scores, expected["next_token_logprobs"], atol=1e-4)


def test_greedy_decoding_of_a_real_model(model):
    params, config, expected = model
    ids, count = expected["greedy_ids"], expected["prompt_len"]
    new = len(ids) - count
    (answer,) = generate(params, config, [ids[:count]], stop_ids=(2,), max_new_tokens=new, compute_dtype="float32")
    assert answer.ids == tuple(ids[count:])


def test_mean_loss_of_a_real_model_on_real_stories(model, assets):
    params, config, expected = model
    tokenizer = Tokenizer.from_file(str(assets / "models" / "TinyStories-656K" / "tokenizer.json"))
    stories = json.loads((assets / "text" / "tinystories" / "tinystories_1000.json").read_text())[:60]
    ids = [[*tokenizer.encode(story.strip()).ids, 2][: config.max_position] for story in stories]
    scores = np.concatenate(score_tokens(params, config, ids, compute_dtype="float32"))
    assert -scores.mean() == pytest.approx(expected["tinystories_first60"]["mean_nll"], abs=1e-4)
