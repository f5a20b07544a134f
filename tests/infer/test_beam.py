"""Beam search against transformers' and against trying everything."""

import itertools
import re

import pytest
import torch
from transformers import GenerationConfig

from athanor.core.errors import ConfigError, NonFiniteError, RequestError
from athanor.infer.beam import Beams, beam_search
from athanor.infer.beam_batch import beam_search_batch
from athanor.infer.engine import Engine
from athanor.models import io
from athanor.tokenizer.foreign import ForeignTokenizer
from athanor.types import Request, SamplingParams
from tests.models.reference import config_of, ours_of, random_ids, theirs_of
from tests.tokenizer.test_foreign import word_pieces

FAMILIES = [
    ("t5", "tiny"),
    ("t5", "tiny-gated"),
    ("bart", "tiny"),
    ("bart", "tiny-uneven"),
    ("pegasus", "tiny"),
    ("llama", "tiny"),
]


@pytest.mark.parametrize("early_stopping", [False, True])
@pytest.mark.parametrize("length_penalty", [1.0, 0.0, 2.0])
@pytest.mark.parametrize("case", FAMILIES, ids="-".join)
def test_the_answers_of_transformers(case, length_penalty, early_stopping, tmp_path):
    config = config_of(case)
    theirs = theirs_of(config)
    ours = ours_of(theirs, tmp_path)
    prompts = random_ids(config, 6, 6)
    decoder = ours.kind == "decoder"
    start = {} if decoder else {"decoder_start_token_id": 2}
    theirs.generation_config = GenerationConfig(**start)
    object.__setattr__(ours, "token_ids", type(ours.token_ids)(decoder_start=2))
    greedy = theirs.generate(prompts, GenerationConfig(max_new_tokens=6, do_sample=False, pad_token_id=0, **start))
    eos = sorted(set(greedy[:, -1].tolist()))  # what the models themselves come to say, so that answers end
    settings = GenerationConfig(
        max_new_tokens=24, num_beams=4, do_sample=False, eos_token_id=eos, pad_token_id=0, length_penalty=length_penalty,
        early_stopping=early_stopping, return_dict_in_generate=True, output_scores=True, **start,
    )  # fmt: skip
    ends = []
    for prompt in prompts:
        expected = theirs.generate(prompt[None], settings, attention_mask=torch.ones(1, 6, dtype=torch.int64))
        how = Beams(4, 24, length_penalty, early_stopping)
        found = beam_search(ours, prompt.tolist(), how, eos)
        assert list(found.ids) == expected.sequences[0, 6 if decoder else 1 :].tolist()
        assert found.score == pytest.approx(float(expected.sequences_scores[0]), abs=1e-4)
        ends.append(len(found.ids))
    assert min(ends) < 24 or (length_penalty > 1 and not early_stopping)  # which favours the longest


@pytest.mark.parametrize("beams", [1, 4])
def test_a_first_token_that_is_forced(beams, tmp_path):
    """As in the files of BART: it follows the start, and is no part of what we call the answer."""
    theirs = theirs_of(config_of(("bart", "tiny")))
    theirs.config.decoder_start_token_id = 2
    theirs.generation_config = GenerationConfig(forced_bos_token_id=9, decoder_start_token_id=2)
    theirs.save_pretrained(tmp_path / "m")
    model = io.load(tmp_path / "m")
    assert model.token_ids.start == (2, 9)
    prompt = random_ids(model.config, 7)
    settings = GenerationConfig(
        max_new_tokens=12, num_beams=beams, do_sample=False, pad_token_id=0, decoder_start_token_id=2, forced_bos_token_id=9
    )  # fmt: skip
    expected = theirs.generate(prompt[None], settings, attention_mask=torch.ones(1, 7, dtype=torch.int64))[0].tolist()
    assert expected[:2] == [2, 9]
    assert list(beam_search(model, prompt.tolist(), Beams(beams, 11), ()).ids) == expected[2:]
    if beams == 1:
        word_pieces(tmp_path / "m")
        answer = Engine(model, ForeignTokenizer.load(tmp_path / "m")).generate(
            [Request("0", prompt.tolist(), SamplingParams(temperature=0, max_tokens=11))]
        )
        assert list(answer[0].ids) == expected[2:]
    (tmp_path / "again").mkdir()
    io.save(model, tmp_path / "again")
    assert io.load(tmp_path / "again").token_ids == model.token_ids
    again = type(theirs).from_pretrained(tmp_path / "again")
    assert again.generation_config.forced_bos_token_id == 9


def test_with_every_answer_followed_it_is_the_most_probable_of_all(tiny):
    model = tiny(vocab_size=24)
    prompt, steps = [5, 6, 7], 3
    found = beam_search(model, prompt, Beams(12, steps, 0.0), ())
    every = torch.tensor([[*prompt, *answer] for answer in itertools.product(range(24), repeat=steps)])
    with torch.no_grad():
        logprobs = torch.log_softmax(model(every[:, :-1])[:, 2:], -1).gather(2, every[:, 3:, None])[..., 0].sum(1)
    assert found.ids == tuple(every[logprobs.argmax(), 3:].tolist())
    assert found.total == pytest.approx(float(logprobs.max()), abs=1e-5)


def test_one_beam_is_greedy(lm):
    greedy = lm.complete("The heat", temperature=0, max_tokens=9)
    assert lm.complete("The heat", beams=1, max_tokens=9).ids == greedy.ids
    assert lm.generate("The heat", beams=1, max_tokens=9) == greedy.text


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        ({"beams": 0}, RequestError, "beams (0) must be a whole number of at least 1"),
        ({"beams": 4, "max_tokens": 0}, RequestError, "max_tokens (0) must be a whole number"),
        (
            {"beams": 4, "max_tokens": 128},
            RequestError,
            "the prompt has 2 tokens and max_tokens is 128, and the context holds 128",
        ),
        ({"beams": 400, "max_tokens": 4}, RequestError, "beams (400) is too many for a vocabulary of 320: use fewer"),
        ({"beams": 4, "temperature": 1.0}, ConfigError, "parameter 'temperature' does not go with beams; there are beams"),
    ],
)
def test_refused(lm, params, error, message):
    with pytest.raises(error, match=re.escape(message)):
        lm.generate("he", **params)


def test_prompts_that_are_none(tiny):
    with pytest.raises(RequestError, match="the prompt is empty"):
        beam_search(tiny(), [], Beams(), ())
    with pytest.raises(RequestError, match=r"token ids outside \[0, 320\)"):
        beam_search(tiny(), [320], Beams(), ())


def test_an_answer_that_nothing_begins(tmp_path):
    config = config_of(("bart", "tiny"))
    ours = ours_of(theirs_of(config), tmp_path)
    object.__setattr__(ours, "token_ids", type(ours.token_ids)())
    with pytest.raises(ConfigError, match="names no decoder_start_token_id"):
        beam_search(ours, [4], Beams(), ())


def test_a_model_that_is_broken_has_no_most_probable_answer(tiny):
    model = tiny()
    with torch.no_grad():
        model.blocks[0].feed_forward.down.weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="the model's logits are not finite: its weights are damaged or have diverged"):
        beam_search(model, [4, 5], Beams(beams=2, max_tokens=3), ())
    with pytest.raises(NonFiniteError, match="logits are not finite"):
        beam_search_batch(model, [[4, 5]], Beams(beams=2, max_tokens=3), ())
