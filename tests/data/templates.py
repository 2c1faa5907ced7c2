"""Chat templates in the manner of well-known models, and tokenizers to go with them; written for these tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

CHATML = """{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

# A start token, headers, trimmed contents, an end of turn that is not the tokenizer's end token.
HEADERS = """{{- bos_token }}{% for m in messages %}
{{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""

# Thinking is shown in the answers after the last question only; tools and calls are written by the template.
THINKING = """{%- if tools %}{{- '<|im_start|>system\n# Tools\n' }}
{%- for t in tools %}{{- t | tojson + '\n' }}{% endfor %}
{{- '<|im_end|>\n' }}{%- endif %}
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
{%- if m.role == 'assistant' %}
{%- set think = '' %}{% set content = m.content %}
{%- if '</think>' in content %}
{%- set think = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\n') %}
{%- endif %}
{{- '<|im_start|>assistant\n' }}
{%- if loop.index0 > ns.last %}{{- '<think>\n' + think + '\n</think>\n\n' }}{% endif %}
{{- content }}
{%- for call in m.tool_calls or [] %}{{- '\n<tool_call>' + call.function | tojson + '</tool_call>' }}{% endfor %}
{{- '<|im_end|>\n' }}
{%- else %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}"""

# The generation prompt opens a thought that answers in the history do not have, so it is no prefix of them.
FORCED_THOUGHT = """{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}
{%- if m.role == 'assistant' and '</think>' in m.content %}{{ m.content.split('</think>')[-1].strip() }}
{%- else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"""

# Refuses system turns and turns out of order; calls the assistant by another name.
STRICT = """{{- bos_token }}{% for m in messages %}
{%- if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}
{{- '<|im_start|>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim + '<|im_end|>\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>model\n' }}{% endif %}"""

# Neither a generation prompt nor an end of turn.
BARE = """{% for m in messages %}{{ m.role | upper + ': ' + m.content + '\n' }}{% endfor %}"""

TEMPLATES = {
    "chatml": CHATML, "headers": HEADERS, "thinking": THINKING, "forced": FORCED_THOUGHT, "strict": STRICT, "bare": BARE
}  # fmt: skip


def make_tokenizer(base: Path, template: str | None, *, bos: bool = False) -> Any:
    """The embedded base's tokenizer with another template; with `bos` it starts every text with <|endoftext|>."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = template
    headers = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", *headers]})
    if bos:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", tokenizer.bos_token_id)]
        )
    return tokenizer
