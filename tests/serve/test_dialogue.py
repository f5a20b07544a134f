"""A conversation in one thread: history, what no longer fits, and answers that are stopped."""

from __future__ import annotations

import pytest

from athanor.core.errors import RequestError
from athanor.serve.dialogue import Dialogue
from athanor.tokenizer.chat import render
from athanor.types import Message


def text_of(turn):
    return "".join(chunk.content for chunk in turn)


def test_the_history_is_rendered_as_in_training(fake, tokenizer):
    engine = fake(lambda r: f"{len(r.prompt_ids)} tokens")
    dialogue = Dialogue(engine, tokenizer, "Be brief.")
    turn = dialogue.ask("one", seed=5, temperature=0.0)
    first = text_of(turn)
    assert (turn.dropped, turn.finish_reason, turn.tokens) == (0, "stop", len(first))
    text_of(dialogue.ask("two"))
    messages = [
        Message("system", "Be brief."),
        Message("user", "one"),
        Message("assistant", first),
        Message("user", "two"),
    ]
    assert engine.seen[1].prompt_ids == render(tokenizer, messages, generation_prompt=True).ids
    assert (engine.seen[0].params.seed, engine.seen[0].params.temperature) == (5, 0.0)
    assert engine.seen[1].params.max_tokens == engine.max_len - len(engine.seen[1].prompt_ids)
    dialogue.reset()
    text_of(dialogue.ask("one"))
    assert engine.seen[2].prompt_ids == engine.seen[0].prompt_ids


def test_with_a_real_engine_reasoning_stays_in_the_history(lm):
    dialogue = Dialogue(lm.engine(max_batch=1), lm.tokenizer)
    for seed in range(200):
        dialogue.reset()
        turn = dialogue.ask("12 + 30 = ?", seed=seed, max_tokens=20)
        chunks = list(turn)
        completion = chunks[-1].completion
        assert "".join(c.content for c in chunks) == completion.text
        assert turn.tokens == len(completion.ids)
        assert turn.seconds > 0
        assert dialogue.history == [
            Message("user", "12 + 30 = ?"),
            Message("assistant", completion.text, completion.reasoning),
        ]
        if completion.reasoning:
            return
    pytest.fail("the random model never opened <think>")


def test_the_oldest_turns_are_dropped_and_counted_when_the_context_is_full(fake, tokenizer):
    engine = fake(lambda r: "answer", max_len=120)
    dialogue = Dialogue(engine, tokenizer, "System.")
    dropped = []
    for i in range(12):
        turn = dialogue.ask(f"question {i}")
        dropped.append(turn.dropped)
        assert turn.prompt + 30 <= 120  # a quarter of the context is left for the answer
        assert text_of(turn) == "answer"
        assert dialogue.history[0].role == "user"
    assert sum(dropped) == 24 - len(dialogue.history)
    assert dropped[:2] == [0, 0]
    assert set(dropped[2:]) >= {2}
    system = [tokenizer.bos_id, tokenizer.system_id, *tokenizer.encode("System."), tokenizer.end_id]
    assert engine.seen[-1].prompt_ids[: len(system)] == system


def test_max_tokens_is_what_turns_are_dropped_for(fake, tokenizer):
    engine = fake(lambda r: "a" * 60, max_len=120)
    dialogue = Dialogue(engine, tokenizer)
    text_of(dialogue.ask("one", max_tokens=60))
    turn = dialogue.ask("two", max_tokens=60)
    assert turn.dropped == 2
    assert engine.seen[-1].params.max_tokens == 60
    long = dialogue.ask("x" * 100, max_tokens=60)
    assert engine.seen[-1].params.max_tokens == 120 - long.prompt < 60


def test_a_message_that_does_not_fit_alone_changes_nothing(fake, tokenizer):
    dialogue = Dialogue(fake(max_len=60), tokenizer, "System.")
    text_of(dialogue.ask("one"))
    before = dialogue.history
    with pytest.raises(RequestError, match=r"the message and the system text make \d+ tokens, but the context has 60"):
        dialogue.ask("x" * 60)
    assert dialogue.history is before
    assert len(before) == 2


def test_parameters_out_of_range_change_nothing(lm):
    dialogue = Dialogue(lm.engine(max_batch=1), lm.tokenizer)
    for params in ({"temperature": -1.0}, {"max_tokens": 0}, {"top_p": 0.0}):
        with pytest.raises(RequestError) as error:
            dialogue.ask("hello", **params)
        assert error.value.param in params
    assert dialogue.history == []


def test_a_stopped_answer_keeps_what_was_said_and_the_next_is_clean(lm):
    engine = lm.engine(max_batch=1)
    dialogue = Dialogue(engine, lm.tokenizer)
    said = ""
    turn = dialogue.ask("hello", seed=1, stopped=lambda: len(said) > 5)
    for chunk in turn:
        said += chunk.content
    assert turn.finish_reason == "abort"
    assert [m.content for m in dialogue.history] == ["hello", said]
    after = dialogue.ask("again", seed=2, max_tokens=10)
    assert "".join(c.content for c in after) == dialogue.history[-1].content
    fresh = Dialogue(lm.engine(max_batch=1), lm.tokenizer)
    fresh.history = dialogue.history[:2]
    assert text_of(fresh.ask("again", seed=2, max_tokens=10)) == dialogue.history[-1].content
    assert not engine.has_work


def test_an_answer_stopped_before_its_first_word_leaves_no_question_behind(fake, tokenizer):
    engine = fake()
    dialogue = Dialogue(engine, tokenizer)
    turn = dialogue.ask("hello", stopped=lambda: True)
    assert list(turn) == []
    assert (turn.finish_reason, dialogue.history, engine.has_work) == ("abort", [], False)


def test_a_conversation_goes_on_where_it_was_left(fake, tokenizer):
    engine = fake(lambda r: f"{len(r.prompt_ids)}")
    dialogue = Dialogue(engine, tokenizer, "Be brief.")
    for text in ("one", "two"):
        text_of(dialogue.ask(text))
    other = Dialogue(engine, tokenizer)
    other.resume(dialogue.messages())
    assert (other.system, other.history, other.messages()) == ("Be brief.", dialogue.history, dialogue.messages())
    text_of(dialogue.ask("three"))
    text_of(other.ask("three"))
    assert engine.seen[-1].prompt_ids == engine.seen[-2].prompt_ids
    other.resume([])
    assert (other.system, other.history) == (None, [])


def test_what_is_no_conversation_is_refused_and_changes_nothing(fake, tokenizer):
    dialogue = Dialogue(fake(), tokenizer, "Be brief.")
    text_of(dialogue.ask("one"))
    before = dialogue.messages()
    for bad in ([{"role": "user", "content": "a"}], [{"role": "assistant", "content": "a"}], [{"role": "user"}], "text"):
        with pytest.raises(RequestError) as error:
            dialogue.resume(bad)
        assert error.value.param == "messages"
        assert dialogue.messages() == before
