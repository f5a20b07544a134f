"""Reading config.json: every field has a type, and what is not computed is refused."""

import re

import pytest

from athanor.core.errors import CheckpointError
from athanor.models.fields import Fields

FIELDS = Fields(
    {"n": 3, "x": 0.5, "whole": 2, "yes": True, "name": "silu", "table": {"a": 1}, "nothing": None}, "llama"
)  # fmt: skip


def test_what_is_there():
    assert (FIELDS.int("n"), FIELDS.float("x"), FIELDS.float("whole"), FIELDS.bool("yes")) == (3, 0.5, 2.0, True)
    assert isinstance(FIELDS.float("whole"), float)
    assert FIELDS.str("name") == "silu" and FIELDS.table("table") == {"a": 1} and FIELDS.get("n") == 3
    assert FIELDS.int("absent", 7) == FIELDS.int("nothing", 7) == 7 and FIELDS.int("absent", None) is None
    FIELDS.only("name", "silu", "gelu")
    FIELDS.only("absent", "silu")
    FIELDS.only("nothing", "silu")
    assert FIELDS.bool("absent", True) is True and FIELDS.bool("nothing", False) is False
    assert Fields({"n": 2**31 - 1}, "llama").int("n") == 2**31 - 1


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (lambda f: f.int("absent"), "config.json lacks 'absent', which a llama needs: copy it again"),
        (lambda f: f.int("nothing"), "config.json lacks 'nothing', which a llama needs"),
        (lambda f: f.int("x"), "config.json: x is 0.5 and must be a whole number: copy it again"),
        (lambda f: f.int("yes"), "config.json: yes is True and must be a whole number"),
        (lambda f: f.float("yes"), "config.json: yes is True and must be a number"),
        (lambda _: Fields({"x": 10**400}, "llama").float("x"), "0 and must be a number below 1.8e308: copy it again"),
        (lambda f: f.float("name"), "config.json: name is 'silu' and must be a number"),
        (lambda f: f.bool("n"), "config.json: n is 3 and must be true or false"),
        (lambda f: f.str("n"), "config.json: n is 3 and must be a text"),
        (lambda f: f.table("n"), "config.json: n is 3 and must be a table"),
        (lambda f: f.bool("nothing", True), "nothing is None and must be true or false: write which, or leave it out"),
        (lambda f: f.only("nothing", True), "nothing is None, which is not supported for llama (only True is): use another"),
        (lambda f: f.only("name", "gelu"), "name is 'silu', which is not supported for llama (only 'gelu' is): use another"),
        (
            lambda f: f.only("name", "gelu", "relu"),
            "name is 'silu', which is not supported for llama (only 'gelu' and 'relu' are)",
        ),
    ],
)
def test_refused(read, message):
    with pytest.raises(CheckpointError, match=re.escape(message)):
        read(FIELDS)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, {"rope_type": "default", "rope_theta": 10_000.0}),
        ({"rope_theta": 5}, {"rope_type": "default", "rope_theta": 5.0}),
        ({"rope_theta": 5, "rope_scaling": None}, {"rope_type": "default", "rope_theta": 5.0}),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, {"rope_type": "linear", "factor": 2.0, "rope_theta": 10_000.0}),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 7.0}}, {"rope_type": "yarn", "rope_theta": 7.0}),
        (
            {
                "rope_parameters": {"rope_type": "linear", "rope_theta": 5.0, "factor": 2},
                "rope_scaling": {"type": "linear", "factor": 2.0},
                "rope_theta": 5,
            },
            {"rope_type": "linear", "rope_theta": 5.0, "factor": 2.0},
        ),
        (
            {"rope_parameters": {"rope_theta": 10_000.0}, "rope_scaling": {"type": "default"}},
            {"rope_type": "default", "rope_theta": 10_000.0},
        ),
    ],
)
def test_rotary_settings_new_and_old(values, expected):
    assert Fields(values, "llama").rope() == expected


@pytest.mark.parametrize("new", [{"factor": 4.0}, {"rope_theta": 7.0}, {"rope_type": "default"}])
def test_two_tables_that_disagree(new):
    old = {"type": "linear", "factor": 2.0}
    values = {"rope_scaling": old, "rope_parameters": old | new}
    with pytest.raises(
        CheckpointError, match=r"rope_scaling \(\{.*\) and rope_parameters \(\{.*\) disagree: remove the one that is"
    ):
        Fields(values, "llama").rope()


@pytest.mark.parametrize("name", ["rope_type", "type"])
def test_a_type_that_is_no_text(name):
    with pytest.raises(CheckpointError, match=r"rope_type in rope_parameters is \['x'\] and must be a text: copy it again"):
        Fields({"rope_parameters": {name: ["x"]}}, "llama").rope()


@pytest.mark.parametrize(
    ("read", "most"),
    [(Fields.int, 2**31 - 1), (Fields.width, 2**24), (Fields.count, 10_000)],
)
def test_numbers_that_no_memory_holds(read, most):
    assert read(Fields({"n": most}, "llama"), "n") == most
    with pytest.raises(CheckpointError, match=f"n is {most + 1} and must be at most {most}: copy it again"):
        read(Fields({"n": most + 1}, "llama"), "n")


def test_a_field_of_two_names():
    aliases = {"hidden_size": "n_embd"}
    for values in ({"n_embd": 3}, {"hidden_size": 3}, {"hidden_size": 3, "n_embd": 3}):
        assert Fields(values, "gpt2", aliases).int("n_embd") == 3
    message = "hidden_size is 4 and n_embd, which means the same in a gpt2, is 3: remove the one that is wrong"
    with pytest.raises(CheckpointError, match=message):
        Fields({"hidden_size": 4, "n_embd": 3}, "gpt2", aliases)


@pytest.mark.parametrize("theta", ["x", True])
def test_a_base_that_is_no_number(theta):
    with pytest.raises(CheckpointError, match=f"rope_theta is {theta!r} and must be a number: copy it again"):
        Fields({"rope_parameters": {"rope_theta": theta}}, "llama").rope()
