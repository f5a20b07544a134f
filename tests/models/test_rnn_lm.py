"""The recurrent language model against torch.nn.LSTM, GRU and RNN; cached = uncached, packed = separate, files there and back."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from athanor.core.errors import CheckpointError, ConfigError
from athanor.core.io import read_json
from athanor.infer.rows import Rows
from athanor.models import io, rnn_lm
from athanor.nn.context import Causal, Packed, Padded
from athanor.nn.paged import Paged, PagedCache
from tests.models import test_parity
from tests.models.reference import files, greatest, packed, random_ids, separate

TINY = [name for name in rnn_lm.PRESETS if name.startswith("tiny")]
over_presets = pytest.mark.parametrize("preset", TINY)
CELLS = {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}


class Theirs(nn.Module):
    """The same network from PyTorch's parts alone."""

    def __init__(self, c):
        super().__init__()
        self.embedding = nn.Embedding(c.vocab_size, c.d_embedding)
        self.cells = CELLS[c.cell](c.d_embedding, c.d_hidden, c.n_layers, batch_first=True)
        self.projection = (
            nn.Linear(c.d_hidden, c.d_embedding, bias=False) if c.tied and c.d_embedding != c.d_hidden else nn.Identity()
        )
        self.out = nn.Linear(c.d_embedding if c.tied else c.d_hidden, c.vocab_size)
        if c.tied:
            self.out.weight = self.embedding.weight

    def forward(self, ids):
        return self.out(self.projection(self.cells(self.embedding(ids))[0]))


def pair(preset):
    """A random model of ours, and theirs with the same weights; the names of theirs by ours."""
    config = rnn_lm.PRESETS[preset]
    ours, theirs = io.build("rnn_lm", config, seed=0), Theirs(config)
    names = {"bias": "out.bias", "output.weight": "out.weight"}
    for name, _ in ours.named_parameters():
        if name.startswith("layers."):
            _, i, _, leaf = name.split(".")
            names[name] = f"cells.{leaf[:-1]}{i}"
    generator, state = torch.Generator().manual_seed(1), theirs.state_dict()
    with torch.no_grad():
        for name, p in ours.named_parameters():
            p.normal_(std=0.2, generator=generator)
            state[names.get(name, name)].copy_(p)
    theirs.load_state_dict(state)
    return ours.eval(), theirs, names


@over_presets
def test_logits_and_gradients_are_those_of_torch(preset):
    ours, theirs, names = pair(preset)
    ids, targets = (random_ids(ours.config, 3, 19, seed=seed) for seed in (1, 2))
    expected = theirs(ids)
    assert expected.std() > 0.05
    assert greatest(ours(ids).detach(), expected.detach()) <= 1e-5
    assert ours.n_parameters() == sum(p.numel() for p in theirs.parameters())
    for logits in (ours(ids), expected):
        F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").backward()
    yours = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        grad = yours[names.get(name, name)].grad
        assert greatest(p.grad, grad) <= 1e-4 * float(grad.abs().max()), name


@over_presets
def test_the_chunked_loss_is_that_of_the_logits(preset):
    ours, theirs, _ = pair(preset)
    ids, targets = (random_ids(ours.config, 3, 19, seed=seed) for seed in (1, 2))
    loss, _ = ours.cross_entropy(packed(ours, list(ids)), targets.flatten())
    expected = F.cross_entropy(theirs(ids).flatten(0, 1), targets.flatten(), reduction="sum")
    assert greatest(loss.detach(), expected.detach()) <= 1e-5 * float(expected.detach())


@over_presets
def test_packed_is_separate(preset):
    ours = pair(preset)[0]
    texts = [random_ids(ours.config, n, seed=n) for n in (7, 1, 12, 3, 12)]
    with torch.no_grad():
        assert greatest(packed(ours, texts), separate(ours, texts)) <= 1e-5
        changed = [texts[0], *(s.flip(0) for s in texts[1:])]
        assert torch.equal(packed(ours, texts)[:7], packed(ours, changed)[:7])
    grads = []
    for together in (packed, separate):
        ours.zero_grad()
        together(ours, texts).square().sum().backward()
        grads.append([p.grad.clone() for p in ours.parameters() if p.grad is not None])
    for a, b in zip(*grads, strict=True):
        assert greatest(a, b) <= 1e-4 * float(b.abs().max())


@over_presets
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side(preset, side):
    ours, theirs, _ = pair(preset)
    texts = [random_ids(ours.config, n, seed=n) for n in (9, 4, 13)]
    ids, mask = torch.zeros(3, 13, dtype=torch.int64), torch.zeros(3, 13, dtype=torch.bool)
    for row, text in enumerate(texts):
        at = slice(13 - len(text), 13) if side == "left" else slice(0, len(text))
        ids[row, at], mask[row, at] = text, True
    with torch.no_grad():
        found = ours.logits(ours.hidden(ids, Padded(mask, causal=True)))
        for row, text in enumerate(texts):
            assert greatest(found[row, mask[row]], theirs(text.unsqueeze(0))[0]) <= 1e-5


@over_presets
def test_cached_is_uncached(preset):
    ours, theirs, _ = pair(preset)
    texts = [random_ids(ours.config, n + 24, seed=n) for n in (9, 1, 17)]
    starts = [9, 1, 17]
    runner = Rows(ours)
    got = [runner.prefill([t[:n].tolist() for t, n in zip(texts, starts, strict=True)], 0)]
    for step in range(24):
        at = [n + step for n in starts]
        got.append(runner.decode([int(t[i]) for t, i in zip(texts, at, strict=True)], at))
    with torch.no_grad():
        for row, (text, n) in enumerate(zip(texts, starts, strict=True)):
            expected = theirs(text.unsqueeze(0))[0]
            for step, found in enumerate(got):
                assert greatest(found[row], expected[n + step - 1]) <= 1e-5


@over_presets
def test_greedy_generation_is_that_of_whole_forward_passes(preset):
    ours, theirs, _ = pair(preset)
    prompts = random_ids(ours.config, 3, 6)
    whole = prompts
    with torch.no_grad():
        for _ in range(32):
            whole = torch.cat((whole, theirs(whole)[:, -1].argmax(1, keepdim=True)), 1)
    runner = Rows(ours)
    tokens = [runner.prefill(prompts.tolist(), 0).argmax(1).tolist()]
    for step in range(31):
        tokens.append(runner.decode(tokens[-1], [6 + step] * 3).argmax(1).tolist())
    assert torch.tensor(tokens).T.tolist() == whole[:, 6:].tolist()


@pytest.mark.parametrize("preset", ["tiny", "tiny-gru", "tiny-rnn"])
def test_rows_that_move_take_their_states_along(preset):
    ours, theirs, _ = pair(preset)
    texts = random_ids(ours.config, 3, 8)
    runner = Rows(ours)
    runner.prefill([t.tolist() for t in texts], 0)
    runner.move([(2, 0)], 8)
    with torch.no_grad():
        found = runner.decode([5], [8])
        expected = theirs(torch.cat((texts[2], torch.tensor([5]))).unsqueeze(0))[:, -1]
    assert greatest(found, expected) <= 1e-5


@pytest.mark.parametrize("preset", ["tiny", "tiny-gru", "tiny-rnn"])
def test_a_text_read_in_pieces_is_the_text(preset):
    """Through the paged context: a state in a slot goes on where the last piece left it."""
    ours, theirs, _ = pair(preset)
    texts = [random_ids(ours.config, n, seed=n) for n in (11, 6)]
    cache = PagedCache(ours.cache_layers(), 4, 8, 3, torch.float32, torch.device("cpu"))
    slots, tables = torch.tensor([2, 0]), torch.tensor([[0, 1], [2, 3]])
    done = torch.tensor([0, 0])
    found = [[], []]
    with torch.no_grad():
        for sizes in ([4, 5], [6, 1], [1, 0]):
            going = [i for i in (0, 1) if sizes[i]]
            part = [texts[i][done[i] : done[i] + sizes[i]] for i in going]
            lengths = torch.tensor([len(p) for p in part])
            ctx = Paged(cache, tables[going], done[going], lengths, slots[going])
            hidden = ours.hidden(torch.cat(part).unsqueeze(0), ctx)[0].split(lengths.tolist())
            for i, h in zip(going, hidden, strict=True):
                found[i].append(ours.logits(h))
            done += torch.tensor(sizes)
        for text, pieces in zip(texts, found, strict=True):
            assert greatest(torch.cat(pieces), theirs(text.unsqueeze(0))[0]) <= 1e-5


@pytest.mark.parametrize("preset", ["tiny", "tiny-gru", "tiny-rnn"])
def test_it_generates_in_bfloat16(preset):
    ours, theirs, _ = pair(preset)
    texts = random_ids(ours.config, 2, 9)
    runner = Rows(ours, "bf16")
    got = [runner.prefill([t[:5].tolist() for t in texts], 0)]
    for at in range(5, 9):
        got.append(runner.decode(texts[:, at].tolist(), [at] * 2))
    with torch.no_grad():
        expected = theirs(texts)[:, 4:]
    assert greatest(torch.stack(got, 1), expected) <= 0.05 * float(expected.abs().max())


@over_presets
def test_files_there_and_back(preset, tmp_path):
    ours = pair(preset)[0]
    ids = random_ids(ours.config, 2, 9)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    io.save(ours, tmp_path / "a")
    again = io.load(tmp_path / "a")
    assert again.config == ours.config
    with torch.no_grad():
        assert torch.equal(again(ids), ours(ids))
    io.save(again, tmp_path / "b")
    a, b = files(tmp_path / "a"), files(tmp_path / "b")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert {"rnn.embedding.weight", "bias", "rnn.layers.1.weight_hh_l0"} <= a.keys()
    assert ("output.weight" in a) != ours.config.tied and ("projection.weight" in a) == ("projected" in preset)
    fields = read_json(tmp_path / "b" / "config.json")
    assert fields["model_type"] == "rnn_lm" and fields["architectures"] == ["RnnLM"]
    assert fields == read_json(tmp_path / "a" / "config.json")


def test_an_output_that_is_not_the_embedding_is_refused_where_they_are_tied(tmp_path):
    io.save(pair("tiny-untied")[0], tmp_path)
    fields = read_json(tmp_path / "config.json")
    io.io.write_json(tmp_path / "config.json", fields | {"tie_word_embeddings": True})
    with pytest.raises(CheckpointError, match=r"output\.weight differs from rnn\.embedding\.weight"):
        io.load(tmp_path)


@over_presets
def test_the_suite_of_all_architectures(preset, tmp_path):
    test_parity.test_initialise_is_a_function_of_the_seed_and_sets_every_weight(("rnn_lm", preset))
    test_parity.test_loading_neither_draws_random_numbers_nor_leaves_anything_without_a_device(("rnn_lm", preset), tmp_path)


def test_initialise_is_what_its_docstring_says():
    model = io.build("rnn_lm", replace(rnn_lm.PRESETS["tiny-projected"], vocab_size=2000), seed=0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            bound = 0.1 if name == "embedding.weight" else 32**-0.5
            if name == "bias":
                assert not p.any()
            elif "bias" not in name:
                assert 0.95 * bound < float(p.abs().max()) <= bound, name
        assert (model.layers[0].kernel.bias_ih_l0[32:64] == 1).all()


def test_published_shapes():
    """Zaremba et al. 2014 with the vocabulary of WikiText-2: 2 V H + V for words, 8 H (H + 1) for each layer."""
    for name, h in (("lstm-200", 200), ("lstm-650", 650)):
        model = io.build("rnn_lm", rnn_lm.PRESETS[name])
        assert model.n_parameters() == 2 * 33278 * h + 33278 + 2 * 8 * h * (h + 1)
    tied = io.build("rnn_lm", rnn_lm.PRESETS["lstm-650-tied"])
    assert tied.n_parameters() == 33278 * 651 + 2 * 8 * 650 * 651


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cell": "lstmm"}, r"cell \('lstmm'\) must be one of rnn, lstm, gru: lstm is usual"),
        ({"n_layers": 0}, r"n_layers \(0\) must be at least 1"),
        ({"d_embedding": -1}, r"d_embedding \(-1\) must be at least 1"),
    ],
)
def test_mistakes_in_a_config_are_named(change, message):
    with pytest.raises(ConfigError, match=message):
        replace(rnn_lm.PRESETS["tiny"], **change)


@pytest.mark.parametrize(("field", "value"), [("cell", 3), ("hidden_size", None), ("num_hidden_layers", "2")])
def test_fields_that_are_none_are_refused(field, value):
    with pytest.raises(CheckpointError, match=field):
        rnn_lm.Config.from_hf(rnn_lm.PRESETS["tiny"].to_hf() | {field: value})


def test_contexts_of_every_kind_read_the_same():
    ours = pair("tiny")[0]
    ids = random_ids(ours.config, 4, 6)
    with torch.no_grad():
        expected = ours.hidden(ids, Causal(4, 6))
        assert greatest(ours.hidden(ids.view(1, -1), Packed(torch.tensor([6] * 4))).view(4, 6, -1), expected) <= 1e-6
        assert greatest(ours.hidden(ids, Padded(torch.ones(4, 6), causal=True)), expected) <= 1e-6
