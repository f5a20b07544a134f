"""What a conversation looks like as text: the control tokens and the chat template around them.

One message is `<|role|>` content `<|end|>`; a conversation is `<|bos|>` and its messages; an assistant's reasoning stands
between `<think>` and `</think>` in front of its content. `chat.render` builds the same sequence from ids, never from text.
"""

from __future__ import annotations

import hashlib

PAD, BOS, END = "<|pad|>", "<|bos|>", "<|end|>"
SYSTEM, USER, ASSISTANT = "<|system|>", "<|user|>", "<|assistant|>"
THINK, END_THINK = "<think>", "</think>"

CONTROL_TOKENS: tuple[str, ...] = (
    *(PAD, BOS, END, SYSTEM, USER, ASSISTANT, THINK, END_THINK, "<|tool|>"),
    *(f"<|reserved_{i}|>" for i in range(7)),
)
"""Tokens that no text can produce; the position is the id."""

TEMPLATE = (
    "{{- '<|bos|>' -}}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}"
    "{{- '<|assistant|>' -}}"
    "{%- generation -%}"
    "{%- if message['reasoning_content'] is defined and message['reasoning_content'] is not none -%}"
    "{{- '<think>' + message['reasoning_content'] + '</think>' -}}"
    "{%- endif -%}"
    "{{- message['content'] + '<|end|>' -}}"
    "{%- endgeneration -%}"
    "{%- elif message['role'] in ['system', 'user'] -%}"
    "{{- '<|' + message['role'] + '|>' + message['content'] + '<|end|>' -}}"
    "{%- else -%}"
    "{{- raise_exception('unknown role ' + message['role'] + ': use system, user or assistant') -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)
"""The template as Hugging Face's Jinja dialect, for other people's software; `{% generation %}` marks what is learned."""


def template_hash() -> str:
    """SHA-256 of TEMPLATE (hex), stored in every checkpoint."""
    return hashlib.sha256(TEMPLATE.encode()).hexdigest()
