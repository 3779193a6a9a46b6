"""Alpaca's published prompt (Taori et al. 2023), as text and as a chat template for tokenizers that have none."""

import re

PREAMBLE_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)
PREAMBLE = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
PROMPT = re.compile(
    r"(?P<preamble>.*?)\n\n### Instruction:\n(?P<instruction>.*?)"
    r"(?:\n\n### Input:\n(?P<input>.*?))?\n\n### Response:(?:\n(?P<output>.*))?",
    re.DOTALL,
)
# One turn after the other; what the assistant says ends with the end-of-text token and is what is learned.
CHAT_TEMPLATE = (
    "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}"
    "{% else %}{{ '" + PREAMBLE + "' }}{% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '\n\n### Instruction:\n' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}{{ '\n\n### Response:\n' }}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% elif message['role'] != 'system' or not loop.first %}"
    "{{ raise_exception('the Alpaca prompt has no place for a message of ' + message['role']) }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n\n### Response:\n' }}{% endif %}"
)


def render(instruction: str, input: str = "", output: str = "", preamble: str = "") -> str:
    """The prompt and the answer as one text, by the published form; `preamble` in place of its first lines."""
    before = preamble or (PREAMBLE_INPUT if input else PREAMBLE)
    extra = f"\n\n### Input:\n{input}" if input else ""
    return f"{before}\n\n### Instruction:\n{instruction}{extra}\n\n### Response:\n{output}"


def parse(text: str) -> dict[str, str] | None:
    """preamble (empty where it is the published one), instruction, input and output of such a text; None for others."""
    found = PROMPT.fullmatch(text)
    if found is None:
        return None
    fields = {name: value or "" for name, value in found.groupdict().items()}
    if fields["preamble"] in (PREAMBLE, PREAMBLE_INPUT):
        fields["preamble"] = ""
    return fields
