"""A conversation or document -> token ids and loss weights. The ONE place that decides what is trained on.

For each assistant turn `turns.py` gives the *prompt*, which is what inference feeds, and what the turn adds to it: the
*completion*, which is what the template makes the model write first, the content and the stop token (all supervised),
and an *epilogue*, often a newline (not supervised). With ChatML:

    <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\n   Hello <|im_end|>   \\n
    prompt                                          weight 0   weight 1           epilogue, weight 0

Prompts are encoded as inference encodes them, completions as continuations of them. The next turn joins the same
example if *its* prompt, encoded anew as inference would, begins with the ids so far. Where it does not (the template
rewrites history, or answer and template text would merge into other tokens), the turn becomes an example of its own.

Control ids come from the template only: look-alikes in content are disguised before rendering, and encoded as text.
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from sft_jax.config_schema import DataConfig
from sft_jax.data.disguise import Disguise, disguise_conversation, texts_of
from sft_jax.data.errors import RowError
from sft_jax.data.example_builder import (
    ExampleBuilder,
    Parts,
    RenderedRow,
    join_parts,
    split_reasoning,
)
from sft_jax.data.template_probe import check_reasoning_is_chosen, probe_template
from sft_jax.data.templates import ChatTemplate, TemplateError, load_template
from sft_jax.data.tokenizer import KnownTexts, Tokenizer, load_tokenizer
from sft_jax.data.turns import Turn, render_turns
from sft_jax.datatypes import ConfigError, Conversation, Document, Message, Origin, TokenizedExample

RENDERING_VERSION = 3
"""Raised when the same rows would give other ids or weights: part of the fingerprint."""


@dataclass(frozen=True, kw_only=True)
class RenderOptions:
    """The options of `config.data` that shape ids and weights, by the same names."""

    stop_token: str = ""
    unknown_tokens: str = "error"
    supervise: str = "all"
    train_reasoning: bool = True
    prompt_loss_weight: float = 0.0
    averaging: str = "token"


_DEFAULTS = RenderOptions()


def open_renderer(data: DataConfig, model_path: str) -> "Renderer":
    """The tokenizer and the chat template of a config, held against each other; each process that renders opens one.

    Raises:
      ConfigError: besides what `Renderer` raises, which form of a generation prompt is trained is left to chance.
    """
    tokenizer = load_tokenizer(data.tokenizer or model_path, data.new_tokens)
    template = load_template(data.chat_template, tokenizer, data.chat_template_kwargs)
    options = {f.name: getattr(data, f.name) for f in dataclasses.fields(RenderOptions)}
    renderer = Renderer(tokenizer, template, RenderOptions(**options))
    check_reasoning_is_chosen(template, renderer.facts.reasoning)
    return renderer


class _Step(NamedTuple):
    """A turn that is to be appended to an example."""

    number: int  # of its message
    turn: Turn
    weight: float
    prompt_weight: float
    is_last: bool


class _Row(NamedTuple):
    """What the rendering of one row shares."""

    origin: Origin
    counts: dict[str, int]
    disguise: Disguise | None = None
    known: KnownTexts | None = None  # where several examples tell the row's history


class Renderer:
    """Tokenizer and template together: examples for training and prompts for inference, from the same code.

    Attributes:
      facts: what the probes of the template showed.
      stop_ids: ids that end an assistant turn; without a template, EOS.
    """

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate, options: RenderOptions = _DEFAULTS):
        """Check the template on probes.

        Raises:
          ConfigError: the template's generation prompt is no prefix of the turn, it writes no stop token, or its
            control tokens are not tokens of the tokenizer.
        """
        self.tokenizer = tokenizer
        self.template = template
        self.options = options
        self.facts = probe_template(tokenizer, template, options.stop_token)
        stops = dict.fromkeys((self.facts.stop.text, self.facts.call_stop))
        self.stop_ids: tuple[int, ...] = tuple(i for i in map(tokenizer.token_id, stops) if i is not None)

    def fingerprint(self) -> str:
        """sha256, hex, over everything that shapes ids and weights.

        Raises:
          ConfigError: the template writes today's date, so that a fingerprint would vouch for nothing tomorrow.
        """
        return hashlib.sha256(json.dumps(self.fingerprint_fields(), sort_keys=True).encode()).hexdigest()

    def fingerprint_fields(self) -> dict[str, Any]:
        """What `fingerprint` is made of, as JSON values by the config field that sets it; raises as it does. Template
        and tokenizer by their sha256."""
        self.refuse_clock()
        return {
            "rendering_version": RENDERING_VERSION,
            "config.data.tokenizer": self.tokenizer.fingerprint(),
            "config.data.chat_template": hashlib.sha256(self.template.text.encode()).hexdigest(),
            "config.data.chat_template_kwargs": self.template.kwargs,
            **{f"config.data.{name}": value for name, value in dataclasses.asdict(self.options).items()},
        }

    def refuse_clock(self) -> None:
        """Raises ConfigError where a rendering so far has asked for today's date: a fingerprint would vouch for nothing
        tomorrow. Some templates ask in some conversations only, so who renders rows asks again behind them."""
        if self.template.reads_clock:
            raise ConfigError(
                f"config.data.chat_template_kwargs: chat template {self.template.name} writes today's date into every "
                "prompt, so the same rows would differ tomorrow. Give it a fixed one: dict(now='2026-01-31')."
            )

    def prompt_ids(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = ()) -> list[int]:
        """What inference feeds before an assistant turn that follows `messages`."""
        asked, _ = self._split_reasoning(Conversation(tuple(messages), Origin("", 0), tuple(tools)))
        asked, disguise = disguise_conversation(asked, self.tokenizer.control, self.template.text)
        prompt = self.template.render(asked.messages, add_generation_prompt=True, tools=asked.tools)
        return self.tokenizer.encode_parts(self._split(prompt, disguise))

    def render(self, row: Conversation | Document) -> list[TokenizedExample]:
        """The examples of `render_row`, alone."""
        return [rendered.example for rendered in self.render_row(row).examples]

    def render_row(self, row: Conversation | Document) -> RenderedRow:
        """The examples of a row: one, or more where turns cannot share one.

        Raises:
          RowError: `no_assistant_turn`; `nothing_supervised`, all of whose turns have weight 0; `template`, which
            refuses these messages or treats a turn unlike the probe; `template_leaves_out`, text of the row;
            `unknown_token`, unless these are kept.
          ConfigError: a conversation, and there is no template; a document, and the tokenizer has no EOS.
        """
        if isinstance(row, Document):
            return self._render_document(row)
        try:
            return self._render_conversation(row)
        except TemplateError as error:
            raise RowError("template", row.origin, f"{error.what}. Fix the row, or choose another template.") from error

    def _render_document(self, document: Document) -> RenderedRow:
        """`[BOS] text EOS`, all of it supervised except the first id, which nothing predicts."""
        tokenizer = self.tokenizer
        eos_id = tokenizer.token_id(tokenizer.eos_token)
        if eos_id is None:
            raise ConfigError(
                f"config.data.tokenizer: {tokenizer.origin} has no EOS token to end documents with. "
                "Name a folder whose tokenizer_config.json gives one."
            )
        bos_id = tokenizer.token_id(tokenizer.bos_token) if tokenizer.adds_bos else None
        (text_ids,) = tokenizer.encode_each([document.text])
        row = _Row(document.origin, {})
        self._check_unknown([document.text], [text_ids], row)
        example = ExampleBuilder()
        bos_ids, eos_ids = tokenizer.encode_each([] if bos_id is None else [bos_id]), tokenizer.encode_each([eos_id])
        example.append([*bos_ids, text_ids, *eos_ids], weight=1.0)
        return RenderedRow([example.finish(document.origin, self.options.averaging)], row.counts)

    def _render_conversation(self, conversation: Conversation) -> RenderedRow:
        weights = self._turn_weights(conversation)
        counts: dict[str, int] = {}
        conversation, num_split = self._split_reasoning(conversation)
        if num_split:
            counts["reasoning_split"] = num_split
        shown, disguise = disguise_conversation(conversation, self.tokenizer.control, self.template.text)
        if disguise and any(map(self.tokenizer.control.holds, texts_of(conversation))):
            counts["control_text"] = 1
        row = _Row(conversation.origin, counts, disguise)
        try:
            turns = render_turns(self.template, self.facts, shown.messages, shown.tools, list(weights), row.origin)
        except (RowError, TemplateError) as error:
            if disguise:  # the message quotes what was rendered
                error.args = (disguise.reveal(error.args[0]),)
            raise
        examples: list[ExampleBuilder] = []
        read = 0  # messages that stand in the examples so far
        for (i, weight), turn in zip(weights.items(), turns, strict=True):
            prompt_weight = self.options.prompt_loss_weight
            if prompt_weight and any(message.role in ("tool", "assistant") for message in shown.messages[read:i]):
                prompt_weight = 0.0
            if examples and examples[-1].leads_to(turn.prompt):
                example = examples[-1]
            else:
                if len(examples) == 1:
                    row = row._replace(known={})
                example = ExampleBuilder()
                prompt_weight *= not examples  # the first example has had these messages
                examples.append(example)
            self._append_turn(example, _Step(i, turn, weight, prompt_weight, is_last=turn is turns[-1]), row)
            read = i + 1
        for example in examples:
            if example.last and example.last.epilogue:
                after_stop = self._split(example.last.stop + example.last.epilogue, disguise)
                example.append(self.tokenizer.encode_each(after_stop)[1:], weight=0.0)
        if len(examples) > 1:
            counts["expanded"] = len(examples) - 1
        return RenderedRow([example.finish(row.origin, self.options.averaging) for example in examples], counts)

    def _turn_weights(self, conversation: Conversation) -> dict[int, float]:
        """Number of each assistant message that is trained, ascending -> its weight, above 0."""
        turns = [i for i, message in enumerate(conversation.messages) if message.role == "assistant"]
        if not turns:
            what = "has no assistant turn to train on. Add one, or drop the row."
            raise RowError("no_assistant_turn", conversation.origin, what)
        if self.options.supervise == "last":
            turns = turns[-1:]
        default = 0.0 if self.options.supervise == "weighted" else 1.0
        weights = {}
        for i in turns:
            own = conversation.messages[i].loss_weight
            weight = default if own is None else own
            if weight > 0:
                weights[i] = weight
        if not weights:
            what = f"has no turn of a weight above 0, with config.data.supervise = {self.options.supervise!r}"
            raise RowError("nothing_supervised", conversation.origin, f"{what}. Give one a weight, or remove the row.")
        return weights

    def _split_reasoning(self, conversation: Conversation) -> tuple[Conversation, int]:
        """Assistant contents that open with the template's own marks, cut into reasoning and content, and how many they
        are: written out as text, the marks would be text, and not what the model must write."""
        marks = self.facts.reasoning
        if marks is None or not any(marks.opens in message.content for message in conversation.messages):
            return conversation, 0
        messages, num_split = list(conversation.messages), 0
        for i, message in enumerate(messages):
            head, opens, rest = message.content.partition(marks.opens)
            reasoning, closes, content = rest.partition(marks.closes)
            if message.role == "assistant" and opens and closes and not head.strip():
                if message.reasoning.strip() not in ("", reasoning.strip()):
                    what = f"message {i + 1} has reasoning in two places, and they differ. Remove one of the fields."
                    raise RowError("conflicting_fields", conversation.origin, what)
                messages[i] = message._replace(reasoning=reasoning.strip(), content=content.lstrip())
                num_split += 1
        return conversation._replace(messages=tuple(messages)), num_split

    def _append_turn(self, example: ExampleBuilder, step: _Step, row: _Row) -> None:
        """The example grows by a turn and what stands before it."""
        turn, disguise = step.turn, row.disguise
        # Encode only what lies beyond the ids so far. Their last is the stop token, where every text is cut.
        beyond = turn.prompt[example.stop_at :]
        prompt_parts = self._split(beyond, disguise)
        parts = self._split(turn.completion, disguise) + ([] if turn.stop else [self.stop_ids[0]])
        # A stop token that the template does not write stands in no later prompt.
        shares = not step.is_last and bool(turn.stop)
        shares = shares and self._split(beyond + turn.completion, disguise) == join_parts(prompt_parts, parts)
        prompt_ids, ids, shares = self._encode_turn(prompt_parts, parts, shares, row.known)
        self._check_unknown(prompt_parts, prompt_ids, row)
        self._check_unknown(parts, ids, row)

        example.append(prompt_ids[1:] if example.ids else prompt_ids, step.prompt_weight)
        num_before = example.num_ids
        if turn.message.reasoning and not self.options.train_reasoning:
            reasoning = disguise.reveal(turn.message.reasoning) if disguise else turn.message.reasoning
            marks = self.facts.reasoning
            runs = split_reasoning(parts, ids, reasoning.strip(), marks.opens, self.tokenizer) if marks else []
            if not any(is_reasoning for _, is_reasoning in runs):
                what = f"chat template {self.template.name} writes reasoning so that it cannot be told from the answer"
                raise RowError(
                    "template", row.origin, f"{what}. Set config.data.train_reasoning = True, or choose another."
                )
            for run_ids, is_reasoning in runs:
                example.append([run_ids], 0.0 if is_reasoning else step.weight)
        else:
            example.append(ids, step.weight)
        example.end_turn(step.number, turn, num_before, shares)

    def _encode_turn(
        self, prompt: Parts, completion: Parts, shares: bool, known: KnownTexts | None
    ) -> tuple[list[bytes], list[bytes], bool]:
        """Ids of a prompt, ids of a completion as a continuation of it, and whether a later prompt has the same ids.

        A later prompt encodes both as one text. Pieces between control tokens are encoded alone, so only the piece in
        which the two meet can differ: `"assistant\\n" + "\\nHello"` may merge its newlines into one token. Where that
        piece's ids begin with the prompt's, no token crosses the border, and the rest is the continuation.

        Args:
          shares: whether the question arises; if not, the answer is no.
        """
        encode_each = self.tokenizer.encode_each
        prompt_ids, ids = encode_each(prompt, known=known), encode_each(completion, continuation=bool(prompt))
        if shares and prompt and isinstance(completion[0], str):
            if isinstance(prompt[-1], str):
                joint = encode_each([*prompt[-2:-1], prompt[-1] + completion[0]])[-1]
                shares = joint.startswith(prompt_ids[-1])
                if shares:
                    ids[0] = joint[len(prompt_ids[-1]) :]
            else:
                shares = prompt[-1] not in self.tokenizer.restarting
        return prompt_ids, ids, shares

    def _split(self, text: str, disguise: Disguise | None) -> Parts:
        parts = self.tokenizer.control.split(text)
        if disguise:
            parts = [disguise.reveal(part) if isinstance(part, str) else part for part in parts]
        return parts

    def _check_unknown(self, parts: Sequence[int | str], ids: list[bytes], row: _Row) -> None:
        unk_id = self.tokenizer.unk_id
        if self.tokenizer.model.expresses_all:
            return
        for part, part_ids in zip(parts, ids, strict=True):
            num_unknown = int(np.count_nonzero(np.frombuffer(part_ids, np.int32) == unk_id))
            if not num_unknown or not isinstance(part, str):
                continue
            if self.options.unknown_tokens == "keep":
                row.counts["unknown_tokens"] = row.counts.get("unknown_tokens", 0) + num_unknown
                continue
            unknown = [c for c in dict.fromkeys(part) if unk_id in self.tokenizer.encode(c, continuation=True)]
            names = ", ".join(f"{c!r} (U+{ord(c):04X})" for c in unknown[:5]) or "a part of it"
            message = f"the tokenizer cannot express {names}. Fix the row, or set config.data.unknown_tokens."
            raise RowError("unknown_token", row.origin, message)
