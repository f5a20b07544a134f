"""DeepSeek-V3: the bias that balances, what a cache keeps, and the heads for the tokens after the next; else test_parity.py."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.modeling_layers import MtpModel

from athanor.compress.apply import compress
from athanor.core.errors import CheckpointError, ConfigError
from athanor.infer.rows import Rows
from athanor.models import deepseek_v3, io
from athanor.nn import moe
from athanor.nn.cache import Decode, KVCache, Prefill
from athanor.nn.context import Causal, Packed
from athanor.nn.norms import RMSNorm
from athanor.nn.rope import YarnRope
from tests.models.reference import greatest, ours_of, random_ids, theirs_of

TINY = deepseek_v3.PRESETS["tiny"]
AHEAD = replace(deepseek_v3.PRESETS["tiny-ahead"], n_ahead=2)


def random_model(config):
    model = io.build("deepseek_v3", config, seed=0)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(1.0 if "norm" in name else 0.0, 0.15)
    return model.eval()


def test_the_published_config_is_the_preset():
    published = {
        "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 0,
        "eos_token_id": 1, "ep_size": 1, "first_k_dense_replace": 3, "hidden_act": "silu", "hidden_size": 7168,
        "initializer_range": 0.02, "intermediate_size": 18432, "kv_lora_rank": 512, "max_position_embeddings": 163840,
        "model_type": "deepseek_v3", "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 256,
        "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 128, "num_experts_per_tok": 8,
        "num_hidden_layers": 61, "num_key_value_heads": 128, "num_nextn_predict_layers": 1, "q_lora_rank": 1536,
        "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06, "rope_theta": 10000,
        "rope_scaling": {
            "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096, "type": "yarn",
        },
        "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "tie_word_embeddings": False, "topk_group": 4,
        "topk_method": "noaux_tc", "torch_dtype": "bfloat16", "use_cache": True, "v_head_dim": 128, "vocab_size": 129280,
    }  # fmt: skip
    config = deepseek_v3.Config.from_hf(published)
    assert config == deepseek_v3.PRESETS["deepseek-v3"]
    model = io.build("deepseek_v3", config)
    # The report says 671B, and 14B more for the module that predicts ahead, embeddings and output that it shares among them.
    assert 671.0e9 < model.n_parameters() - sum(p.numel() for p in model.ahead.parameters()) < 671.1e9
    assert 11.4e9 < sum(p.numel() for p in model.ahead.parameters()) < 11.7e9
    assert config.sharpness == pytest.approx(1.8738, abs=1e-4)  # (0.1 log 40 + 1)^2


def test_a_bias_that_balances_moves_choices_as_in_transformers(tmp_path):
    theirs = theirs_of(TINY)
    gate = theirs.model.layers[1].mlp.gate
    gate.e_score_correction_bias.normal_(0, 0.3)
    ours = ours_of(theirs, tmp_path)
    assert torch.equal(ours.blocks[1].feed_forward.router.e_score_correction_bias, gate.e_score_correction_bias)
    ids = random_ids(TINY, 3, 19)
    with torch.no_grad():
        expected = theirs(ids).logits
        assert greatest(ours(ids), expected) <= 1e-5
        gate.e_score_correction_bias.zero_()
        assert greatest(theirs(ids).logits, expected) > 0.1


def test_balancing_a_model_evens_its_loads():
    model = random_model(TINY).train()
    ids = random_ids(TINY, 8, 64)
    spreads = []
    for _ in range(60):
        with torch.no_grad():
            model(ids)
        load = moe.balance(model, 0.003).load.float()
        spreads.append(float(load.std() / load.mean()))
    assert spreads[-1] < 0.5 * spreads[0]


def test_a_cache_keeps_the_latent_and_what_is_turned():
    model = random_model(TINY)
    assert model.cache_layers() == [(1, TINY.latent_rank + TINY.head_dim, 0)] * 2
    runner = Rows(model)
    runner.prefill([[5, 6, 7]], 0)
    numbers = sum(x.shape[1] * x.shape[3] for x in (*runner.cache.own.keys, *runner.cache.own.values) if x is not None)
    assert numbers == 2 * (16 + 8)


@torch.no_grad()
def test_compressed_weights_are_the_same_cached_and_not():
    model = compress(
        random_model(replace(TINY, d_model=64, latent_rank=32, query_rank=32, value_dim=16, d_ff=64, d_expert=32)), 8
    )
    ids = random_ids(TINY, 1, 12)
    expected = model(ids)[0]
    cache = KVCache(model.cache_layers(), torch.float32, model.device)
    cache.reserve(1, 12)
    first = model.logits(model.hidden(ids[:, :8], Prefill(cache, torch.tensor([0]), torch.tensor([8]))))[0]
    rest = [model.logits(model.hidden(ids[:, t : t + 1], Decode(cache, torch.tensor([t]))))[0] for t in range(8, 12)]
    assert greatest(torch.cat((first, *rest)), expected) <= 1e-5


@torch.no_grad()
def test_heads_for_the_tokens_after_the_next_are_those_of_transformers(tmp_path):
    theirs = theirs_of(AHEAD)
    theirs.save_pretrained(tmp_path)
    heads = MtpModel(theirs, 2).eval()
    torch.manual_seed(1)
    for name, p in heads.layers.named_parameters():
        p.normal_(1.0 if "norm" in name else 0.0, 0.15)
    ours = io.build("deepseek_v3", AHEAD, seed=0)
    file = load_file(tmp_path / "model.safetensors")
    for k, layer in enumerate(heads.layers):
        _write_head(file, layer, f"model.layers.{2 + k}.")
    ours.load_state_dict(ours.from_hf(file))
    ids = random_ids(AHEAD, 3, 19)
    ctx = Causal(*ids.shape)
    hidden = ours.hidden(ids, ctx)
    expected, state = [], theirs.model(ids).last_hidden_state
    for k in range(2):
        # Theirs reads what it knows, and forgets the rest; positions are those of the tokens that come in.
        state = heads.forward_layer(k, state[:, : 18 - k], torch.arange(1 + k, 19).expand(3, -1), None, input_ids=ids[:, 1 + k :])
        expected.append(state)
    for k, (found, want) in enumerate(zip(ours.mtp_hidden(ids, hidden, ctx), expected, strict=True), 1):
        assert want.std() > 0.05
        assert greatest(found[:, : 19 - k], want) <= 1e-5


def _write_head(file, layer, name):
    for part in ("enorm", "hnorm", "eh_proj"):
        file[f"{name}{part}.weight"] = getattr(layer, part).weight
    file[f"{name}shared_head.norm.weight"] = layer.post_norm.weight
    block = {k.removeprefix("mtp_block."): v for k, v in layer.state_dict().items() if k.startswith("mtp_block.")}
    for k, v in block.items():
        if k == "mlp.experts.gate_up_proj":
            for e, matrix in enumerate(v):
                file[f"{name}mlp.experts.{e}.gate_proj.weight"], file[f"{name}mlp.experts.{e}.up_proj.weight"] = matrix.chunk(2)
        elif k == "mlp.experts.down_proj":
            for e, matrix in enumerate(v):
                file[f"{name}mlp.experts.{e}.down_proj.weight"] = matrix
        else:
            file[name + k] = v


@torch.no_grad()
def test_heads_are_the_formula_of_the_report():
    model = random_model(AHEAD)
    ids = random_ids(AHEAD, 1, 9)
    ctx = Causal(1, 9)
    h = model.hidden(ids, ctx)
    found = model.mtp_hidden(ids, h, ctx)

    def norm(x, weight):
        return x / (x.square().mean(-1, keepdim=True) + AHEAD.norm_eps).sqrt() * weight

    for k, head in enumerate(model.ahead, 1):
        n = 9 - k
        both = (norm(model.embedding.weight[ids[:, k:]], head.token_norm.weight), norm(h[:, :n], head.hidden_norm.weight))
        x = torch.cat(both, -1) @ head.project.weight.T
        short = Causal(1, n)
        x = head.block(x, short, 0, model.rotary.at(short.positions, n))
        h = norm(x, head.norm.weight)
        assert greatest(found[k - 1][:, :n], h) <= 1e-5


@torch.no_grad()
def test_heads_see_neither_what_is_to_come_nor_other_sequences():
    model = random_model(AHEAD)
    a, b = random_ids(AHEAD, 1, 9, seed=1), random_ids(AHEAD, 1, 6, seed=2)
    ctx = Packed(torch.tensor([9, 6]))
    both = torch.cat((a, b), 1)
    packed = model.mtp_hidden(both, model.hidden(both, ctx), ctx)
    changed = a.clone()
    changed[0, 6] = (changed[0, 6] + 1) % 320
    for k in (1, 2):
        for ids, part in ((a, packed[k - 1][:, :9]), (b, packed[k - 1][:, 9:])):
            ctx = Causal(*ids.shape)
            alone = model.mtp_hidden(ids, model.hidden(ids, ctx), ctx)[k - 1]
            assert greatest(part[:, :-k], alone[:, :-k]) <= 1e-5
        ctx = Causal(1, 9)
        other = model.mtp_hidden(changed, model.hidden(changed, ctx), ctx)[k - 1]
        assert greatest(other[:, : 6 - k], packed[k - 1][:, : 6 - k]) <= 1e-5
        assert greatest(other[:, 6 - k], packed[k - 1][:, 6 - k]) > 1e-3


def test_heads_learn_and_so_does_what_they_read():
    model = random_model(AHEAD).train()
    ids = random_ids(AHEAD, 2, 9)
    ctx = Causal(2, 9)
    for k, h in enumerate(model.mtp_hidden(ids, model.hidden(ids, ctx), ctx), 1):
        loss, _ = model.cross_entropy(h[:, : -k - 1].flatten(0, 1), ids[:, k + 1 :].flatten())
        loss.backward(retain_graph=True)
    for part in (model.embedding.weight, model.head.weight, model.blocks[0].attention.latent.weight):
        assert part.grad.abs().sum() > 0
    for name, p in model.ahead.named_parameters():
        assert p.grad.abs().sum() > 0, name


def test_heads_are_saved_and_read_by_the_names_of_published_files(tmp_path):
    model = random_model(AHEAD)
    io.save(model, tmp_path)
    path = tmp_path / "model.safetensors"
    file = load_file(path)
    for name in (
        "enorm", "hnorm", "eh_proj", "shared_head.norm", "shared_head.head", "embed_tokens", "input_layernorm",
        "self_attn.kv_a_proj_with_mqa", "mlp.gate", "mlp.experts.7.up_proj", "mlp.shared_experts.down_proj",
    ):  # fmt: skip
        assert f"model.layers.3.{name}.weight" in file
    assert torch.equal(file["model.layers.2.embed_tokens.weight"], file["model.embed_tokens.weight"])
    assert torch.equal(file["model.layers.2.shared_head.head.weight"], file["lm_head.weight"])
    again = io.load(tmp_path)
    for (name, p), q in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(p, q), name
    # Shared tensors may be there once only, and must not differ.
    twin = "model.layers.3.embed_tokens.weight"
    save_file({k: v for k, v in file.items() if k != twin}, path)
    assert io.load(tmp_path).ahead is not None
    save_file(file | {twin: file[twin] + 1}, path)
    with pytest.raises(CheckpointError, match=r"layers.3.embed_tokens.weight differs from model.embed_tokens.weight"):
        io.load(tmp_path)
    save_file({k: v for k, v in file.items() if "layers.3.eh_proj" not in k}, path)
    with pytest.raises(CheckpointError, match=r"missing: model.layers.3.eh_proj.weight"):
        io.load(tmp_path)


def test_a_file_without_heads_has_none_and_says_so(tmp_path):
    ours = ours_of(theirs_of(AHEAD), tmp_path)
    ids, ctx = random_ids(AHEAD, 1, 4), Causal(1, 4)
    hidden = ours.hidden(ids, ctx)
    with pytest.raises(
        ConfigError, match=r"no heads for the tokens after the next: .* load a checkpoint that holds model.layers.2"
    ):
        ours.mtp_hidden(ids, hidden, ctx)
    model = random_model(AHEAD)
    cache = KVCache(model.cache_layers(), torch.float32, model.device)
    cache.reserve(1, 4)
    with pytest.raises(ConfigError, match="read whole sequences: use a context without a cache"):
        model.mtp_hidden(ids, hidden, Prefill(cache, torch.tensor([0]), torch.tensor([4])))


def test_norms_of_latents_have_an_epsilon_of_their_own():
    model = random_model(replace(TINY, norm_eps=1e-3))
    eps = {name: m.eps for name, m in model.named_modules() if isinstance(m, RMSNorm)}
    assert eps["blocks.0.attention.latent_norm"] == eps["blocks.0.attention.query_norm"] == 1e-6
    assert eps["blocks.0.attention_norm"] == 1e-3


def test_scores_are_sharpened_by_yarn_where_the_config_says_so():
    def sharpness(by):
        return replace(TINY, rope_scaling=by).sharpness

    assert sharpness(None) == sharpness(YarnRope(4.0, 32)) == 1.0
    assert sharpness(YarnRope(4.0, 32, mscale=1.0, mscale_all_dim=1.0)) == pytest.approx(1.2965, abs=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"n_kv_heads": 2},
            r"n_kv_heads \(2\) must be n_heads \(4\), since a latent gives every head its own keys: leave it out",
        ),
        ({"latent_rank": 0}, r"latent_rank \(0\) must be at least 1"),
        ({"query_rank": 0}, r"query_rank \(0\) must be at least 1, or None for queries straight from the input"),
        ({"n_ahead": -1}, r"n_ahead \(-1\) must be at least 0"),
        ({"top_k": 9}, r"top_k \(9\) must be from 1 to n_experts \(8\)"),
        ({"n_groups": 3}, r"n_groups \(3\) must split n_experts \(8\)"),
        ({"top_groups": 1}, r"top_groups \(1\) must be at most n_groups \(4\)"),
    ],
)
def test_mistakes_in_a_config_are_named(change, message):
    with pytest.raises(ConfigError, match=message):
        replace(TINY, **change)


@pytest.mark.parametrize("field", ["rope_interleave", "norm_topk_prob"])
def test_null_is_not_true(field):
    with pytest.raises(CheckpointError, match=f"{field} is None and must be true or false: write which, or leave it out"):
        deepseek_v3.Config.from_hf(TINY.to_hf() | {field: None})


def test_the_number_of_experts_has_two_names():
    fields = TINY.to_hf()
    with pytest.raises(
        CheckpointError, match="num_local_experts is 4 and n_routed_experts, which means the same in a deepseek_v3"
    ):
        deepseek_v3.Config.from_hf(fields | {"num_local_experts": 4})
    fields["num_local_experts"] = fields.pop("n_routed_experts")
    assert deepseek_v3.Config.from_hf(fields) == TINY


@pytest.mark.parametrize("field", ["hidden_act", "scoring_func", "topk_method"])
def test_what_is_not_computed_is_refused(field):
    with pytest.raises(CheckpointError, match=f"{field} is 'greedy', which is not supported for deepseek_v3"):
        deepseek_v3.Config.from_hf(TINY.to_hf() | {field: "greedy"})
