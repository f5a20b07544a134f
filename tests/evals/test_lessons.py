import itertools

import torch

from athanor.evals import lessons, skill
from athanor.tokenizer.chat import render
from athanor.types import IGNORE

NAMES = ("add", "reverse")


def test_supervised_is_exactly_what_the_assistant_writes(tokenizer):
    batch = lessons.batch(tokenizer, NAMES, "chat", seed=3, budget=2000)
    examples = itertools.islice(skill.examples(NAMES, "train", 3), len(batch.lengths))
    start = 0
    for example, length in zip(examples, batch.lengths.tolist(), strict=True):
        labels = batch.labels[start : start + length]
        whole = render(tokenizer, example.conversation).ids
        prompt = render(tokenizer, example.conversation[:1], generation_prompt=True).ids
        assert labels[labels != IGNORE].tolist() == whole[len(prompt) :]
        start += length


def test_text_form_supervises_everything_and_uses_no_chat_tokens(tokenizer):
    batch = lessons.batch(tokenizer, NAMES, "text", seed=0, budget=500)
    assert bool((batch.labels != IGNORE).all())
    assert tokenizer.user_id not in batch.ids


def test_budget_holds_but_for_a_first_example_that_is_longer(tokenizer):
    assert lessons.batch(tokenizer, NAMES, "chat", 0, 300).ids.numel() <= 300
    assert len(lessons.batch(tokenizer, NAMES, "chat", 0, 1).lengths) == 1


def test_terse_share_drops_reasoning_and_nothing_else(tokenizer):
    def thoughts(share):
        batch = lessons.batch(tokenizer, NAMES, "chat", 0, 4000, share)
        return int((batch.ids == tokenizer.think_id).sum()), len(batch.lengths)

    none, all_terse = thoughts(0.0), thoughts(1.0)
    assert none[0] == none[1]
    assert all_terse[0] == 0
    half = thoughts(0.5)
    assert 0.35 < half[0] / half[1] < 0.65


def test_batches_are_pure_functions_of_the_seed_and_never_hold_out_problems(tokenizer):
    one, two = (lessons.batch(tokenizer, NAMES, "chat", 7, 1000, 0.5) for _ in range(2))
    assert torch.equal(one.ids, two.ids)
    assert not torch.equal(one.ids[:50], lessons.batch(tokenizer, NAMES, "chat", 8, 1000, 0.5).ids[:50])
    for example in lessons.prompts(NAMES, 7, 200):
        assert skill.split_of(example.skill, example.problem.key) == "train"
