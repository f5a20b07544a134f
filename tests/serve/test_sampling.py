"""Parameters that chat and text completions share: what reaches the engine, ranges, forms of answers."""

from __future__ import annotations

import json

import pytest

from athanor.core.errors import RequestError
from athanor.serve.body import read
from athanor.serve.sampling import MAX_BIASES, MAX_DEPTH, MAX_IDS, MAX_STRUCTURE, Sampling
from athanor.types import SamplingParams, Structure

OBJECT = {"type": "object"}


def parse(**fields):
    return read(json.dumps({"model": "m", **fields}).encode(), Sampling)


def refused(**fields):
    with pytest.raises(RequestError) as error:
        parse(**fields)
    return error.value


@pytest.mark.parametrize(
    ("fields", "params"),
    [
        ({"min_p": 0.1}, {"min_p": 0.1}),
        ({"top_k": 5}, {"top_k": 5}),
        ({"repetition_penalty": 1.5}, {"repetition_penalty": 1.5}),
        ({"presence_penalty": -2}, {"presence_penalty": -2.0}),
        ({"frequency_penalty": 0.5}, {"frequency_penalty": 0.5}),
        ({"logit_bias": {"7": -100, "12": 2.5}}, {"logit_bias": ((7, -100.0), (12, 2.5))}),
        ({"allowed_token_ids": [1, 2]}, {"allowed_ids": (1, 2)}),
        ({"bad_words": ["no"]}, {"bad_words": ("no",)}),
        ({"stop_token_ids": [3]}, {"stop_ids": (3,)}),
        ({"min_tokens": 4}, {"min_tokens": 4}),
        ({"ignore_eos": True}, {"ignore_eos": True}),
        ({"prompt_logprobs": 2}, {"prompt_logprobs": 2}),
        ({"response_format": {"type": "text"}}, {}),
        ({"response_format": {"type": "json_object"}}, {"structure": Structure("json", "")}),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "n", "schema": {"type": "object"}, "strict": True},
                }
            },
            {"structure": Structure("json_schema", '{"type": "object"}')},
        ),
        ({"structured_outputs": {"json": {}}}, {"structure": Structure("json_schema", "{}")}),
        ({"structured_outputs": {"json": '{"a":1}'}}, {"structure": Structure("json_schema", '{"a": 1}')}),
        ({"structured_outputs": {"json_object": True}}, {"structure": Structure("json", "")}),
        ({"structured_outputs": {"regex": "a+"}}, {"structure": Structure("regex", "a+")}),
        ({"structured_outputs": {"choice": ["a", "b"]}}, {"structure": Structure("choice", '["a", "b"]')}),
        ({"structured_outputs": {"grammar": 'start: "a"'}}, {"structure": Structure("grammar", 'start: "a"')}),
    ],
)
def test_what_reaches_the_engine(fields, params):
    assert parse(seed=1, **fields).sampling(9) == [SamplingParams(max_tokens=9, seed=1, **params)]


@pytest.mark.parametrize(
    ("param", "value", "rule"),
    [
        ("min_p", 1.1, "less than or equal to 1"),
        ("repetition_penalty", 0, "greater than 0"),
        ("presence_penalty", 2.1, "less than or equal to 2"),
        ("frequency_penalty", -2.1, "greater than or equal to -2"),
        ("logit_bias.7", {"7": 101}, "less than or equal to 100"),
        ("logit_bias.x", {"x": 1}, "match pattern"),
        ("logit_bias.-1", {"-1": 1}, "match pattern"),
        ("logit_bias", {str(i): 1 for i in range(MAX_BIASES + 1)}, f"at most {MAX_BIASES} items"),
        ("logit_bias", [1], "valid dictionary"),
        ("allowed_token_ids", [], "at least 1 item"),
        ("allowed_token_ids", [1] * (MAX_IDS + 1), f"at most {MAX_IDS} items"),
        ("allowed_token_ids[0]", [-1], "greater than or equal to 0"),
        ("bad_words[0]", [""], "at least 1 character"),
        ("bad_words", ["a"] * 65, "at most 64 items"),
        ("stop_token_ids[1]", [1, 2**31], "less than"),
        ("stop_token_ids", [1] * 65, "at most 64 items"),
        ("min_tokens", -1, "greater than or equal to 0"),
        ("ignore_eos", 1, "valid boolean"),
        ("prompt_logprobs", 21, "less than or equal to 20"),
        ("truncate_prompt_tokens", 0, "greater than or equal to 1"),
        ("priority", 2**31, "less than"),
        ("return_token_ids", 0, "valid boolean"),
        ("response_format.type", {"type": "xml"}, "'text' or 'json_object'"),
        ("response_format.json_schema", {"type": "json_schema"}, "is missing"),
        ("response_format.json_schema.schema", {"type": "json_schema", "json_schema": {"name": "a"}}, "is missing"),
        ("response_format.json_schema.schema", {"type": "json_schema", "json_schema": {"schema": 5}}, "valid dictionary"),
        ("structured_outputs.choice", {"choice": []}, "at least 1 item"),
        ("structured_outputs.regex", {"regex": ""}, "at least 1 character"),
        ("structured_outputs.regex", {"regex": "a" * 4097}, "at most 4096 characters"),
        ("structured_outputs.grammar", {"grammar": "a" * (MAX_STRUCTURE + 1)}, "at most 65536 characters"),
        ("structured_outputs.regexp", {"regexp": "a"}, "did you mean 'regex'"),
        ("structured_outputs.whitespace_pattern", {"regex": "a", "whitespace_pattern": " "}, "is not supported yet"),
        ("structured_outputs.json", {"json": "{"}, "holds no JSON object"),
        ("structured_outputs.json", {"json": "[" * 60_000}, "holds no JSON object"),
        ("structured_outputs.json", {"json": "5"}, "holds no JSON object"),
        ("structured_outputs", {}, r"takes exactly one of json, regex, choice, grammar and json_object (got none)"),
        ("structured_outputs", {"regex": "a", "json": {}}, "(got json, regex): leave one"),
        ("structured_outputs", {"json_object": False}, "(got none)"),
    ],
)
def test_values_out_of_range(param, value, rule):
    error = refused(**{param.split("[")[0].split(".")[0]: value})
    assert error.param == param
    assert rule in str(error)


def nested(depth):
    schema = {}
    for _ in range(depth - 1):
        schema = {"items": schema}
    return schema


def test_limits_of_schemas():
    assert parse(structured_outputs={"json": nested(MAX_DEPTH)}).structure().kind == "json_schema"
    error = refused(structured_outputs={"json": nested(MAX_DEPTH + 1)})
    assert f"nested deeper than {MAX_DEPTH} levels" in str(error)
    wide = {"description": "x" * MAX_STRUCTURE}
    error = refused(response_format={"type": "json_schema", "json_schema": {"schema": wide}})
    assert error.param == "response_format.json_schema.schema"
    assert "65,555 characters long and may be 65,536" in str(error)


def test_one_form_alone():
    error = refused(structured_outputs={"regex": "a"}, response_format={"type": "json_object"})
    assert "both say what form the answer has" in str(error)
    assert parse(structured_outputs={"regex": "a"}, response_format={"type": "text"}).structure() == Structure("regex", "a")


@pytest.mark.parametrize(
    "fields",
    [{"allowed_token_ids": [1]}, {"bad_words": ["a"]}, {"min_tokens": 1}, {"ignore_eos": True}],
    ids=lambda f: next(iter(f)),
)
def test_what_does_not_go_with_a_form(fields):
    error = refused(structured_outputs={"regex": "a"}, **fields)
    assert error.param == next(iter(fields))
    assert "does not go with a form of the answer" in str(error)


def test_rules_over_two_fields():
    assert "stand in no event of a stream" in str(refused(stream=True, prompt_logprobs=1))
    with pytest.raises(RequestError, match=r"'min_tokens' \(5\) is more than the 4 tokens that the answer may have") as error:
        parse(min_tokens=5).sampling(4)
    assert error.value.param == "min_tokens"


def test_null_is_the_default_everywhere():
    fields = [name for name in Sampling.names() if name != "model"]
    assert parse(**dict.fromkeys(fields)) == parse()
