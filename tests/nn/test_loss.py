"""Losses over a vocabulary against PyTorch's own."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from athanor.nn import loss as losses
from athanor.nn.loss import linear_cross_entropy, token_logprobs

VOCAB, DIM = 50, 12


class Products(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten.mm.default
        return function(*args, **(kwargs or {}))


def data(n, scale=1.0):
    generator = torch.Generator().manual_seed(n)
    hidden = (torch.randn(n, DIM, generator=generator) * scale).requires_grad_()
    weight = torch.randn(VOCAB, DIM, generator=generator).requires_grad_()
    return hidden, weight, torch.randint(0, VOCAB, (n,), generator=generator)


@pytest.fixture(params=[8, 1 << 20], ids=["chunks", "one chunk"])
def chunks(request, monkeypatch):
    monkeypatch.setattr(losses, "_chunk_rows", lambda vocab: request.param)


def test_a_chunk_of_logits_has_a_bounded_size():
    assert losses._chunk_rows(2048) * 2048 == losses._CHUNK_ELEMENTS
    assert losses._chunk_rows(10**9) == losses._LEVEL  # below that a product is not worth its call


@pytest.mark.parametrize("n", [1, 7, 8, 9, 16, 23])
@pytest.mark.parametrize("scale", [1.0, 50.0])
def test_cross_entropy_value_and_gradients(chunks, n, scale):
    hidden, weight, targets = data(n, scale)
    total, correct = linear_cross_entropy(hidden, weight, targets)
    (total / n * 3).backward()
    mine = hidden.grad, weight.grad
    hidden.grad = weight.grad = None
    logits = hidden @ weight.T
    expected = F.cross_entropy(logits, targets, reduction="sum")
    (expected / n * 3).backward()
    torch.testing.assert_close(total.detach(), expected.detach(), rtol=1e-6, atol=1e-4)
    assert int(correct) == int((logits.argmax(1) == targets).sum())
    for ours, theirs in zip(mine, (hidden.grad, weight.grad), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))


def test_cross_entropy_of_nothing_is_zero(chunks):
    total, correct = linear_cross_entropy(torch.zeros(0, DIM), torch.zeros(VOCAB, DIM), torch.zeros(0, dtype=torch.int64))
    assert (float(total), int(correct)) == (0.0, 0)


def test_many_targets_lose_no_digits():
    """A float32 running sum of 200,000 losses would be off in the sixth digit."""
    n = 200_000
    hidden = torch.randn(n, 2, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(4, 2, generator=torch.Generator().manual_seed(1))
    targets = torch.arange(n) % 4
    total, _ = linear_cross_entropy(hidden, weight, targets)
    exact = F.cross_entropy(hidden.double() @ weight.double().T, targets, reduction="sum")
    assert float(total) == pytest.approx(float(exact), rel=1e-7)


def test_only_the_gradients_that_are_needed_are_formed(chunks):
    """Three products a chunk for both gradients, two for one, and one where nothing is differentiated."""
    hidden, weight, targets = data(8)
    for context, h, w, products in (
        (torch.enable_grad(), hidden, weight, 3),
        (torch.enable_grad(), hidden, weight.detach(), 2),
        (torch.enable_grad(), hidden.detach(), weight, 2),
        (torch.no_grad(), hidden, weight, 1),
        (torch.inference_mode(), hidden, weight, 1),
    ):
        with context, Products() as seen:
            linear_cross_entropy(h, w, targets)
        assert seen.count == products
    total, _ = linear_cross_entropy(hidden, weight.detach(), targets)
    total.backward()
    (expected,) = torch.autograd.grad(F.cross_entropy(hidden @ weight.detach().T, targets, reduction="sum"), hidden)
    torch.testing.assert_close(hidden.grad, expected)


def test_chunks_of_a_span_share_the_product_of_the_weights_gradient(monkeypatch):
    monkeypatch.setattr(losses, "_chunk_rows", lambda vocab: 8)
    with Products() as seen:
        linear_cross_entropy(*data(5 * 8))
    assert seen.count == 2 * 5 + 2  # five chunks, of which the first four are a span


@pytest.mark.parametrize("n", [40, 300, 1030, 2500])  # of chunks of 256 and spans of 1024
def test_cross_entropy_under_autocast_is_close_and_keeps_the_weights_dtype(n, monkeypatch):
    monkeypatch.setattr(losses, "_chunk_rows", lambda vocab: losses._LEVEL)
    hidden, weight, targets = data(n)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total, _ = linear_cross_entropy(hidden, weight, targets)
    total.backward()
    assert total.dtype == hidden.grad.dtype == weight.grad.dtype == torch.float32
    expected = F.cross_entropy(hidden @ weight.T, targets, reduction="sum")
    assert total.item() == pytest.approx(expected.item(), rel=0.01)
    for ours, theirs in zip((hidden.grad, weight.grad), torch.autograd.grad(expected, (hidden, weight)), strict=True):
        assert (ours - theirs).norm() <= 0.02 * theirs.norm()


@pytest.mark.parametrize("n", [1, 8, 21])
def test_token_logprobs_values_gradients_and_entropy(chunks, n):
    hidden, weight, targets = data(n)
    generator = torch.Generator().manual_seed(99)
    temperature = 0.3 + torch.rand(n, generator=generator)
    upstream = torch.randn(n, generator=generator)
    logprobs, entropy = token_logprobs(hidden, weight, targets, temperature)
    (logprobs * upstream).sum().backward()
    mine = hidden.grad, weight.grad
    hidden.grad = weight.grad = None
    distribution = torch.distributions.Categorical(logits=hidden @ weight.T / temperature[:, None])
    expected = distribution.log_prob(targets)
    (expected * upstream).sum().backward()
    torch.testing.assert_close(logprobs, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy, distribution.entropy().detach(), rtol=1e-5, atol=1e-5)
    assert not entropy.requires_grad
    for ours, theirs in zip(mine, (hidden.grad, weight.grad), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))


def test_token_logprobs_by_finite_differences(chunks):
    """The gradient against the function's own values: float32 differences along random directions."""
    hidden, weight, targets = data(9)
    temperature = torch.full((9,), 0.7)

    def value(h, w):
        return token_logprobs(h, w, targets, temperature)[0].double().sum()

    d_hidden, d_weight = torch.autograd.grad(value(hidden, weight), (hidden, weight))
    generator = torch.Generator().manual_seed(3)
    for _ in range(5):
        u, v = torch.randn(9, DIM, generator=generator), torch.randn(VOCAB, DIM, generator=generator)
        step = 1e-2
        with torch.no_grad():
            difference = (value(hidden + step * u, weight + step * v) - value(hidden - step * u, weight - step * v)) / (2 * step)
        assert float(difference) == pytest.approx(float((d_hidden * u).sum() + (d_weight * v).sum()), rel=5e-3, abs=5e-2)


def test_token_logprobs_at_temperature_1_are_the_cross_entropy():
    hidden, weight, targets = data(30)
    logprobs, _ = token_logprobs(hidden, weight, targets, torch.ones(30))
    total, _ = linear_cross_entropy(hidden, weight, targets)
    assert -logprobs.sum().item() == pytest.approx(total.item(), rel=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_bias_cap_and_smoothed_targets_are_pytorchs(chunks, smoothing, softcap):
    hidden, weight, targets = data(23)
    bias = torch.randn(VOCAB, generator=torch.Generator().manual_seed(1)).requires_grad_()
    total, correct = linear_cross_entropy(hidden, weight, targets, bias, softcap, smoothing)
    total.backward()
    mine = [hidden.grad, weight.grad, bias.grad]
    for tensor in (hidden, weight, bias):
        tensor.grad = None
    logits = hidden @ weight.t() + bias
    logits = logits if softcap is None else torch.tanh(logits / softcap) * softcap
    expected = F.cross_entropy(logits, targets, label_smoothing=smoothing, reduction="sum")
    expected.backward()
    assert torch.allclose(total, expected, rtol=1e-5)
    assert int(correct) == int((logits.argmax(1) == targets).sum())
    for grad, tensor in zip(mine, (hidden, weight, bias), strict=True):
        assert torch.allclose(grad, tensor.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_token_logprobs_with_bias_and_cap(chunks, biased, softcap):
    hidden, weight, targets = data(23)
    generator = torch.Generator().manual_seed(2)
    bias = torch.randn(VOCAB, generator=generator).requires_grad_() if biased else None
    temperature, upstream = 0.3 + torch.rand(23, generator=generator), torch.randn(23, generator=generator)
    given = (hidden, weight) if bias is None else (hidden, weight, bias)
    logprobs, entropy = token_logprobs(hidden, weight, targets, temperature, bias, softcap)
    mine = torch.autograd.grad(logprobs, given, upstream)
    logits = hidden @ weight.T if bias is None else hidden @ weight.T + bias
    logits = logits if softcap is None else torch.tanh(logits / softcap) * softcap
    distribution = torch.distributions.Categorical(logits=logits / temperature[:, None])
    expected = distribution.log_prob(targets)
    torch.testing.assert_close(logprobs, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy, distribution.entropy().detach(), rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(mine, torch.autograd.grad(expected, given, upstream), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))


def test_entropy_where_tokens_are_forbidden():
    hidden, weight, targets = data(9)
    bias = torch.zeros(VOCAB).index_fill_(0, torch.arange(5, 20), -torch.inf)
    targets = targets.remainder(5)
    found = token_logprobs(hidden, weight, targets, torch.ones(9), bias)[1]
    logits = hidden.detach() @ weight.detach().T + bias
    torch.testing.assert_close(found, torch.distributions.Categorical(logits=logits).entropy())
