"""Where the sequences of a context are: the same tokens laid out in every way."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from athanor.nn import spans
from athanor.nn.context import Bidirectional, Causal, Memory, Packed, Padded, WithMemory


def layouts(lengths):
    """name -> (x (B, T, 2), context): token t of sequence s is (s, t), padding is -1."""
    tokens = [torch.stack((torch.full((n,), float(s)), torch.arange(n).float()), 1) for s, n in enumerate(lengths)]
    longest = max(lengths) + 2
    found = {"packed": (torch.cat(tokens).unsqueeze(0), Packed(torch.tensor(lengths), causal=False))}
    for side in ("left", "right", "both"):
        x, mask = torch.full((len(lengths), longest, 2), -1.0), torch.zeros(len(lengths), longest, dtype=torch.bool)
        for s, n in enumerate(lengths):
            at = {"left": longest - n, "right": 0, "both": (longest - n) // 2}[side]
            x[s, at : at + n], mask[s, at : at + n] = tokens[s], True
        found[side] = x, Padded(mask, causal=True)
    return found


@given(lengths=st.lists(st.integers(1, 6), min_size=1, max_size=5))
def test_every_layout_has_the_same_sequences(lengths):
    n = torch.tensor(lengths)
    order = torch.arange(len(lengths)).float()
    for name, (x, ctx) in layouts(lengths).items():
        assert torch.equal(spans.at(x, spans.first(ctx)), torch.stack((order, torch.zeros_like(order)), 1)), name
        assert torch.equal(spans.at(x, spans.last(ctx)), torch.stack((order, n - 1.0), 1)), name
        assert torch.equal(spans.mean(x, ctx), torch.stack((order, (n - 1) / 2), 1)), name
        rows, found = spans.rows_of(x, ctx)
        assert torch.equal(found, n) and rows.shape[1] == max(lengths)
        for s, length in enumerate(lengths):
            assert rows[s, :length].tolist() == [[s, t] for t in range(length)]
        memory = WithMemory(ctx, Memory(torch.zeros(len(lengths), 3, 2)))
        assert all(torch.equal(a, b) for a, b in zip(memory.spans(), ctx.spans(), strict=True))


def test_whole_rows_are_sequences():
    for ctx in (Causal(3, 5), Bidirectional(3, 5)):
        starts, lengths = ctx.spans()
        assert starts.tolist() == [0, 5, 10] and lengths.tolist() == [5, 5, 5]


def test_a_row_of_padding_counts_as_one_token():
    ctx = Padded(torch.tensor([[0, 0, 0], [0, 1, 1]]), causal=True)
    assert ctx.spans()[1].tolist() == [1, 2]
    assert spans.last(ctx).tolist() == [0, 5]


def test_means_have_the_gradients_of_their_tokens_alone():
    ctx = Padded(torch.tensor([[1, 1, 0], [0, 0, 1]]), causal=True)
    x = torch.randn(2, 3, 4, requires_grad=True)
    spans.mean(x, ctx).sum().backward()
    assert x.grad[:, :, 0].tolist() == [[0.5, 0.5, 0], [0, 0, 1]]
