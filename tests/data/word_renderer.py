"""A renderer that a person can do by hand: each word is an id, each role is an id, so that a test knows every length.

user "a b", assistant "c"  ->  1 [user] a b [assistant] c 2      supervised: c 2
"""

from collections import Counter

from sft_jax.config_schema import Config, DataConfig, RunConfig, SourceConfig
from sft_jax.data.errors import RowError
from sft_jax.data.example_builder import RenderedExample, RenderedRow
from sft_jax.data.rendering import Renderer
from sft_jax.datatypes import Document, TokenizedExample

BOS, STOP, UNKNOWN = 1, 2, 3
ROLE_IDS = {"system": 4, "user": 5, "assistant": 6, "tool": 7}
FIRST_WORD = 10


class WordRenderer(Renderer):
    """The word `?` cannot be expressed; a system prompt `rewrites` makes every turn an example of its own."""

    stop_ids = (STOP,)

    def __init__(self, unknown_tokens="error", version="words", supervise="all"):
        self.unknown_tokens = unknown_tokens
        self.version = version
        self.supervise = supervise

    def fingerprint_fields(self):
        return {"config.data.tokenizer": self.version}

    def refuse_clock(self):
        pass

    def render_row(self, row):
        counts = Counter()
        if isinstance(row, Document):
            ids = [BOS, *self._encode(row.text, row.origin, counts), STOP]
            return RenderedRow([RenderedExample(TokenizedExample.from_ids(ids, [1.0] * len(ids), row.origin))], counts)
        last_turn = max(i for i, message in enumerate(row.messages) if message.role == "assistant")
        rewrites = row.messages[0].content == "rewrites"
        ids, weights, examples, turns, answers = [BOS], [0.0], [], [], []
        for i, message in enumerate(row.messages):
            words = self._encode(message.content, row.origin, counts)
            weight = message.loss_weight if message.loss_weight is not None else float(self.supervise != "weighted")
            is_trained = message.role == "assistant" and weight > 0 and (self.supervise != "last" or i == last_turn)
            ids += [ROLE_IDS[message.role], *words]
            weights += [0.0] + [float(is_trained)] * len(words)
            if message.role == "assistant":
                ids.append(STOP)
                weights.append(float(is_trained))
            if is_trained:
                examples.append(TokenizedExample.from_ids(list(ids), list(weights), row.origin))
                weights = [0.0 if rewrites else weight for weight in weights]
                turns.append(i)
                answers.append((len(ids) - 2 - len(words), len(ids) - 1))
        if not examples:
            raise RowError("nothing_supervised", row.origin, "has no turn to train on. Remove it.")
        if not rewrites:
            return RenderedRow([RenderedExample(examples[-1], tuple(turns), tuple(answers))], counts)
        counts["expanded"] += len(examples) - 1
        each = zip(examples, turns, answers, strict=True)
        return RenderedRow([RenderedExample(example, (i,), (answer,)) for example, i, answer in each], counts)

    def _encode(self, text, origin, counts):
        if text == "rewrites":
            return []
        words = text.split()
        if "?" in words and self.unknown_tokens != "keep":
            raise RowError("unknown_token", origin, "has '?', which the tokenizer cannot express. Remove it.")
        counts += Counter(unknown_tokens=words.count("?"))  # which holds no zeros
        return [UNKNOWN if word == "?" else FIRST_WORD + int(word) for word in words]


def make_config(tmp_path, *paths, seed=0, **data):
    """A config over source files; the stores lie in the test's folder."""
    defaults = {"max_seq_len": 16, "read_threads": 0, "store_dir": f"{tmp_path}/stores"}
    sources = {"train": tuple(SourceConfig(path=str(path)) for path in paths)}
    return Config(run=RunConfig(seed=seed), data=DataConfig(**(sources | defaults | data)))
