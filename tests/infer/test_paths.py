"""Law L2 for every family that generates: in parts, from shared beginnings, preempted, among strangers: the plain answer."""

from dataclasses import replace

import pytest
import torch

from athanor.infer.engine import BLOCK, Engine
from athanor.models import io
from athanor.nn import paged
from athanor.nn.paged import PagedCache
from athanor.types import Request, SamplingParams
from tests.models.reference import cases, config_of, mixture

GENERATING = [*cases("decoder", "encoder_decoder"), ("transformer", "tiny"), ("rnn_lm", "tiny")]
COUNT = 18  # tokens of an answer: more than a block of the cache


class Letters:
    """A vocabulary that is not asked for much."""

    bos_id = end_id = think_id = end_think_id = None

    def __init__(self, size):
        self.vocab_size = size

    def encode(self, text):
        return [ord(c) % self.vocab_size for c in text]

    def pieces(self, before):
        return self

    def push(self, id):
        return ""

    def finish(self):
        return ""


def random_model(name, config, std=0.15):
    """A model whose weights are random, those that are zero at first too."""
    model = io.build(name, config, seed=0).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, p in model.named_parameters():
            p.normal_(1.0 if "norm" in key and key.endswith("weight") else 0.0, std, generator=generator)
    return model


@pytest.fixture(scope="module", params=GENERATING, ids="-".join)
def family(request):
    """A random model, prompts that share beginnings, and the plain answers to them with their log-probabilities."""
    model = random_model(request.param[0], config_of(request.param))
    if model.kind == "encoder_decoder" and model.token_ids.decoder_start is None:
        model.token_ids = replace(model.token_ids, decoder_start=1)
    draw = torch.Generator().manual_seed(1)

    def text(n):
        return torch.randint(3, model.config.vocab_size, (n,), generator=draw).tolist()

    shared = text(2 * BLOCK + 3)
    prompts = [[*shared, *text(5)], text(4), [*shared, *text(9)], text(BLOCK), shared[: BLOCK + 1], text(40)]
    return model, prompts, [plain(model, prompt, COUNT) for prompt in prompts]


@torch.no_grad()
def plain(model, prompt, count):
    """Greedy tokens and log-probabilities by a whole forward pass for each token."""
    ids, logprobs = [], []
    for _ in range(count):
        if model.kind == "encoder_decoder":
            logits = model(torch.tensor([prompt]), torch.tensor([[*model.token_ids.start, *ids]]))[0, -1]
        else:
            logits = model(torch.tensor([[*prompt, *ids]]))[0, -1]
        found = torch.log_softmax(logits.float(), -1)
        ids.append(int(found.argmax()))
        logprobs.append(float(found.max()))
        if ids[-1] in model.token_ids.eos:
            break
    return ids, logprobs


WAYS = {
    "together": {},
    "alone": {"max_batch": 1},
    "in parts": {"step_tokens": 7, "max_batch": 3},
    "nothing shared": {"share": False},
    "preempted": {"preempt": True},
    "preempted in parts": {"preempt": True, "step_tokens": 5, "share": False},
    "few keys together": {"together": 4 * BLOCK},
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_gives_the_plain_answer(family, way, monkeypatch):
    model, prompts, expected = family
    options = dict(WAYS[way])
    if tokens := options.pop("together", 0):  # sequences attend in groups, the longest ones each by itself
        widest = PagedCache(model.cache_layers(), 1, BLOCK, 1, torch.float32, model.device).widest
        monkeypatch.setattr(paged, "_TOGETHER", tokens * widest)
    if options.pop("preempt", False):  # a cache that one long answer all but fills
        blocks = 2 if model.kind == "encoder_decoder" else 6
        options |= {"cache_tokens": blocks * BLOCK, "max_len": blocks * BLOCK - 1, "max_batch": 4}
    engine = Engine(model, Letters(model.config.vocab_size), **options)
    requests = [Request(str(i), p, SamplingParams(temperature=0, max_tokens=COUNT, logprobs=2)) for i, p in enumerate(prompts)]
    # Experts of a mixture may be chosen by a hair: there values alone are compared as long as tokens agree.
    for _ in range(2):  # the second time beginnings are in the cache
        for answer, (ids, logprobs) in zip(engine.generate(requests), expected, strict=True):
            if not mixture(model):
                assert list(answer.ids) == ids
            same = next((i for i, (a, b) in enumerate(zip(answer.ids, ids, strict=False)) if a != b), len(ids))
            assert same >= 1
            assert list(answer.logprobs[:same]) == pytest.approx(logprobs[:same], abs=1e-5)
            for token, top in zip(answer.ids, answer.top_logprobs, strict=True):
                assert top.id == token and top.top[0] == (token, pytest.approx(top.logprob, abs=1e-6)) and len(top.top) == 2
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.cache_usage) == (0, 0, 0.0)
    if way.startswith("preempted"):
        assert stats.preemptions > 0
    if engine.scheduler.blocks.share and way in ("together", "alone"):
        assert stats.prefix_hits > 0


def test_log_probabilities_of_prompts_are_those_of_a_forward_pass(family):
    model, prompts, _ = family
    if model.kind == "encoder_decoder":
        pytest.skip("answers to sources, not continuations")
    engine = Engine(model, Letters(model.config.vocab_size), step_tokens=11)
    params = SamplingParams(temperature=0, max_tokens=2, prompt_logprobs=3)
    for prompt, answer in zip(prompts, engine.generate([Request(str(i), p, params) for i, p in enumerate(prompts)]), strict=True):
        with torch.no_grad():
            expected = torch.log_softmax(model(torch.tensor([prompt]))[0].float(), -1)
        assert answer.prompt_logprobs[0] is None and len(answer.prompt_logprobs) == len(prompt)
        for i, told in enumerate(answer.prompt_logprobs[1:], 1):
            assert told.id == prompt[i] and told.logprob == pytest.approx(float(expected[i - 1, prompt[i]]), abs=1e-5)
            assert [v for _, v in told.top] == pytest.approx(expected[i - 1].topk(3).values.tolist(), abs=1e-5)


def test_a_stranger_that_leaves_changes_nothing(family):
    model, prompts, expected = family
    engine = Engine(model, Letters(model.config.vocab_size), max_batch=4, step_tokens=9)
    for i, prompt in enumerate(prompts):
        engine.add(Request(str(i), prompt, SamplingParams(temperature=0, max_tokens=COUNT)))
        engine.add(
            Request(f"stranger {i}", prompt[::-1], SamplingParams(temperature=1.0, seed=i, max_tokens=50), priority=i % 3 - 1)
        )
    done, steps = {}, 0
    while engine.has_work:
        steps += 1
        engine.abort(f"stranger {steps // 4}")
        done |= {c.request_id: c.completion for c in engine.step() if c.completion}
    for i, (ids, _) in enumerate(expected):
        if not mixture(model):
            assert list(done[str(i)].ids) == ids
    assert engine.stats().cache_usage == 0
