"""Structured output: whatever way is taken through the allowed tokens, other people's code accepts the text at its end."""

import json
import re
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from athanor.core.errors import MissingExtraError, RequestError
from athanor.infer import constrained
from athanor.infer.constrained import MAX_LENGTH, Constraint, token_bytes
from athanor.tokenizer.bpe import Tokenizer
from athanor.tokenizer.foreign import ForeignTokenizer
from athanor.types import Structure

TEXT = [
    '{"name": "Ada", "age": 36, "tags": ["x", "y"]} true false null yes no',
    "naïve café 你好 🔥 0123456789",
    "the heat of it",
] * 3
PADDED = 700  # a model's vocabulary, larger than any tokenizer's here
STEPS = 400


def _byte_level():
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=320, special_tokens=["<end>"], initial_alphabet=alphabet))
    return inner


def _sentence_piece():
    inner = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    strip = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    inner.decoder = decoders.Sequence(strip)
    special = ["<unk>", "<s>", "<end>", *(f"<0x{byte:02X}>" for byte in range(256))]
    inner.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=360, special_tokens=special))
    content = json.loads(inner.to_str())
    content["added_tokens"] = content["added_tokens"][:3]  # bytes are no special tokens
    return tokenizers.Tokenizer.from_str(json.dumps(content))


def _unigram():
    """Letters, so that JSON leads nowhere that cannot be left, and a few pieces; no bytes. No two trainings give the same."""
    letters = sorted({"▁", *(chr(c) for c in range(ord("!"), ord("~") + 1)), *"ïé你好🔥"})
    pieces = ["▁the", "▁true", "heat", '▁"', '":', "▁{", "at", "12", "name"]
    vocabulary = [("<pad>", 0.0), ("<end>", 0.0), ("<unk>", -9.0), *((piece, -3.0) for piece in [*letters, *pieces])]
    inner = tokenizers.Tokenizer(models.Unigram(vocabulary, unk_id=2))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Metaspace()
    inner.add_special_tokens(["<pad>", "<end>", "<unk>"])
    return inner


def _loaded(inner):
    with tempfile.TemporaryDirectory() as folder:
        inner.save(f"{folder}/tokenizer.json")
        (Path(folder) / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))
        return ForeignTokenizer.load(folder)


KINDS = {"byte_level": _byte_level, "sentence_piece": _sentence_piece, "unigram": _unigram}


@pytest.fixture(scope="module", params=["ours", *KINDS])
def vocabulary(request):
    return Tokenizer.train(TEXT, 320) if request.param == "ours" else _loaded(KINDS[request.param]())


@pytest.fixture(scope="module")
def ours():
    return Tokenizer.train(TEXT, 320)


def follow(structure, tokenizer, seed=0, before=None, **options):
    """A way through the structure by random logits, which grow fond of what closes it. Text of the answer, and its ids."""
    grammar = constrained.compile(structure, tokenizer, PADDED)
    before = tokenizer.encode("so:") if before is None else before
    form = Constraint(grammar, {tokenizer.end_id}, before=before, **options)
    generator = torch.Generator().manual_seed(seed)
    closing = torch.zeros(PADDED)
    closing[[id for id in range(tokenizer.vocab_size) if tokenizer.decode([id]).strip() in ('"', "}", "]", '"}')]] = 1.0
    closing[tokenizer.end_id] = 4.0
    ids = []
    for step in range(STEPS):
        allowed = form.allowed()
        assert allowed.shape == (PADDED,) and allowed.any()
        assert not allowed[tokenizer.vocab_size :].any(), "a token that the tokenizer does not have"
        logits = torch.randn(PADDED, generator=generator) + closing * (step / 20)
        id = int(logits.masked_fill(~allowed, -torch.inf).argmax())
        form.advance(id)
        if id == tokenizer.end_id:
            assert form.done
            pieces = tokenizer.pieces(before)
            return "".join(map(pieces.push, ids)) + pieces.finish(), ids
        ids.append(id)
    raise AssertionError(f"no end after {STEPS} tokens: {tokenizer.decode(ids)}")


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["x", "y", None, 1.5]}, "maxItems": 3},
        "more": {"$ref": "#/$defs/more"},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
    "$defs": {"more": {"anyOf": [{"type": "null"}, {"type": "object", "properties": {"more": {"$ref": "#/$defs/more"}}}]}},
}
SCHEMAS = st.recursive(
    st.sampled_from(
        [
            {"type": "null"},
            {"type": "boolean"},
            {"type": "integer", "minimum": -5, "maximum": 300},
            {"type": "number"},
            {"type": "string", "maxLength": 5},
            {"type": "string", "pattern": "^[a-z]{2,4}$"},
            {"enum": ["yes", "no", 3, None]},
            {"const": "naïve"},
        ]
    ),
    lambda inner: (
        st.builds(lambda items, n: {"type": "array", "items": items, "minItems": n, "maxItems": 3}, inner, st.integers(0, 2))
        | st.builds(lambda options: {"anyOf": options}, st.lists(inner, min_size=1, max_size=3))
        | st.dictionaries(st.sampled_from(["a", "b", "the", "ü"]), inner, min_size=1, max_size=3).map(
            lambda properties: {
                "type": "object",
                "properties": properties,
                "required": sorted(properties)[:1],
                "additionalProperties": False,
            }
        )
    ),
    max_leaves=5,
)


def _writes_json(tokenizer):
    """Whether the vocabulary has all bytes; the small unigram one lacks some letters."""
    return b"\xc3" in token_bytes(tokenizer)


@settings(max_examples=60)
@given(schema=st.just(PERSON) | SCHEMAS, seed=st.integers(0, 2**20))
def test_any_way_through_a_schema_is_valid(vocabulary, schema, seed):
    if not _writes_json(vocabulary):
        schema = PERSON
    text, _ = follow(Structure("json_schema", json.dumps(schema)), vocabulary, seed)
    jsonschema.validate(json.loads(text), schema)


@settings(max_examples=15)
@given(seed=st.integers(0, 2**20))
def test_json_is_any_object(vocabulary, seed):
    text, _ = follow(Structure("json", ""), vocabulary, seed)
    assert isinstance(json.loads(text), dict)


PATTERNS = [
    *(r"[a-f0-9]{4}(-[a-f0-9]{2}){2}", r"(yes|no)\.?", r" ?([a-zü]+ ){0,3}end", r"[^x\n]{1,6}", r"a/b&c\"d"),
    *(r"[0-9]{1,4}\.[0-9]{2}", r"(?i)heat|it", r"", r"^x$"),
]


@settings(max_examples=60)
@given(data=st.data(), seed=st.integers(0, 2**20))
def test_any_way_through_an_expression_matches(vocabulary, data, seed):
    pattern = data.draw(st.sampled_from(PATTERNS if _writes_json(vocabulary) else ["(yes|no)[:,]", "[a-f0-9]{4}", "(he|it)?"]))
    assert re.fullmatch(pattern, follow(Structure("regex", pattern), vocabulary, seed)[0])


@settings(max_examples=60)
@given(data=st.data(), seed=st.integers(0, 2**20))
def test_any_way_through_choices_is_one_of_them(vocabulary, data, seed):
    letters = "the |()\\.*\n\"'{x" + ("ïü你🔥" if _writes_json(vocabulary) else "")
    letters = "".join(letter for letter in letters if _writes_json(vocabulary) or letter in "the x")
    choices = data.draw(st.lists(st.text(letters, min_size=1, max_size=6), min_size=1, max_size=4))
    text, _ = follow(Structure("choice", json.dumps(choices)), vocabulary, seed)
    assert text in choices


def test_every_choice_can_be_chosen(ours):
    choices = ["yes", "no", "yes and no", ""]
    assert {follow(Structure("choice", json.dumps(choices)), ours, seed)[0] for seed in range(200)} == set(choices)


def test_any_way_through_a_grammar_is_of_it(vocabulary):
    grammar = 'start: "(" start ")" | /[0-9]{1,2}/' if _writes_json(vocabulary) else 'start: "{" start "}" | /[0-9]{1,2}/'
    for seed in range(10):
        text, _ = follow(Structure("grammar", grammar), vocabulary, seed)
        n = len(text) - len(text.lstrip("({"))
        assert re.fullmatch(rf"[({{]{{{n}}}[0-9][0-9]?[)}}]{{{n}}}", text)


def test_an_answer_that_begins_a_text_keeps_its_space():
    # T5's and LLaMA's vocabularies write no space at the beginning of a text.
    tokenizer = _loaded(_sentence_piece())
    for seed in range(20):
        assert follow(Structure("regex", "(a|b| c)(d| e)"), tokenizer, seed, before=[])[0] in ("ad", "a e", "bd", "b e")
    within = {follow(Structure("regex", "(a| c)d"), tokenizer, seed)[0] for seed in range(40)}
    assert within == {"ad", " cd"}
    grammar = constrained.compile(Structure("regex", " c"), tokenizer, PADDED)
    Constraint(grammar, before=tokenizer.encode("so:"))
    with pytest.raises(RequestError, match="no token of this model's vocabulary fits"):
        Constraint(grammar)


def test_bytes_are_those_that_the_library_reads():
    for kind in ("byte_level", "sentence_piece"):
        inner = KINDS[kind]()
        theirs, tokens = LLTokenizer(inner.to_str()), token_bytes(_loaded(inner))
        special = {id for id, token in inner.get_added_tokens_decoder().items() if token.special}
        # The byte 0xFF, which is in no text, is a sign of the library's own.
        different = [id for id, token in enumerate(tokens) if token not in (theirs.decode_bytes([id]), b"\xff")]
        assert set(different) == special and all(tokens[id] == b"" for id in special)


def test_a_piece_that_is_the_sign_for_no_character_is_itself():
    inner = tokenizers.Tokenizer(models.BPE({"a": 0, "\ufffd": 1, "<0xE4>": 2, "<end>": 3}, [], byte_fallback=True))
    inner.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    inner.add_special_tokens(["<end>"])
    assert token_bytes(_loaded(inner)) == [b"a", "\ufffd".encode(), b"\xe4", b""]


# --- ends and control tokens


def _ids(tokenizer, text):
    single = {token: id for id, token in enumerate(token_bytes(tokenizer))}
    return [single[bytes([byte])] for byte in text.encode()]


def test_an_end_is_allowed_exactly_where_the_form_may_end(vocabulary):
    if not _writes_json(vocabulary):
        pytest.skip("this vocabulary has no bytes")
    end = vocabulary.end_id
    form = Constraint(constrained.compile(Structure("regex", "xy{0,2}"), vocabulary, PADDED), {end, PADDED - 1, PADDED + 5})
    x, y = _ids(vocabulary, "xy")
    assert not form.allowed()[end] and not form.done
    form.advance(x)
    assert form.allowed()[[end, PADDED - 1, y]].all() and not form.allowed()[x] and not form.done
    form.advance(y)
    form.advance(y)
    assert form.done and form.allowed().nonzero().flatten().tolist() == sorted([end, PADDED - 1])
    form.advance(end)
    assert form.done and not form.allowed().any()


def test_without_ends_a_complete_form_allows_nothing(ours):
    form = Constraint(constrained.compile(Structure("choice", '["x"]'), ours, ours.vocab_size))
    assert form.allowed().any() and not form.done
    form.advance(_ids(ours, "x")[0])
    assert form.done and not form.allowed().any()


def test_a_token_that_ends_the_answer_is_no_text(ours):
    x, y = _ids(ours, "xy")
    form = Constraint(constrained.compile(Structure("regex", "x[xy]{2}"), ours, ours.vocab_size), {y})
    form.advance(x)
    assert form.allowed()[x] and not form.allowed()[y]


@pytest.mark.parametrize("grammar", ["start: <[0-15]>", "start: <[*]>+", "start: /(.|\\n)*/"])
def test_control_tokens_are_never_allowed(ours, grammar):
    form = Constraint(constrained.compile(Structure("grammar", grammar), ours, PADDED), {ours.end_id})
    named = [ours.control[name] for name in ("<think>", "</think>", "<|reserved_1|>", "<|reserved_2|>")]
    for _ in range(5):
        allowed = form.allowed().nonzero().flatten().tolist()
        assert set(allowed) - set(range(16, ours.vocab_size)) <= {ours.end_id, *named}
        if form.done:
            break
        form.advance(allowed[-1])
    with pytest.raises(RequestError, match="no token of this model's vocabulary fits"):
        Constraint(constrained.compile(Structure("grammar", "start: <[4]>"), ours, PADDED), {ours.end_id})


def test_a_grammar_may_ask_for_calls_and_thoughts_and_for_no_role(ours):
    form = Constraint(constrained.compile(Structure("grammar", 'start: <think> "x" </think> <|reserved_1|> "y"'), ours, PADDED))
    x, y = _ids(ours, "xy")
    for id in (ours.think_id, x, ours.end_think_id, ours.control["<|reserved_1|>"], y):
        assert form.allowed().nonzero().flatten().tolist() == [id]
        form.advance(id)
    assert form.done
    for name in ("<|user|>", "<|end|>", "<|system|>", "<|reserved_5|>"):
        with pytest.raises(RequestError, match=rf'unknown special token: "{re.escape(name)}"'):
            constrained.compile(Structure("grammar", f"start: {name}"), ours, PADDED)


def test_names_of_control_tokens_are_letters(ours):
    text, ids = follow(Structure("choice", '["<|user|><think><|reserved_1|>"]'), ours)
    assert text == "<|user|><think><|reserved_1|>" and min(ids) >= 16


# --- thoughts, and going back


def test_thoughts_come_before_the_form_where_they_are_allowed(ours):
    grammar = constrained.compile(Structure("choice", '["xx"]'), ours, PADDED)
    assert not Constraint(grammar).allowed()[ours.think_id]
    form = Constraint(grammar, {ours.end_id}, reasoning=True)
    x, y = _ids(ours, "xy")
    assert form.allowed()[[ours.think_id, x]].all() and not form.allowed()[y]
    form.advance(ours.think_id)
    thinking = form.allowed()
    assert thinking.nonzero().flatten().tolist() == [ours.end_think_id, *range(16, ours.vocab_size)]
    form.advance(y)
    assert torch.equal(form.allowed(), thinking) and not form.done
    form.advance(ours.end_think_id)
    assert form.allowed()[x] and not form.allowed()[[y, ours.think_id]].any()
    form.advance(x)
    form.advance(x)
    assert form.done
    form.rollback(4)
    assert torch.equal(form.allowed(), thinking)
    form.rollback(1)
    assert form.allowed()[[ours.think_id, x]].all()


@settings(max_examples=30)
@given(seed=st.integers(0, 2**20), data=st.data())
def test_tokens_taken_back_were_never_taken(vocabulary, seed, data):
    _, ids = follow(Structure("json_schema", json.dumps(PERSON)), vocabulary, seed)
    grammar = constrained.compile(Structure("json_schema", json.dumps(PERSON)), vocabulary, PADDED)
    form = Constraint(grammar, {vocabulary.end_id}, before=vocabulary.encode("so:"))
    masks = [form.allowed()]
    for id in [*ids, vocabulary.end_id]:
        form.advance(id)
        masks.append(form.allowed())
    at = len(ids) + 1
    for _ in range(3):
        n = data.draw(st.integers(0, at))
        form.rollback(n)
        at -= n
        assert torch.equal(form.allowed(), masks[at])
        if at < len(ids):
            form.advance(ids[at])
            at += 1
            assert torch.equal(form.allowed(), masks[at])


def test_no_end_comes_within_a_thought(ours):
    x, y = _ids(ours, "xy")
    form = Constraint(constrained.compile(Structure("choice", '["x"]'), ours, PADDED), {ours.end_id, y}, reasoning=True)
    form.advance(ours.think_id)
    assert form.allowed()[x] and not form.allowed()[[y, ours.end_id]].any()


def test_json_has_room_for_indentation_and_no_more(ours):
    form = Constraint(constrained.compile(Structure("json", ""), ours, PADDED))
    brace, blank = _ids(ours, "{ ")
    form.advance(brace)
    for _ in range(32):
        assert form.allowed()[blank]
        form.advance(blank)
    assert form.allowed().any() and not form.allowed()[blank]


def test_two_answers_of_one_grammar_know_nothing_of_each_other(ours):
    grammar = constrained.compile(Structure("choice", '["xy", "yx"]'), ours, PADDED)
    first, second = Constraint(grammar), Constraint(grammar)
    x, y = _ids(ours, "xy")
    first.advance(x)
    assert second.allowed()[y] and not first.allowed()[x]
    second.advance(y)
    assert first.allowed()[y] and second.allowed()[x]


def test_what_is_compiled_is_kept(ours, monkeypatch):
    structure = Structure("regex", "kept{3}")
    constrained.compile(structure, ours, PADDED)
    monkeypatch.setattr(constrained, "_grammar_text", None)
    again = Tokenizer(ours._definition)  # an equal vocabulary
    assert constrained.compile(structure, again, 400).vocab_size == 400


# --- what cannot be followed


@pytest.mark.parametrize(
    ("structure", "param", "message"),
    [
        (Structure("json_schema", "{"), "response_format", "the schema must be JSON .*; correct it"),
        (Structure("json_schema", "[1]"), "response_format", "an object or true, and is of type list"),
        (Structure("json_schema", '{"type": "foo"}'), "response_format", "foo.*; correct the schema, or leave out what is not"),
        (Structure("json_schema", '{"not": {"type": "null"}}'), "response_format", r'Unimplemented keys: \["not"\]'),
        (Structure("json_schema", '{"not": {}, "x-guidance": {"lenient": true}}'), "response_format", r'keys: \["not"\]'),
        (Structure("json_schema", "false"), "response_format", "and is false, which no text fulfils"),
        (
            Structure("json_schema", '{"type": "integer", "minimum": 5, "maximum": 3}'),
            "response_format",
            "minimum .5. is greater",
        ),
        (Structure("json_schema", '{"type": "string", "format": "zzz"}'), "response_format", "Unknown format: zzz"),
        (Structure("json_schema", '{"$ref": "http://x/y"}'), "response_format", "http://x/y"),
        (Structure("json_schema", '{"$ref": "#"}'), "response_format", "cannot be followed"),
        (Structure("regex", "(a"), "structured_outputs", "unclosed group; correct the regex"),
        (Structure("regex", "(?=a)b"), "structured_outputs", "look-around"),
        (Structure("regex", r"(a)\1"), "structured_outputs", "backreferences are not supported"),
        (Structure("choice", "x"), "structured_outputs", "the choices must be JSON .*; correct it"),
        (Structure("choice", "[]"), "structured_outputs", "choice must be a list of at least one text"),
        (Structure("choice", '["a", 1]'), "structured_outputs", "choice must be a list of at least one text"),
        (Structure("grammar", "start: foo"), "structured_outputs", 'unknown name: "foo"; correct the grammar'),
        (Structure("grammar", 'start: "a'), "structured_outputs", "lexer error"),
        (Structure("grammar", "start: start"), "structured_outputs", "cannot be followed"),
    ],
)
def test_what_is_wrong_is_named(ours, structure, param, message):
    with pytest.raises(RequestError, match=message) as caught:
        Constraint(constrained.compile(structure, ours, PADDED))
    assert caught.value.param == param
    assert str(caught.value).startswith(f"the form that {param} asks for cannot be followed: ")
    assert len(str(caught.value)) < 600 and "\n" not in str(caught.value)
    with pytest.raises(RequestError, match="the form that tools asks for") as caught:
        Constraint(constrained.compile(replace(structure, param="tools"), ours, PADDED))
    assert caught.value.param == "tools"


def test_true_and_nothing_are_schemas(ours):
    for schema in ("true", "{}"):
        json.loads(follow(Structure("json_schema", schema), ours)[0])


def test_a_form_that_the_vocabulary_cannot_write():
    tokenizer = _loaded(_unigram())
    with pytest.raises(
        RequestError, match="structured_outputs asks for cannot be followed: no token of this model's vocabulary fits"
    ):
        Constraint(constrained.compile(Structure("regex", "€+"), tokenizer, PADDED))
    form = Constraint(constrained.compile(Structure("regex", "h[€]"), tokenizer, PADDED), before=tokenizer.encode("so:"))
    form.advance(int(form.allowed().nonzero()[0]))
    with pytest.raises(
        RequestError, match="could not be followed to the end of the answer: no token of this model's vocabulary fits"
    ) as caught:
        form.allowed()
    assert caught.value.param == "structured_outputs"


def _chain(rule, n):
    return "start: " + rule.format(0) + "\n" + "\n".join(f"{rule.format(i)}: {rule.format(i + 1)}" for i in range(n))


HOSTILE = {
    "deep parentheses": ("regex", "(" * 30_000 + "a" + ")" * 30_000),
    "deep JSON": ("json_schema", '{"items":' * 7000 + "{}" + "}" * 7000),
    "deep lists": ("json_schema", "[" * 60_000 + "]" * 60_000),
    "deep groups": ("grammar", "start: " + "(" * 30_000 + '"a"' + ")" * 30_000),
    "long chain of rules": ("grammar", _chain("r{}", 4000) + '\nr4000: "a"'),
    "long chain of terminals": ("grammar", _chain("R{}", 4000) + '\nR4000: "a"'),
    "doubling rules": ("grammar", "start: r0\n" + "\n".join(f"r{i}: r{i + 1} r{i + 1}" for i in range(60)) + '\nr60: "a"'),
    "long chain of references": (
        "json_schema",
        json.dumps({"$ref": "#/$defs/0", "$defs": {str(i): {"$ref": f"#/$defs/{i + 1}"} for i in range(1900)} | {"1900": {}}}),
    ),
    "huge count": ("regex", "a{1000000000}"),
    "huge counts of counts": ("regex", "((a{1,1000}){1,1000}){1,1000}b"),
    "ambiguous": ("regex", "(a*)*(a|aa)*(.*a){20}b"),
    "product of alternatives": (
        "json_schema",
        json.dumps({"allOf": [{"anyOf": [{"properties": {f"p{i}{j}": {"type": "integer"}}} for j in "ab"]} for i in range(14)]}),
    ),
    "many alternatives": ("regex", "|".join(f"a{i}b" for i in range(8000))),
    "too long": ("regex", "a" * (MAX_LENGTH + 1)),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_forms_are_errors_or_work_and_never_take_the_process_down(name):
    # In a process of its own: a stack that overflows cannot be caught.
    script = """
import sys
from athanor.core.errors import RequestError
from athanor.infer import constrained
from athanor.tokenizer.bpe import Tokenizer
from athanor.types import Structure
tokenizer = Tokenizer.train(["aaaa abab"], 300)
try:
    form = constrained.Constraint(constrained.compile(Structure(sys.argv[1], sys.stdin.read()), tokenizer, 300), {2})
    for _ in range(100):
        if form.done:
            break
        form.advance(int(form.allowed().nonzero()[-1]))
    print("works")
except RequestError as error:
    print("refused", error)
"""
    kind, value = HOSTILE[name]
    done = subprocess.run([sys.executable, "-c", script, kind], input=value, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, (done.returncode, done.stderr[-500:])
    assert done.stdout.startswith(("works", "refused the form that ")), done.stdout[:300]
    if name.startswith(("deep", "too")):
        assert done.stdout.startswith("refused")
    if name == "too long":
        assert f"its regex has {MAX_LENGTH + 1} characters and may have {MAX_LENGTH}; make it shorter" in done.stdout


def test_a_form_that_becomes_too_complex_breaks_off(ours):
    # Every letter doubles what may follow.
    grammar = 'start: a\na: a a | "x" | "x" "x" | a "x" a'
    form = Constraint(constrained.compile(Structure("grammar", grammar), ours, PADDED), {ours.end_id})
    x = _ids(ours, "x")[0]
    with pytest.raises(RequestError, match=r"could not be followed to the end of the answer: .*; use a simpler form"):
        for _ in range(3000):
            form.allowed()
            form.advance(x)


def test_without_the_library(ours, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    constrained._table.cache_clear()
    with pytest.raises(MissingExtraError, match=r"llguidance, which is not installed: pip install 'athanor-lm\[structured\]'"):
        constrained.compile(Structure("json", ""), ours, PADDED)
