"""A conversation or document -> token ids and loss weights. The ONE place that decides what is trained on.

For each assistant turn the template is asked twice: for the *prompt*, the messages before the turn with the generation
prompt, which is what inference feeds; and for the messages up to the turn itself. The second must begin with the first.
What it adds is the *completion*: what the template makes the model write first, the content, the stop token (all
supervised), and an *epilogue*, often a newline (not supervised). With ChatML:

    <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\n   Hello <|im_end|>   \\n
    prompt                                          weight 0   weight 1           epilogue, weight 0

Prompts are encoded as inference encodes them, completions as continuations of them. The next turn joins the same
example if *its* prompt, encoded anew as inference would, begins with the ids so far. Where it does not (the template
rewrites history, or answer and template text would merge into other tokens), the turn becomes an example of its own.

Control ids come from the template only: look-alikes in content are disguised before rendering, and encoded as text.
"""

import collections
import dataclasses
import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sft_jax.config_schema import DataConfig
from sft_jax.data.control_tokens import Disguise
from sft_jax.data.errors import RowError
from sft_jax.data.stop_token import find_stop
from sft_jax.data.templates import ChatTemplate, TemplateError, load_template
from sft_jax.data.tokenizer import Tokenizer, load_tokenizer
from sft_jax.datatypes import ConfigError, Conversation, Document, Message, Origin, TokenizedExample

RENDERING_VERSION = 1
"""Raised when the same rows would give other ids or weights: part of the fingerprint."""

Parts = list[int | str]
"""A rendered text, cut into control ids and plain text."""


@dataclass(frozen=True, kw_only=True)
class RenderOptions:
    """The options of `config.data` that shape ids and weights, by the same names."""

    stop_token: str = ""
    unknown_tokens: str = "error"


def open_renderer(data: DataConfig, model_path: str) -> "Renderer":
    """The tokenizer and the chat template of a config, held against each other; each process that renders opens one."""
    tokenizer = load_tokenizer(data.tokenizer or model_path, data.new_tokens)
    template = load_template(data.chat_template, tokenizer, data.chat_template_kwargs)
    options = {f.name: getattr(data, f.name) for f in dataclasses.fields(RenderOptions)}
    return Renderer(tokenizer, template, RenderOptions(**options))


_DEFAULTS = RenderOptions()


class Renderer:
    """Tokenizer and template together: examples for training and prompts for inference, from the same code.

    Attributes:
      stop_ids: ids that end an assistant turn; without a template, EOS.
      counts: over all rows so far, `turns`: those trained on; `expanded`: turns that became examples of their own;
        `disguised`: conversations with content that looks like control tokens; `unknown_tokens`: kept.
    """

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate, options: RenderOptions = _DEFAULTS):
        """Check the template on a probe.

        Raises:
          ConfigError: the template's generation prompt is no prefix of the turn, it writes no stop token, or its
            control tokens are not tokens of the tokenizer.
        """
        self.tokenizer = tokenizer
        self.template = template
        self.counts: collections.Counter[str] = collections.Counter()
        self.options = options
        self._stop = find_stop(tokenizer, template, options.stop_token)
        stop_id = tokenizer.token_id(self._stop.text)
        self.stop_ids: tuple[int, ...] = () if stop_id is None else (stop_id,)

    def fingerprint(self) -> str:
        """sha256, hex, over everything that shapes ids and weights.

        Raises:
          ConfigError: the template writes today's date, so that a fingerprint would vouch for nothing tomorrow.
        """
        return hashlib.sha256(json.dumps(self.fingerprint_fields(), sort_keys=True).encode()).hexdigest()

    def fingerprint_fields(self) -> dict[str, Any]:
        """What `fingerprint` is made of, as JSON values by the config field that sets it; raises as it does. Template
        and tokenizer by their sha256."""
        if self.template.reads_clock:
            raise ConfigError(
                f"config.data.chat_template_kwargs: chat template {self.template.name} writes today's date into every "
                "prompt, so the same rows would differ tomorrow. Give it a fixed one: dict(now='2026-01-31')."
            )
        return {
            "rendering_version": RENDERING_VERSION,
            "config.data.tokenizer": self.tokenizer.fingerprint(),
            "config.data.chat_template": hashlib.sha256(self.template.text.encode()).hexdigest(),
            "config.data.chat_template_kwargs": self.template.kwargs,
            **{f"config.data.{name}": value for name, value in dataclasses.asdict(self.options).items()},
        }

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """What inference feeds before an assistant turn that follows `messages`."""
        messages, disguise = self._disguise(messages)
        prompt = self.template.render(messages, add_generation_prompt=True)
        return self.tokenizer.encode_parts(self._split(prompt, disguise))

    def render(self, row: Conversation | Document) -> list[TokenizedExample]:
        """The examples of a row: one, or more where turns cannot share one.

        Raises:
          RowError: `no_assistant_turn`; `template`, which refuses these messages or treats a turn unlike the probe;
            `unknown_token`, unless these are kept.
          ConfigError: a conversation, and there is no template; a document, and the tokenizer has no EOS.
        """
        if isinstance(row, Document):
            return [self._render_document(row)]
        try:
            return self._render_conversation(row)
        except TemplateError as error:
            raise RowError("template", row.origin, f"{error}. Fix the row, or choose another template.") from error

    def _render_document(self, document: Document) -> TokenizedExample:
        """`[BOS] text EOS`, all of it supervised except the first id, which nothing predicts."""
        tokenizer = self.tokenizer
        eos_id = tokenizer.token_id(tokenizer.eos_token)
        if eos_id is None:
            raise ConfigError(
                f"config.data.tokenizer: {tokenizer.origin} has no EOS token to end documents with. "
                "Name a folder whose tokenizer_config.json gives one."
            )
        bos_id = tokenizer.token_id(tokenizer.bos_token) if tokenizer.adds_bos else None
        text_ids = tokenizer.encode(document.text)
        self._check_unknown([document.text], [text_ids], document.origin)
        ids = [*([] if bos_id is None else [bos_id]), *text_ids, eos_id]
        return TokenizedExample.from_ids(ids, [1.0] * len(ids), document.origin)

    def _render_conversation(self, conversation: Conversation) -> list[TokenizedExample]:
        origin = conversation.origin
        messages, disguise = self._disguise(conversation.messages)
        turns = [i for i, message in enumerate(messages) if message.role == "assistant"]
        if not turns:
            raise RowError("no_assistant_turn", origin, "has no assistant turn to train on. Add one, or drop the row.")
        self.counts["disguised"] += disguise is not None
        self.counts["turns"] += len(turns)
        examples: list[_Example] = []
        for i in turns:
            prompt, completion, epilogue = self._render_turn(messages, i, origin)
            if examples and examples[-1].leads_to(prompt):
                example = examples[-1]
            else:
                example = _Example()
                examples.append(example)
            # Encode only what lies beyond the ids so far. Their last is a control token, where every text is cut.
            beyond = prompt[example.stop_at :]
            prompt_parts = self._split(beyond, disguise)
            prompt_ids = self.tokenizer.encode_each(prompt_parts)
            self._check_unknown(prompt_parts, prompt_ids, origin)
            example.append(prompt_ids[1:] if example.ids else prompt_ids, weight=0.0)

            parts = self._split(completion, disguise) + ([] if self._stop.is_written else [*self.stop_ids])
            shares = i != turns[-1] and self._split(beyond + completion, disguise) == _join(prompt_parts, parts)
            completion_ids, shares = self._encode_completion(prompt_parts, prompt_ids, parts, shares)
            self._check_unknown(parts, completion_ids, origin)
            example.append(completion_ids, weight=1.0)
            example.text, example.epilogue, example.shares = prompt + completion, epilogue, shares
            example.stop_at = len(example.text) - len(self._stop.text)
        for example in examples:
            after_stop = self._split(self._stop.text + example.epilogue, disguise)
            example.append(self.tokenizer.encode_each(after_stop)[1:], weight=0.0)
        self.counts["expanded"] += len(examples) - 1
        return [example.finish(origin) for example in examples]

    def _render_turn(self, messages: Sequence[Message], i: int, origin: Origin) -> tuple[str, str, str]:
        """(prompt, completion through the stop token, epilogue) of assistant message `i`."""
        prompt = self.template.render(messages[:i], add_generation_prompt=True)
        whole = self.template.render(messages[: i + 1], add_generation_prompt=False)
        where = f"chat template {self.template.name}, message {i + 1}"
        for k in range(i - 1, -1, -1):
            if messages[k].role == "assistant":
                break  # checked with its own turn; from here on the template may rewrite history
            if messages[k].role != "tool" and messages[k].content.strip() not in prompt:
                what = f"chat template {self.template.name} leaves out message {k + 1}, of role {messages[k].role}"
                raise RowError("template", origin, f"{what}. Take it out of the row, or choose another template.")
        if not whole.startswith(prompt):
            what = f"{where}: the prompt that asks for it is no prefix of the text with it"
            raise RowError("template", origin, f"{what}. Choose another template.")
        if not self._stop.is_written:
            return prompt, whole[len(prompt) :], ""
        end = whole.rfind(self._stop.text, len(prompt))
        if end < 0:
            what = f"{where}: is not followed by the stop token {self._stop.text!r}"
            raise RowError("template", origin, f"{what}. Choose another template.")
        end += len(self._stop.text)
        return prompt, whole[len(prompt) : end], whole[end:]

    def _encode_completion(
        self, prompt: Parts, prompt_ids: list[list[int]], completion: Parts, shares: bool
    ) -> tuple[list[list[int]], bool]:
        """Ids of a completion as a continuation of its prompt, and whether a later prompt has the same ids.

        A later prompt encodes both as one text. Pieces between control tokens are encoded alone, so only the piece in
        which the two meet can differ: `"assistant\\n" + "\\nHello"` may merge its newlines into one token. Where that
        piece's ids begin with the prompt's, no token crosses the border, and the rest is the continuation.

        Args:
          shares: whether the question arises; if not, the answer is no.
        """
        encode_each = self.tokenizer.encode_each
        if shares and prompt and isinstance(completion[0], str):
            if isinstance(prompt[-1], str):
                joint = encode_each([*prompt[-2:-1], prompt[-1] + completion[0]])[-1]
                border = len(prompt_ids[-1])
                if joint[:border] == prompt_ids[-1]:
                    return [joint[border:], *encode_each(completion[1:])], True
                shares = False
            else:
                shares = prompt[-1] not in self.tokenizer.restarting
        return encode_each(completion, continuation=bool(prompt)), shares

    def _disguise(self, messages: Sequence[Message]) -> tuple[Sequence[Message], Disguise | None]:
        """Messages in which no content can be taken for a control token, and the way back."""
        control = self.tokenizer.control
        if not any(control.may_form_in(message.content) for message in messages):
            return messages, None
        disguise = Disguise(self.template.text + "".join(message.content for message in messages))
        return [Message(m.role, control.disguise(m.content, disguise)) for m in messages], disguise

    def _split(self, text: str, disguise: Disguise | None) -> Parts:
        parts = self.tokenizer.control.split(text)
        if disguise:
            parts = [disguise.reveal(part) if isinstance(part, str) else part for part in parts]
        return parts

    def _check_unknown(self, parts: Sequence[int | str], ids: list[list[int]], origin: Origin) -> None:
        unk_id = self.tokenizer.unk_id
        for part, part_ids in zip(parts, ids, strict=True):
            if not isinstance(part, str) or unk_id not in part_ids:
                continue
            if self.options.unknown_tokens == "keep":
                self.counts["unknown_tokens"] += part_ids.count(unk_id)
                continue
            unknown = [c for c in dict.fromkeys(part) if unk_id in self.tokenizer.encode(c, continuation=True)]
            names = ", ".join(f"{c!r} (U+{ord(c):04X})" for c in unknown[:5]) or "a part of it"
            message = f"the tokenizer cannot express {names}. Fix the row, or set config.data.unknown_tokens."
            raise RowError("unknown_token", origin, message)


@dataclass
class _Example:
    """An example that grows turn by turn."""

    ids: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)  # one per call of append, with
    counts: list[int] = field(default_factory=list)  # the number of ids that have it
    text: str = ""  # rendered so far, through the last stop token
    stop_at: int = 0  # where in `text` that stop token begins
    epilogue: str = ""  # what the template writes after it
    shares: bool = False  # whether a later prompt that begins with `text` begins with `ids` too

    def leads_to(self, prompt: str) -> bool:
        return self.shares and prompt.startswith(self.text)

    def append(self, ids: list[list[int]], weight: float) -> None:
        """Ids and weights grow by one call, so that they cannot part."""
        before = len(self.ids)
        self.ids.extend(itertools.chain.from_iterable(ids))
        self.weights.append(weight)
        self.counts.append(len(self.ids) - before)

    def finish(self, origin: Origin) -> TokenizedExample:
        weights = np.repeat(np.array(self.weights, np.float32), self.counts)
        return TokenizedExample.from_ids(np.array(self.ids, np.int32), weights, origin)


def _join(prompt: Parts, completion: Parts) -> Parts:
    """The parts of two texts as the parts of one."""
    if prompt and isinstance(prompt[-1], str) and isinstance(completion[0], str):
        return [*prompt[:-1], prompt[-1] + completion[0], *completion[1:]]
    return prompt + completion
