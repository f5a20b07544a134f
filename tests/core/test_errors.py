import inspect

import pytest

from athanor.core import errors
from athanor.core.errors import AthanorError, RequestError, nearest


def test_the_tree_drawn_in_the_docstring_is_the_tree_in_the_code():
    drawn = {word for line in (errors.__doc__ or "").splitlines() for word in line.split() if word.endswith("Error")}
    classes = {c for _, c in inspect.getmembers(errors, inspect.isclass) if c.__module__ == errors.__name__}
    assert {c.__name__ for c in classes} == drawn
    assert all(issubclass(c, AthanorError) and c.__doc__ for c in classes)


def test_a_child_is_drawn_under_its_parent():
    assert issubclass(errors.NoTargetsError, errors.DataError)
    assert issubclass(errors.NonFiniteLossError, errors.TrainingError)


def test_request_error_names_the_parameter():
    error = RequestError("temperature (-1) must not be negative: use 0 for greedy", "temperature")
    assert error.param == "temperature"
    assert str(error).startswith("temperature (-1)")
    assert RequestError("x").param is None


@pytest.mark.parametrize(
    ("name", "known", "clause"),
    [
        ("temprature", ["temperature", "top_p"], "; did you mean 'temperature'?"),
        ("zzz", ["temperature", "top_p"], ""),
        ("a", [], ""),
    ],
)
def test_nearest(name, known, clause):
    assert nearest(name, known) == clause
    assert nearest(name, iter(known)) == clause
