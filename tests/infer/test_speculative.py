"""Guessed tokens change how fast an answer comes, never the answer."""

import pytest
import torch

from athanor.core.errors import ConfigError
from athanor.infer.sequence import Sequence
from athanor.infer.speculative import Draft, NGram
from athanor.types import Request


def answers(engine, requests, **options):
    busy = engine(**options)
    return busy.generate(requests), busy.stats()


@pytest.fixture(scope="module")
def near(tiny):
    """A draft model that is often right: the model itself with a little noise."""
    model = tiny()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * p.std() * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    return model


@pytest.fixture
def guessers(near, tiny):
    return {
        "ngram": lambda: NGram(4),
        "short ngram": lambda: NGram(1, 2),
        "near": lambda: Draft(near, 3),
        "far": lambda: Draft(tiny(seed=9), 2),
    }


@pytest.mark.parametrize("name", ["ngram", "short ngram", "near", "far"])
@pytest.mark.parametrize("options", [{}, {"max_batch": 2}, {"step_tokens": 8, "max_batch": 3}, {"cache_tokens": 144}])
def test_answers_are_those_without_guesses(engine, prompts, request_of, guessers, name, options):
    """Greedy and sampled, with penalties, bans and stops, whose rows depend on the guesses before them."""
    ways = [
        {"temperature": 0},
        {"temperature": 1.0, "top_p": 0.9},
        {"temperature": 0.5, "repetition_penalty": 1.3, "logprobs": 2},
        {"temperature": 1.0, "frequency_penalty": 0.5, "min_tokens": 9, "logit_bias": ((2, 3.0),)},
        {"temperature": 0.7, "bad_words": ("heat", "one"), "stop": ("e",)},
    ]
    requests = [
        request_of(f"{i}{j}", p, seed=i, max_tokens=8 + 5 * j, **way) for i, p in enumerate(prompts) for j, way in enumerate(ways)
    ]
    plain, _ = answers(engine, requests)
    guessed, stats = answers(engine, requests, guesser=guessers[name](), **options)
    for a, b in zip(plain, guessed, strict=True):
        assert (a.ids, a.text, a.finish_reason, a.stop_reason) == (b.ids, b.text, b.finish_reason, b.stop_reason)
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-5)
        assert (a.top_logprobs is None) == (b.top_logprobs is None)
        if a.top_logprobs is not None:
            assert [t.id for t in b.top_logprobs] == list(b.ids)
    assert (stats.guesses > 0 or "cache_tokens" in options) and 0 <= stats.right_guesses <= stats.guesses
    assert stats.generation_tokens == sum(len(a.ids) for a in guessed)


def test_equal_prompts_may_have_room_for_different_guesses(engine, request_of, near):
    """What the draft model computes of a prompt is copied to the same prompt's other answer, whose table is of another length."""
    prompt = [20 + i % 7 for i in range(30)]  # with a token more, one guess fits into two blocks and four do not
    requests = [request_of(i, prompt, temperature=0, max_tokens=n) for i, n in enumerate((2, 12, 3))]
    plain, _ = answers(engine, requests)
    guessed, stats = answers(engine, requests, guesser=Draft(near, 4), share=False)
    assert [a.ids for a in guessed] == [a.ids for a in plain] and stats.guesses > 0


def test_right_guesses_save_steps(engine, prompts, request_of, model, near):
    requests = [request_of("x", prompts[0], temperature=0, max_tokens=60)]
    plain, before = answers(engine, requests)
    perfect, after = answers(engine, requests, guesser=Draft(model, 3))
    assert perfect[0].ids == plain[0].ids and after.right_guesses == after.guesses
    assert after.steps <= before.steps / 3.5
    assert answers(engine, requests, guesser=Draft(near, 3))[1].right_guesses > 0


def test_what_was_said_before_is_guessed_again(engine, tokenizer, request_of):
    """The model repeats itself by force of a bias, and the n-gram sees it coming."""
    prompt = [tokenizer.bos_id, *[30, 31, 32, 33, 34] * 4]
    requests = [request_of("x", prompt, temperature=0, max_tokens=40, logit_bias=((30, 90.0),))]
    plain, before = answers(engine, requests)
    guessed, after = answers(engine, requests, guesser=NGram(5))
    assert guessed[0].ids == plain[0].ids and after.steps < before.steps / 3


def test_the_last_occurrence_counts_and_longer_ones_first():
    def plan(tokens, most=9, **options):
        return NGram(**options).plan(Sequence(Request("x", tokens), None), most)

    assert plan([1, 2, 3, 1, 2, 4, 1, 2], count=2) == [4, 1]
    assert plan([9, 1, 2, 3, 8, 1, 2, 4, 9, 1, 2], count=1) == [3]
    assert plan([9, 1, 2, 3, 8, 1, 2, 4, 9, 1, 2], count=1, longest=2) == [4]
    assert plan([1, 2, 3], count=2) == [] and plan([1, 1, 1, 1], count=3, most=1) == [1]


def test_what_does_not_go_together_is_refused(engine, tiny):
    with pytest.raises(ConfigError, match=r"count \(0\) must be at least 1 and longest \(4\) at least 2"):
        NGram(0)
    with pytest.raises(ConfigError, match=r"count \(0\) must be at least 1"):
        Draft(tiny(), 0)
    with pytest.raises(ConfigError, match="the draft model has 300 tokens and the model 320: take one with the same vocabulary"):
        engine(guesser=Draft(tiny(vocab_size=300)))
    with pytest.raises(ConfigError, match="the draft model reads 64 tokens and the engine 128: lower max_len, or take another"):
        engine(guesser=Draft(tiny(max_positions=64)))
