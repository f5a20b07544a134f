"""What a conversation looks like as text: the control tokens and the chat template around them.

One message is `<|role|>` content `<|end|>`; a conversation is `<|bos|>` and its messages. In an assistant's message reasoning
stands between `<think>` and `</think>` in front of the content, and calls of tools after it; in a system message the tools do.
`chat.render` builds the same sequence from ids, never from text.
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

# Tools came after the first vocabularies, whose tokens keep their names.
TOOL, TOOL_DEFINITION, CALL, ARGUMENTS = "<|tool|>", "<|reserved_0|>", "<|reserved_1|>", "<|reserved_2|>"

TEMPLATE = (
    "{%- macro defined(tools) -%}"
    "{%- for tool in tools -%}"
    "{%- set f = tool['function'] if tool['function'] is defined else tool -%}"
    "{{- '<|reserved_0|>{\"name\": ' + (f['name'] | tojson) -}}"
    "{%- if f['description'] is defined and f['description'] -%}"
    "{{- ', \"description\": ' + (f['description'] | tojson) -}}"
    "{%- endif -%}"
    "{%- if f['parameters'] is defined and f['parameters'] is not none -%}"
    "{{- ', \"parameters\": ' + (f['parameters'] | tojson) -}}"
    "{%- endif -%}"
    "{{- '}' -}}"
    "{%- endfor -%}"
    "{%- endmacro -%}"
    "{%- macro answered(n, calls) -%}"
    "{%- if n != calls | length -%}"
    "{{- raise_exception('the call of ' + (calls[n]['function'] or calls[n])['name'] + ' has no result') -}}"
    "{%- endif -%}"
    "{%- endmacro -%}"
    "{%- set given = tools if tools is defined and tools else [] -%}"
    "{%- set last = namespace(calls=[], results=0) -%}"
    "{{- '<|bos|>' -}}"
    "{%- if given and messages[0]['role'] != 'system' -%}{{- '<|system|>' + defined(given) + '<|end|>' -}}{%- endif -%}"
    "{%- for message in messages -%}"
    "{%- if message['role'] != 'tool' -%}"
    "{{- answered(last.results, last.calls) -}}"
    "{%- set last.calls = [] -%}{%- set last.results = 0 -%}"
    "{%- endif -%}"
    "{%- if message['role'] == 'assistant' -%}"
    "{{- '<|assistant|>' -}}"
    "{%- generation -%}"
    "{%- if message['reasoning_content'] is defined and message['reasoning_content'] is not none -%}"
    "{{- '<think>' + message['reasoning_content'] + '</think>' -}}"
    "{%- endif -%}"
    "{%- if message['tool_calls'] is defined and message['tool_calls'] -%}"
    "{%- set last.calls = message['tool_calls'] -%}"
    "{{- message['content'] or '' -}}"
    "{%- else -%}"
    "{{- message['content'] + '' -}}"
    "{%- endif -%}"
    "{%- for call in last.calls -%}"
    "{%- set f = call['function'] if call['function'] is defined else call -%}"
    "{{- '<|reserved_1|>' + f['name'] + '<|reserved_2|>' -}}"
    "{{- f['arguments'] if f['arguments'] is string else (f['arguments'] | tojson) -}}"
    "{%- endfor -%}"
    "{{- '<|end|>' -}}"
    "{%- endgeneration -%}"
    "{%- elif message['role'] == 'tool' -%}"
    "{%- if last.results >= last.calls | length -%}{{- raise_exception('a result of a tool answers no call') -}}{%- endif -%}"
    "{%- set id = last.calls[last.results]['id'] -%}"
    "{%- if id and message['tool_call_id'] and id != message['tool_call_id'] -%}"
    "{{- raise_exception('results of tools must stand in the order of their calls') -}}"
    "{%- endif -%}"
    "{%- set last.results = last.results + 1 -%}"
    "{{- '<|tool|>' + message['content'] + '<|end|>' -}}"
    "{%- elif message['role'] in ['system', 'user'] -%}"
    "{{- '<|' + message['role'] + '|>' + message['content'] -}}"
    "{%- if message['tools'] is defined and message['tools'] -%}{{- defined(message['tools']) -}}{%- endif -%}"
    "{%- if loop.first and message['role'] == 'system' -%}{{- defined(given) -}}{%- endif -%}"
    "{{- '<|end|>' -}}"
    "{%- else -%}"
    "{{- raise_exception('unknown role ' + message['role'] + ': use system, user, assistant or tool') -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if last.results -%}{{- answered(last.results, last.calls) -}}{%- endif -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)
"""The template as Hugging Face's Jinja dialect, for other people's software; `{% generation %}` marks what is learned."""

# Templates before this one that render each conversation they know to the same ids, so that models which were trained with
# them are at home here: the one that knew no tools.
EARLIER = frozenset({"9379ea0a3797ccf69485ffff9119ee60be1386593534372bf34f5fd0d67980e1"})


def template_hash() -> str:
    """SHA-256 of TEMPLATE (hex), stored in every checkpoint."""
    return hashlib.sha256(TEMPLATE.encode()).hexdigest()


def renders_alike(template: object) -> bool:
    """Whether a saved template is TEMPLATE, or an earlier one whose conversations have the same ids."""
    return isinstance(template, str) and (template == TEMPLATE or hashlib.sha256(template.encode()).hexdigest() in EARLIER)
