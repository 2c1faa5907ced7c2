"""Chat templates: which one, and a conversation rendered with it.

A base's own template is used where it has one; otherwise ChatML, ended by the tokenizer's own end token where
ChatML's is unknown to it, so that what the model learns to say last is what generation stops at.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
from jinja2 import nodes

from lorica.data.limits import TemplateLimitError
from lorica.data.sandbox import Hooks, Sandbox
from lorica.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_TEMPLATE_CHARS = 1_000_000

CHATML = """{% for m in messages %}
{{- '<|im_start|>' + m['role'] + '\\n' + m['content'] + TURN_END + '\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

PLAIN = """{% for m in messages %}{{ m['content'] }}{{ eos_token if m['role'] == 'assistant' }}{{ '\\n' }}
{%- endfor %}"""


class TemplateRefusal(Exception):
    """The template raised, or failed on, this conversation."""


class Template:
    """A compiled chat template. Not to be shared between threads: the deadline belongs to one rendering at a time."""

    def __init__(self, source: str, origin: str, variables: Mapping[str, Any]) -> None:
        """source: jinja. origin: where it came from, for errors. variables: special tokens by name, as templates read.

        Raises ConfigError when the source is no template, TemplateLimitError when it is absurdly large.
        """
        self.source, self.origin = source, origin
        self._variables = dict(variables)
        if len(source) > MAX_TEMPLATE_CHARS:
            size = f"{len(source)} characters; {MAX_TEMPLATE_CHARS} are allowed"
            raise TemplateLimitError(f"{origin}: the chat template has {size}.")
        self._environment = Sandbox()
        try:
            tree = self._environment.parse(source)
            self.reads_tools = "tools" in {node.name for node in tree.find_all(nodes.Name)}
            self.reads_tool_calls = "tool_calls" in source
            self._template = self._environment.from_string(Hooks().visit(tree))
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(f"{origin}:{error.lineno}: not a chat template: {error.message}") from None
        except (RecursionError, MemoryError, OverflowError, SyntaxError) as error:
            raise ConfigError(f"{origin}: not a chat template: {error}") from None

    def render(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]], *, generation_prompt: bool
    ) -> str:
        """The conversation as text. Raises TemplateRefusal (this conversation) or TemplateLimitError (any)."""
        variables = {**self._variables, "messages": list(messages), "tools": list(tools) or None}
        self._environment.start()
        try:
            return self._template.render(**variables, add_generation_prompt=generation_prompt)
        except (TemplateLimitError, RecursionError, MemoryError) as error:
            raise TemplateLimitError(
                f"{self.origin}: the chat template went over a limit: {error}. It is broken or hostile; "
                "give another with data.template."
            ) from None
        except Exception as error:  # a template can raise anything that Python's operators raise
            raise TemplateRefusal(str(error) or type(error).__name__) from None


def choose_template(tokenizer: PreTrainedTokenizerBase, template: str) -> Template:
    """What `template` names: "auto" (the tokenizer's own, else ChatML), "chatml", "plain", or a file's path."""
    variables = {name: value for name, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
    own = tokenizer.chat_template
    if isinstance(own, dict):
        own = own.get("default")
    if template == "auto" and own:
        return Template(own, f"{tokenizer.name_or_path}: chat template", variables)
    if template in ("auto", "chatml"):
        known = "<|im_end|>" in tokenizer.get_vocab()
        turn_end = "<|im_end|>" if known else tokenizer.eos_token or ""
        return Template(CHATML.replace("TURN_END", repr(turn_end)), "chatml", variables)
    if template == "plain":
        return Template(PLAIN, "plain", variables)
    try:
        source = Path(template).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"data.template is {template!r}: auto, chatml, plain or a template file is wanted, and the file cannot be "
            f"read: {error}"
        ) from None
    return Template(source, template, variables)
