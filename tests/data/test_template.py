"""Templates render as transformers renders them, and hostile ones end."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from lorica.data import limits
from lorica.data.limits import TemplateLimitError
from lorica.data.template import Template, TemplateRefusal, choose_template
from lorica.errors import ConfigError, DataError

from .templates import TEMPLATES, make_tokenizer

CHAT = [
    {"role": "user", "content": " One?  "},
    {"role": "assistant", "content": "<think>\nwhy\n</think>\n\nFirst."},
    {"role": "user", "content": "二？"},
    {"role": "assistant", "content": "Second <b> & 'c'."},
]
TOOLS = [{"type": "function", "function": {"name": "f", "description": "<é>", "parameters": {"type": "object"}}}]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("generation_prompt", [False, True])
def test_rendering_equals_transformers(base: Path, name: str, generation_prompt: bool) -> None:
    tokenizer = make_tokenizer(base, TEMPLATES[name])
    template = choose_template(tokenizer, "auto")
    for messages in (CHAT[:1], CHAT[:3], CHAT):
        for tools in ([], TOOLS):
            expected = tokenizer.apply_chat_template(
                messages, tools=tools or None, tokenize=False, add_generation_prompt=generation_prompt
            )
            assert template.render(messages, tools, generation_prompt=generation_prompt) == expected


FEATURES = """{%- macro show(x, depth=0) -%}[{{ x ~ '/' ~ depth }}]{%- endmacro %}
{%- set ns = namespace(found=false, count=0) %}
{%- for m in messages if m.role != 'system' %}
{%- if loop.first %}{% continue %}{% endif %}
{%- set ns.count = ns.count + 1 %}{{ show(m.content[:3], depth=loop.index) }}
{%- if m.content is string and 'a' in m.content %}{% set ns.found = true %}{% endif %}
{%- if ns.count >= 2 %}{% break %}{% endif %}
{%- endfor %}
{%- generation %}{{ messages | map(attribute='role') | join(', ') }}{% endgeneration %}
{%- set captured %}{{ messages | length }}{% endset %}{{ captured * 2 }}
{{ {'b': 1, 'a': [1, 2]} | tojson }} {{ messages[0] | tojson(indent=2) }} {{ '%d-%s' % (3, 'x') }}
{{ 'x{}'.format(1) }}
{{ messages[::-1][0].content.split(' ')[-1].replace('c', 'd').upper() }} {{ ns.found }} {{ 'a\nb' | indent(2) }}
{{ messages | selectattr('role', 'equalto', 'user') | list | length }} {{ dict(a=1) }}
{{ '%s/%s' | format('a', 2) }} {{ (1, 2) + (3,) }} {{ 7 // 2 ** 1 }}
{%- for k, v in {'x': 1}.items() %}{{ k }}={{ v }}{% endfor %}{{ range(3) | list }}{{ missing is defined }}{{ missing }}
{{ ['a', 'b'] | first }}{{ messages[0].get('nothing', 'none') }}{{ 'abc'.startswith('a') }}{{ 3 | string + '!' }}"""


def test_every_feature_that_templates_use_equals_transformers(base: Path) -> None:
    tokenizer = make_tokenizer(base, FEATURES)
    expected = tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert Template(FEATURES, "test", {}).render(CHAT, [], generation_prompt=False) == expected


DOUBLING = "{%% set ns = namespace(x=%s) %%}{%% for i in range(60) %%}{%% set ns.x = %s %%}{%% endfor %%}{{ ns.x %s }}"

HOSTILE = {
    "multiplied": '{{ "x" * 10 ** 9 }}',
    "multiplied list": "{{ [1] * 10 ** 9 }}",
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "filtered loops": "{% for a in range(99999) %}{% for b in range(99999) if false %}{% endfor %}{% endfor %}",
    "sorting loops": "{% for a in range(99999) %}{% set x = range(99999) | list | sort %}{% endfor %}",
    "splitting loops": '{% set x = "a," * 999999 %}{% for a in range(99999) %}{% set y = x.split(",") %}{% endfor %}',
    "lazy chains": "{% set ns = namespace(x=range(9)) %}{% for i in range(9999) %}{% set ns.x = ns.x | map('string') %}"
    "{% endfor %}{{ ns.x | list }}",
    "power": "{{ (10 ** 900) ** 900 }}",
    "number doubling": DOUBLING % ("10 ** 900", "ns.x * ns.x", ""),
    "percent width": '{{ "%1000000000d" % 1 }}',
    "percent star": '{{ "%*d" % (10 ** 9, 1) }}',
    "format width": '{{ "{:1000000000}".format(1) }}',
    "format computed": '{{ "{:{}}".format(1, 10 ** 9) }}',
    "percent repeated": '{{ "%(a)s" * 99999 % {"a": "x" * 99999} }}',
    "format repeated": '{{ ("{0}" * 99999).format("x" * 99999) }}',
    "indented lines": '{{ ("\n" * 99999) | indent(99999, blank=true) }}',
    "format filter": '{{ "%1000000000d" | format(1) }}',
    "deep json": "{% set ns = namespace(x=range(9999) | list) %}{% for i in range(400) %}"
    "{% set ns.x = [ns.x] %}{% endfor %}"
    "{{ ns.x | tojson(indent=8) }}",
    "date width": '{{ strftime_now("%1000000000Y") }}',
    "center": '{{ "x".center(10 ** 9) }}',
    "center filter": '{{ "x" | center(10 ** 9) }}',
    "expandtabs": '{{ "\t".expandtabs(10 ** 9) }}',
    "to_bytes": '{{ (1).to_bytes(10 ** 9, "big") }}',
    "json indent": "{{ [1] | tojson(indent=10 ** 9) }}",
    "safe methods": '{% autoescape true %}{{ ("x" | safe).ljust(10 ** 9) }}{% endautoescape %}',
    "lorem ipsum": "{{ lipsum(n=10 ** 5) }}",
    "big range": "{{ range(10 ** 9) | list }}",
    "concat doubling": DOUBLING % ("'aa'", "ns.x ~ ns.x", ""),
    "plus doubling": DOUBLING % ("'aa'", "ns.x + ns.x", ""),
    "replace doubling": DOUBLING % ("'aa'", "ns.x.replace('a', ns.x)", ""),
    "join doubling": DOUBLING % ("'aa'", "ns.x | join(ns.x)", ""),
    "capture doubling": "{% set ns = namespace(x='aa') %}{% for i in range(60) %}"
    "{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}{% endfor %}{{ ns.x }}",
    "unrolled doubling": "{% set x = 'aa' %}" + "{% set x = x ~ x %}" * 60 + "{{ x }}",
    "list nesting": DOUBLING % ("['a']", "[ns.x, ns.x]", ""),
    "dict nesting": DOUBLING % ("{}", "dict(a=ns.x, b=ns.x)", "| tojson"),
    "namespace nesting": "{% set ns = namespace(x=1) %}{% set ns.y = ns %}{{ ns }}",
    "literal text": "{% for a in range(99999) %}" + "y" * 1000 + "{% endfor %}",
    "endless recursion": "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(0) }}",
    "branching recursion": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "recursive loop": "{% for x in [1, 2] recursive %}{{ loop([1, 2]) }}{% endfor %}",
    "classes": "{{ ().__class__.__bases__ }}",
    "globals": "{{ namespace.__init__.__globals__ }}",
    "hidden names": "{% set ns = namespace(__call__=1) %}",
    "files": "{% include '/etc/passwd' %}",
    "mutation": "{{ messages.append(1) }}",
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_ends_by_a_limit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_SECONDS", 0.2)
    monkeypatch.setattr(limits, "MAX_CHARS", 1_000_000)
    started = time.thread_time()
    with pytest.raises((TemplateLimitError, TemplateRefusal, ConfigError)):
        Template(HOSTILE[name], "test", {}).render(CHAT, [], generation_prompt=True)
    assert time.thread_time() - started < 2.0


def test_a_limit_is_a_data_error_that_names_the_template() -> None:
    with pytest.raises(DataError, match=r"somewhere: the chat template went over a limit.*data\.template"):
        Template('{{ "x" * 10 ** 9 }}', "somewhere", {}).render(CHAT, [], generation_prompt=False)
    with pytest.raises(DataError, match="1000001 characters"):
        Template("x" * 1_000_001, "somewhere", {})


def test_a_broken_template_is_a_configuration_error(base: Path, tmp_path: Path) -> None:
    tokenizer = make_tokenizer(base, None)
    path = tmp_path / "broken.jinja"
    path.write_text("a\n{% for m in messages %}\n{{ m. }}")
    with pytest.raises(ConfigError, match=r"broken\.jinja:3: not a chat template"):
        choose_template(tokenizer, str(path))
    with pytest.raises(ConfigError, match="auto, chatml, plain or a template file"):
        choose_template(tokenizer, str(tmp_path / "missing.jinja"))


def test_the_date_does_not_change_from_day_to_day() -> None:
    template = Template("{{ strftime_now('%Y-%m-%d') }}", "test", {})
    assert template.render(CHAT, [], generation_prompt=False) == "2025-01-01"


def render(template: Template, *, generation_prompt: bool = False) -> str:
    return template.render(
        [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
        [],
        generation_prompt=generation_prompt,
    )


def test_defaults_end_with_what_the_tokenizer_can_say(base: Path) -> None:
    known = make_tokenizer(base, None)
    expected = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n"
    assert render(choose_template(known, "auto")) == render(choose_template(known, "chatml")) == expected
    assert render(choose_template(known, "auto"), generation_prompt=True) == expected + "<|im_start|>assistant\n"
    assert render(choose_template(known, "plain")) == "q\na<|im_end|>\n"

    class Unknown:
        special_tokens_map: dict[str, Any] = {"eos_token": "</s>"}  # noqa: RUF012
        chat_template = None
        eos_token = "</s>"
        name_or_path = "x"

        def get_vocab(self) -> dict[str, int]:
            return {"a": 0}

    foreign: Any = Unknown()
    assert render(choose_template(foreign, "auto")) == "<|im_start|>user\nq</s>\n<|im_start|>assistant\na</s>\n"


def test_a_named_template_is_taken_from_several(base: Path) -> None:
    tokenizer = make_tokenizer(base, None)
    tokenizer.chat_template = {"default": TEMPLATES["chatml"], "other": "nothing"}
    assert choose_template(tokenizer, "auto").source == TEMPLATES["chatml"]
