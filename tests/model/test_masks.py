"""Which text is learned under the templates of the known families: marked by hand, «so», and nothing else."""

from typing import Any

import pytest

from soma.base.errors import UserError
from soma.data.instruct.alpaca import CHAT_TEMPLATE as ALPACA
from soma.data.tokenizer import CHAT_TEMPLATE as OURS
from soma.model import chat

SYSTEM = {"role": "system", "content": "Be brief."}
TALK: list[dict[str, Any]] = [
    {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"},
]  # fmt: skip
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
TOOL_TALK: list[dict[str, Any]] = [
    {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c1", "content": "4"}, {"role": "assistant", "content": "It is 4."},
]  # fmt: skip

QWEN25 = """{%- if tools %}{{- '<|im_start|>system\\n# Tools\\n' }}
{%- for tool in tools %}{{- tool | tojson }}{%- endfor %}
{{- '<|im_end|>\\n' }}{%- elif messages[0].role != 'system' %}
{{- '<|im_start|>system\\nYou are Qwen.<|im_end|>\\n' }}{%- endif %}
{%- for message in messages %}
{%- if message.role == 'user' or message.role == 'system' or (message.role == 'assistant' and not message.tool_calls) %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- elif message.role == 'assistant' %}{{- '<|im_start|>' + message.role }}
{%- if message.content %}{{- '\\n' + message.content }}{%- endif %}
{%- for tool_call in message.tool_calls %}{%- set tool_call = tool_call.function %}
{{- '\\n<tool_call>\\n{"name": "' }}{{- tool_call.name }}{{- '", "arguments": ' }}{{- tool_call.arguments | tojson }}
{{- '}\\n</tool_call>' }}{%- endfor %}{{- '<|im_end|>\\n' }}
{%- elif message.role == 'tool' %}{{- '<|im_start|>user\\n<tool_response>\\n' + message.content }}
{{- '\\n</tool_response><|im_end|>\\n' }}{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
QWEN3 = """{%- set ns = namespace(last=0) %}{%- for message in messages %}{%- if message.role == 'user' %}
{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' }}{%- if message.role == 'assistant' %}
{%- set content = message.content.split('</think>')[-1].lstrip('\\n') %}
{%- if loop.index0 > ns.last %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{{- content }}{%- else %}
{{- message.content }}{%- endif %}{{- '<|im_end|>\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
LLAMA2 = """{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}
{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}
{% set system_message = false %}{% endif %}{% for message in loop_messages %}
{% if loop.index0 == 0 and system_message %}
{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}
{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}
{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}
{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"""
LLAMA3 = """{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] +
'<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}
{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}
{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""
MISTRAL = """{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] %}
{%- set rest = messages[1:] %}{%- else %}{%- set rest = messages %}{%- endif %}{{- bos_token }}
{%- for message in rest %}{%- if message['role'] == 'user' %}{%- if loop.last and system is defined %}
{{- '[INST] ' + system + '\\n\\n' + message['content'] + '[/INST]' }}{%- else %}
{{- '[INST] ' + message['content'] + '[/INST]' }}{%- endif %}{%- else %}
{{- ' ' + message['content'] | trim + eos_token }}{%- endif %}{%- endfor %}"""
GEMMA = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}
{% endif %}{% for message in messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}
{% if message['role'] == 'assistant' %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}
{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}
{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""
ZEPHYR = """{% for message in messages %}
{{ '<|' + message['role'] + '|>\\n' + message['content'] + eos_token }}
{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}{% endfor %}"""
DEEPSEEK_R1 = """{{ bos_token }}{% for message in messages %}
{%- if message['role'] == 'system' %}{{- message['content'] }}
{%- elif message['role'] == 'user' %}{{- '<｜User｜>' + message['content'] }}{%- else %}
{%- set content = message['content'].split('</think>')[-1] %}
{{- '<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>' }}{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<｜Assistant｜><think>\\n' }}{%- endif %}"""
PLAIN_ALPACA = """{% for message in messages %}{% if message.role == 'system' %}{{ message.content + '\\n\\n' }}
{%- elif message.role == 'user' %}{{- '### Instruction:\\n' + message.content + '\\n\\n' }}{%- else %}
{{- '### Response:\\n' + message.content + eos_token + '\\n\\n' }}{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '### Response:\\n' }}{%- endif %}"""

PREAMBLE = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
FAMILIES: dict[str, tuple[str, list[dict[str, Any]], str, set[str], str]] = {
    "ours": (OURS, [SYSTEM, *TALK], "<|endoftext|>", {"<|im_start|>", "<|im_end|>"},
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
        "«Hello!<|im_end|>»\n<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n«4<|im_end|>»\n"),
    "qwen2.5": (QWEN25, TALK, "<|im_end|>", {"<|im_start|>"},
        "<|im_start|>system\nYou are Qwen.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
        "«Hello!<|im_end|>»\n<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n«4<|im_end|>»\n"),
    "qwen3": (QWEN3, TALK, "<|im_end|>", {"<|im_start|>"},
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n«Hello!<|im_end|>»\n<|im_start|>user\n2+2?<|im_end|>\n"
        "<|im_start|>assistant\n«<think>\n\n</think>\n\n4<|im_end|>»\n"),
    "llama2": (LLAMA2, [SYSTEM, *TALK], "</s>", {"<s>"},
        "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST]« Hello! </s>»<s>[INST] 2+2? [/INST]« 4 </s>»"),
    "llama3": (LLAMA3, [SYSTEM, *TALK], "<|end_of_text|>", {"<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"},
        "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|><|start_header_id|>user<|end_header_id|>"
        "\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n«Hello!<|eot_id|>»<|start_header_id|>user"
        "<|end_header_id|>\n\n2+2?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n«4<|eot_id|>»"),
    "mistral": (MISTRAL, TALK, "</s>", {"<s>", "[INST]", "[/INST]"},
        "<s>[INST] Hi[/INST]« Hello!</s>»[INST] 2+2?[/INST]« 4</s>»"),
    # The system prompt goes to the last question, so what comes before it is written anew with every turn.
    "mistral with system": (MISTRAL.replace("loop.last", "loop.index0 >= rest | length - 2"), [SYSTEM, *TALK], "</s>",
        {"<s>", "[INST]", "[/INST]"},
        "<s>[INST] Hi[/INST] «Hello!</s>»[INST] Be brief.\n\n2+2?[/INST]« 4</s>»"),
    "gemma": (GEMMA, TALK, "<eos>", {"<bos>", "<start_of_turn>", "<end_of_turn>"},
        "<s><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n«Hello!<end_of_turn>»\n"
        "<start_of_turn>user\n2+2?<end_of_turn>\n<start_of_turn>model\n«4<end_of_turn>»\n"),
    "zephyr": (ZEPHYR, [SYSTEM, *TALK], "</s>", {"<s>"},
        "<|system|>\nBe brief.</s>\n<|user|>\nHi</s>\n<|assistant|>\n«Hello!</s>»\n<|user|>\n2+2?</s>\n<|assistant|>\n"
        "«4</s>»\n"),
    "deepseek-r1": (DEEPSEEK_R1, [SYSTEM, *TALK[:3], TALK[3] | {"content": "<think>easy</think>4"}],
        "<｜end▁of▁sentence｜>", {"<｜User｜>", "<｜Assistant｜>"},
        "<s>Be brief.<｜User｜>Hi<｜Assistant｜>«Hello!<｜end▁of▁sentence｜>»<｜User｜>2+2?<｜Assistant｜>"
        "«4<｜end▁of▁sentence｜>»"),
    "alpaca": (ALPACA, TALK, "</s>", set(),
        f"{PREAMBLE}\n\n### Instruction:\nHi\n\n### Response:\n«Hello!</s>»\n\n### Instruction:\n2+2?\n\n"
        "### Response:\n«4</s>»"),
    "alpaca without marks": (PLAIN_ALPACA, [SYSTEM, *TALK], "</s>", set(),
        "Be brief.\n\n### Instruction:\nHi\n\n### Response:\n«Hello!</s>»\n\n### Instruction:\n2+2?\n\n### Response:\n"
        "«4</s>»\n\n"),
    "qwen2.5 with tools": (QWEN25, TOOL_TALK, "<|im_end|>", {"<|im_start|>"},
        '<|im_start|>system\n# Tools\n{"type": "function", "function": {"name": "add", "parameters": {}}}<|im_end|>\n'
        "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
        '«<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call><|im_end|>»\n'
        "<|im_start|>user\n<tool_response>\n4\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
        "«It is 4.<|im_end|>»\n"),
}  # fmt: skip


def marked(template: str, talk: list[dict[str, Any]], eos: str, special: set[str]) -> str:
    """The rendered text with what is learned between « and »."""
    tools = TOOLS if talk is TOOL_TALK else None
    text, spans = chat.answer_spans(template, talk, special | {eos}, tools=tools, bos_token="<s>", eos_token=eos)
    for start, end in sorted(spans, reverse=True):
        text = f"{text[:start]}«{text[start:end]}»{text[end:]}"
    return text


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_learned(family: str) -> None:
    template, talk, eos, special, expected = FAMILIES[family]
    assert marked(template, talk, eos, special) == expected
    # An answer of weight 0 is not learned, and no other changes by that.
    first = next(index for index, message in enumerate(talk) if message["role"] == "assistant")
    muted = [message | ({"weight": 0} if index == first else {}) for index, message in enumerate(talk)]
    begin, end = expected.index("«"), expected.index("»")
    without = expected[:begin] + expected[begin + 1 : end] + expected[end + 1 :]
    if talk is not TOOL_TALK:
        assert marked(template, muted, eos, special) == without


def test_where_it_cannot_be_told() -> None:
    calls = QWEN25.replace("<|im_start|>system\\n# Tools", "{{ messages | length }}<|im_start|>system\\n# Tools")
    calls = calls.replace("{%- if tools %}", "{{- messages | length }}{%- if tools %}")
    with pytest.raises(UserError, match="renders message 1 differently"):  # a call is more than its content
        marked(calls, TOOL_TALK, "<|im_end|>", {"<|im_start|>"})
    with pytest.raises(UserError, match="renders message 1 differently"):  # nothing ends the turn
        marked(PLAIN_ALPACA.replace("+ eos_token", "").replace("{% for", "{{ messages | length }}{% for", 1), TALK,
               "</s>", set())  # fmt: skip
    once = "{% for m in messages %}{% if m.role == 'assistant' and loop.last %}{% generation %}{{ m.content }}" \
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"  # fmt: skip
    with pytest.raises(UserError, match="marks 1 answers of 2"):
        marked(once, [TALK[0], TALK[1] | {"weight": 0}, *TALK[2:]], "</s>", set())
