"""Every chat template at hand, tried on four conversations: verified, expanded, or refused for a listed reason."""

import ast
import functools
import re
from dataclasses import dataclass, field

from sft_jax.data.errors import RowError
from sft_jax.data.rendering import Renderer, RenderOptions
from sft_jax.data.template_probe import check_reasoning_is_chosen
from sft_jax.data.templates import BUILTIN_TEMPLATES, ChatTemplate, load_template
from sft_jax.data.tokenizer import load_tokenizer
from sft_jax.datatypes import ConfigError, Conversation, Message, Origin, ToolCall

ORIGIN = Origin("chats.jsonl", 7)
CALL = ToolCall("get_weather", {"city": "Paris"}, '{"city": "Paris"}', id="call00001")
FUNCTION = {
    "name": "get_weather",
    "description": "Weather of a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "Its name."}}},
}


def _conversation(*messages, tools=()):
    return Conversation(messages, ORIGIN, tools)


_ASK, _MORE, _THANKS = (Message("user", text) for text in ("One?", "Two?", "Thanks."))
CONVERSATIONS = {
    "two turns": _conversation(_ASK, Message("assistant", "1."), _MORE, Message("assistant", "2.")),
    "system": _conversation(Message("system", "Be brief."), _ASK, Message("assistant", "1.")),
    "tools": _conversation(
        _ASK,
        Message("assistant", "", tool_calls=(CALL,)),
        Message("tool", "Sunny.", tool_call_id=CALL.id, name=CALL.name),
        Message("assistant", "It is sunny."),
        _THANKS,
        Message("assistant", "Bye."),
        tools=({"type": "function", "function": FUNCTION},),
    ),
    "reasoning": _conversation(
        _ASK,
        Message("assistant", "1.", reasoning="Count once."),
        _MORE,
        Message("assistant", "2.", reasoning="Count twice."),
    ),
}
# A reason, as the table has it <- words of the error.
REASONS = {
    "generation prompt is no prefix": "is no prefix of",
    "no stop token": "writes no stop token|in which there is no control token",
    "needs images": "may expect images|has no attribute 'text'",
    "choose a form": "so one of two forms would be trained by chance",
    "no place for tools": "leaves out (.*the row's tools|.*call 1 of message 2|message 3, of role tool)",
    "no place for reasoning": "leaves out the reasoning",
    "refuses the roles": "does not take roles",
}
OTHER_TEMPLATE = "another `chat_template`"


@dataclass(frozen=True)
class Settings:
    """What leads through a refusal: options of `config.data`. `new_tokens` beside those that the error itself names."""

    kwargs: dict = field(default_factory=dict)
    stop_token: str = ""
    new_tokens: tuple[str, ...] = ()

    def __str__(self):
        shown = [f"`chat_template_kwargs = dict({k}={v!r})`" for k, v in self.kwargs.items()]
        shown += [f"`stop_token = {self.stop_token!r}`"] if self.stop_token else []
        return ", ".join([*shown, *([f"`new_tokens = {self.new_tokens!r}`"] if self.new_tokens else [])])


def templates(assets=None):
    """(name, Jinja text) of those built in, and of every file of the assets."""
    for name in BUILTIN_TEMPLATES:
        yield name, None
    if assets:
        for path in sorted((assets / "chat_templates").glob("*/*.jinja")):
            text = path.read_text(encoding="utf-8")
            if path.parent.name == "chujiezheng":  # its repository loads them so
                text = text.replace("    ", "").replace("\n", "")
            yield f"{path.parent.name}/{path.stem}", text


def open_renderer(tokenizer, name, text, settings=Settings()):
    """Raises ConfigError where the template is refused as a whole."""
    if text is None:
        template = load_template(name, tokenizer, settings.kwargs)
    else:
        variables = {"bos_token": "", "eos_token": ""} | tokenizer.special_tokens  # some have neither
        template = compiled(name, text).with_kwargs(variables | settings.kwargs)
    renderer = Renderer(tokenizer, template, RenderOptions(stop_token=settings.stop_token, unknown_tokens="keep"))
    check_reasoning_is_chosen(template, renderer.facts.reasoning)
    return renderer


@functools.lru_cache(maxsize=1)
def compiled(name, text):
    """One process serves all tokenizers."""
    return ChatTemplate(name, text, {}, {"now": "2026-01-31"})


def tokens_asked_for(folder, name, text, settings=Settings()):
    """The new tokens that our own errors ask for, until the template needs no more."""
    new_tokens = settings.new_tokens
    while True:
        asked = []
        try:
            renderer = open_renderer(load_tokenizer(folder, new_tokens), name, text, settings)
            renderer.render(CONVERSATIONS["tools"])
        except (ConfigError, RowError) as error:
            asked = re.findall(r"new_tokens, as (\(.*\)), or choose", str(error))
        if not asked:
            return new_tokens
        new_tokens += ast.literal_eval(asked[0])


def reason_of(error):
    for reason, words in REASONS.items():
        if re.search(words, str(error)):
            return reason
    raise AssertionError(f"refused for no listed reason: {error}")


def survey(tokenizer, name, text, settings=Settings()):
    """Conversation -> verdict. A template that is refused as a whole has that verdict everywhere."""
    try:
        renderer = open_renderer(tokenizer, name, text, settings)
    except ConfigError as error:
        return dict.fromkeys(CONVERSATIONS, f"refused: {reason_of(error)}")
    verdicts = {}
    for kind, conversation in CONVERSATIONS.items():
        try:
            examples = renderer.render(conversation)
        except RowError as error:
            verdicts[kind] = f"refused: {reason_of(error)}"
            continue
        assert_verified(renderer, conversation, examples)
        verdicts[kind] = "verified" if len(examples) == 1 else f"verified, {len(examples)} examples"
    return verdicts


def assert_verified(renderer, conversation, examples):
    """Before each supervised stretch stands what inference feeds; each ends in a stop token; no turn is missing."""
    turns = [i for i, message in enumerate(conversation.messages) if message.role == "assistant"]
    starts = [
        (example, start + 1)
        for example in examples
        for start, (before, after) in enumerate(zip([0, *example.loss_weights], example.loss_weights, strict=False))
        if after and not before
    ]
    assert len(starts) == len(turns)
    for (example, start), turn in zip(starts, turns, strict=True):
        prompt = renderer.prompt_ids(conversation.messages[:turn], conversation.tools)
        assert example.ids[:start].tolist() == prompt
        end = start
        while end < len(example.ids) and example.loss_weights[end - 1]:
            end += 1
        assert example.ids[end - 1] in renderer.stop_ids
