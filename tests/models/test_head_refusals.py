"""What heads refuse: tasks, labels, targets, texts and files that do not fit; and what config.json says of labels."""

import json
import re

import pytest
import torch

from athanor.core import plugins
from athanor.core.errors import CheckpointError, ConfigError, DataError, NoTargetsError
from athanor.models import heads, io
from athanor.models.base import TokenIds
from athanor.nn.context import Bidirectional, Causal
from athanor.types import IGNORE
from tests.models.reference import random_ids

L = 3  # labels


def tiny(name="llama"):
    """A new model."""
    return io.build(name, plugins.load("models", name).PRESETS["tiny"], seed=0)


def attached_to(trunk, task="sequence", labels=L, **more):
    return heads.attach(trunk, task, labels, generator=torch.Generator(), **more)


def attached(name="llama", task="sequence", labels=L, **more):
    return attached_to(tiny(name), task, labels, **more)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: attached(task="sequnce"),
            "unknown head 'sequnce'; did you mean 'sequence'? There are sequence, token,",
        ),
        (
            lambda: attached("pegasus"),
            "a pegasus has no head 'sequence' in transformers (it has none): take another",
        ),
        (lambda: attached("bart", "token"), "a bart has no head 'token' in transformers (it has question, sequence): take"),
        (lambda: attached_to(attached()), "this llama has a head 'sequence' already: give its `trunk`"),
        (lambda: attached(labels=0), "labels (0) must be at least 1: give a number, or a name for each"),
        (lambda: attached(labels=()), "labels (0) must be at least 1: give a number, or a name for each"),
        *(
            (lambda labels=labels: attached(labels=labels), f"labels ({labels!r}) must be a number, or names that differ and are")
            for labels in ([0, 1], "yes", ["a", "a"], ["a", ""], True, 2.5, None)
        ),
        (
            lambda: attached(problem="ranking"),
            "problem_type ('ranking') must be one of regression, single_label_classification, multi_label_classification, or",
        ),
        (
            lambda: attached(labels=1, problem="single_label_classification"),
            "problem_type ('single_label_classification') needs at least 2 labels, and there is 1: use 2 for yes and no, or",
        ),
        (lambda: attached(task="question"), "labels (3) of a 'question' head must be 2, a start and an end: leave them out"),
        (
            lambda: attached().values(torch.ones(1, 3, dtype=torch.int64), Causal(1, 3)),
            "this llama has a head 'sequence' of 3 logits, and values are those of a 'sequence' head of 1 on a decoder:",
        ),
        (
            lambda: attached("bert", labels=1).values(torch.ones(1, 3, dtype=torch.int64), Bidirectional(1, 3)),
            "this bert has a head 'sequence' of 1 logits, and values are those of a 'sequence' head of 1 on a decoder",
        ),
        (
            lambda: attached()(torch.ones(1, 3, dtype=torch.int64), segments=torch.zeros(1, 3, dtype=torch.int64)),
            "a llama has no segments: leave them out, and mark the second text by tokens",
        ),
        (
            lambda: attached().logits(torch.ones(1, 32)),
            "this llama was saved without its language-model head (its task is 'sequence'), so it has no logits of tokens",
        ),
        (
            lambda: heads.best_spans(torch.zeros(1, 3, 2), Causal(1, 3), max_length=0),
            "max_length (0) must be at least 1: 30 is usual",
        ),
    ],
)
def test_mistakes_are_named(make, message):
    with pytest.raises(ConfigError, match="^" + re.escape(message)):
        make()


def test_an_encoder_decoder_must_know_how_texts_begin_and_end():
    model, ids = attached("bart"), torch.tensor([[5, 6, 2]])
    with pytest.raises(ConfigError, match=r"^this bart does not say what its answers begin with: set token_ids.decoder_start$"):
        model(ids)
    model.token_ids = TokenIds(decoder_start=2)
    with pytest.raises(ConfigError, match=r"^this bart does not say what ends a text, which its head reads: set token_ids.eos$"):
        model(ids)
    model.token_ids = TokenIds(decoder_start=2, eos=(2, 3))
    assert model(ids).shape == (1, L)
    message = r"^sequence 1 has no end of text \(one of \[2, 3\]\), which the head of a bart reads: add one to every text$"
    with pytest.raises(DataError, match=message):
        model(torch.tensor([[5, 6, 3], [5, 6, 7]]))


WHOLE = "targets must be whole numbers in [0, 3), or -100 where none is known: these belong to another head, or to another"


@pytest.mark.parametrize(
    ("task", "problem", "targets", "message"),
    [
        ("sequence", None, torch.tensor([0, 3]), WHOLE),
        ("sequence", None, torch.tensor([0, -1]), WHOLE),
        ("sequence", "single_label_classification", torch.tensor([0.0, 1.0]), WHOLE),
        ("token", None, torch.tensor([[0, 1, 2, 9], [0, 0, 0, 0]]), WHOLE),
        (
            "sequence",
            None,
            torch.tensor([0, 1, 2]),
            "targets have the shape (3,) and must have (2,), whole numbers: give one for",
        ),
        (
            "sequence",
            None,
            torch.zeros(2),
            "targets have the shape (2,) and must have (2, 3), for multi_label_classification: give one for each",
        ),
        (
            "sequence",
            None,
            torch.full((2, 3), 1.5),
            "targets of several labels must lie in [0, 1]: give 1 for each label that holds and 0 for the others",
        ),
        ("sequence", "regression", torch.zeros(2, 2), "targets have the shape (2, 2) and must have (2, 3), for regression"),
        (
            "token",
            None,
            torch.tensor([0, 1]),
            "targets have the shape (2,) and must have (2, 4), whole numbers: give one for each",
        ),
        (
            "question",
            None,
            torch.tensor([0, 1]),
            "targets have the shape (2,) and must have (2, 2), a start and an end for each sequence: give one for each",
        ),
        (
            "question",
            None,
            torch.tensor([[0, 1], [3, 2]]),
            "targets[1] is [3, 2] and must be a start of 0 or more and an end",
        ),
        ("question", None, torch.tensor([[-1, 1], [0, 2]]), "targets[0] is [-1, 1] and must be a start of 0 or more and an end"),
    ],
)
def test_targets_that_are_none_are_refused(task, problem, targets, message):
    model = attached("llama", task, 2 if task == "question" else L, problem=problem)
    with pytest.raises(DataError, match="^" + re.escape(message)):
        model.loss(random_ids(model.config, 2, 4), targets)


@pytest.mark.parametrize(
    ("task", "targets"),
    [
        ("sequence", torch.tensor([IGNORE, IGNORE])),
        ("token", torch.full((2, 4), IGNORE)),
        ("question", torch.tensor([[9, 9], [4, 4]])),
    ],
)
def test_a_batch_without_targets_is_refused(task, targets):
    model = attached("llama", task, 2 if task == "question" else L)
    message = rf"^none of the {targets.numel()} targets is known, so there is nothing to learn: leave them out$"
    with pytest.raises(NoTargetsError, match=message):
        model.loss(random_ids(model.config, 2, 4), targets)


def test_contexts_of_answers_that_are_none_are_refused():
    logits, ctx = torch.zeros(2, 3, 2), Causal(2, 3)
    message = r"^context has the shape \(2, 2\) and the tokens \(2, 3\): say it of each$"
    with pytest.raises(DataError, match=message):
        heads.best_spans(logits, ctx, torch.ones(2, 2))
    with pytest.raises(DataError, match=r"^sequence 1 has no context to answer from: leave it out$"):
        heads.best_spans(logits, ctx, torch.tensor([[0, 1, 0], [0, 0, 0]]))


NAMED = "config.json: id2label is {'0': 'a', '2': 'b'} and must map the numbers from 0 on to names: copy it again"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"id2label": {"0": "a", "2": "b"}}, NAMED),
        ({"id2label": {"0": "a", "1": 3}}, "config.json: id2label is {'0': 'a', '1': 3} and must map the numbers from 0 on"),
        ({"id2label": ["a", "b"]}, "config.json: id2label is ['a', 'b'] and must be a table: copy it again"),
        ({"id2label": {}}, "config.json: labels (0) must be at least 1: give a number, or a name for each"),
        ({"id2label": None, "num_labels": 0}, "config.json: labels (0) must be at least 1: give a number, or a name for each"),
        ({"problem_type": "ranking"}, "config.json: problem_type ('ranking') must be one of regression, single_label"),
        ({"problem_type": 3}, "config.json: problem_type is 3 and must be a text: copy it again"),
        ({"id2label": {"0": "a", "1": "b"}}, "the weights do not fit"),
        ({"architectures": ["LlamaForTokenClassification"]}, "missing: score.bias."),
        ({"architectures": ["LlamaForCausalLM"]}, "unexpected: score.weight."),
        (
            {"architectures": ["LlamaForMultipleChoice"]},
            "architectures names 'LlamaForMultipleChoice', a class that is not computed",
        ),
    ],
)
def test_files_whose_head_is_not_what_they_say_are_refused(fields, message, tmp_path):
    io.save(attached(), tmp_path)
    path = tmp_path / "config.json"
    said = {k: v for k, v in (json.loads(path.read_text()) | fields).items() if v is not None}
    path.write_text(json.dumps(said))
    with pytest.raises(CheckpointError, match=re.escape(str(tmp_path)) + ".*" + re.escape(message)):
        io.load(tmp_path)


def test_files_with_a_head_that_the_family_lacks_are_refused(tmp_path):
    model = tiny("pegasus")
    io.save(model, tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": ["PegasusForSequenceClassification"]}))
    message = (
        r"config\.json: architectures names 'PegasusForSequenceClassification', and a pegasus has no head 'sequence' in"
        r" transformers \(it has none\): take another family or head$"
    )
    with pytest.raises(CheckpointError, match=message):
        io.load(tmp_path)


def test_files_that_only_number_their_labels_are_read(tmp_path):
    io.save(attached(), tmp_path)
    path = tmp_path / "config.json"
    said = {k: v for k, v in json.loads(path.read_text()).items() if k not in ("id2label", "label2id")}
    path.write_text(json.dumps(said | {"num_labels": L}))
    assert io.load(tmp_path).head.labels.names == ("LABEL_0", "LABEL_1", "LABEL_2")


@pytest.mark.parametrize("name", ["bart", "bert"])
def test_files_that_say_nothing_of_their_labels_have_two(name, tmp_path):
    """transformers writes nothing of two, not even of a BART, though it takes three for granted when it reads one."""
    io.save(attached(name, labels=2), tmp_path)
    path = tmp_path / "config.json"
    said = {k: v for k, v in json.loads(path.read_text()).items() if k not in ("id2label", "label2id")}
    path.write_text(json.dumps(said))
    assert io.load(tmp_path).head.labels.n == 2
    io.save(attached(name), tmp_path)
    path.write_text(json.dumps(said))
    message = "must be (2, 32) (config.json has neither id2label nor num_labels, so there are 2 labels: add one)"
    with pytest.raises(CheckpointError, match="misshaped: .*" + re.escape(message)):
        io.load(tmp_path)


def test_a_new_head_forgets_what_the_file_said_of_the_old_one():
    trunk = tiny()
    trunk.fields = {"num_labels": 9, "problem_type": "regression", "architectures": ["LlamaForCausalLM"], "note": 1}
    fields = attached_to(trunk, labels=("no", "yes")).fields
    assert fields == {
        "note": 1,
        "architectures": ["LlamaForSequenceClassification"],
        "id2label": {"0": "no", "1": "yes"},
        "label2id": {"no": 0, "yes": 1},
    }
