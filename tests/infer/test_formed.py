"""Answers that must have a form, from the engine: they have it, and nobody beside them notices."""

import json
import re

import jsonschema
import pytest

from athanor.core.errors import RequestError
from athanor.infer.speculative import NGram
from athanor.types import Structure

pytest.importorskip("llguidance")
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Bonn", "Köln"]}, "warm": {"type": "boolean"}},
    "required": ["city", "warm"],
    "additionalProperties": False,
}
FORMS = {
    "choice": Structure("choice", json.dumps(["red", "dark red", "blue"])),
    "regex": Structure("regex", r"[0-9]{2}:[0-9]{2}"),
    "schema": Structure("json_schema", json.dumps(SCHEMA)),
    "grammar": Structure("grammar", 'start: "a" ("b" | "c")'),
}


def keeps(name, text):
    if name == "choice":
        return text in ("red", "dark red", "blue")
    if name == "regex":
        return re.fullmatch(r"[0-9]{2}:[0-9]{2}", text)
    if name == "grammar":
        return text in ("ab", "ac")
    jsonschema.validate(json.loads(text), SCHEMA)
    return True


def no_thought(tokenizer):
    """A random model may think for ever before it answers, or write blanks where these are allowed."""
    blank = [id for id in range(16, tokenizer.vocab_size) if not tokenizer.decode([id]).strip()]
    return tuple((id, -100.0) for id in (tokenizer.think_id, *blank))


@pytest.mark.parametrize("guesser", [None, NGram(3)])
def test_answers_keep_to_their_form_among_others(engine, tokenizer, prompts, request_of, guesser):
    bias = no_thought(tokenizer)
    free = [request_of(f"free{i}", p, seed=i, max_tokens=15) for i, p in enumerate(prompts)]
    formed = [
        request_of(f"{name}{seed}", prompts[seed], seed=seed, structure=form, max_tokens=90, logit_bias=bias)
        for name, form in FORMS.items()
        for seed in range(4)
    ]
    busy = engine(max_batch=7, guesser=guesser)
    answers = {c.request_id: c for c in busy.generate([*formed, *free])}
    for request in formed:
        answer = answers[request.id]
        assert answer.finish_reason == "stop" and keeps(request.id.rstrip("0123"), answer.text), answer.text
    alone = engine().generate(free)
    assert [answers[c.request_id].ids for c in alone] == [c.ids for c in alone]


def test_greedy_takes_the_most_probable_token_that_is_allowed(engine, tokenizer, prompts, request_of):
    ask = lambda **more: engine().generate([request_of("x", prompts[0], temperature=0, max_tokens=9, **more)])[0]  # noqa: E731
    answer = ask(structure=FORMS["choice"], logit_bias=no_thought(tokenizer), logprobs=5)
    assert keeps("choice", answer.text)
    assert [t.id for t in answer.top_logprobs] == list(answer.ids)  # of the model itself, not of what was allowed
    assert ask().ids != answer.ids


def test_an_answer_that_is_cut_is_a_beginning(engine, tokenizer, prompts, request_of):
    (answer,) = engine().generate(
        [request_of("x", prompts[0], seed=1, structure=FORMS["regex"], max_tokens=2, logit_bias=no_thought(tokenizer))]
    )
    assert answer.finish_reason == "length" and re.fullmatch(r"[0-9]{1,2}:?", answer.text)


def test_a_form_that_is_none_is_refused_and_leaves_nothing(engine, prompts, request_of):
    busy = engine()
    bad = request_of("x", prompts[0], structure=Structure("regex", "(a"))
    for act in (busy.add, lambda r: busy.prepare(r.params)):
        with pytest.raises(RequestError) as error:
            act(bad)
        assert error.value.param == "structured_outputs"
    assert not busy.has_work
    busy.prepare(request_of("y", prompts[0]).params)


def test_a_form_that_leads_nowhere_ends_one_answer_and_no_other(engine, tokenizer, prompts, request_of, monkeypatch):
    from athanor.infer.constrained import Constraint

    calls, true = [], Constraint.allowed

    def allowed(self):
        calls.append(1)
        if len(calls) > 3:
            raise RequestError("it leads nowhere", "structured_outputs")
        return true(self)

    monkeypatch.setattr(Constraint, "allowed", allowed)
    requests = [
        request_of("formed", prompts[0], seed=1, structure=FORMS["schema"], logit_bias=no_thought(tokenizer)),
        request_of("free", prompts[1], seed=1, max_tokens=12),
    ]
    formed, free = engine().generate(requests)
    assert (formed.finish_reason, formed.error) == ("abort", "it leads nowhere")
    assert free.error is None and len(free.ids) > 3
