"""Recurrent layers: many sequences are each alone, and a state goes on where it was left."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from athanor.nn.recurrent import CELLS, Recurrent

over_cells = pytest.mark.parametrize("cell", CELLS)


def layer(cell, both_ways=False, seed=0):
    made = Recurrent(cell, 6, 5, both_ways)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in made.parameters():
            p.normal_(std=0.5, generator=generator)
    return made


def drawn(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def by_hand(made, x):
    """Outputs of one sequence (T, D) -> (T, H), by the formulas of the docstring, and the last state."""
    w, u, b, d = (getattr(made.kernel, name) for name in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"))
    h = c = torch.zeros(5)
    out = []
    for step in x:
        given, before = w @ step + b, u @ h + d
        if made.cell == "rnn":
            h = (given + before).tanh()
        elif made.cell == "lstm":
            i, f, g, o = (given + before).chunk(4)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        else:
            (r, z, n), (r2, z2, n2) = given.chunk(3), before.chunk(3)
            z = (z + z2).sigmoid()
            h = (1 - z) * (n + (r + r2).sigmoid() * n2).tanh() + z * h
        out.append(h)
    return torch.stack(out), torch.cat((h, c)) if made.cell == "lstm" else h


@over_cells
def test_it_computes_what_the_docstring_says(cell):
    made, x = layer(cell), drawn(7, 6)
    out, state = made(x.unsqueeze(0))
    expected, last = by_hand(made, x)
    torch.testing.assert_close(out[0], expected)
    torch.testing.assert_close(state[0], last)
    assert state.shape == (1, made.state_width)


@settings(max_examples=25)
@given(
    cell=st.sampled_from(CELLS),
    both_ways=st.booleans(),
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    more=st.integers(0, 3),
)
def test_together_is_alone(cell, both_ways, lengths, more):
    """Outputs, states and gradients, whatever stands after a sequence's end; backwards begins at its true end."""
    made = layer(cell, both_ways)
    x = drawn(len(lengths), max(lengths) + more, 6).requires_grad_()
    weights = drawn(len(lengths), max(lengths) + more, 10 if both_ways else 5, seed=2)
    out, states = made(x, torch.tensor(lengths))
    inside = torch.arange(x.shape[1]) < torch.tensor(lengths)[:, None]
    (out * weights)[inside].sum().backward()
    together, x.grad = x.grad, None
    for row, n in enumerate(lengths):
        alone, state = made(x[row : row + 1, :n])
        torch.testing.assert_close(out[row, :n], alone[0])
        torch.testing.assert_close(states[row], state[0])
        (alone[0] * weights[row, :n]).sum().backward()
    torch.testing.assert_close(together, x.grad)
    assert not together[~inside].any()


@over_cells
def test_a_state_goes_on_where_it_was_left(cell):
    made, x = layer(cell), drawn(3, 8, 6)
    whole, last = made(x)
    lengths = torch.tensor([3, 1, 5])
    first, state = made(x[:, :5], lengths)
    for row, n in enumerate(lengths.tolist()):
        rest, end = made(x[row : row + 1, n:], None, state[row : row + 1])
        torch.testing.assert_close(torch.cat((first[row, :n], rest[0])), whole[row])
        torch.testing.assert_close(end[0], last[row])
    again, _ = made(x[:, 5:], torch.tensor([3, 2, 1]), state)
    torch.testing.assert_close(again[0], made(x[:1, 5:], None, state[:1])[0][0])


def test_a_sequence_of_no_tokens_counts_as_one():
    made, x = layer("gru"), drawn(2, 4, 6)
    torch.testing.assert_close(made(x, torch.tensor([0, 4]))[1], made(x, torch.tensor([1, 4]))[1])


@over_cells
@torch.no_grad()
def test_initialise_is_what_its_docstring_says(cell):
    made = Recurrent(cell, 30, 64)
    made.initialise(torch.Generator().manual_seed(0))
    for name, p in made.kernel.named_parameters():
        if name.startswith("weight"):
            assert 0.95 * 64**-0.5 < float(p.max()) <= 64**-0.5 and -(64**-0.5) <= float(p.min()) < -0.95 * 64**-0.5
        else:
            forget = p[64:128] if cell == "lstm" and name == "bias_ih_l0" else p[:0]
            assert (forget == 1).all() and float(p.sum()) == len(forget)
