"""Guessed tokens change how fast an answer comes, never the answer."""

from dataclasses import replace

import pytest
import torch

from athanor.core.errors import ConfigError
from athanor.infer.engine import Engine
from athanor.infer.runner import Part, Runner
from athanor.infer.sequence import Sequence
from athanor.infer.speculative import Draft, Heads, NGram, by
from athanor.models import deepseek_v3
from athanor.nn.context import Causal
from athanor.objectives import multi_token
from athanor.types import IGNORE, Batch, Request, SamplingParams, Structure


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


# The model's own heads.

FIRST, AROUND = 20, 32  # the tokens that follow each other in a circle


@pytest.fixture(scope="module")
def deep(tokenizer):
    """`deep(n_ahead)`: a new model with so many heads, every weight random, with clear preferences."""

    def build(n_ahead, **fields):
        config = replace(deepseek_v3.PRESETS["tiny-ahead"], vocab_size=tokenizer.vocab_size, n_ahead=n_ahead, **fields)
        model = deepseek_v3.Model(config)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.normal_(1.0 if name.endswith("norm.weight") else 0.0, 0.15, generator=generator)
        return model.eval()

    return build


@pytest.fixture(scope="module")
def going_round(tokenizer):
    """A model that was trained for a second to go around in a circle of tokens, and two heads that know where it goes."""
    config = replace(deepseek_v3.PRESETS["tiny-ahead"], vocab_size=tokenizer.vocab_size, n_ahead=2, n_layers=1)
    model = deepseek_v3.Model(config)
    generator = torch.Generator().manual_seed(0)
    model.initialise(generator)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    loss = multi_token.build(multi_token.Config(1.0))
    for _ in range(25):
        ids = FIRST + (torch.randint(0, AROUND, (8, 1), generator=generator) + torch.arange(32)) % AROUND
        labels = torch.cat((ids[:, 1:], torch.full((8, 1), IGNORE)), 1)
        total, count, _ = loss(model, Batch(ids.flatten(), labels.flatten(), torch.tensor([32] * 8), origin="circle"))
        optimizer.zero_grad()
        (total / count).backward()
        optimizer.step()
    return model.eval()


def circle(start, length):
    return [FIRST + (start + i) % AROUND for i in range(length)]


@pytest.fixture(scope="module")
def asked(prompts):
    """Requests of all kinds: strangers, long ones, equal ones, some that begin alike."""
    ways = [
        {"temperature": 0},
        {"temperature": 1.0, "top_p": 0.9, "prompt_logprobs": 0},
        {"temperature": 0.5, "repetition_penalty": 1.3, "min_tokens": 9, "bad_words": ("heat", "one"), "stop": ("e",)},
    ]
    texts = [*prompts[:3:2], circle(5, 40), [*circle(5, 40), *circle(9, 5)], circle(5, 40)]
    return [
        Request(f"{i}{j}", text, SamplingParams(seed=i, max_tokens=6 + 5 * j, **way))
        for i, text in enumerate(texts)
        for j, way in enumerate(ways)
    ]


@pytest.fixture(scope="module", params=["one random head", "three random heads", "two heads that know"])
def headed(request, deep, going_round, tokenizer, asked):
    """A model, and what it answers without guesses."""
    model = {"one random head": deep(1), "three random heads": deep(3)}.get(request.param, going_round)
    return model, Engine(model, tokenizer).generate(asked)


@pytest.mark.parametrize(
    "options", [{}, {"max_batch": 2}, {"step_tokens": 8, "max_batch": 3}, {"cache_tokens": 144}, {"share": False}], ids=str
)
def test_heads_change_no_answer(engine, asked, headed, options):
    """Whatever is in the batch, prompts in parts, out of the cache and equal ones, and after preemption."""
    model, plain = headed
    heads = Heads()
    busy = engine(model, guesser=heads, **options)
    for _ in range(2):  # the second time prompts are in the cache
        for a, b in zip(plain, busy.generate(asked), strict=True):
            assert (a.ids, a.text, a.finish_reason, a.stop_reason) == (b.ids, b.text, b.finish_reason, b.stop_reason)
            assert a.logprobs == pytest.approx(b.logprobs, abs=1e-5)
    stats = busy.stats()
    assert stats.guesses > 0 and (stats.prefix_hits > 0) == options.get("share", True)
    assert (stats.preemptions > 0) == ("cache_tokens" in options)
    assert not heads._seen  # nothing is kept of those who have left


def test_heads_change_no_answer_beside_one_that_is_aborted(engine, request_of, going_round):
    """Its blocks go to others while it is being guessed, and so does its id."""
    requests = [request_of(i, circle(i, 30 + i), seed=i, max_tokens=20) for i in range(4)]
    plain = engine(going_round).generate(requests)
    busy = engine(going_round, guesser=Heads(), max_batch=2)
    found = {}
    for turn in range(3):
        busy.add(request_of("gone", circle(0, 30), max_tokens=50))
        for request in requests[turn::3]:
            busy.add(request)
        steps = 0
        while busy.has_work:
            found |= {c.request_id: c.completion for c in busy.step() if c.completion}
            steps += 1
            if steps == 2 + turn:
                busy.abort("gone")
        assert found.pop("gone").finish_reason == "abort"
    assert [found[r.id].ids for r in requests] == [a.ids for a in plain]


def test_heads_that_learned_save_steps(engine, request_of, going_round, deep):
    """One step in three is left where every guess is right; heads that learned nothing are right by chance."""
    prompts = [circle(start, length) for start, length in ((3, 1), (9, 2), (30, 20), (17, 70))]
    requests = [request_of(i, p, temperature=0, max_tokens=31) for i, p in enumerate(prompts)]
    plain, before = answers(engine, requests, model=going_round)
    guessed, after = answers(engine, requests, model=going_round, guesser=Heads())
    assert [a.ids for a in guessed] == [a.ids for a in plain]
    assert plain[2].ids == tuple(circle(50, 31))
    assert after.guesses > 0 and after.right_guesses >= 0.9 * after.guesses and after.steps <= before.steps / 2.5
    _, chance = answers(engine, requests, model=deep(2), guesser=Heads())
    assert chance.guesses > 0 and chance.right_guesses <= 0.2 * chance.guesses


def test_guesses_of_what_is_sampled_are_drawn_with_the_same_numbers(engine, request_of, going_round):
    """Among tokens that are equally likely a head could not know by itself which one is drawn."""
    flat = deepseek_v3.Model(going_round.config)
    flat.load_state_dict(going_round.state_dict())
    with torch.no_grad():
        flat.head.weight.zero_()
    requests = [request_of(i, circle(i, 5), seed=i, max_tokens=30, allowed_ids=(60, 61, 62, 63)) for i in range(3)]
    plain, _ = answers(engine, requests, model=flat.eval())
    guessed, stats = answers(engine, requests, model=flat, guesser=Heads())
    assert [a.ids for a in guessed] == [a.ids for a in plain] and len({i for a in plain for i in a.ids}) == 4
    assert 0 < stats.guesses == stats.right_guesses


def guess_whole(model, tokens):
    """Greedy guesses by heads that read the whole text at once, without a cache."""
    guesses, n = [], len(tokens) - 1
    with torch.no_grad():
        hidden = model.hidden(torch.tensor([tokens[:-1]]), Causal(1, n))
        for k in range(1, len(model.ahead) + 1):
            hidden = model.mtp_state(k, torch.tensor([[*tokens, *guesses][k : k + n]]), hidden, Causal(1, n))
            guesses.append(int(model.logits(hidden)[0, -1].argmax()))
    return guesses


@pytest.mark.parametrize("n_ahead", [1, 3])
def test_guesses_from_the_cache_are_those_of_the_whole_text(engine, request_of, deep, n_ahead):
    """From token to token, where the tokens are other than guessed, and where several at once are as guessed."""
    model, seen = deep(n_ahead), []

    class Watched(Heads):
        def plan(self, sequence, most):
            seen.append(([*sequence.tokens], super().plan(sequence, most)))
            return seen[-1][1]

    busy = engine(model, guesser=Watched(), step_tokens=16, max_batch=3)
    requests = [request_of(i, circle(i, n), temperature=0, max_tokens=40) for i, n in enumerate((1, 2, 1, 21, 50))]
    busy.generate(requests)
    assert busy.stats().right_guesses > 0 and len(seen) > 60
    for tokens, guesses in seen:
        assert guesses == guess_whole(model, tokens)[: len(guesses)] and guesses


@pytest.mark.parametrize("n_ahead", [1, 2, 3])
@pytest.mark.parametrize("parts", [[40], [7, 33], [16, 1, 16, 1, 1, 5], [1, 39], [3, 30, 3, 4], [38, 1, 1]], ids=str)
def test_prompts_may_come_in_parts(deep, n_ahead, parts):
    """Every part is read with what comes after it; where one begins, what was guessed at the end of the last is read anew."""
    model = deep(n_ahead)
    heads, runner = Heads(), Runner(model, 9, 16, 2)
    heads.attach(runner, 9)
    tokens = torch.randint(0, 300, (41,), generator=torch.Generator().manual_seed(n_ahead)).tolist()
    a, b = (Sequence(Request(x, tokens, SamplingParams(temperature=0)), None) for x in "ab")
    a.slot, b.slot, a.table, b.table = 0, 1, [4, 2, 7], [1, 8, 3]
    for s, sizes in ((a, parts), (b, [40])):
        for size in sizes:
            part = Part(tokens[s.computed : s.computed + size], s.computed, s.table, s.slot, size)
            begin, s.computed = s.computed, s.computed + size
            heads.read([(s, begin, runner.run([part]))])
        assert heads.plan(s, 9) == guess_whole(model, tokens)
    assert heads.plan(a, 1) == heads.plan(b, 1) == guess_whole(model, tokens)[:1]


def test_heads_in_bfloat16(engine, request_of, going_round):
    requests = [request_of(i, circle(i, n), temperature=0, max_tokens=20) for i, n in enumerate((1, 20, 40))]
    plain, _ = answers(engine, requests, model=going_round, precision="bf16")
    guessed, stats = answers(engine, requests, model=going_round, precision="bf16", guesser=Heads())
    assert [a.ids for a in guessed] == [a.ids for a in plain]
    assert stats.right_guesses >= 0.9 * stats.guesses > 0


def test_heads_guess_nothing_of_an_answer_that_has_a_form(engine, request_of, going_round):
    pytest.importorskip("llguidance", reason="forms of answers need llguidance")
    free = request_of("free", circle(0, 4), temperature=0, max_tokens=12)
    formed = request_of("formed", circle(8, 4), max_tokens=12, structure=Structure("regex", "[0-9]{40}"))
    plain = engine(going_round).generate([free, formed])
    alone, stats = answers(engine, [formed], model=going_round, guesser=Heads())
    both, others = answers(engine, [free, formed], model=going_round, guesser=Heads())
    assert alone[0].ids == plain[1].ids and [a.ids for a in both] == [a.ids for a in plain]
    assert stats.guesses == 0 < others.guesses


def test_heads_that_are_not_there(engine, tiny, deep):
    message = (
        r"guesses by heads need heads for the tokens after the next, and this {} has none: take a deepseek_v3 that was built"
    )
    with pytest.raises(ConfigError, match=message.format("llama")):
        engine(tiny(), guesser=Heads())
    with pytest.raises(ConfigError, match=message.format("deepseek_v3")):
        engine(deep(0), guesser=Heads())
    heads = Heads()
    engine(deep(1), guesser=heads)
    with pytest.raises(ConfigError, match="these heads guess for another engine already: make new ones for each engine"):
        engine(deep(1), guesser=heads)


def test_what_the_option_names():
    assert by(0) is None and by(7).count == 7 and isinstance(by(7), NGram) and isinstance(by("heads"), Heads)
    with pytest.raises(ConfigError, match=r"guess is -1, but must be 0 \(nothing is guessed\), a number of tokens, or heads"):
        by(-1)
