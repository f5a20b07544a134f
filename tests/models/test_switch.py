"""Switch Transformers: what experts have no room for, the losses of routers, and what files are refused; else test_parity.py."""

import inspect
import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from transformers import SwitchTransformersConfig

from athanor.core.errors import CheckpointError, ConfigError
from athanor.infer.rows import Rows
from athanor.models import io, switch
from athanor.nn import moe
from athanor.nn.context import Bidirectional, Causal, Memory, Packed, Padded, WithMemory
from tests.models.reference import (
    gradients_of_ours,
    gradients_of_theirs,
    greatest,
    inputs,
    logits,
    ours_of,
    packed,
    random_ids,
    separate,
    theirs_of,
)

TINY = switch.PRESETS["tiny"]
# Of 19 tokens for 4 experts, and of 13, some must be too many.
FULL = replace(TINY, capacity=3)


def mixtures(model):
    return moe.mixtures(model.encoder) + moe.mixtures(model.decoder)


def dropped(model):
    return int(moe.usage(model).dropped.sum())


def test_the_published_config_is_the_preset():
    published = {
        "add_router_probs": False, "architectures": ["SwitchTransformersForConditionalGeneration"], "d_ff": 3072, "d_kv": 64,
        "d_model": 768, "decoder_sparse_step": 2, "decoder_start_token_id": 0, "dense_act_fn": "relu", "dropout_rate": 0.1,
        "encoder_sparse_step": 2, "eos_token_id": 1, "expert_capacity": 64, "feed_forward_proj": "relu",
        "initializer_factor": 1.0, "is_encoder_decoder": True, "is_gated_act": False, "layer_norm_epsilon": 1e-06,
        "model_type": "switch_transformers", "n_positions": 512, "num_decoder_layers": 12, "num_experts": 8, "num_heads": 12,
        "num_layers": 12, "num_sparse_decoder_layers": 6, "num_sparse_encoder_layers": 6, "pad_token_id": 0,
        "relative_attention_max_distance": 128, "relative_attention_num_buckets": 32, "router_aux_loss_coef": 0.001,
        "router_bias": False, "router_dtype": "float32", "router_ignore_padding_tokens": False, "router_jitter_noise": 0.01,
        "router_type": "tokens_masked", "router_z_loss_coef": 0.001, "use_cache": True, "vocab_size": 32128,
    }  # fmt: skip
    assert switch.Config.from_hf(published) == switch.PRESETS["switch-base-8"]
    # The model cards say 0.62, 2.0 and 7.4 thousand million.
    sizes = [io.build("switch", switch.PRESETS[f"switch-base-{n}"]).n_parameters() for n in (8, 32, 128)]
    assert [round(n / 1e8) for n in sizes] == [6, 20, 74]


def test_fields_that_a_file_lacks_have_the_values_of_transformers():
    needed = ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads")
    fields = {name: switch.PRESETS["switch-base-8"].to_hf()[name] for name in needed}
    assert switch.Config.from_hf(fields) == switch.Config.from_hf(SwitchTransformersConfig(**fields).to_dict())


@pytest.mark.parametrize("layers", range(1, 9))
def test_layers_with_experts_are_those_of_transformers(layers):
    for sparse in range(1, layers + 1):
        config = replace(
            TINY, d_model=4, d_ff=4, n_layers=layers, n_decoder_layers=layers, n_sparse_layers=sparse,
            n_sparse_decoder_layers=layers + 1 - sparse,
        )  # fmt: skip
        model, theirs = switch.Model(config), theirs_of(config)
        for ours, yours in ((model.encoder, theirs.encoder), (model.decoder, theirs.decoder)):
            found = [isinstance(block.feed_forward, moe.MixtureOfExperts) for block in ours.blocks]
            assert found == [block.is_sparse for block in yours.block]


@pytest.mark.parametrize("capacity", [1, 3, 7])
def test_what_experts_have_no_room_for_is_dropped_as_in_transformers(capacity, tmp_path):
    config = replace(switch.PRESETS["tiny-all"], capacity=capacity, jitter=0.0)
    theirs = theirs_of(config)
    ours = ours_of(theirs, tmp_path / "model").train()
    given = inputs(config, ours.kind)
    targets = random_ids(config, 3, 13, seed=3).flatten()
    expected = theirs(**given).logits
    found = logits(ours, given)
    assert dropped(ours) > 0
    assert greatest(found.detach(), expected.detach()) <= 1e-5
    for x in (expected, found):
        F.cross_entropy(x.flatten(0, 1), targets, reduction="sum").backward()
    mine, yours = gradients_of_ours(ours), gradients_of_theirs(theirs, tmp_path / "gradients")
    assert mine.keys() == yours.keys()
    floor = 1e-3 * max(float(grad.abs().max()) for grad in yours.values())
    for name, grad in yours.items():
        assert greatest(mine[name], grad) <= 1e-4 * max(float(grad.abs().max()), floor), name


def test_no_sequence_takes_the_room_of_another(tmp_path):
    ours = ours_of(theirs_of(FULL), tmp_path).train()
    sources = [random_ids(FULL, n, seed=n) for n in (19, 1, 23, 7)]
    answers = [random_ids(FULL, n, seed=90 + n) for n in (2, 21, 13, 17)]
    for m in mixtures(ours):
        m.router.jitter = 0.0
    with torch.no_grad():
        found, together = packed(ours, sources, answers), dropped(ours)
        expected, alone = separate(ours, sources, answers), dropped(ours)
    assert greatest(found, expected) <= 1e-5
    assert together == alone > 0


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_takes_no_room(side, tmp_path):
    ours = ours_of(theirs_of(FULL), tmp_path)
    source, answer = random_ids(FULL, 1, 19), random_ids(FULL, 1, 13, seed=2)
    alone = ours.hidden(answer, WithMemory(Causal(1, 13), Memory(ours.encode(source, Bidirectional(1, 19)))))
    # In a batch with longer ones, whose padding would all be for one expert.
    place = slice(6, None) if side == "left" else slice(None, -6)
    ids, said = torch.zeros(2, 25, dtype=torch.int64), torch.zeros(2, 19, dtype=torch.int64)
    ids[0, place], said[0, place] = source[0], answer[0]
    ids[1], said[1] = random_ids(FULL, 25, seed=5), random_ids(FULL, 19, seed=6)
    mask, after = ids > 0, said > 0
    memory = Memory(ours.encode(ids, Padded(mask, causal=False)), mask=mask)
    found = ours.hidden(said, WithMemory(Padded(after, causal=True), memory))
    assert greatest(found[0, place], alone[0]) <= 1e-5


def test_owners_are_sequences_padding_is_nobodys_and_with_a_cache_every_token_is_alone():
    mask = torch.tensor([[0, 1, 1], [1, 1, 0], [0, 0, 1]])
    assert switch.owners(Padded(mask, causal=True), mask.shape).tolist() == [[3, 0, 0], [1, 1, 3], [3, 3, 2]]
    assert switch.owners(Packed(torch.tensor([2, 1, 3])), torch.Size((1, 6))).tolist() == [[0, 0, 1, 2, 2, 2]]
    assert switch.owners(Causal(2, 2), torch.Size((2, 2))).tolist() == [[0, 0], [1, 1]]
    ctx = Causal(2, 2)
    ctx.cached = True
    assert switch.owners(ctx, torch.Size((2, 2))).tolist() == [[0, 1], [2, 3]]


@torch.no_grad()
def test_generation_drops_in_the_encoder_alone_as_in_transformers(tmp_path):
    theirs = theirs_of(FULL)
    ours = ours_of(theirs, tmp_path)
    source, answer = random_ids(FULL, 2, 19), random_ids(FULL, 2, 13, seed=2)
    runner = Rows(ours)
    found = [runner.prefill([[int(a)] for a in answer[:, 0]], 0, source.tolist())]
    found += [runner.decode(answer[:, i].tolist(), [i, i]) for i in range(1, 13)]
    past, expected = None, []
    memory = theirs.encoder(source)
    name = "cache" if "cache" in inspect.signature(theirs.forward).parameters else "past_key_values"  # of newer transformers
    for i in range(13):
        out = theirs(encoder_outputs=memory, decoder_input_ids=answer[:, i : i + 1], use_cache=True, **{name: past})
        past = out.past_key_values
        expected.append(out.logits[:, -1])
    assert greatest(torch.stack(found), torch.stack(expected)) <= 1e-5
    # Here something would have been dropped in one pass.
    whole = logits(ours, {"input_ids": source, "decoder_input_ids": answer})
    assert greatest(torch.stack(found, 1), whole) > 1e-2
    # A prompt in one piece is the same prompt token by token.
    assert greatest(Rows(ours).prefill(answer.tolist(), 0, source.tolist()), found[-1]) <= 1e-5


def test_the_losses_of_routers_are_theirs_with_their_gradients(tmp_path):
    config = replace(TINY, z_loss=0.3, balance_loss=0.7, jitter=0.0)
    theirs = theirs_of(config)
    ours = ours_of(theirs, tmp_path)
    given = inputs(config, ours.kind, rows=1)  # transformers balances each row for itself, and the paper whole batches
    labels = random_ids(config, 1, 13, seed=3)
    said = theirs(**given, labels=labels, output_router_logits=True)
    expected = said.loss - F.cross_entropy(said.logits.flatten(0, 1), labels.flatten())
    logits(ours, given)
    found = ours.router_loss()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    encoder, decoder = moe.aux_losses(ours.encoder), moe.aux_losses(ours.decoder)
    torch.testing.assert_close(encoder["load_balance"], said.encoder_aux_loss)
    torch.testing.assert_close(decoder["router_z"], said.decoder_z_loss)
    expected.backward()
    found.backward()
    yours = [theirs.encoder.block[1].layer[1], theirs.decoder.block[1].layer[2]]
    for mine, block in zip(mixtures(ours), yours, strict=True):
        assert mine.router.weight.grad.abs().max() > 1e-3
        torch.testing.assert_close(mine.router.weight.grad, block.mlp.router.classifier.weight.grad, atol=1e-6, rtol=1e-4)


def test_before_a_forward_pass_there_is_no_loss_of_routers():
    with pytest.raises(ConfigError, match=r"^the router has not seen a token yet: ask for its losses after a forward pass$"):
        switch.Model(TINY).router_loss()


@torch.no_grad()
def test_training_jitters_and_evaluation_does_not():
    model = io.build("switch", replace(TINY, jitter=0.5), seed=0).train()
    given = inputs(TINY, model.kind)
    torch.manual_seed(0)
    assert greatest(logits(model, given), logits(model, given)) > 0
    model.eval()
    assert greatest(logits(model, given), logits(model, given)) == 0


def test_fresh_matrices_of_blocks_have_a_tenth_of_the_usual_variance():
    config = replace(TINY, d_model=256, d_ff=512, n_experts=8, router_bias=True)
    model = io.build("switch", config, seed=0)
    sparse = model.encoder.blocks[1].feed_forward
    for found, inputs_ in (
        (sparse.router.weight, 256), (sparse.experts.up.weight, 256), (sparse.experts.down.weight, 512),
        (model.encoder.blocks[0].feed_forward.down.weight, 512), (model.decoder.blocks[0].cross.kv.weight, 256),
    ):  # fmt: skip
        assert float(found.detach().std()) == pytest.approx((0.1 / inputs_) ** 0.5, rel=0.05)
    assert not sparse.router.bias.any()
    assert float(model.embedding.weight.detach().std()) == pytest.approx(1, rel=0.05)
    assert torch.equal(model.encoder.blocks[0].attention_norm.weight, torch.ones(256))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"feed_forward": "gated-gelu"}, "feed_forward ('gated-gelu') must be one of relu, gelu: experts have no gate"),
        ({"tied": False}, "tied (False) must be True: the files of Switch Transformers hold one embedding"),
        ({"n_experts": 0}, "n_experts (0) must be at least 1: 8 is usual"),
        ({"capacity": 0}, "capacity (0) must be at least 1: 64 is usual"),
        ({"n_sparse_layers": 0}, "n_sparse_layers (0) must be from 1 to n_layers (2): half of them is usual"),
        ({"n_sparse_decoder_layers": 3}, "n_sparse_decoder_layers (3) must be from 1 to n_decoder_layers (2): half of them is"),
        ({"jitter": 1.0}, "jitter (1.0) must lie in [0, 1): 0.01 is usual"),
        ({"jitter": -0.1}, "jitter (-0.1) must lie in [0, 1)"),
        ({"z_loss": -1.0}, "z_loss (-1.0) must not be negative: 0.001 is usual"),
        ({"balance_loss": float("nan")}, "balance_loss (nan) must not be negative: 0.001 is usual"),
        ({"d_ff": 0}, "d_ff (0) must be at least 1"),
    ],
)
def test_mistakes_in_a_config_are_named(change, message):
    with pytest.raises(ConfigError, match="^" + re.escape(message)):
        replace(TINY, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dense_act_fn": "gelu_new"}, "config.json: dense_act_fn is 'gelu_new', which is not supported for switch_transformers"),
        ({"router_dtype": "bfloat16"}, "config.json: router_dtype is 'bfloat16', which is not supported for switch_transformers"),
        ({"tie_word_embeddings": False}, "config.json: tie_word_embeddings is False, which is not supported for switch_tra"),
        (
            {"is_encoder_decoder": False},
            "config.json: is_encoder_decoder is False, which is not supported for switch_transformers",
        ),
        ({"num_hidden_layers": 1}, "config.json: num_hidden_layers is 1 and num_layers, which means the same in a switch_trans"),
        ({"router_bias": 1}, "config.json: router_bias is 1 and must be true or false: copy it again"),
        (
            {"encoder_sparse_step": 1},
            "config.json: encoder_sparse_step is 1, and by the numbers of its layers and its sparse layers the encoder has"
            " experts in every 2: copy it again",
        ),
        ({"decoder_sparse_step": 3}, "config.json: decoder_sparse_step is 3, and by the numbers of its layers and its sparse"),
    ],
)
def test_what_is_not_computed_is_refused(change, message):
    with pytest.raises(CheckpointError, match="^" + re.escape(message)):
        switch.Config.from_hf(TINY.to_hf() | change)
