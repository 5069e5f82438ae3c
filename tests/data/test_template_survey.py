"""docs/templates.md says what we make of every chat template, and each entry is tried here, by tokenizers of all kinds.

SFT_JAX_ASSETS=... python tests/data/test_template_survey.py    # writes the page
"""

import gzip
import os
import re
import sys
import tempfile
from pathlib import Path

import pytest
from template_survey import CONVERSATIONS, OTHER_TEMPLATE, Settings, survey, templates, tokens_asked_for
from tiny_tokenizers import edit_json, write_byte_level, write_sentencepiece

from sft_jax.data.templates import BUILTIN_TEMPLATES
from sft_jax.data.tokenizer import load_tokenizer

PAGE = Path(__file__).parents[2] / "docs/templates.md"
NO_STOP = Settings(stop_token="<|stop|>", new_tokens=("<|stop|>",))
THINKING, NOT_THINKING = Settings({"enable_thinking": True}), Settings({"enable_thinking": False})
SPELT_OTHERWISE = (
    "<|turn>",
    "<turn|>",
    "<|tool_call>",
    "<tool_call|>",
    "<|tool_response>",
    "<tool_response|>",
    '<|"|>',
)  # control tokens that our error cannot know for such
# What leads through, where a template is refused as a whole. A text is for people: it cannot be tried.
WAYS = {
    **dict.fromkeys(("chujiezheng/amberchat", "chujiezheng/chatqa", "chujiezheng/falcon-instruct"), NO_STOP),
    "chujiezheng/solar-instruct": NO_STOP,
    "trl/glm4moe": Settings(stop_token="<|user|>", new_tokens=("<|user|>",)),
    **{f"trl/qwen3_{kind}{end}": THINKING for kind in ("5_think", "5_nothink", "6") for end in ("", "_training")},
    **{f"trl/nemotron_3_{size}{end}": NOT_THINKING for size in ("nano", "super", "ultra") for end in ("", "_training")},
    **dict.fromkeys(("trl/deepseekv3", "trl/deepseekv3_training"), "`chat_template = 'deepseek'`"),
    **dict.fromkeys(
        ("trl/idefics3", "trl/idefics3_training", "trl/llava_next", "trl/llava_next_training"), OTHER_TEMPLATE
    ),
}
HEAD = """# Chat templates, tried

Each template renders four conversations: two turns; a system message; a tool call with its result; and two turns with
reasoning. *Verified*: before every supervised turn stand exactly the ids that inference would feed, and the turn ends
with the template's stop token. *n examples*: the template rewrites history, so a turn has an example of its own, with
the history that inference sees. *Refused*: for one of the reasons below, when the run starts (all four), or row by row,
counted under `template` or `template_leaves_out`.

| reason | what to do |
|---|---|
| generation prompt is no prefix | the last column, or another template: it would train what is not asked |
| no stop token | `data.stop_token`; a new one belongs in `data.new_tokens` too |
| choose a form | its generation prompt opens or closes reasoning: `data.chat_template_kwargs` says which is trained |
| needs images | another template: it takes content as a list of parts |
| refuses the roles | it takes no such message: another template, or take the message out of the rows |
| no place for tools, for reasoning | it would leave them out unsaid: another template, or take them out of the rows |

Built in with tools: llama3.1, qwen2.5, qwen3, mistral-v3, mistral-v7; with reasoning: qwen3, and deepseek where
`chat_template_kwargs = dict(thinking=True)`.

`SFT_JAX_ASSETS=... python tests/data/test_template_survey.py` writes this page, and a test holds it to what happens,
with {tokenizers}, each given the tokens that the template asks for.

"""


def open_tokenizers(folder, assets):
    """A function of a template's name -> tokenizers by name, with the tokens that the template asks for, or the like:
    those that any asks for, but `[INST]` and its kind only where it asks for them, as to others they are plain text."""
    tiny = write_sentencepiece(folder / "sentencepiece")
    texts = [(name, text, WAYS.get(name, Settings())) for name, text in templates(assets)]
    ways = [(name, text, way if isinstance(way, Settings) else Settings()) for name, text, way in texts]
    asked_by = {name: tokens_asked_for(tiny, name, text, way) for name, text, way in ways}
    asked = dict.fromkeys([*SPELT_OTHERWISE, *(token for tokens in asked_by.values() for token in tokens)])
    byte_level = write_byte_level(folder / "byte_level")
    edit_json(byte_level / "tokenizer_config.json", bos_token="<|endoftext|>")  # Llama's templates write one
    paths = {"a tiny byte-level one": byte_level, "a tiny sentencepiece": tiny}
    if assets:
        deepseek = folder / "deepseek"
        deepseek.mkdir()
        packed = (assets / "tokenizers/deepseek/tokenizer.json.gz").read_bytes()
        (deepseek / "tokenizer.json").write_bytes(gzip.decompress(packed))
        config = (assets / "tokenizers/deepseek/tokenizer_config.json").read_bytes()
        (deepseek / "tokenizer_config.json").write_bytes(config)
        paths |= {"DeepSeek's": deepseek, "Llama-2's": assets / "tokenizers/llama2"}
        paths |= {"minimind's": assets / "tokenizers/minimind", "TinyStories's": assets / "models/TinyStories-656K"}
        mistral = assets / "tokenizers/mistral"
        for version in ("241114.model.v7", "240323.model.v3"):
            paths[f"Mistral's {version[-2:]}"] = mistral / f"mistral_instruct_tokenizer_{version}"
    tokenizers = {False: {}, True: {}}
    for name, path in paths.items():
        known = load_tokenizer(path)
        new = [t for t in asked if known.token_id(t) is None and known.model.token_id(t) is None]
        for with_brackets in tokenizers:
            wanted = [t for t in new if with_brackets or not t.startswith("[")]
            tokenizers[with_brackets][name] = load_tokenizer(path, wanted)
    return lambda name: tokenizers[any(token.startswith("[") for token in asked_by[name])]


def lines_of(tokenizers_for, assets):
    """The table, one line per template."""
    lines = ["| template | two turns | system | tools | reasoning | leads through |", "|---|---|---|---|---|---|"]
    for name, text in templates(assets):
        tokenizers = tokenizers_for(name)
        found = {tokenizer: survey(tokenizers[tokenizer], name, text) for tokenizer in tokenizers}
        verdicts = next(iter(found.values()))
        cells = [cell_of(verdicts[kind], {name: found[name][kind] for name in found}) for kind in CONVERSATIONS]
        way = WAYS.get(name, "")
        assert bool(way) == (len(set(verdicts.values())) == 1 and "refused" in verdicts["two turns"]), (name, verdicts)
        if isinstance(way, Settings):
            for tokenizer in tokenizers.values():
                led = survey(tokenizer, name, text, way)
                assert led["two turns"].startswith("verified"), (name, led)
                assert led["system"].startswith("verified"), (name, led)
        if way:
            cells = [f"all four refused: {reason(verdicts)}", "", "", ""]
        lines.append(f"| {name} | {' | '.join(cells)} | {str(way).replace('|', chr(92) + '|')} |")
    return lines


def cell_of(verdict, found):
    """The verdict, and with which tokenizers another number of examples is verified."""
    others = {}
    for tokenizer, other in found.items():
        if other != verdict:
            assert verdict.startswith("verified"), found
            assert other.startswith("verified"), found
            others.setdefault(other.removeprefix("verified, "), []).append(tokenizer)
    return "; ".join([verdict, *(f"{other} with {', '.join(names)}" for other, names in others.items())])


def reason(verdicts):
    return verdicts["two turns"].removeprefix("refused: ")


def write_page(tokenizers_for, assets):
    names = ", ".join(tokenizers_for(BUILTIN_TEMPLATES[0]))
    return HEAD.format(tokenizers=names) + "\n".join(lines_of(tokenizers_for, assets)) + "\n"


def test_the_page_says_what_happens(assets, tmp_path):
    assert PAGE.read_text() == write_page(open_tokenizers(tmp_path, assets), assets), (
        "write it anew: see this module's docstring"
    )


def test_built_in_templates_without_the_assets(tmp_path):
    lines = lines_of(open_tokenizers(tmp_path, None), None)
    on_page = re.sub(r"; [^|]* with [^|]*(?= \|)", "", PAGE.read_text()).splitlines()  # of larger tokenizers
    for name, line in zip(BUILTIN_TEMPLATES, lines[2:], strict=True):
        assert line in on_page, name
        assert "verified" in line.split("|")[2], name


@pytest.mark.parametrize("name", ["trl/qwen3", "trl/gemma"])
def test_the_survey_sees_a_wrong_verdict(assets, tmp_path, name):
    write_byte_level(tmp_path / "byte_level")
    text = dict(templates(assets))[name]
    tokenizer = load_tokenizer(tmp_path / "byte_level", tokens_asked_for(tmp_path / "byte_level", name, text))
    broken = text.replace("<|im_end|>", "").replace("<end_of_turn>", "")
    assert survey(tokenizer, name, broken)["two turns"] == "refused: no stop token"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        root = Path(os.environ["SFT_JAX_ASSETS"])
        PAGE.write_text(write_page(open_tokenizers(Path(folder), root), root))
    sys.stdout.write(f"wrote {PAGE}\n")
