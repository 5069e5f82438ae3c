"""Over-long rows under a template that rewrites history: each turn's reasoning is trained once, in an
example of its own where a question follows. Every token that is lost is counted, and what fits stays as it was."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sft_jax.data.rendering import Renderer, RenderOptions
from sft_jax.data.templates import load_template
from sft_jax.data.tokenizer import load_tokenizer
from sft_jax.data.too_long import OverLongError, fit_examples
from sft_jax.datatypes import Conversation, Message, Origin, ToolCall

ORIGIN = Origin("a.jsonl", 3)


@pytest.fixture(scope="module")
def tokenizer(tiny_byte_level):
    return load_tokenizer(str(tiny_byte_level), ("<tool_call>", "</tool_call>"))


EXCHANGES = st.tuples(
    st.integers(0, 40),
    st.integers(0, 3),
    st.integers(0, 20),
    st.integers(0, 20),
    st.sampled_from([None, None, 0.0, 0.5]),
)


def exchange(num_asked, num_calls, num_thought, num_said, weight):
    """A question, calls with their results, an answer after reasoning."""
    messages = [Message("user", "q " + "x " * num_asked)]
    for k in range(num_calls):
        call = ToolCall("f", {"a": k}, f'{{"a": {k}}}')
        messages.append(Message("assistant", "", reasoning="r " * k, tool_calls=(call,), loss_weight=weight))
        messages.append(Message("tool", "result " * k, name="f"))
    answer = Message("assistant", "a " + "y " * num_said, reasoning="z " * num_thought, loss_weight=weight)
    return [*messages, answer]


def num_supervised(examples):
    return sum(int(np.count_nonzero(example.loss_weights)) for example in examples)


def num_turns(examples, stop_ids):
    return sum(int((np.isin(example.targets, stop_ids) & (example.loss_weights != 0)).sum()) for example in examples)


@given(
    st.lists(EXCHANGES, min_size=1, max_size=6),
    st.integers(20, 400),
    st.sampled_from(["drop_early_turns", "split_turns", "truncate"]),
    st.sampled_from(["all", "last"]),
    st.sampled_from(["token", "example"]),
)
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_lost_is_counted(tokenizer, rows, max_seq_len, policy, supervise, averaging):
    messages = [message for row in rows for message in exchange(*row)]
    messages[-1] = messages[-1]._replace(loss_weight=None)
    conversation = Conversation(tuple(messages), ORIGIN)
    template = load_template("qwen3", tokenizer, {"enable_thinking": True})
    renderer = Renderer(tokenizer, template, RenderOptions(supervise=supervise, averaging=averaging))
    whole = renderer.render(conversation)
    try:
        options = dict(supervise=supervise, averaging=averaging)
        examples, lost, _, turns, *_ = fit_examples(conversation, renderer, max_seq_len, policy, **options)
        assert turns == num_turns(examples, renderer.stop_ids)
    except OverLongError as error:
        examples, lost = [], error.lost
    assert all(len(example) <= max_seq_len for example in examples)
    assert num_supervised(whole) == num_supervised(examples) + lost.supervised_tokens
    assert num_turns(whole, renderer.stop_ids) == num_turns(examples, renderer.stop_ids) + lost.turns
    assert lost.tokens >= 0
    if averaging == "example":
        assert all(abs(example.loss_weights.sum() - 1) < 1e-4 for example in examples)
    kept = {(example.ids.tobytes(), example.loss_weights.tobytes()) for example in examples}
    for example in whole:
        if len(example) <= max_seq_len:
            assert (example.ids.tobytes(), example.loss_weights.tobytes()) in kept
