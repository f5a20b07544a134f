"""Each law holds on a sound model and is broken by the fault that it is there for."""

import copy

import pytest
import torch

from athanor.align.rollouts import roll_out, to_batch
from athanor.data.pack import join, pack
from athanor.evals import laws
from athanor.infer import engine
from athanor.infer.blocks import Blocks
from athanor.infer.engine import Engine
from athanor.infer.sampling import truncate
from athanor.nn import context, paged
from athanor.nn.sdpa import attention
from athanor.types import Finding, Rollout, SamplingParams


@pytest.fixture(scope="module")
def model(tiny):
    return tiny()


@pytest.fixture(scope="module")
def batch(tokenizer):
    return join([pack([s]) for s in laws.sequences(tokenizer, 128, 320)])


def hold(findings):
    assert findings
    return [f.passed for f in findings]


def test_a_finding_holds_up_to_its_tolerance_and_not_beyond():
    assert Finding("L2", "x", 0.1, 0.1).passed
    assert Finding("L4", "x", 0.0).passed
    assert Finding("L4", "x", skipped="the model is quantised").passed
    for value in (0.2, float("nan"), float("inf"), None):
        assert not Finding("L2", "x", value, 0.1).passed


@pytest.mark.parametrize("limit", [2, 5, 40, 128])
def test_probes_are_ragged_short_enough_and_supervised(tokenizer, limit):
    probes = laws.sequences(tokenizer, limit, 320)
    assert all(2 <= len(p.ids) <= limit and len(p.ids) == len(p.loss_mask) and any(p.loss_mask) for p in probes)
    if limit > 5:
        assert len({len(p.ids) for p in probes}) >= 3


class TestOneRenderer:
    def test_it_holds(self, tokenizer):
        findings = laws.one_renderer(tokenizer)
        assert hold(findings) == [True, True]
        assert "rendered by transformers" in findings[0].compared

    def test_jinja_renders_where_transformers_is_not_installed(self, tokenizer, monkeypatch):
        monkeypatch.setattr(laws, "find_spec", lambda name: None)
        findings = laws.one_renderer(tokenizer)
        assert hold(findings) == [True, True]
        assert "rendered by jinja" in findings[0].compared

    @pytest.mark.parametrize("installed", [True, False])
    def test_a_second_beginning_of_text_is_seen(self, tokenizer, monkeypatch, installed):
        true_render = laws.render
        monkeypatch.setattr(laws, "find_spec", lambda name: installed or None)

        def twice(*args, **kwargs):
            rendered = true_render(*args, **kwargs)
            return type(rendered)([tokenizer.bos_id, *rendered.ids], [False, *rendered.loss_mask])

        monkeypatch.setattr(laws, "render", twice)
        findings = laws.one_renderer(tokenizer)
        assert hold(findings) == [False, False]
        assert findings[0].value == 2 * len(laws.CONVERSATIONS)

    def test_text_that_becomes_a_control_token_is_seen(self, tokenizer, monkeypatch):
        true_render = laws.render

        def careless(tokenizer, messages, **kwargs):
            rendered = true_render(tokenizer, messages, **kwargs)
            if "<|end|>" in messages[0]["content"]:
                rendered.ids.insert(2, tokenizer.end_id)
            return rendered

        monkeypatch.setattr(laws, "render", careless)
        assert hold(laws.one_renderer(tokenizer)) == [True, False]


class TestOneModel:
    def test_it_holds(self, model, tokenizer):
        assert hold(laws.one_model(model, tokenizer)) == [True, True, True]

    def test_a_decoding_that_sees_too_much_is_seen(self, model, tokenizer, monkeypatch):
        true_attention = paged.attend_rows

        def unmasked(query, key, value, mask, **kw):
            return true_attention(query, key, value, torch.zeros_like(mask), **kw)

        monkeypatch.setattr(paged, "attend_rows", unmasked)
        assert hold(laws.one_model(model, tokenizer))[0] is False

    def test_a_decoding_that_is_a_position_late_is_seen(self, model, tokenizer, monkeypatch):
        true_init = paged.Paged.__init__

        def late(self, *args):
            true_init(self, *args)
            if self._single:
                self.positions = self.positions + 1

        monkeypatch.setattr(paged.Paged, "__init__", late)
        finding = laws.one_model(model, tokenizer)[0]
        assert not finding.passed and finding.value > 10 * finding.tolerance

    def test_blocks_that_two_requests_write_are_seen(self, model, tokenizer, monkeypatch):
        monkeypatch.setattr(Blocks, "take", lambda self, count: [1] * count)
        monkeypatch.setattr(Blocks, "release", lambda self, table: None)
        monkeypatch.setattr(Blocks, "publish", lambda self, *args: None)
        assert hold(laws.one_model(model, tokenizer))[:2] == [False, False]

    def test_beginnings_of_other_texts_are_seen(self, model, tokenizer, monkeypatch):
        true_match = Blocks.match
        monkeypatch.setattr(Blocks, "match", lambda self, tokens: true_match(self, self.lie(tokens)))
        monkeypatch.setattr(
            Blocks, "lie", lambda self, tokens: [*next(iter(self._block), (0, ()))[1], *tokens][: len(tokens)], raising=False
        )
        assert hold(laws.one_model(model, tokenizer))[2] is False


class TestPackedIsSeparate:
    def test_it_holds(self, model, batch):
        assert laws.packed_is_separate(model, batch).passed

    def test_documents_that_see_each_other_are_seen(self, model, batch, monkeypatch):
        class Leaky(context.Packed):
            def attend(self, layer, query, key, value, scoring=None):
                return attention(query, key, value, causal=True)

        monkeypatch.setattr(laws, "Packed", Leaky)
        assert not laws.packed_is_separate(model, batch).passed


class TestRolloutIsTrainer:
    def rollouts(self, model, tokenizer):
        prompts = [s.ids for s in laws.sequences(tokenizer, 64, 320)]
        params = SamplingParams(temperature=0.7, top_p=0.9, max_tokens=12)
        groups = roll_out(Engine(model, tokenizer), prompts, 2, params, lambda i, c: Rollout(c, float(c.request_id[-1]), {}))
        return to_batch(groups, 0.7, "std", "x")[0]

    def test_it_holds(self, model, tokenizer):
        assert laws.rollout_is_trainer(model, self.rollouts(model, tokenizer)).passed

    def test_a_temperature_that_the_trainer_does_not_know_is_seen(self, model, tokenizer):
        batch = self.rollouts(model, tokenizer)
        batch.extras["temperature"].fill_(1.0)
        assert not laws.rollout_is_trainer(model, batch).passed

    def test_log_probabilities_of_the_truncated_distribution_are_seen(self, model, tokenizer, monkeypatch):
        true_sample = engine.sample

        def truncated(logits, rows):
            tokens, _ = true_sample(logits, rows)
            n = len(rows)
            kept = truncate(torch.log_softmax(logits / 0.7, -1), torch.full((n,), 0.9), torch.full((n,), logits.shape[1]))
            return tokens, torch.log_softmax(kept, -1).gather(1, tokens[:, None])[:, 0]

        monkeypatch.setattr(engine, "sample", truncated)
        assert not laws.rollout_is_trainer(model, self.rollouts(model, tokenizer)).passed

    def test_weights_that_have_moved_on_are_seen(self, model, tiny, tokenizer):
        batch = self.rollouts(model, tokenizer)
        assert not laws.rollout_is_trainer(tiny(seed=1), batch).passed


class TestSameLogits:
    def test_it_holds_bit_by_bit_and_within_rounding(self, model):
        assert laws.same_logits("x", model, copy.deepcopy(model), [1, 2, 3], exactly=True).passed
        near = laws.same_logits("x", model, lambda ids: model(ids) * (1 + 1e-6), [1, 2, 3], exactly=False)
        assert near.passed and near.value > 0

    def test_one_bit_and_more_than_rounding_are_seen(self, model):
        other = copy.deepcopy(model)
        with torch.no_grad():
            other.head.weight[7, 3] += 1e-6
        assert not laws.same_logits("x", model, other, [1, 2, 3], exactly=True).passed
        assert not laws.same_logits("x", model, lambda ids: model(ids) * 1.001, [1, 2, 3], exactly=False).passed

    def test_another_vocabulary_is_seen(self, model, tiny):
        finding = laws.same_logits("x", model, tiny(vocab_size=321), [1, 2, 3], exactly=False)
        assert not finding.passed and "(1, 3, 320) and (1, 3, 321)" in finding.compared
