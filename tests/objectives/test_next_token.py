"""Next-token prediction against transformers' own loss on the same ids."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from athanor.core.errors import NoTargetsError
from athanor.models import io
from athanor.objectives import next_token
from athanor.types import IGNORE, Batch


@pytest.fixture(scope="module")
def pair(tiny, tmp_path_factory):
    """Our model and the same one in transformers."""
    folder = tmp_path_factory.mktemp("model")
    ours = tiny()
    io.save(ours, folder)
    return ours, LlamaForCausalLM.from_pretrained(folder, config=LlamaConfig.from_pretrained(folder))


def batch_of(lengths, masked=0.4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    n = sum(lengths)
    ids, labels = torch.randint(0, 320, (2, n), generator=generator)
    labels[torch.rand(n, generator=generator) < masked] = IGNORE
    return Batch(ids, labels, torch.tensor(lengths), origin="random")


@pytest.mark.parametrize(("lengths", "masked"), [((8, 8), 0.0), ((3, 14, 1, 9), 0.4), ((20,), 0.9)])
def test_the_loss_is_that_of_transformers(pair, lengths, masked):
    ours, theirs = pair
    batch = batch_of(lengths, masked)
    total, count, metrics = next_token.loss(ours, batch)
    expected, correct = 0.0, 0
    for ids, labels in zip(batch.ids.split(lengths), batch.labels.split(lengths), strict=True):
        # Their labels are not shifted: position i + 1 holds what position i is to predict.
        shifted = torch.cat((torch.tensor([IGNORE]), labels))[None]
        padded = torch.cat((ids, ids[:1]))[None]
        with torch.no_grad():
            out = theirs(padded, labels=shifted)
        n = int((labels != IGNORE).sum())
        expected += float(out.loss) * n if n else 0.0
        correct += int((out.logits[0, :-1].argmax(-1) == labels).sum())
    assert count == int((batch.labels != IGNORE).sum())
    assert total.item() == pytest.approx(expected, rel=1e-5)
    assert int(metrics["correct"]) == correct


def test_a_batch_in_which_nothing_is_supervised_is_an_error(pair):
    batch = batch_of((4, 3))
    batch.labels.fill_(IGNORE)
    message = r"batch 'random': all 7 labels are masked, .* check that its conversations have an assistant turn"
    with pytest.raises(NoTargetsError, match=message):
        next_token.loss(pair[0], batch)
