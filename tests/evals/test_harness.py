"""The generative harness: the questions are rendered as in training, and answers are judged by the skills' own metrics."""

import pytest

from athanor.evals import harness, skill
from athanor.infer.engine import Engine
from athanor.tokenizer.chat import render
from athanor.types import Completion

SKILLS = ["add", "reverse", "weekday"]


@pytest.fixture(scope="module")
def examples():
    return skill.heldout(SKILLS, 9, seed=0)


@pytest.fixture(scope="module")
def engine(tiny, tokenizer):
    return Engine(tiny(max_positions=512), tokenizer)


def said(tokenizer, example, ids, reason="stop"):
    """A completion with these ids to the example's question."""
    prompt = render(tokenizer, example.conversation[:1], generation_prompt=True).ids
    return Completion("0", prompt, ids, [0.0] * len(ids), "", None, reason)


def test_the_reference_answer_is_right(engine, tokenizer, examples):
    for example in examples:
        prompt = render(tokenizer, example.conversation[:1], generation_prompt=True).ids
        whole = render(tokenizer, example.conversation).ids
        assert whole[: len(prompt)] == prompt  # what is evaluated is what was trained
        result = harness.judge(engine, example, said(tokenizer, example, whole[len(prompt) :]))
        assert (result.correct, result.well_formed, result.stopped) == (1.0, True, True)
        assert result.message == example.conversation[1]
        assert result.tokens == len(whole) - len(prompt)


def test_a_wrong_answer_and_one_without_its_form_are_told_apart(engine, tokenizer, examples):
    example = examples[0]
    wrong = [tokenizer.think_id, *tokenizer.encode("hm"), tokenizer.end_think_id, *tokenizer.encode("never"), tokenizer.end_id]
    result = harness.judge(engine, example, said(tokenizer, example, wrong))
    assert (result.correct, result.well_formed, result.stopped) == (0.0, True, True)
    right = example.conversation[1].content
    bare = harness.judge(engine, example, said(tokenizer, example, tokenizer.encode(right), "length"))
    assert (bare.correct, bare.well_formed, bare.stopped) == (1.0, False, False)


def test_a_tiny_model_answers_every_example_in_order(engine, examples):
    seen = []
    results = harness.answer(engine, examples, max_tokens=12, progress=seen.append)
    assert [r.example for r in results] == examples
    assert seen[-1] == len(examples)
    assert all(0 <= r.correct <= 1 and 1 <= r.tokens <= 12 for r in results)
    assert all(r.stopped == (r.tokens < 12) for r in results if not r.stopped or r.tokens < 12)
    again = harness.answer(engine, examples[3:5], max_tokens=12)
    assert [r.message for r in again] == [r.message for r in results[3:5]]  # greedy, alone or among others


def test_a_temperature_makes_answers_vary_reproducibly(engine, examples):
    same = [examples[0]] * 4
    hot = [harness.answer(engine, same, max_tokens=12, temperature=1.0) for _ in range(2)]
    assert [r.message for r in hot[0]] == [r.message for r in hot[1]]
    assert len({r.message.content for r in hot[0]}) > 1
