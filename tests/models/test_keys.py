"""Key maps: what is written is read again, part by part, in place."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from athanor.models.keys import Experts, Fused, Rows, Same, Transposed, entry


def there_and_back(place, tensor):
    """To the tensors of a file and into new memory, as `LanguageModel` does it."""
    file = {name: part.clone() for name, part in place.parts("weight", place.written("weight", tensor))}
    again = torch.full_like(tensor, torch.nan)
    for name, part in place.parts("weight", again):
        part.copy_(file[name])  # a part is a view
    place.settle("weight", again)
    return file, again


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(1, 4))
def test_fused(rows, width):
    place = Fused(tuple(f"m{i}" for i in range(len(rows))), tuple(rows))
    tensor = torch.randn(sum(rows), width)
    file, again = there_and_back(place, tensor)
    assert torch.equal(again, tensor) and place.names == place.modules
    assert torch.equal(torch.cat([file[f"m{i}.weight"] for i in range(len(rows))]), tensor)


@given(st.integers(1, 4), st.lists(st.integers(1, 4), min_size=1, max_size=2), st.integers(1, 3))
def test_experts(n, rows, width):
    place = Experts(tuple(tuple(f"e{i}.{j}" for j in range(len(rows))) for i in range(n)), tuple(rows))
    tensor = torch.randn(n, sum(rows), width)
    file, again = there_and_back(place, tensor)
    assert torch.equal(again, tensor) and len(file) == n * len(rows) == len(place.names)
    assert torch.equal(file["e0.0.weight"], tensor[0, : rows[0]])


@given(st.permutations(range(7)))
def test_rows(order):
    place = Rows("m", torch.tensor(order))
    tensor = torch.randn(7, 2)
    file, again = there_and_back(place, tensor)
    assert torch.equal(again, tensor) and torch.equal(file["m.weight"][torch.tensor(order)], tensor)


@pytest.mark.parametrize("tensor", [torch.randn(3, 5), torch.randn(3)])
def test_transposed(tensor):
    file, again = there_and_back(Transposed("m"), tensor)
    assert torch.equal(again, tensor) and torch.equal(file["m.weight"], tensor.t() if tensor.ndim == 2 else tensor)


def test_a_string_is_the_same_module_and_none_the_tensor_itself():
    assert entry("a.b") == Same("a.b") and entry(Same("x")) == Same("x")
    assert next(Same("a").parts("bias", torch.ones(1)))[0] == "a.bias"
    assert next(Same("").parts("final_logits_bias", torch.ones(1)))[0] == "final_logits_bias"
