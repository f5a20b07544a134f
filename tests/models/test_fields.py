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


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (lambda f: f.int("absent"), "config.json lacks 'absent', which a llama needs: copy it again"),
        (lambda f: f.int("nothing"), "config.json lacks 'nothing', which a llama needs"),
        (lambda f: f.int("x"), "config.json: x is 0.5 and must be a whole number: copy it again"),
        (lambda f: f.int("yes"), "config.json: yes is True and must be a whole number"),
        (lambda f: f.float("yes"), "config.json: yes is True and must be a number"),
        (lambda f: f.float("name"), "config.json: name is 'silu' and must be a number"),
        (lambda f: f.bool("n"), "config.json: n is 3 and must be true or false"),
        (lambda f: f.str("n"), "config.json: n is 3 and must be a text"),
        (lambda f: f.table("n"), "config.json: n is 3 and must be a table"),
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
                "rope_parameters": {"rope_theta": 7.0, "factor": 3.0},
                "rope_scaling": {"type": "linear", "factor": 2.0},
                "rope_theta": 5,
            },
            {"rope_type": "linear", "rope_theta": 7.0, "factor": 3.0},
        ),
    ],
)
def test_rotary_settings_new_and_old(values, expected):
    assert Fields(values, "llama").rope() == expected


@pytest.mark.parametrize("theta", ["x", True])
def test_a_base_that_is_no_number(theta):
    with pytest.raises(CheckpointError, match=f"rope_theta is {theta!r} and must be a number: copy it again"):
        Fields({"rope_parameters": {"rope_theta": theta}}, "llama").rope()
