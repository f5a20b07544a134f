"""What chat, text completions and responses share: how tokens are chosen, in OpenAI's words and vLLM's, as SamplingParams."""

from __future__ import annotations

import json
import secrets
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag

from athanor.core.errors import RequestError
from athanor.serve.body import Fields, Strict
from athanor.types import SamplingParams, Structure

MAX_CHOICES = 8
MAX_STOPS = 16
MAX_STOP_LENGTH = 512  # characters, of bad words too
MAX_WORDS = 64
MAX_IDS = 4096
MAX_BIASES = 1024
MAX_LOGPROBS = 20
MAX_CHOICE = 256
MAX_STRUCTURE = 2**16  # characters of a schema or grammar
MAX_REGEX = 4096
MAX_DEPTH = 32  # of a schema, in objects and lists


def text_or_list(value: object) -> str:
    """The tag of a value that may be a text or a list."""
    return "<list>" if isinstance(value, list) else "<text>"


_Word = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
Texts = Annotated[
    Annotated[_Word, Tag("<text>")] | Annotated[list[_Word], Field(max_length=MAX_STOPS), Tag("<list>")],
    Discriminator(text_or_list),
]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
_Key = Annotated[str, Field(pattern="^[0-9]{1,9}$")]
_Schema = dict[str, Any]


class StreamOptions(Strict):
    UNSUPPORTED: ClassVar[Fields] = {"include_obfuscation": (False,)}

    include_usage: bool = False
    continuous_usage_stats: bool = False


class JsonSchema(Strict):
    """`name` and `description` are for people; a schema is always kept to, so `strict` changes nothing."""

    INERT = frozenset({"name", "description", "strict"})

    schema_: _Schema = Field(alias="schema")


class AnyFormat(Strict):
    type: Literal["text", "json_object"]


class SchemaFormat(Strict):
    type: Literal["json_schema"]
    json_schema: JsonSchema


def format_tag(value: object) -> str:
    """The tag of a form of the answer."""
    return "<schema>" if isinstance(value, dict) and value.get("type") == "json_schema" else "<any>"


Format = Annotated[Annotated[AnyFormat, Tag("<any>")] | Annotated[SchemaFormat, Tag("<schema>")], Discriminator(format_tag)]


class StructuredOutputs(Strict):
    """One of the five."""

    UNSUPPORTED: ClassVar[Fields] = {
        "disable_additional_properties": (False,),
        "disable_any_whitespace": (False,),
        "disable_fallback": (False,),
        "structural_tag": (),
        "whitespace_pattern": (),
    }

    json_: Annotated[
        Annotated[str, Field(max_length=MAX_STRUCTURE), Tag("<text>")] | Annotated[_Schema, Tag("<schema>")],
        Discriminator(lambda value: "<text>" if isinstance(value, str) else "<schema>"),
    ] | None = Field(None, alias="json")  # fmt: skip
    regex: Annotated[str, Field(min_length=1, max_length=MAX_REGEX)] | None = None
    choice: Annotated[list[_Word], Field(min_length=1, max_length=MAX_CHOICE)] | None = None
    grammar: Annotated[str, Field(min_length=1, max_length=MAX_STRUCTURE)] | None = None
    json_object: bool = False

    def structure(self) -> Structure:
        """Raises RequestError unless exactly one is given, and it is within the limits."""
        fields = {"json": self.json_, "regex": self.regex, "choice": self.choice, "grammar": self.grammar}
        given = [name for name, value in fields.items() if value is not None] + ["json_object"] * self.json_object
        if len(given) != 1:
            raise RequestError(
                "'structured_outputs' takes exactly one of json, regex, choice, grammar and json_object"
                f" (got {', '.join(given) or 'none'}): leave one",
                "structured_outputs",
            )
        if self.json_ is not None:
            return schema_form(self.json_, "structured_outputs.json")
        if self.regex is not None:
            return Structure("regex", self.regex)
        if self.choice is not None:
            return Structure("choice", json.dumps(self.choice))
        return Structure("grammar", self.grammar) if self.grammar is not None else Structure("json", "")


def schema_form(schema: _Schema | str, param: str) -> Structure:
    """Raises RequestError for a schema that is no JSON object, too long or too deep."""
    if isinstance(schema, str):
        try:
            parsed = json.loads(schema)
        except (ValueError, RecursionError):
            parsed = None
        if not isinstance(parsed, dict):
            raise RequestError(f"'{param}' is a text that holds no JSON object: send the schema itself", param)
        schema = parsed
    level: list[Any] = [schema]
    depth = 0
    while level := [x for x in level if isinstance(x, (dict, list))]:
        depth += 1
        if depth > MAX_DEPTH:
            raise RequestError(
                f"'{param}' is nested deeper than {MAX_DEPTH} levels, the most this server reads: flatten it", param
            )
        level = [child for x in level for child in (x.values() if isinstance(x, dict) else x)]
    text = json.dumps(schema)
    if len(text) > MAX_STRUCTURE:
        raise RequestError(
            f"'{param}' is {len(text):,} characters long and may be {MAX_STRUCTURE:,}: leave descriptions out of it", param
        )
    return Structure("json_schema", text)


class Sampling(Strict):
    """Parameters of every request that generates. Ranges are OpenAI's where it has the parameter, else vLLM's."""

    model: str
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0, lt=2**31)
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, gt=0, le=10)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    logit_bias: dict[_Key, Annotated[float, Field(ge=-100, le=100)]] = Field(
        default_factory=dict, max_length=MAX_BIASES, json_schema_extra={"additionalProperties": False}
    )
    allowed_token_ids: Annotated[list[TokenId], Field(min_length=1, max_length=MAX_IDS)] | None = None
    bad_words: list[_Word] = Field(default_factory=list, max_length=MAX_WORDS)
    stop: Texts = Field(default_factory=list)
    stop_token_ids: list[TokenId] = Field(default_factory=list, max_length=MAX_WORDS)
    min_tokens: int = Field(0, ge=0, lt=2**31)
    ignore_eos: bool = False
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    prompt_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    return_token_ids: bool = False
    truncate_prompt_tokens: int | None = Field(None, ge=1, lt=2**31)
    priority: int = Field(0, ge=-(2**31), lt=2**31)
    response_format: Format | None = None
    structured_outputs: StructuredOutputs | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def usage_in_every_event(self) -> bool:
        """Whether every event of a stream says how many tokens there are so far."""
        return self.stream_options is not None and self.stream_options.continuous_usage_stats

    @property
    def told(self) -> int | None:
        """How many most probable tokens are told for each new one."""
        return None

    @property
    def told_of_prompt(self) -> int | None:
        """And for each token of the prompt."""
        return self.prompt_logprobs

    def check(self) -> None:
        if self.stream_options is not None and not self.stream:
            raise RequestError(
                "'stream_options' is allowed only with \"stream\": true: add that or leave it out", "stream_options"
            )
        if self.stream and self.prompt_logprobs is not None:
            raise RequestError("'prompt_logprobs' stand in no event of a stream: leave them or 'stream' out", "prompt_logprobs")
        if self.structure() is not None:
            for field in ("allowed_token_ids", "bad_words", "min_tokens", "ignore_eos"):
                if getattr(self, field):
                    raise RequestError(
                        f"'{field}' does not go with a form of the answer, which says alone what may come: leave one out", field
                    )

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop texts."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def structure(self) -> Structure | None:
        """The form that the answer must have. Raises RequestError for more than one."""
        asked = self.response_format if self.response_format and self.response_format.type != "text" else None
        if asked and self.structured_outputs:
            raise RequestError(
                "'response_format' and 'structured_outputs' both say what form the answer has: send one", "structured_outputs"
            )
        if self.structured_outputs:
            return self.structured_outputs.structure()
        if isinstance(asked, SchemaFormat):
            return schema_form(asked.json_schema.schema_, "response_format.json_schema.schema")
        return Structure("json", "") if asked else None

    def sampling(self, max_tokens: int) -> list[SamplingParams]:
        """The parameters of each of the n choices; choice i has seed + i. Without a seed every request draws one.

        Raises RequestError when more tokens are asked for at least than there may be.
        """
        if self.min_tokens > max_tokens:
            raise RequestError(
                f"'min_tokens' ({self.min_tokens}) is more than the {max_tokens} tokens that the answer may have: lower it",
                "min_tokens",
            )
        seed = secrets.randbits(62) if self.seed is None else self.seed
        return [
            SamplingParams(
                temperature=self.temperature,
                top_p=self.top_p,
                top_k=self.top_k,
                max_tokens=max_tokens,
                stop=self.stops,
                seed=(seed + i) % 2**63,
                min_p=self.min_p,
                repetition_penalty=self.repetition_penalty,
                presence_penalty=self.presence_penalty,
                frequency_penalty=self.frequency_penalty,
                logit_bias=tuple((int(token), bias) for token, bias in self.logit_bias.items()),
                allowed_ids=None if self.allowed_token_ids is None else tuple(self.allowed_token_ids),
                bad_words=tuple(self.bad_words),
                stop_ids=tuple(self.stop_token_ids),
                min_tokens=self.min_tokens,
                ignore_eos=self.ignore_eos,
                logprobs=self.told,
                prompt_logprobs=self.told_of_prompt,
                structure=self.structure(),
            )
            for i in range(self.n)
        ]

    def token_ids(self) -> dict[str, list[int]]:
        """The tokens that the request names, by field: all must be of the model's vocabulary."""
        return {
            "logit_bias": [int(token) for token in self.logit_bias],
            "allowed_token_ids": self.allowed_token_ids or [],
            "stop_token_ids": self.stop_token_ids,
        }
