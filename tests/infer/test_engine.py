"""Law L2: whatever the engine does to be fast, the answer is that of plain forward passes, one request alone."""

from itertools import pairwise
from typing import get_args

import pytest
import torch

from athanor.core.errors import ConfigError, RequestError
from athanor.infer.engine import Engine
from athanor.lm import LM, load
from athanor.models import deepseek_v3, mixtral
from athanor.nn import linear
from athanor.nn.moe import mixtures
from athanor.optim.build import Name, OptimConfig, build
from athanor.tokenizer.chat import parse
from athanor.train.step import apply
from athanor.types import Structure
from tests.infer.test_paths import Letters, random_model

TOLERANCE = 1e-5  # float32, log-probabilities


def drain(engine):
    """All chunks until there is no work; fails when the engine stops making progress."""
    chunks = []
    for _ in range(2000):
        if not engine.has_work:
            return chunks
        chunks += engine.step()
    raise AssertionError("the engine does not finish")


def completions(chunks):
    return {c.request_id: c.completion for c in chunks if c.completion}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_greedy_answers_are_those_of_plain_forward_passes(engine, model, prompts, plainly, request_of, precision):
    requests = [request_of(i, p, temperature=0, max_tokens=25) for i, p in enumerate(prompts)]
    for request, answer in zip(requests, engine(precision=precision).generate(requests), strict=True):
        assert answer.prompt_ids is request.prompt_ids
        assert len(answer.ids) == len(answer.logprobs) >= 1
        own, best = plainly(model, answer.prompt_ids, answer.ids)
        if precision == "fp32":
            assert list(answer.ids) == best
        assert list(answer.logprobs) == pytest.approx(own, abs=TOLERANCE if precision == "fp32" else 0.15)


def test_sampled_log_probabilities_are_of_the_untruncated_distribution_at_the_temperature(
    engine, model, prompts, plainly, request_of
):
    requests = [request_of(i, p, temperature=0.7, top_p=0.9, top_k=20, seed=i, max_tokens=15) for i, p in enumerate(prompts)]
    for answer in engine().generate(requests):
        own, _ = plainly(model, answer.prompt_ids, answer.ids, temperature=0.7)
        assert list(answer.logprobs) == pytest.approx(own, abs=TOLERANCE)


@pytest.mark.parametrize("max_batch", [1, 2, 3, 64])
def test_batched_is_alone(engine, prompts, request_of, max_batch):
    """Lengths of answers differ, so rows fall free, are moved and are filled again while others run."""
    requests = [
        request_of(i, prompts[i % len(prompts)], temperature=0.8 * (i % 3), seed=100 + i, max_tokens=1 + 5 * i % 23, top_p=0.95)
        for i in range(18)
    ]
    alone = [engine(max_batch=1).generate([r])[0] for r in requests]
    together = engine(max_batch=max_batch).generate(requests)
    assert [c.request_id for c in together] == [r.id for r in requests]
    for a, b in zip(alone, together, strict=True):
        assert (a.ids, a.text, a.reasoning, a.finish_reason) == (b.ids, b.text, b.reasoning, b.finish_reason)
        assert a.logprobs == pytest.approx(b.logprobs, abs=TOLERANCE)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_many_rows_that_fall_free_one_by_one_and_are_taken_again(engine, model, prompts, plainly, request_of, precision):
    """More rows than a multiple of sixteen: in bfloat16 idle rows are computed along, and nobody may notice."""
    requests = [
        request_of(i, prompts[i % len(prompts)], temperature=1.0, seed=i, max_tokens=2 + 7 * i % 13, top_p=0.95)
        for i in range(45)
    ]
    for answer in engine(max_batch=21, precision=precision).generate(requests):
        own, _ = plainly(model, answer.prompt_ids, answer.ids)
        assert list(answer.logprobs) == pytest.approx(own, abs=TOLERANCE if precision == "fp32" else 0.15)


def test_requests_that_join_mid_way_get_the_same_answers(engine, prompts, request_of):
    requests = [request_of(i, p, temperature=1.0, seed=i, max_tokens=5 + 4 * i) for i, p in enumerate(prompts)]
    alone = {r.id: engine().generate([r])[0].ids for r in requests}
    busy, chunks = engine(max_batch=4), []
    for request in requests:
        busy.add(request)
        chunks += busy.step() + busy.step()
    assert {id: c.ids for id, c in completions(chunks + drain(busy)).items()} == alone


def test_equal_prompts_are_read_once_and_answered_apart(engine, prompts, request_of):
    shared = prompts[3]
    requests = [request_of(i, shared if i % 2 else prompts[0], temperature=1.0, seed=i, max_tokens=12) for i in range(9)]
    alone = [engine().generate([r])[0] for r in requests]
    busy = engine()
    read, hidden = [], busy.runner.model.hidden
    busy.runner.model.hidden = lambda ids, ctx: read.append(ids.shape) or hidden(ids, ctx)
    try:
        together = busy.generate(requests)
    finally:
        del busy.runner.model.hidden
    assert read[0] == (1, len(shared) + len(prompts[0]))
    assert [c.ids for c in together] == [c.ids for c in alone]
    assert len({c.ids for c in together}) == 9


def test_the_same_seed_gives_the_same_text_and_another_seed_another(engine, prompts, request_of):
    def text(seed, *others):
        return engine().generate([request_of("x", prompts[0], seed=seed, max_tokens=30), *others])[0].text

    others = [request_of(i, prompts[i], seed=50 + i, max_tokens=20) for i in range(4)]
    assert text(7) == text(7, *others)
    assert text(7) != text(8)


def test_weights_are_read_at_every_step(tiny, engine, prompts, request_of):
    """The engine holds the very model that is trained."""
    model = tiny(seed=1)
    shared = engine(model=model)
    request = request_of("x", prompts[0], temperature=0, max_tokens=10)
    before = shared.generate([request])[0]
    model.load_state_dict(tiny(seed=2).state_dict())
    after = shared.generate([request])[0]
    assert after.ids == engine(model=tiny(seed=2)).generate([request])[0].ids != before.ids


def test_a_place_that_falls_free_is_filled_in_the_next_step(engine, prompts, request_of):
    one = engine(max_batch=1)
    for i in range(3):
        one.add(request_of(i, prompts[0], max_tokens=1))
    finished = []
    while one.has_work:
        finished.append([c.request_id for c in one.step() if c.completion])
    assert finished == [["0"], ["1"], ["2"]]
    two = engine(max_batch=1)
    two.add(request_of("long", prompts[0], temperature=0, max_tokens=3))
    two.add(request_of("next", prompts[1], temperature=0, max_tokens=1))
    assert [[c.request_id for c in two.step() if c.completion] for _ in range(3)] == [[], [], ["long"]]
    assert [c.request_id for c in two.step() if c.completion] == ["next"]


def test_chunks_are_the_text_in_pieces(engine, tokenizer, prompts, request_of):
    busy = engine(max_batch=3)
    for i, p in enumerate(prompts):
        busy.add(request_of(i, p, seed=i, max_tokens=60))
    content, reasoning = {}, {}
    chunks = drain(busy)
    for chunk in chunks:
        content[chunk.request_id] = content.get(chunk.request_id, "") + chunk.content
        reasoning[chunk.request_id] = reasoning.get(chunk.request_id, "") + chunk.reasoning
    done = completions(chunks)
    assert done.keys() == content.keys() == {str(i) for i in range(len(prompts))}
    assert len(chunks) > 20 * len(prompts)
    for id, c in done.items():
        assert content[id] == c.text and reasoning[id] == (c.reasoning or "")
        message = parse(tokenizer, c.ids)
        assert (c.text, c.reasoning) == (message.content, message.reasoning)


def saying(tiny, tokenizer, text):
    """A model that says the tokens of `text` after `<|bos|>`, one after another, then `<|end|>`, whatever else came before.

    Its two blocks are the identity and its head reads the last token alone; no token of `text` may come twice.
    """
    ids = [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.end_id]
    assert len(set(ids)) == len(ids)
    model = tiny(d_model=512, n_heads=2, n_kv_heads=1)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        model.norm.weight.fill_(1)
        for token in range(tokenizer.vocab_size):
            model.embedding.weight[token, token] = 1
        for token, following in pairwise(ids):
            model.head.weight[following, token] = 1
    return model


@pytest.mark.parametrize(
    ("stop", "text", "reason"),
    [
        ((), "one steady heat 12", "stop"),
        (("heat",), "one steady ", "stop"),
        (("y h", "steady"), "one ", "stop"),
        (("ady heat 1", "nothing"), "one ste", "stop"),
        (("nothing",), "one steady heat 12", "stop"),
    ],
)
def test_stop_texts_end_an_answer_and_are_not_part_of_it(tiny, tokenizer, engine, request_of, stop, text, reason):
    model = saying(tiny, tokenizer, "one steady heat 12")
    request = request_of("x", [tokenizer.bos_id], temperature=0, stop=stop, max_tokens=100)
    (answer,) = engine(model=model).generate([request])
    assert (answer.text, answer.finish_reason) == (text, reason)
    full = (*tokenizer.encode("one steady heat 12"), tokenizer.end_id)
    assert answer.ids == full[: len(answer.ids)]
    assert (answer.ids == full) == (text == "one steady heat 12")


def test_max_tokens_cuts_an_answer(tiny, tokenizer, engine, request_of):
    model = saying(tiny, tokenizer, "one steady heat 12")
    full = (*tokenizer.encode("one steady heat 12"), tokenizer.end_id)
    for n in range(1, len(full) + 1):
        (answer,) = engine(model=model).generate([request_of("x", [tokenizer.bos_id], temperature=0, max_tokens=n)])
        assert answer.ids == full[:n]
        assert answer.finish_reason == ("stop" if n == len(full) else "length")


@pytest.mark.parametrize("max_len", [20, None])
def test_a_full_context_ends_an_answer(engine, model, plainly, tokenizer, request_of, max_len):
    context = max_len or model.config.max_positions
    prompt = [tokenizer.bos_id, *[20 + i % 7 for i in range(context - 4)]]
    (answer,) = engine(max_len=max_len).generate([request_of("x", prompt, temperature=0, max_tokens=10**6)])
    assert (len(answer.prompt_ids) + len(answer.ids), answer.finish_reason) == (context, "length")
    own, best = plainly(model, prompt, answer.ids)
    assert list(answer.ids) == best and list(answer.logprobs) == pytest.approx(own, abs=TOLERANCE)


def test_reasoning_and_text_are_told_apart(tiny, tokenizer, engine, request_of):
    model = saying(tiny, tokenizer, "heat")
    heat = tokenizer.encode("heat")
    with torch.no_grad():
        model.head.weight[:, tokenizer.bos_id] = 0
        model.head.weight[tokenizer.think_id, tokenizer.bos_id] = 1
        model.head.weight[heat[0], tokenizer.think_id] = 1
    (answer,) = engine(model=model).generate([request_of("x", [tokenizer.bos_id], temperature=0)])
    assert (answer.text, answer.reasoning, answer.finish_reason) == ("", "heat", "stop")


class TestAbort:
    def test_a_running_request_ends_with_what_it_has(self, engine, prompts, request_of):
        busy = engine()
        for i in range(3):
            busy.add(request_of(i, prompts[i], temperature=0, max_tokens=30))
        alone = engine().generate([request_of("2", prompts[2], temperature=0, max_tokens=30)])[0]
        chunks = busy.step() + busy.step()
        busy.abort("1")
        last = busy.step()
        done = completions(last)["1"]
        assert (len(done.ids), len(done.logprobs), done.finish_reason) == (2, 2, "abort")
        assert "".join(c.content for c in chunks + last if c.request_id == "1") == done.text
        rest = completions(chunks + last + drain(busy))
        assert rest["2"].ids == alone.ids
        assert rest.keys() == {"0", "1", "2"}

    def test_a_waiting_request_ends_without_a_word(self, engine, prompts, request_of):
        busy = engine(max_batch=1)
        for i in range(3):
            busy.add(request_of(i, prompts[i], max_tokens=3))
        busy.step()
        busy.abort("1")
        done = completions(drain(busy))
        assert (done["1"].ids, done["1"].text, done["1"].finish_reason) == ((), "", "abort")
        assert done["2"].finish_reason != "abort"

    def test_alone_it_still_is_reported(self, engine, prompts, request_of):
        idle = engine()
        idle.add(request_of("x", prompts[0]))
        idle.abort("x")
        assert idle.has_work
        assert [c.completion.finish_reason for c in idle.step()] == ["abort"]
        assert not idle.has_work

    def test_unknown_and_finished_ids_are_no_error(self, engine, prompts, request_of):
        busy = engine()
        busy.generate([request_of("x", prompts[0], max_tokens=2)])
        busy.abort("x")
        busy.abort("never")
        assert busy.step() == []

    def test_generate_returns_what_was_aborted_meanwhile(self, engine, prompts, request_of):
        busy = engine(max_batch=1)
        requests = [request_of(i, prompts[i], max_tokens=4) for i in range(3)]
        answers = busy.generate(requests, progress=lambda done: busy.abort("2"))
        assert [a.finish_reason == "abort" for a in answers] == [False, False, True]


def test_progress_counts_finished_answers(engine, prompts, request_of):
    seen = []
    engine().generate([request_of(i, p, max_tokens=1 + i) for i, p in enumerate(prompts)], seen.append)
    assert seen == sorted(set(seen)) and seen[-1] == len(prompts)


def test_an_id_is_free_again_once_it_is_answered(engine, prompts, request_of):
    busy = engine()
    busy.add(request_of("x", prompts[0], max_tokens=2))
    with pytest.raises(RequestError, match="request id 'x' is already being answered: give each request its own") as error:
        busy.add(request_of("x", prompts[1]))
    assert error.value.param == "id"
    drain(busy)
    busy.add(request_of("x", prompts[1], max_tokens=1))
    assert completions(drain(busy)).keys() == {"x"}


def test_a_refused_request_leaves_nothing_behind(engine, prompts, request_of):
    busy = engine()
    with pytest.raises(RequestError, match="stop"):
        busy.add(request_of("x", prompts[0], stop=("",)))
    assert not busy.has_work
    busy.add(request_of("x", prompts[0], max_tokens=1))
    drain(busy)
    with pytest.raises(RequestError, match="max_tokens"):
        busy.generate([request_of("x", prompts[0]), request_of("y", prompts[1], max_tokens=0)])
    assert not busy.has_work
    assert len(busy.generate([request_of("x", prompts[0], max_tokens=1)])) == 1


def test_generate_does_not_swallow_the_text_of_others(engine, prompts, request_of):
    busy = engine()
    busy.add(request_of("x", prompts[0], max_tokens=3))
    with pytest.raises(RequestError, match="the engine is busy with other requests, whose text would be lost: take steps until"):
        busy.generate([request_of("y", prompts[1])])
    assert completions(drain(busy)).keys() == {"x"}


@pytest.mark.parametrize(
    ("prompt", "params", "param", "message"),
    [
        ([], {}, "messages", r"the prompt is empty: give at least one token"),
        ([20] * 130, {}, "messages", r"the prompt has 130 tokens and the context holds 128, .* shorten it by 3 tokens"),
        ([20] * 128, {}, "messages", r"shorten it by 1 tokens"),
        ([20, 320], {}, "messages", r"the prompt holds token ids outside \[0, 320\): it was made by another tokenizer"),
        ([-1], {}, "messages", r"outside \[0, 320\)"),
        ([20], {"max_tokens": 0}, "max_tokens", r"max_tokens \(0\) must be at least 1"),
        ([20], {"temperature": -0.1}, "temperature", r"temperature \(-0.1\) must be a finite number, 0 \(greedy\) or more"),
        ([20], {"temperature": float("nan")}, "temperature", r"temperature \(nan\) must be a finite number"),
        ([20], {"temperature": float("inf")}, "temperature", r"temperature \(inf\) must be a finite number"),
        ([20], {"top_p": 0.0}, "top_p", r"top_p \(0.0\) must lie in \(0, 1\]"),
        ([20], {"top_p": 1.1}, "top_p", r"top_p \(1.1\) must lie in \(0, 1\]"),
        ([20], {"top_p": float("nan")}, "top_p", r"top_p \(nan\) must lie in \(0, 1\]"),
        ([20], {"top_k": -1}, "top_k", r"top_k \(-1\) must be 0 \(all tokens\) or more"),
        ([20], {"stop": ("a", "")}, "stop", r"must be a list of texts, none of them empty"),
        ([20], {"min_p": 1.5}, "min_p", r"min_p \(1.5\) must lie in \[0, 1\]"),
        (
            [20],
            {"repetition_penalty": 0.0},
            "repetition_penalty",
            r"repetition_penalty \(0.0\) must be a finite number above 0: 1 is off",
        ),
        ([20], {"presence_penalty": 2.5}, "presence_penalty", r"presence_penalty \(2.5\) must lie in \[-2, 2\]"),
        ([20], {"frequency_penalty": float("nan")}, "frequency_penalty", r"frequency_penalty \(nan\) must lie in \[-2, 2\]"),
        ([20], {"logit_bias": ((320, 1.0),)}, "logit_bias", r"logit_bias has the token 320, which must lie in \[0, 320\)"),
        ([20], {"logit_bias": ((1, float("inf")),)}, "logit_bias", r"logit_bias must be finite numbers: -100 all but forbids"),
        ([20], {"allowed_ids": (-1,)}, "allowed_ids", r"allowed_ids has the token -1"),
        ([20], {"allowed_ids": ()}, "allowed_ids", r"allowed_ids is empty, so that nothing could be said"),
        ([20], {"stop_ids": (400,)}, "stop_ids", r"stop_ids has the token 400"),
        ([20], {"min_tokens": 9, "max_tokens": 8}, "min_tokens", r"min_tokens \(9\) must lie between 0 and max_tokens \(8\)"),
        ([20], {"logprobs": -1}, "logprobs", r"logprobs \(-1\) must be 0 or more"),
        ([20], {"prompt_logprobs": -1}, "prompt_logprobs", r"prompt_logprobs \(-1\) must be 0 or more"),
        ([20], {"structure": Structure("json", ""), "min_tokens": 1}, "min_tokens", r"min_tokens does not go with a structure"),
    ],
)
def test_a_request_out_of_range_is_refused_by_name(engine, request_of, prompt, params, param, message):
    with pytest.raises(RequestError, match=message) as error:
        engine().add(request_of("x", prompt, **params))
    assert error.value.param == param


def test_an_engine_that_could_never_answer_is_refused(engine):
    with pytest.raises(ConfigError, match=r"max_batch \(0\) must be at least 1"):
        engine(max_batch=0)
    for max_len in (1, 129):
        with pytest.raises(ConfigError, match=rf"max_len \({max_len}\) must lie between 2 .* and 128, the model's context"):
            engine(max_len=max_len)
    for steps in (0, -1):
        with pytest.raises(ConfigError, match=rf"step_tokens \({steps}\) must be at least 1"):
            engine(step_tokens=steps)
    with pytest.raises(ConfigError, match=r"cache_tokens \(100\) must hold one sequence of max_len \(128\) tokens, 128 in whole"):
        engine(cache_tokens=100)


def test_tokens_that_stop_an_answer_are_told_and_not_said(tiny, tokenizer, engine, request_of):
    model, (stop,) = saying(tiny, tokenizer, "one steady heat 12"), tokenizer.encode(" heat")[-1:]
    request = request_of("x", [tokenizer.bos_id], temperature=0, stop_ids=(stop,))
    (answer,) = engine(model=model).generate([request])
    assert (answer.ids[-1], answer.finish_reason, answer.stop_reason) == (stop, "stop", stop)
    assert "one steady heat 12".startswith(answer.text) and answer.text == tokenizer.decode(answer.ids[:-1])
    (answer,) = engine(model=model).generate([request_of("x", [tokenizer.bos_id], temperature=0, stop=("y h",))])
    assert answer.stop_reason == "y h"


def test_an_answer_has_min_tokens_and_may_go_on_after_its_end(engine, model, tokenizer, request_of, prompts):
    """A bias makes the end the most probable token everywhere."""
    ends = {"logit_bias": ((tokenizer.end_id, 100.0),), "temperature": 0, "max_tokens": 9}
    lengths = [
        len(engine().generate([request_of("x", prompts[0], **ends, **more)])[0].ids)
        for more in ({}, {"min_tokens": 4}, {"min_tokens": 4, "stop": ("e",)}, {"ignore_eos": True})
    ]
    assert lengths == [1, 5, 5, 9]


def test_with_a_listener_min_tokens_mean_the_same(tiny, tokenizer, engine, request_of):
    model = saying(tiny, tokenizer, "one steady heat 12")
    least = len(tokenizer.encode("one steady heat 12")) - 1
    request = request_of("x", [tokenizer.bos_id], temperature=0, min_tokens=least, stop=("o",))
    (whole,) = engine(model=model).generate([request])
    busy = engine(model=model)
    busy.add(request)
    assert completions(drain(busy))["x"] == whole and len(whole.ids) >= least and whole.stop_reason == "o"


def test_bad_words_never_appear(tiny, tokenizer, engine, request_of):
    model = saying(tiny, tokenizer, "one steady heat 12")
    with torch.no_grad():
        model.head.weight += 0.01 * torch.randn(model.head.weight.shape, generator=torch.Generator().manual_seed(0))
    say = lambda **more: engine(model=model).generate([request_of("x", [tokenizer.bos_id], temperature=0, max_tokens=12, **more)])  # noqa: E731
    assert "steady" in say()[0].text
    for words in (("steady",), ("steady", "heat"), ("one",)):
        assert not any(word in say(bad_words=words)[0].text for word in words)


def test_chunks_tell_tokens_and_their_log_probabilities(engine, prompts, request_of):
    busy = engine()
    busy.add(request_of("x", prompts[0], seed=3, max_tokens=20, logprobs=2))
    chunks = drain(busy)
    done = completions(chunks)["x"]
    assert tuple(id for c in chunks for id in c.ids) == done.ids
    assert tuple(t for c in chunks for t in c.logprobs) == done.top_logprobs
    assert [t.id for t in done.top_logprobs] == list(done.ids) and all(len(t.top) == 2 for t in done.top_logprobs)
    assert done.timing.added <= done.timing.started <= done.timing.first <= done.timing.ended


def test_log_probabilities_that_are_told_are_at_temperature_1(engine, model, prompts, plainly, request_of):
    (answer,) = engine().generate([request_of("x", prompts[0], temperature=0.5, max_tokens=9, logprobs=0)])
    own, _ = plainly(model, answer.prompt_ids, answer.ids)
    assert [t.logprob for t in answer.top_logprobs] == pytest.approx(own, abs=TOLERANCE)


def test_beginnings_are_forgotten_when_the_weights_change(tiny, engine, request_of):
    """In place as optimisers do it, which PyTorch counts; after `.data`, which it does not, when told."""
    model, prompt = tiny(seed=1), [20 + i % 9 for i in range(60)]
    shared = engine(model=model)
    ask = lambda: shared.generate([request_of("x", prompt, temperature=0, max_tokens=8)])[0]  # noqa: E731
    assert (ask().cached, ask().cached) == (0, 48)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    after = ask()
    assert after.cached == 0
    assert after.ids == engine(model=model).generate([request_of("x", prompt, temperature=0, max_tokens=8)])[0].ids
    assert ask().cached == 48
    shared.forget()
    assert ask().cached == 0


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", get_args(Name))
def test_a_step_of_any_optimiser_makes_weights_new(tiny, engine, prompts, request_of, name, precision):
    """PyTorch's fused kernels do not count what they change."""
    model, prompt = tiny(seed=1), (prompts[3] * 8)[:60]
    shared = engine(model=model, precision=precision)

    def ask(who):
        return who.generate([request_of("x", prompt, temperature=0, max_tokens=8)])[0]

    first = ask(shared)
    assert ask(shared).cached == 48
    model(torch.tensor([prompt])).square().sum().backward()
    apply(build(model, OptimConfig(name=name, lr=0.1)), grad_norm=1.0, clip=1.0, lr_factor=1.0)
    after, fresh = ask(shared), ask(engine(model=model, precision=precision))
    assert after.cached == 0 and after.logprobs != first.logprobs
    assert (after.ids, after.logprobs) == (fresh.ids, fresh.logprobs)


def test_what_balances_experts_makes_answers_new(request_of):
    """A buffer, not a parameter; what only counts tokens is no reason to forget."""
    model = random_model("deepseek_v3", deepseek_v3.PRESETS["tiny"])
    shared, prompt = Engine(model, Letters(model.config.vocab_size)), [3 + i % 50 for i in range(60)]

    def ask():
        return shared.generate([request_of("x", prompt, temperature=0, max_tokens=8)])[0].cached

    assert (ask(), ask()) == (0, 48)
    with torch.no_grad():
        model.train()(torch.tensor([prompt]))
    assert model.eval() and ask() == 48
    mixtures(model)[0].router.e_score_correction_bias.add_(1.0)
    assert (ask(), ask()) == (0, 48)


def test_a_model_that_was_loaded_is_packed_too(tiny, tokenizer, engine, prompts, request_of, tmp_path):
    """Its weights have never been changed in place: the count that the engine goes by is 0."""
    LM(tiny(seed=1), tokenizer).save(tmp_path / "model")
    model = load(tmp_path / "model").model
    assert not sum(p._version for p in model.parameters())
    shared = engine(model=model, precision="bf16")
    assert not any(p in linear._PACKED for p in model.parameters())
    shared.generate([request_of("x", prompts[0], max_tokens=2)])
    assert all(module.weight in linear._PACKED for module in model.modules() if type(module) is linear.Linear)


@torch.inference_mode()
def test_a_model_that_was_made_in_inference_mode_answers(tiny, engine, prompts, request_of):
    """PyTorch counts nothing of such tensors."""

    def ask(model):
        return engine(model=model, precision="bf16").generate([request_of("x", prompts[3], temperature=0)])[0].ids

    made = tiny(seed=1)
    assert made.output_weight.is_inference()
    with torch.inference_mode(False):
        assert ask(tiny(seed=1)) == ask(made)


def test_packed_weights_follow_the_weights(tiny, engine, prompts, request_of):
    """In bfloat16 products read a copy; it is made anew when weights change, and answers are those of a fresh engine."""
    model = tiny(seed=1)
    shared = engine(model=model, precision="bf16")
    ask = lambda who: who.generate([request_of("x", prompts[3], temperature=0, max_tokens=12)])[0]  # noqa: E731
    first = ask(shared)
    assert first.logprobs == pytest.approx(ask(engine(model=model, precision="bf16", packed=False)).logprobs, abs=0.1)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    second = ask(shared)
    assert second.logprobs != first.logprobs
    assert (second.ids, second.logprobs) == ((fresh := ask(engine(model=model, precision="bf16"))).ids, fresh.logprobs)
    for p in model.parameters():
        p.data.div_(1.5)
    shared.forget()
    assert ask(shared).logprobs == pytest.approx(first.logprobs, abs=1e-4)


def test_experts_are_kept_in_bfloat16_where_they_are_wider():
    model = random_model("mixtral", mixtral.PRESETS["tiny"])
    own = {id(p) for name, p in model.named_parameters() if ".experts." in name}
    assert own
    for dtype, kept in ((torch.float32, own), (torch.bfloat16, set())):
        engine = Engine(model.to(dtype), Letters(model.config.vocab_size), precision="bf16")
        assert own & {id(weight) for weight in engine._packed} == kept


def test_what_the_engine_does_is_counted(engine, prompts, request_of):
    busy = engine(max_batch=2)
    requests = [request_of(i, p, temperature=0, max_tokens=5) for i, p in enumerate(prompts)]
    for request in requests:
        busy.add(request)
    busy.step()
    now = busy.stats()
    assert (now.running, now.waiting, now.steps, now.generation_tokens) == (2, len(prompts) - 2, 1, 2)
    assert now.step_tokens == len(prompts[0]) + len(prompts[1]) and 0 < now.cache_usage < 1
    answers = completions(drain(busy))
    end = busy.stats()
    assert end.generation_tokens == sum(len(a.ids) for a in answers.values())
    assert end.prompt_tokens == sum(map(len, prompts)) and (end.running, end.waiting, end.cache_usage) == (0, 0, 0)
