"""Heads for tasks against transformers' classes: the same numbers from the same files, in both directions, on every family."""

import pytest
import torch
import transformers

from athanor.core import plugins
from athanor.core.errors import ConfigError
from athanor.core.io import read_json
from athanor.models import heads, io, llama, t5
from athanor.models._head_names import class_of, names_of
from athanor.models.base import TokenIds
from athanor.models.heads import HEADS, Labels
from athanor.nn.context import Packed, Padded
from athanor.types import IGNORE
from tests.models.reference import (
    attention_of,
    cases,
    config_of,
    files,
    gradients_of_ours,
    gradients_of_theirs,
    greatest,
    random_ids,
)

L = 3  # labels
ALL = ("decoder", "encoder", "encoder_decoder")


def families():
    """The first tiny preset of every model_type."""
    found = {}
    for case in cases(*ALL):
        found.setdefault(config_of(case).to_hf()["model_type"], case)
    return list(found.values())


def stem(case):
    with torch.device("meta"):
        return class_of(plugins.load("models", case[0]).Model(config_of(case)), "")


THEIRS = [
    (case, task) for case in families() for task, head in HEADS.items() if hasattr(transformers, stem(case) + head.suffix)
]  # fmt: skip
over = pytest.mark.parametrize(("case", "task"), THEIRS, ids=[f"{stem(c)}-{task}" for c, task in THEIRS])


def randomised(theirs):
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            p.normal_(float(p.mean()) if "norm" in name.lower() and name.endswith("weight") else 0.0, 0.15)
    return theirs.eval()


def theirs_of(case, task, **fields):
    """A random model of transformers' class."""
    torch.manual_seed(0)
    said = config_of(case).to_hf()
    said = {"pad_token_id": 0} | {k: v for k, v in said.items() if k != "pad_token_id" or v is not None}
    labels = {} if task == "question" else {"num_labels": L}
    cls = getattr(transformers, stem(case) + HEADS[task].suffix)
    settings = transformers.AutoConfig.for_model(**said | labels | fields)
    if settings.is_encoder_decoder and getattr(settings, "decoder_start_token_id", None) is None:
        settings.decoder_start_token_id = settings.pad_token_id  # as in the files of every T5
    return randomised(cls._from_config(settings, dtype=torch.float32, attn_implementation=attention_of(cls, settings)))


def ours_of(theirs, folder):
    theirs.save_pretrained(folder)
    return io.load(folder)


def texts(theirs, *lengths):
    """Random ids of these lengths, each with an end of text where an encoder-decoder needs one, or a Longformer's separators."""
    found = [random_ids(theirs.config, n, seed=n) for n in lengths]
    for ids in found:
        if theirs.config.is_encoder_decoder:
            ids[-1] = theirs.config.eos_token_id
        if theirs.config.model_type == "longformer":  # transformers looks for three to answer a question
            ids[[len(ids) // 3, len(ids) // 3 + 1, -1] if len(ids) > 3 else -1] = theirs.config.sep_token_id
    return found


def answered(theirs, ids, **more):
    """Their logits, (S, L) or (B, T, L)."""
    out = theirs(ids, **more)
    return torch.stack([out.start_logits, out.end_logits], 2) if hasattr(out, "start_logits") else out.logits


def targets_of(task, rows, time):
    if task == "sequence":
        return {"labels": torch.tensor([2, 0, 1][:rows])}
    if task == "token":
        labels = random_ids(llama.PRESETS["tiny"], rows, time, seed=5) % L
        labels[0, :4] = IGNORE
        return {"labels": labels}
    return {"start_positions": torch.tensor([3, 99, 0][:rows]), "end_positions": torch.tensor([5, 99, 0][:rows])}


def ours_targets(targets):
    return targets["labels"] if "labels" in targets else torch.stack(list(targets.values()), 1)


def test_the_heads_of_a_family_are_those_that_transformers_has():
    checked = set()
    for case in families():
        module = plugins.load("models", case[0])
        if not module.__name__.startswith("athanor.models."):
            continue  # added by a folder of plugins
        with torch.device("meta"):
            trunk = module.Model(config_of(case))
        for task in HEADS:
            try:
                names_of(trunk, task)
            except ConfigError:
                assert (case, task) not in THEIRS
            else:
                assert (case, task) in THEIRS
                checked.add(trunk.model_type)
    assert len(checked) >= 15


@over
def test_logits_files_and_fields_are_theirs_in_both_directions(case, task, tmp_path):
    theirs = theirs_of(case, task)
    ours = ours_of(theirs, tmp_path / "theirs")
    assert ours.task == task and not ours.training
    assert ours.n_parameters() == theirs.num_parameters()
    ids = torch.stack(texts(theirs, 19, 19, 19))
    with torch.no_grad():
        expected = answered(theirs, ids)
        assert expected.std() > 0.05  # so small a difference would mean nothing otherwise
        assert greatest(ours(ids), expected) <= 1e-5
    (tmp_path / "ours").mkdir()
    io.save(ours, tmp_path / "ours")
    a, b = files(tmp_path / "theirs"), files(tmp_path / "ours")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)
    fields, saved = (read_json(tmp_path / side / "config.json") for side in ("theirs", "ours"))
    # Only T5 without its decoder says that it has none; transformers does not ask.
    asked = fields.keys() - {"transformers_version"} - ({"is_encoder_decoder"} if ours.kind == "encoder_decoder" else set())
    assert {k: saved.get(k) for k in asked} == {k: fields[k] for k in asked}
    again, report = type(theirs).from_pretrained(
        tmp_path / "ours", output_loading_info=True, attn_implementation=theirs.config._attn_implementation
    )
    assert not any(report.values()), report
    with torch.no_grad():
        assert torch.equal(answered(again.eval(), ids), expected)


@over
def test_loss_and_every_gradient_are_theirs(case, task, tmp_path):
    theirs = theirs_of(case, task)
    ours = ours_of(theirs, tmp_path / "model")
    ids = torch.stack(texts(theirs, 19, 19, 19))
    given = targets_of(task, 3, 19)
    expected = theirs(ids, **given).loss
    expected.backward()
    total, count, _ = ours.loss(ids, ours_targets(given))
    loss = total / count
    loss.backward()
    assert greatest(loss.detach(), expected.detach()) <= 1e-4 * float(expected.detach())
    mine, yours = gradients_of_ours(ours), gradients_of_theirs(theirs, tmp_path / "gradients")
    assert mine.keys() == yours.keys()
    # Gradients that are zero but for rounding have no size of their own: a softmax does not see what is added to all its scores,
    # be it by the bias of keys that nothing turns, or to the logits of all tokens by what comes before them.
    floor = 1e-3 * max(float(grad.abs().max()) for grad in yours.values())
    unseen = ("qa_outputs.bias", "transformer.ln_f.bias") if task == "question" else ()
    if getattr(config_of(case), "absolute_positions", False):
        unseen += ("attention.self.key.bias", "self_attn.k_proj.bias", "encoder_attn.k_proj.bias")
    for name, grad in yours.items():
        if name.endswith(unseen):
            assert max(float(grad.abs().max()), float(mine[name].abs().max())) <= 1e-6
            continue
        assert greatest(mine[name], grad) <= 1e-4 * max(float(grad.abs().max()), floor), name


@over
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_on_either_side(case, task, side, tmp_path):
    theirs = theirs_of(case, task)
    ours = ours_of(theirs, tmp_path)
    rows = texts(theirs, 19, 15, 12)
    mask, ids = torch.zeros(3, 19, dtype=torch.int64), torch.full((3, 19), theirs.config.pad_token_id)
    for i, row in enumerate(rows):
        place = slice(19 - len(row), 19) if side == "left" else slice(0, len(row))
        mask[i, place], ids[i, place] = 1, row
    found = ours(ids, Padded(mask, causal=ours.kind == "decoder"))
    seen = (lambda x: x) if task == "sequence" else (lambda x: x[mask.bool()])
    alone = [answered(theirs, row.unsqueeze(0)) for row in rows]
    assert greatest(seen(found), torch.cat([x.flatten(0, -2) for x in alone])) <= 1e-5
    more = {}
    if ours.kind == "decoder":  # transformers counts padding unless told otherwise
        more = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    elif side == "left":  # theirs read the row's first token, or show padding to the decoder
        return
    assert greatest(seen(found), seen(answered(theirs, ids, attention_mask=mask, **more))) <= 1e-5


@over
def test_packed_is_separate(case, task, tmp_path):
    theirs = theirs_of(case, task)
    ours = ours_of(theirs, tmp_path)
    rows = texts(theirs, 7, 2, 12, 3, 12)
    ctx = Packed(torch.tensor([len(row) for row in rows]), causal=ours.kind == "decoder")
    ids = torch.cat(rows).unsqueeze(0)
    with torch.no_grad():
        alone = torch.cat([ours(row.unsqueeze(0)).flatten(0, -2) for row in rows])
        assert greatest(ours(ids, ctx).flatten(0, -2), alone) <= 1e-5
    wanted = torch.tensor([[1, 3], [0, 1], [2, 9], [1, 2], [0, 0]])
    wanted = {"sequence": wanted[:, 0] % L, "token": ids % L, "question": wanted}[task]
    of_rows = list(wanted) if task != "token" else list(wanted[0].split([len(row) for row in rows]))
    separate = [ours.loss(row.unsqueeze(0), one.unsqueeze(0)) for row, one in zip(rows, of_rows, strict=True)]
    total, count, metrics = ours.loss(ids, wanted, ctx)
    assert count == sum(n for _, n, _ in separate)
    assert float(total.detach()) == pytest.approx(sum(float(x.detach()) for x, _, _ in separate), rel=1e-5)
    assert int(metrics["correct"]) == sum(int(m["correct"]) for _, _, m in separate)


SEQUENCE = [(case, task) for case, task in THEIRS if task == "sequence" and case[0] in ("bert", "llama", "bart")]


@pytest.mark.parametrize(("case", "task"), SEQUENCE, ids=[stem(c) for c, _ in SEQUENCE])
@pytest.mark.parametrize(
    ("n", "problem", "labels"),
    [
        (1, None, [0.5, -2.0, 3.0]),
        (1, "regression", [[0.5], [-2.0], [3.0]]),
        (3, "regression", [[0.5, 1.0, 2.0], [0.0, -1.0, 0.0], [3.0, 0.1, 0.2]]),
        (3, None, [2, 0, 2]),
        (3, "single_label_classification", [2, IGNORE, 1]),
        (3, None, [[1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [0.0, 1.0, 0.3]]),
        (2, "multi_label_classification", [[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]]),
    ],
)
@torch.no_grad()
def test_every_problem_type_has_their_loss(case, task, n, problem, labels, tmp_path):
    theirs = theirs_of(case, task, num_labels=n, problem_type=problem)
    ours = ours_of(theirs, tmp_path)
    assert ours.head.labels == Labels.numbered(n, problem)
    ids, labels = torch.stack(texts(theirs, 9, 9, 9)), torch.tensor(labels)
    expected = theirs(ids, labels=labels).loss
    total, count, _ = ours.loss(ids, labels)
    assert float(total / count) == pytest.approx(float(expected), rel=1e-5)


ATTACHED = [(case, task) for case, task in THEIRS if case[0] != "longformer" or task != "token"]


@pytest.mark.parametrize(("case", "task"), ATTACHED, ids=[f"{stem(c)}-{task}" for c, task in ATTACHED])
@torch.no_grad()
def test_a_new_head_on_a_model_is_read_by_transformers(case, task, tmp_path):
    trunk = io.build(case[0], config_of(case), seed=3)
    names = ("no", "maybe", "yes") if task != "question" else 2
    trunk.token_ids = TokenIds(eos=(2,), pad=getattr(trunk.config, "pad_id", 0), decoder_start=2)
    ours = heads.attach(trunk, task, names, generator=torch.Generator().manual_seed(1)).eval()
    io.save(ours, tmp_path)
    cls = getattr(transformers, stem(case) + HEADS[task].suffix)
    assert read_json(tmp_path / "config.json")["architectures"] == [cls.__name__]
    theirs, report = cls.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert theirs.config.num_labels == (2 if task == "question" else L)
    if task != "question":
        assert theirs.config.id2label == dict(enumerate(names))
    ids = torch.stack(texts(theirs, 11, 11))
    assert greatest(ours(ids), answered(theirs.eval(), ids)) <= 1e-5
    again = io.load(tmp_path)
    assert torch.equal(again(ids), ours(ids))
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), ours.state_dict().values(), strict=True))


@torch.no_grad()
def test_segments_of_pairs_are_those_of_the_tokenizer(tmp_path):
    theirs = theirs_of(("bert", "tiny"), "sequence")
    ours = ours_of(theirs, tmp_path)
    words = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3} | {w: i for i, w in enumerate("abcdefg", 4)}
    tokenizer = transformers.BertTokenizer(vocab=words)
    for side in ("left", "right"):
        tokenizer.padding_side = side
        batch = tokenizer(["a b c", "d", "e f"], ["d e", "a b c d", "g"], return_tensors="pt", padding=True)
        ctx = Padded(batch["attention_mask"], causal=False)
        segments = heads.pair_segments(batch["input_ids"], ctx, separator=3)
        assert segments.tolist() == batch["token_type_ids"].tolist()
        if side == "right":
            assert greatest(ours(batch["input_ids"], ctx, segments), theirs(**batch).logits) <= 1e-5
    seen = batch["attention_mask"].bool()
    packed = heads.pair_segments(batch["input_ids"][seen].unsqueeze(0), Packed(seen.sum(1), causal=False), separator=3)
    assert packed[0].tolist() == batch["token_type_ids"][seen].tolist()


@torch.no_grad()
def test_a_reward_is_the_value_of_the_last_token(tmp_path):
    theirs = theirs_of(("llama", "tiny"), "sequence", num_labels=1)
    ours = ours_of(theirs, tmp_path)
    ids = random_ids(ours.config, 3, 19)
    mask = torch.ones(3, 19, dtype=torch.int64)
    mask[1, :4] = mask[2, 12:] = 0
    ctx = Padded(mask, causal=True)
    values = ours.values(ids, ctx)
    states = theirs.model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).last_hidden_state
    assert values.shape == (3, 19) and values.dtype == torch.float32
    assert greatest(values[mask.bool()], theirs.score(states).squeeze(2)[mask.bool()]) <= 1e-5
    rewards = ours(ids, ctx)
    assert rewards.shape == (3, 1) and greatest(rewards[:, 0], values[[0, 1, 2], [18, 18, 11]]) <= 1e-6


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma"])
@torch.no_grad()
def test_padding_that_ends_a_text_is_not_what_a_decoder_is_read_at(name, tmp_path):
    case = next(case for case, task in THEIRS if case[0] == name and task == "sequence")
    theirs = theirs_of(case, "sequence", pad_token_id=2, eos_token_id=2)
    ours = ours_of(theirs, tmp_path)
    ids = random_ids(ours.config, 4, 12)
    ids[0, 11] = ids[1, 8:] = ids[2, 3] = ids[3] = 2  # an end of text; more of them; one inside; nothing else
    expected = theirs(ids).logits
    assert greatest(ours(ids), expected) <= 1e-5
    for row, alone in zip(ids, expected, strict=True):
        assert greatest(theirs(row[None]).logits, alone) <= 1e-5
    packed = torch.cat([ids[0], ids[1, :10], ids[2], ids[3, :5]])[None]
    assert greatest(ours(packed, Packed(torch.tensor([12, 10, 12, 5]))), expected) <= 1e-5
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    assert greatest(ours(ids, Padded(mask, causal=True)), expected) <= 1e-5
    ours.token_ids = TokenIds()  # that knows of no padding reads the last
    assert greatest(ours(ids)[0], expected[0]) > 0.05


def test_a_bfloat16_file_stays_one(tmp_path):
    theirs = theirs_of(("llama", "tiny"), "sequence").to(torch.bfloat16)
    ours = ours_of(theirs, tmp_path / "theirs")
    (tmp_path / "ours").mkdir()
    io.save(ours, tmp_path / "ours")
    a, b = files(tmp_path / "theirs"), files(tmp_path / "ours")
    assert all(torch.equal(a[k], b[k]) and b[k].dtype == torch.bfloat16 for k in a)
    new = heads.attach(io.load(tmp_path / "ours").trunk, "token", generator=torch.Generator())
    assert new.head.out.weight.dtype == torch.bfloat16


@torch.no_grad()
def test_the_last_of_several_ends_is_read(tmp_path):
    for name in ("bart", "t5"):
        theirs = theirs_of((name, "tiny"), "sequence")
        ours = ours_of(theirs, tmp_path / name)
        ids = random_ids(ours.config, 2, 9)
        ids[0, [2, 6]] = ids[1, [1, 8]] = theirs.config.eos_token_id
        assert greatest(ours(ids), theirs(ids).logits) <= 1e-5


def test_an_old_file_of_a_t5_classifier_may_hold_what_nothing_is_computed_with(tmp_path):
    from safetensors.torch import load_file, save_file

    theirs = theirs_of(("t5", "tiny"), "sequence")
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    name = "transformer.decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    save_file(load_file(path) | {name: torch.zeros(8, 4)}, path)
    assert isinstance(io.load(tmp_path).trunk, t5.Model)
