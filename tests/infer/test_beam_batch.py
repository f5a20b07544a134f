"""Many prompts at once are answered as each would be alone."""

import pytest
import torch

from athanor.core.errors import ConfigError, RequestError
from athanor.infer.beam import Beams, beam_search
from athanor.infer.beam_batch import beam_search_batch
from athanor.models import transformer
from athanor.models.base import TokenIds
from tests.models.reference import config_of, ours_of, theirs_of


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """`models(family)`: a tiny random model, and prompts of many lengths for it."""

    def make(family):
        if family == "transformer":
            model = transformer.Model(transformer.PRESETS["tiny"])
            with torch.no_grad():
                for name, p in model.named_parameters():
                    p.normal_(float("norm.weight" in name), 0.2, generator=torch.Generator().manual_seed(len(name)))
            model.eval()
        else:
            model = ours_of(theirs_of(config_of((family, "tiny"))), tmp_path_factory.mktemp(family))
        model.token_ids = TokenIds(decoder_start=2)
        chance = torch.Generator().manual_seed(3)
        prompts = [torch.randint(3, 320, (n,), generator=chance).tolist() for n in (4, 9, 1, 6, 17, 9, 30)]
        return model, [*prompts, prompts[1]]

    return make


@pytest.mark.parametrize("family", ["transformer", "bart", "t5", "llama"])
@pytest.mark.parametrize(
    "how", [Beams(1, 12), Beams(4, 12), Beams(3, 12, 0.0, True), Beams(4, 12, 2.0), Beams(5, 12, 0.6, True)], ids=str
)
def test_as_alone(models, family, how):
    model, prompts = models(family)
    free = [beam_search(model, p, Beams(how.beams, 9), ()) for p in prompts[:6]]
    eos = sorted({answer.ids[i + 1] for i, answer in enumerate(free)})  # what the model comes to say
    alone = [beam_search(model, p, how, eos) for p in prompts]
    assert any(a.ids[-1] in eos for a in alone) or how.length_penalty > 1  # which favours the longest
    for at_once in (3, 64):
        together = beam_search_batch(model, prompts, how, eos, at_once=at_once)
        assert [a.ids for a in together] == [a.ids for a in alone]
        for ours, theirs in zip(together, alone, strict=True):
            assert ours.score == pytest.approx(theirs.score, abs=1e-4)
            assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)


def test_bfloat16_is_close_and_progress_is_told(models):
    model, prompts = models("transformer")
    told = []
    half = beam_search_batch(model, prompts, Beams(2, 3), (), at_once=4, precision="bf16", progress=told.append)
    whole = beam_search_batch(model, prompts, Beams(2, 3), ())
    assert told == [4, 8] and half != whole
    assert sum(a.ids == b.ids for a, b in zip(half, whole, strict=True)) > 3
    assert beam_search_batch(model, [], Beams(), ()) == []


def test_limits_are_those_of_each_prompt(models):
    model, prompts = models("transformer")
    limits = [3, 20, 1, 7, 5, 2, 4, 6][: len(prompts)]
    found = beam_search_batch(model, prompts, Beams(3, 8), (), limits=limits, at_once=3)
    alone = [beam_search(model, p, Beams(3, min(n, 8)), ()) for p, n in zip(prompts, limits, strict=True)]
    assert [a.ids for a in found] == [a.ids for a in alone]
    assert [len(a.ids) for a in found] == [min(n, 8) for n in limits]


def test_refused_as_alone(models):
    model, prompts = models("transformer")
    for how, wanted, message in (
        (Beams(400, 4), prompts, "beams .400. is too many for a vocabulary of 320"),
        (Beams(2, 4), [*prompts, []], "the prompt is empty: give at least one token"),
        (Beams(2, 4), [*prompts, [320]], "the prompt holds token ids outside"),
        (Beams(2, 128), prompts, "max_tokens is 128, and the context holds 128"),
    ):
        with pytest.raises(RequestError, match=message):
            beam_search_batch(model, wanted, how, ())
    model.token_ids = TokenIds()
    with pytest.raises(ConfigError, match="names no decoder_start_token_id"):
        beam_search_batch(model, prompts, Beams(2, 4), ())
