"""Every reason for which a row can be lost: what it means, how to mend it, and what `keep` does where that is possible.

`config.data.policies` gives a reason a policy: `error` (the default: a bad row, which stops the run above
`config.data.max_bad_fraction`), `drop` (the row is left out and counted), `keep` (it is trained on as described here,
and counted).
"""

from typing import NamedTuple


class Reason(NamedTuple):
    meaning: str
    mend: str
    """Begins with a verb and has no full stop: `refuse` ends its message with it."""
    keep: str = ""
    """What the policy `keep` does; empty: a row cannot be kept."""
    option: str = ""
    """The option that decides in place of `data.policies`; empty: none."""


_FIX = "Fix the row"
REASONS: dict[str, Reason] = {
    # A line of a file.
    "malformed_json": Reason("is not JSON", "Fix or remove the line"),
    "not_utf8": Reason("is not UTF-8", "Convert the file to UTF-8"),
    "duplicate_key": Reason("has a key twice in one object", "Keep one of them"),
    "not_an_object": Reason("is JSON, but no object", _FIX),
    "nested_too_deep": Reason("is nested deeper than 100 levels", "Flatten or remove the row"),
    "row_too_large": Reason("is larger than a row may be", "Shorten or remove the row"),
    "not_json": Reason("has a column whose values JSON cannot hold", "Convert the column, or leave it out"),
    # A row's fields.
    "wrong_format": Reason(
        "has not the fields of its source's format, or of any", "Fix the row, or move it to a source of its own format"
    ),
    "preference_pair": Reason(
        "has a better and a worse answer, which is no demonstration",
        "Name the answer to train on in the source's fields",
    ),
    "conversation_tree": Reason(
        "is a tree of replies, in which each path is another conversation", "Write a row for each path to train on"
    ),
    "unsupported_field": Reason(
        "sets a field that other trainers obey, or that a template could show, and that is not read here",
        "Remove the field",
    ),
    "needs_media": Reason("has an image, audio, video or file", "Remove the row, or the part if the text stands alone"),
    "bad_tools": Reason("has tools that are no list of JSON objects", "Fix the tools of the row"),
    "empty_text": Reason("is a document without text", "Remove the row"),
    # The messages, one by one.
    "messages_not_a_list": Reason("has messages that are no list", _FIX),
    "empty_conversation": Reason("has no messages", "Remove the row"),
    "message_not_an_object": Reason("has a message that is no object", _FIX),
    "missing_role": Reason("has a message without a role", _FIX),
    "missing_content": Reason("has a message without content or calls", _FIX),
    "unknown_role": Reason(
        "has a role other than system, user, assistant and tool", "Fix the row, or map it with config.data.role_map"
    ),
    "content_not_text": Reason("has content that is no text", _FIX),
    "bad_part": Reason("has a content part that cannot be read, or parts in an order that a turn cannot keep", _FIX),
    "field_not_text": Reason("has a name, an id or reasoning that is no text", _FIX),
    "field_of_another_role": Reason(
        "sets a field on a turn of another role, such as tool_calls on a user turn", "Remove the field, or fix the role"
    ),
    "empty_content": Reason("has an empty user turn", "Write the turn, or remove the row", "the empty turn is kept"),
    "empty_assistant": Reason(
        "has an assistant turn with neither content nor calls",
        "Write the answer, or remove the row",
        "the empty answer is trained on: the model learns to stop at once",
    ),
    "conflicting_fields": Reason("says one thing in two fields that differ", "Remove one of the fields"),
    "bad_weight": Reason(
        "has a weight that is not 0 or 1 (weight), true or false (train), or from 0 to 1,000,000 (loss_weight)", _FIX
    ),
    "weight_on_context": Reason(
        "gives a weight to a turn that is no answer",
        "Set it to 0, and weight prompts with config.data.prompt_loss_weight",
        "the weight is taken as 0",
    ),
    # Calls of tools.
    "bad_tool_call": Reason("has a call that is not of the form {name, arguments}", "Fix the call"),
    "blank_tool_name": Reason("calls a tool without a name", "Fix the call"),
    "call_arguments_not_json": Reason("has call arguments that are not JSON", "Fix the call"),
    "call_arguments_not_an_object": Reason("has call arguments that are JSON, but no object", "Fix the call"),
    "duplicate_call_id": Reason("has two calls with one id in a turn", "Give each call an id of its own"),
    # The order of turns.
    "system_not_first": Reason(
        "has a system message after the first message",
        "Move it to the front, or join it to the first",
        "it stays where it is, and the template decides whether it can be shown",
    ),
    "assistant_first": Reason(
        "begins with an assistant turn", "Add what it answers, or remove it", "the turn is trained on as it stands"
    ),
    "two_users": Reason("has two user turns in a row", "Join them, or add the answer", "both turns are kept"),
    "two_assistants": Reason(
        "has two assistant turns in a row", "Join them, or add the question", "both turns are trained on"
    ),
    "tool_without_call": Reason(
        "has a tool result that no call asked for",
        "Put the call in tool_calls, or remove the result",
        "the result is kept as it stands",
    ),
    "wrong_call_id": Reason(
        "has a tool result whose id is that of no open call",
        "Fix the id",
        "the result is kept, as that of an open call",
    ),
    "unanswered_call": Reason(
        "goes on before each call has its result", "Add the results", "the calls are kept without their results"
    ),
    "unanswered_result": Reason(
        "has a user turn straight after a tool result", "Add the answer between them", "both turns are kept"
    ),
    "ends_without_assistant": Reason(
        "ends with turns that nothing answers",
        "Remove them, or add the answer",
        "those turns are left off, and counted",
    ),
    "no_assistant_turn": Reason("has no assistant turn to train on", "Add the answer, or remove the row"),
    # What becomes of a sound row.
    "template": Reason("cannot be rendered by the chat template", "Choose another template"),
    "template_leaves_out": Reason(
        "has text, reasoning, calls or tools that the chat template does not write",
        "Take it out of the row, or choose another template",
    ),
    "unknown_token": Reason("has text that the tokenizer cannot express", _FIX, option="data.unknown_tokens"),
    "too_long": Reason("is longer than data.max_seq_len", "Shorten the row", option="data.too_long"),
    "nothing_supervised": Reason("has no token to train on", "Remove the row"),
}
