"""The few things that travel between rooms.

Document -> shards -> Batch -> (sum, count) -> checkpoint -> Engine -> Completion.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

Role = Literal["system", "user", "assistant", "tool"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant", "tool")
IGNORE = -100  # label of a position that is not supervised (PyTorch's and Hugging Face's convention)


@dataclass(frozen=True, slots=True)
class Document:
    """One text and where it came from."""

    text: str
    source: str


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the assistant may call.

    parameters  JSON schema of its arguments, as JSON text; None for a function without
    """

    name: str
    description: str | None = None
    parameters: str | None = None


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that the assistant asks for.

    id         by which a result refers to it. It belongs to those who pass messages on, not to what was said: it is neither
               rendered nor compared, since results stand in the order of the calls
    arguments  JSON text as the model wrote it, which need not be valid
    """

    id: str = field(compare=False)
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Message:
    """One turn.

    reasoning     (assistant only) what stands between <think> and </think>
    tool_calls    (assistant only) what it asks for; their results follow
    tool_call_id  (tool only) which call this is the result of; None is the next one
    tools         (system only) what may be called from here on
    """

    role: Role
    content: str
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    tools: tuple[Tool, ...] = ()


Conversation = Sequence[Message]


@dataclass(frozen=True, slots=True)
class Pair:
    """One preference: the same prompt, an answer that was chosen and one that was rejected."""

    prompt: Conversation
    chosen: Message
    rejected: Message


@dataclass(slots=True)
class Source:
    """What an encoder reads beside a Batch's sequences: a text for each, laid end to end like them.

    M = tokens of all sources together, S = sequences of the batch.

    ids      (M,) int64    tokens
    lengths  (S,) int64    tokens of each source, at least 1; sums to M. Source i belongs to sequence i of the batch
    """

    ids: torch.Tensor
    lengths: torch.Tensor

    def to(self, device: torch.device) -> Source:
        """The same on `device`."""
        return Source(self.ids.to(device), self.lengths.to(device))


@dataclass(slots=True)
class Batch:
    """Sequences laid end to end without padding, the input of every objective.

    N = tokens of all sequences together, S = sequences.

    ids      (N,) int64    tokens
    labels   (N,) int64    target of each position, already shifted: labels[i] is what should follow ids[i];
                           IGNORE where nothing is supervised
    lengths  (S,) int64    tokens of each sequence; sums to N. Attention never crosses sequences
    extras   named tensors that an objective asks for, (N,) or (S,) each (old log-probabilities, advantages ...)
    origin   where the sequences come from, for error messages and for the record of a bad batch
    source   what an encoder-decoder reads; its sequences here are the answers
    """

    ids: torch.Tensor
    labels: torch.Tensor
    lengths: torch.Tensor
    extras: dict[str, torch.Tensor] = field(default_factory=dict)
    origin: str = ""
    source: Source | None = None

    @property
    def tokens(self) -> int:
        """What a model reads: tokens of the sequences and of their sources."""
        return self.ids.numel() + (0 if self.source is None else self.source.ids.numel())

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`."""
        extras = {name: values.to(device) for name, values in self.extras.items()}
        source = None if self.source is None else self.source.to(device)
        return Batch(self.ids.to(device), self.labels.to(device), self.lengths.to(device), extras, self.origin, source)


@dataclass(frozen=True, slots=True)
class Structure:
    """The form that an answer must have.

    kind   json_schema (value: the schema as JSON text), json (any object; value ""), regex, choice (value: the choices as a JSON
           list of texts) or grammar (Lark)
    value  what describes it
    param  the request's field that errors name; by default response_format for JSON and structured_outputs for the others
    """

    kind: Literal["json_schema", "json", "regex", "choice", "grammar"]
    value: str
    param: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen. What changes logits comes in this order: logit_bias, bad and allowed tokens, the three penalties,
    temperature, then top_k, top_p and min_p.

    temperature         0 is greedy; log-probabilities are of softmax(logits / temperature), unchanged and untruncated (of
                        softmax(logits) when greedy)
    top_p               smallest set of tokens whose probability reaches top_p; 1 is all
    top_k               the k most probable tokens; 0 is all
    max_tokens          new tokens at most
    stop                texts that end the answer; they are not part of it
    seed                same seed, same text, whatever else is in the batch
    min_p               tokens at least min_p times as probable as the most probable one; 0 is all
    repetition_penalty  by it logits of tokens of prompt and answer are divided where positive, multiplied where not; 1 is off
    presence_penalty    taken from the logit of each token of the answer so far
    frequency_penalty   taken from it as often as the token stands there
    logit_bias          (token, what is added to its logit)
    allowed_ids         tokens that may be chosen at all; None is all
    bad_words           texts that never appear in the answer
    stop_ids            tokens that end the answer, beside those that always do; they are part of `ids`, not of the text
    min_tokens          tokens before any end or stop
    ignore_eos          whether tokens that end a text do not end it
    logprobs            how many most probable tokens are told for each new one; None tells none
    prompt_logprobs     likewise for each token of the prompt
    structure           the form that the answer must have
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int = 128
    stop: tuple[str, ...] = ()
    seed: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_ids: tuple[int, ...] | None = None
    bad_words: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    structure: Structure | None = None


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt of token ids to be continued.

    priority  requests of a lower one go first; equal ones in the order in which they came
    """

    id: str
    prompt_ids: Sequence[int]
    params: SamplingParams = field(default_factory=SamplingParams)
    priority: int = 0


FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One token and what else could have stood there, under softmax(logits): temperature 1, nothing changed or left out.

    id       the token
    logprob  its log-probability
    top      (token, log-probability) of the most probable ones, most probable first
    """

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Timing:
    """When things happened to a request, by time.perf_counter(); seconds.

    added    it came
    started  it was first computed
    first    its first token was there
    ended    its last
    """

    added: float
    started: float
    first: float
    ended: float


@dataclass(frozen=True, slots=True)
class Completion:
    """What the engine made of a Request.

    ids              new tokens, the end-of-turn token included when it was produced
    logprobs         log-probability of each of them under the distribution of SamplingParams.temperature
    text             their text: content of the answer, reasoning and control tokens left out; cut before a stop text
    reasoning        what stood between <think> and </think>, or None
    stop_reason      the stop text or the token of stop_ids that ended it; None for any other end
    top_logprobs     of each new token, where SamplingParams.logprobs asks for them
    prompt_logprobs  of each token of the prompt but the first, of which there is None
    cached           tokens of the prompt that were not computed, since another request had them
    timing           None where nobody measured
    error            why it was aborted, where the form that was asked for led nowhere; or see `spoilt`
    spoilt           whether it was aborted since the model made inf or nan of it: `error` says what is not finite
    """

    request_id: str
    prompt_ids: Sequence[int]
    ids: Sequence[int]
    logprobs: Sequence[float]
    text: str
    reasoning: str | None
    finish_reason: FinishReason
    stop_reason: str | int | None = None
    top_logprobs: Sequence[TokenLogprob] | None = None
    prompt_logprobs: Sequence[TokenLogprob | None] | None = None
    cached: int = 0
    timing: Timing | None = field(default=None, compare=False)
    error: str | None = None
    spoilt: bool = False


@dataclass(frozen=True, slots=True)
class Rollout:
    """A completion and the reward that it earned; `parts` are the rewards it is made of."""

    completion: Completion
    reward: float
    parts: Mapping[str, float]
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Finding:
    """What a law of the house compared on one model, and how far apart the two sides were.

    law        its name, L1 ... L8
    compared   the two sides, in words
    value      their distance; None when nothing was compared
    tolerance  the largest distance at which the law holds; 0 means bit by bit
    skipped    why nothing was compared, or ""
    """

    law: str
    compared: str
    value: float | None = None
    tolerance: float = 0.0
    skipped: str = ""

    @property
    def passed(self) -> bool:
        """Whether the law holds here, or was skipped for a reason."""
        return bool(self.skipped) or (self.value is not None and self.value <= self.tolerance)
