"""A sequence reads its text late when nobody listens, and its end is the same."""

import pytest

from athanor.infer.sequence import Sequence
from athanor.tokenizer.stream import StreamDecoder
from athanor.types import Request, SamplingParams


def run(tokenizer, text, stop, stream, max_tokens=100):
    request = Request("x", [tokenizer.bos_id], SamplingParams(stop=stop, max_tokens=max_tokens))
    sequence = Sequence(request, StreamDecoder(tokenizer, stop))
    for token in [*tokenizer.encode(text), tokenizer.end_id]:
        sequence.append(token, -0.5, {tokenizer.end_id}, 1000)
        if sequence.finish_reason:
            break
        if stream:
            sequence.take()
    sequence.take()
    return sequence.completion(tokenizer.think_id)


@pytest.mark.parametrize("stop", [(), ("heat",), ("ady", "one"), ("°",)])
@pytest.mark.parametrize("max_tokens", [3, 100])
def test_with_and_without_listener(tokenizer, stop, max_tokens):
    text = "keeps steady heat 20 °C — 你好"
    answers = [run(tokenizer, text, stop, stream, max_tokens) for stream in (True, False)]
    assert answers[0] == answers[1]
    assert len(answers[0].ids) == len(answers[0].logprobs) <= max_tokens


def test_a_stop_text_wins_over_the_limit_that_is_reached_with_it(tokenizer):
    n = len(tokenizer.encode("keeps heat"))
    answer = run(tokenizer, "keeps heat and more", ("heat",), False, max_tokens=n)
    assert (answer.text, answer.finish_reason, len(answer.ids)) == ("keeps ", "stop", n)
