"""What a model makes inf or nan of has no answer, and nobody else's answer changes for it."""

import asyncio
from dataclasses import replace

import pytest
import torch

from athanor.core.errors import NonFiniteError
from athanor.infer.engine import Engine
from athanor.infer.speculative import Draft
from athanor.models import io
from athanor.serve.dialogue import Dialogue
from athanor.serve.worker import EngineFailedError, Worker
from athanor.types import Request, SamplingParams
from tests.infer.test_engine import completions, drain
from tests.infer.test_paths import Letters, random_model
from tests.models.reference import config_of

BAD = 7  # a token of whose embedding nothing is finite
CASES = [
    ("llama", "tiny", {}),
    ("llama", "tiny", {"deterministic": True}),
    ("llama", "tiny", {"step_tokens": 16}),
    ("llama", "tiny", {"share": False}),
    ("mistral", "tiny", {}),
    ("mixtral", "tiny", {}),
    ("deepseek_v3", "tiny", {}),
    ("rnn_lm", "tiny", {}),
    ("t5", "tiny-gated", {}),
]


def broken(name, preset="tiny", value=float("nan")):
    """A model, and the same that makes `value` of one token that it reads."""
    config = config_of((name, preset))
    if getattr(config, "tied", False):  # else nobody's logits would be finite
        config = replace(config, tied=False)
    whole, other = (random_model(name, config) for _ in range(2))
    for model in (whole, other) if whole.kind == "encoder_decoder" else ():
        model.token_ids = replace(model.token_ids, decoder_start=0)
    with torch.no_grad():
        other.get_parameter("embedding.weight")[BAD] = value
    assert other.output_weight.isfinite().all()
    return whole, other


def request(id, prompt, **params):
    return Request(str(id), prompt, SamplingParams(**({"temperature": 0.0, "max_tokens": 12} | params)))


def texts():
    draw = torch.Generator().manual_seed(3)
    return [torch.randint(8, 60, (n,), generator=draw).tolist() for n in (5, 40, 18, 33)]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("name", "preset", "options"), CASES, ids=lambda x: x if isinstance(x, str) else "-".join(x) or "plain")
def test_others_are_answered_as_if_it_were_not_there(name, preset, options, precision):
    whole, other = broken(name, preset)
    letters, clean = Letters(whole.config.vocab_size), [request(i, text) for i, text in enumerate(texts())]
    options = {"max_batch": 8, "precision": precision} | options
    plain = Engine(whole, letters, **options).generate(clean)
    engine = Engine(other, letters, **options)
    for _ in range(3):  # in the places, blocks and slots that it has left, too
        for i, at in enumerate((0, 3, 30)):
            prompt = texts()[1]
            prompt[at] = BAD
            engine.add(request(f"bad {i}", prompt))
        for one in clean:
            engine.add(one)
        found = completions(drain(engine))
        for answer in plain:
            mine = found[answer.request_id]
            assert mine.error is None and mine.ids == answer.ids
            assert mine.logprobs == pytest.approx(answer.logprobs, abs=1e-5 if precision == "fp32" else 0.1)
        for i in range(3):
            mine = found[f"bad {i}"]
            assert (mine.finish_reason, mine.spoilt, len(mine.ids)) == ("abort", True, 0)
            assert mine.error.startswith("hidden states of tokens ")
    assert engine.scheduler.blocks.usage == 0


def test_a_token_of_an_answer_may_be_the_one():
    """Here the model says it itself, and reads it next."""
    whole, other = broken("llama", value=float("inf"))
    letters, prompt = Letters(whole.config.vocab_size), texts()[0]
    say = request(0, prompt, logit_bias=((BAD, 1e4),), max_tokens=6)
    engine = Engine(other, letters)
    engine.add(say)
    answer = completions(drain(engine))["0"]
    assert (answer.ids, answer.spoilt) == ((BAD,), True)
    assert answer.error == f"hidden states of tokens {len(prompt)} to {len(prompt)}"


def test_logits_that_are_not_finite_end_an_answer_too():
    model = random_model("llama", replace(config_of(("llama", "tiny")), tied=False))
    with torch.no_grad():
        model.output_weight[BAD] = float("nan")
    with pytest.raises(
        NonFiniteError, match="the model's logits after token 4 of request '0' are not finite: its weights are damaged or"
    ):
        Engine(model, Letters(model.config.vocab_size)).generate([request(0, texts()[0])])


def test_many_at_once_are_refused_whole_and_leave_nothing():
    whole, other = broken("llama")
    letters = Letters(whole.config.vocab_size)
    engine, bad = Engine(other, letters), [BAD, *texts()[0]]
    with pytest.raises(NonFiniteError, match="the model's hidden states of tokens 0 to 5 of request 'bad' are not finite"):
        engine.generate([request(0, texts()[0]), request("bad", bad), request(1, texts()[1])])
    assert not engine.has_work and engine.scheduler.blocks.usage == 0
    assert engine.generate([request(0, texts()[0])]) == Engine(whole, letters).generate([request(0, texts()[0])])


def test_a_draft_model_that_is_broken_changes_no_answer():
    whole, other = broken("llama")
    letters, clean = Letters(whole.config.vocab_size), [request(i, text) for i, text in enumerate(texts())]
    guessing = Engine(whole, letters, guesser=Draft(other, 3))
    plain = Engine(whole, letters)
    asked = [request("odd", [*texts()[0], BAD, 9]), *clean]
    for _ in range(2):
        assert [a.ids for a in guessing.generate(asked)] == [a.ids for a in plain.generate(asked)]
    before = guessing.stats().right_guesses
    guessing.generate(clean)
    assert guessing.stats().right_guesses > before + 20  # the draft is the model itself but for one token


def test_a_server_answers_that_it_failed_and_a_conversation_that_nothing_was_said(lm):
    model = io.build("llama", lm.model.config, seed=0).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(float("nan"))

    async def served():
        worker = Worker(Engine(model, lm.tokenizer))
        worker.start()
        try:
            with pytest.raises(EngineFailedError, match="are not finite"):
                async for _ in await worker.submit([request("x", [3, 4, 5])]):
                    pass
        finally:
            worker.stop()
            await asyncio.to_thread(worker.join)

    asyncio.run(served())
    dialogue = Dialogue(Engine(model, lm.tokenizer), lm.tokenizer)
    with pytest.raises(NonFiniteError, match="are not finite"):
        list(dialogue.ask("hello"))
    assert dialogue.history == []
