"""Every architecture against transformers: the same numbers from the same files, in both directions.

A file added to `models/` (or to a plugin folder) with a preset whose name begins with "tiny" is tested here without more.
"""

import pytest
import torch
import torch.nn.functional as F
from transformers import GenerationConfig

from athanor.core import plugins
from athanor.core.io import read_json
from athanor.infer.rows import Rows
from athanor.models import io
from tests.models.reference import (
    OWN,
    answered,
    cases,
    config_of,
    files,
    gradients_of_ours,
    gradients_of_theirs,
    greatest,
    inputs,
    logits,
    mixture,
    ours_of,
    packed,
    random_ids,
    separate,
    theirs_of,
)

ALL = ("decoder", "encoder", "encoder_decoder")
GENERATING = ("decoder", "encoder_decoder")


def over(*kinds):
    return pytest.mark.parametrize("case", cases(*kinds), ids="-".join)


def test_every_architecture_is_here_or_has_its_own_test():
    assert {name for name, _ in cases(*ALL)} | OWN >= set(plugins.names("models"))


@over(*ALL)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_reading_their_folder_gives_their_logits(case, implementation, tmp_path):
    config = config_of(case)
    theirs = theirs_of(config, implementation)
    ours = ours_of(theirs, tmp_path)
    given = inputs(config, ours.kind)
    assert ours.config == config
    assert ours.n_parameters() == theirs.num_parameters()
    with torch.no_grad():
        expected = theirs(**given).logits
        assert expected.std() > 0.05  # so small a difference would mean nothing otherwise
        assert greatest(logits(ours, given), expected) <= 1e-5


@over(*ALL)
def test_loss_and_every_gradient_are_theirs(case, tmp_path):
    config = config_of(case)
    theirs = theirs_of(config)
    ours = ours_of(theirs, tmp_path / "model")
    given = inputs(config, ours.kind)
    targets = random_ids(config, *answered(given).shape, seed=3).flatten()
    expected = F.cross_entropy(theirs(**given).logits.flatten(0, 1), targets, reduction="sum")
    expected.backward()
    wanted = expected.detach()
    assert ours.kind == "encoder_decoder" or greatest(wanted, _chunked(ours, given, targets)) <= 1e-4 * float(wanted)
    loss = F.cross_entropy(logits(ours, given).flatten(0, 1), targets, reduction="sum")
    loss.backward()
    assert greatest(loss.detach(), wanted) <= 1e-4 * float(wanted)
    mine, yours = gradients_of_ours(ours), gradients_of_theirs(theirs, tmp_path / "gradients")
    assert mine.keys() == yours.keys()
    largest = max(float(grad.abs().max()) for grad in yours.values())
    floor = 1e-3 * largest  # a gradient that is small for no reason but rounding has no size of its own
    for name, grad in yours.items():
        if getattr(config, "absolute_positions", False) and name.endswith(("attention.self.key.bias", "attn.k_proj.bias")):
            # A softmax does not see what a bias of keys that nothing turns adds to all scores of a query: zero but for rounding.
            assert max(float(grad.abs().max()), float(mine[name].abs().max())) <= 1e-6 * largest, name
            continue
        assert greatest(mine[name], grad) <= 1e-4 * max(float(grad.abs().max()), floor), name


@torch.no_grad()
def _chunked(ours, given, targets):
    """The loss as training computes it, which never holds all logits."""
    ids = given["input_ids"]
    hidden = packed(ours, list(ids))
    return ours.cross_entropy(hidden, targets)[0]


@over(*ALL)
def test_they_read_our_folder_and_files_are_equal_in_keys_and_bits(case, tmp_path):
    config = config_of(case)
    theirs = theirs_of(config)
    ours = ours_of(theirs, tmp_path / "theirs")
    (tmp_path / "ours").mkdir()
    io.save(ours, tmp_path / "ours")
    a, b = files(tmp_path / "theirs"), files(tmp_path / "ours")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)
    attention = theirs.config._attn_implementation
    again, report = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True, attn_implementation=attention)
    assert not any(report.values()), report
    given = inputs(config, ours.kind)
    with torch.no_grad():
        assert greatest(again.eval()(**given).logits, logits(ours, given)) <= 1e-5


@over(*ALL)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side(case, side, tmp_path):
    config = config_of(case)
    theirs = theirs_of(config)
    ours = ours_of(theirs, tmp_path)
    given = inputs(config, ours.kind)
    masks = {}
    for ids, mask in (("input_ids", "attention_mask"), ("decoder_input_ids", "decoder_attention_mask")):
        if ids in given:
            time = given[ids].shape[1]
            masks[mask] = torch.ones(3, time, dtype=torch.int64)
            masks[mask][1, : 4 if side == "left" else 0] = 0
            masks[mask][2, time - 7 if side == "right" else time :] = 0
    extra = {}
    if ours.kind == "decoder":  # transformers counts padding unless told otherwise
        extra = {"position_ids": (masks["attention_mask"].cumsum(1) - 1).clamp(min=0)}
    seen = masks.get("decoder_attention_mask", masks["attention_mask"]).bool()
    if ours.kind != "decoder" and side == "left" and getattr(config, "absolute_positions", False):
        pytest.skip("transformers counts padding in the positions of this family: padding belongs to the right")
    with torch.no_grad():
        expected = theirs(**given, **masks, **extra).logits
        found = logits(ours, given, masks)
    assert greatest(found[seen], expected[seen]) <= 1e-5


@over(*ALL)
def test_packed_is_separate(case, tmp_path):
    config = config_of(case)
    ours = ours_of(theirs_of(config), tmp_path)
    sources = [random_ids(config, n, seed=n) for n in (7, 1, 12, 3, 12)]
    answers = [random_ids(config, n, seed=90 + n) for n in (2, 9, 1, 5, 4)]
    with torch.no_grad():
        assert greatest(packed(ours, sources, answers), separate(ours, sources, answers)) <= 1e-5
        changed = [sources[0], *(s.flip(0) for s in sources[1:])]
        cut = len(answers[0]) if ours.kind == "encoder_decoder" else len(sources[0])
        same, other = packed(ours, sources, answers)[:cut], packed(ours, changed, answers)[:cut]
        # How many tokens meet at an expert decides the order in which its products are summed.
        assert greatest(same, other) <= 1e-5 if mixture(ours) else torch.equal(same, other)


@over(*GENERATING)
def test_cached_is_uncached(case, tmp_path):
    """Law L2, over 24 tokens that are given: prompts of different lengths in one batch."""
    config = config_of(case)
    ours = ours_of(theirs_of(config), tmp_path)
    sources = [random_ids(config, n, seed=n) for n in (5, 11, 2)]
    answers = [random_ids(config, n + 24, seed=50 + n) for n in (9, 1, 17)]
    given = sources if ours.kind == "encoder_decoder" else None
    with torch.no_grad():
        expected = [ours.logits(h) for h in _alone(ours, sources, answers)]
    runner = Rows(ours)
    starts = [len(a) - 24 for a in answers]
    begun = [a[:n].tolist() for a, n in zip(answers, starts, strict=True)]
    got = [runner.prefill(begun, 0, given and [s.tolist() for s in given])]
    for step in range(24):
        at = [n + step for n in starts]
        got.append(runner.decode([int(a[i]) for a, i in zip(answers, at, strict=True)], at))
    for step, found in enumerate(got):
        for row, n in enumerate(starts):
            assert greatest(found[row], expected[row][n + step - 1]) <= 1e-5


def _alone(ours, sources, answers):
    if ours.kind == "encoder_decoder":
        return [separate(ours, [s], [a]) for s, a in zip(sources, answers, strict=True)]
    return [separate(ours, [a]) for a in answers]


@over(*GENERATING)
def test_greedy_generation_is_that_of_transformers(case, tmp_path):
    config = config_of(case)
    theirs = theirs_of(config)
    ours = ours_of(theirs, tmp_path)
    prompts = random_ids(config, 3, 6)
    theirs.generation_config = GenerationConfig(decoder_start_token_id=2)  # theirs would add ids that end or are forced
    settings = GenerationConfig(max_new_tokens=64, do_sample=False, pad_token_id=0, decoder_start_token_id=2)
    expected = theirs.generate(prompts, settings, attention_mask=torch.ones_like(prompts))
    expected = expected[:, 1 if ours.kind == "encoder_decoder" else 6 :]
    runner = Rows(ours)
    rows = prompts.tolist()
    starts = [[2]] * 3 if ours.kind == "encoder_decoder" else rows
    tokens = [runner.prefill(starts, 0, rows if ours.kind == "encoder_decoder" else None).argmax(1).tolist()]
    for step in range(63):
        tokens.append(runner.decode(tokens[-1], [len(starts[0]) + step] * 3).argmax(1).tolist())
    assert torch.tensor(tokens).T.tolist() == expected.tolist()


@over(*ALL)
def test_what_config_json_says_is_what_transformers_writes(case, tmp_path):
    config = config_of(case)
    theirs = theirs_of(config)
    ours = ours_of(theirs, tmp_path / "theirs")
    (tmp_path / "ours").mkdir()
    io.save(ours, tmp_path / "ours")
    fields, saved = (read_json(tmp_path / side / "config.json") for side in ("theirs", "ours"))
    shared = fields.keys() & saved.keys()
    assert {k: saved[k] for k in shared} == {k: fields[k] for k in shared}


@over(*ALL)
def test_bfloat16_files_are_read_and_written_as_they_are(case, tmp_path):
    config = config_of(case)
    theirs = theirs_of(config).to(torch.bfloat16)
    ours = ours_of(theirs, tmp_path / "theirs")
    (tmp_path / "ours").mkdir()
    io.save(ours, tmp_path / "ours")
    before, after = files(tmp_path / "theirs"), files(tmp_path / "ours")
    assert all(torch.equal(before[name], after[name]) and after[name].dtype == before[name].dtype for name in before)
    assert read_json(tmp_path / "ours" / "config.json")["dtype"] == "bfloat16"
    given = inputs(config, ours.kind)
    with torch.no_grad():
        exact = theirs.float()(**given).logits
        near = (logits(ours, given).float() - exact).abs().amax(-1) <= 0.05 * float(exact.abs().max())
        # A token that stands between two experts may be computed by the other one.
        assert near.float().mean() >= (0.9 if mixture(ours) else 1)


@over(*ALL, "tagger")
def test_initialise_is_a_function_of_the_seed_and_sets_every_weight(case):
    name, config = case[0], config_of(case)
    a, b, other = (io.build(name, config, seed=seed) for seed in (1, 1, 2))
    poisoned = plugins.load("models", name).Model(config)
    with torch.no_grad():
        for p in poisoned.parameters():
            p.fill_(torch.nan)
    poisoned.initialise(torch.Generator().manual_seed(1))
    for (key, p), q, r in zip(a.named_parameters(), b.parameters(), poisoned.parameters(), strict=True):
        assert torch.equal(p, q) and torch.equal(p, r), key
    assert any(not torch.equal(p, q) for p, q in zip(a.parameters(), other.parameters(), strict=True))


@over(*ALL, "tagger")
def test_loading_neither_draws_random_numbers_nor_leaves_anything_without_a_device(case, tmp_path):
    io.save(io.build(case[0], config_of(case), seed=0), tmp_path)
    state = torch.get_rng_state()
    model = io.load(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    assert {x.device.type for x in (*model.parameters(), *model.buffers())} == {"cpu"}
    assert not model.training
