from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from athanor.core.errors import AthanorError, CheckpointError
from athanor.report.data import RUNGS, ordered, parent, rungs, validate

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)

# Every kind of field once: (path as keys, path as the message names it).
REQUIRED = [
    (("athanor",), "athanor"),
    (("created",), "created"),
    (("minutes",), "minutes"),
    (("seconds",), "seconds"),
    (("seed",), "seed"),
    (("plan",), "plan"),
    (("plan", "parameters"), "plan.parameters"),
    (("machine",), "machine"),
    (("stages",), "stages"),
    (("stages", 2, "seconds"), "stages[2].seconds"),
    (("stages", 0, "name"), "stages[0].name"),
    (("ladder",), "ladder"),
    (("ladder", "sft", "accuracy"), "ladder.sft.accuracy"),
    (("ladder", "sft", "accuracy", "low"), "ladder.sft.accuracy.low"),
    (("ladder", "rl", "format_rate"), "ladder.rl.format_rate"),
    (("ladder", "rl", "stop_rate"), "ladder.rl.stop_rate"),
    (("ladder", "base", "bits_per_byte"), "ladder.base.bits_per_byte"),
    (("ladder", "int8", "bytes"), "ladder.int8.bytes"),
    (("ladder", "int8", "tokens_per_second"), "ladder.int8.tokens_per_second"),
    (("ladder", "int4", "skills", "sort", "n"), "ladder.int4.skills.sort.n"),
    (("ladder", "int4", "languages"), "ladder.int4.languages"),
    (("corpus", "dropped"), "corpus.dropped"),
    (("tokenizer", "bytes_per_token"), "tokenizer.bytes_per_token"),
    (("bits_per_byte", "xz"), "bits_per_byte.xz"),
    (("curves", "pretrain", 3, "loss"), "curves.pretrain[3].loss"),
    (("curves", "grpo", 0, "reward"), "curves.grpo[0].reward"),
    (("samples", 1, "expected"), "samples[1].expected"),
    (("samples", 1, "answers", "rl", "correct"), "samples[1].answers.rl.correct"),
    (("lineage", "rl", "parent"), "lineage.rl.parent"),
    (("lineage", "rl", "weights"), "lineage.rl.weights"),
]


def at(report: Any, keys: tuple[Any, ...]) -> Any:
    for key in keys:
        report = report[key]
    return report


def test_a_whole_report_passes(report: dict[str, Any]) -> None:
    validate(report)


@pytest.mark.parametrize(("keys", "path"), REQUIRED)
def test_a_missing_field_is_named_by_its_path(report: dict[str, Any], keys: tuple[Any, ...], path: str) -> None:
    del at(report, keys[:-1])[keys[-1]]
    with pytest.raises(CheckpointError) as caught:
        validate(report)
    assert f" {path} is missing" in str(caught.value)


@pytest.mark.parametrize(("keys", "path"), REQUIRED)
def test_a_wrong_value_is_named_by_its_path_with_the_rule(report: dict[str, Any], keys: tuple[Any, ...], path: str) -> None:
    at(report, keys[:-1])[keys[-1]] = {"wrong"}  # a set is nothing that JSON has
    with pytest.raises(CheckpointError) as caught:
        validate(report)
    assert f" {path} is {{'wrong'}}; it must be " in str(caught.value)


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (("ladder", "sft", "accuracy", "value"), 61.3, "ladder.sft.accuracy.value is 61.3; it must be in 0..1"),
        (("ladder", "sft", "accuracy", "high"), float("nan"), "ladder.sft.accuracy.high is nan; it must be finite"),
        (("ladder", "sft", "accuracy", "n"), True, "ladder.sft.accuracy.n is True; it must be a whole number"),
        (("ladder", "sft", "accuracy", "n"), 60.0, "ladder.sft.accuracy.n is 60.0; it must be a whole number"),
        (("ladder", "rl", "bytes"), -1, "ladder.rl.bytes is -1; it must be 0 or more"),
        (("stages",), "plan", "stages is 'plan'; it must be a list"),
        (("stages",), [], "stages is empty; it must hold at least one stage"),
        (("ladder",), {}, "ladder is empty; it must hold at least one checkpoint"),
        (("machine",), [], "machine is []; it must be an object"),
        (("samples", 0, "prompt"), 5, "samples[0].prompt is 5; it must be a text"),
        (("samples", 0, "answers", "rl", "correct"), 1, "samples[0].answers.rl.correct is 1; it must be true or false"),
        (("lineage", "rl", "parent"), "sfft", "lineage.rl.parent is 'sfft'; did you mean 'sft'?; it must be in the lineage"),
        (("lineage", "base", "parent"), "rl", "lineage.base.parent leads back to 'base'; no checkpoint descends from itself"),
    ],
)
def test_messages(report: dict[str, Any], keys: tuple[Any, ...], value: Any, message: str) -> None:
    at(report, keys[:-1])[keys[-1]] = value
    with pytest.raises(CheckpointError) as caught:
        validate(report)
    assert str(caught.value).startswith(f"report.json: {message}")
    assert str(caught.value).endswith("Correct the field or make the report anew")


def test_an_interval_that_does_not_hold_its_value(report: dict[str, Any]) -> None:
    report["ladder"]["rl"]["accuracy"] = {"value": 0.5, "low": 0.6, "high": 0.7, "n": 9}
    with pytest.raises(
        CheckpointError, match=r"ladder\.rl\.accuracy has low 0\.6, value 0\.5, high 0\.7; they must be in this order"
    ):
        validate(report)


def test_a_misspelt_field_gets_the_nearest_name(report: dict[str, Any]) -> None:
    report["ladder"]["rl"]["format_rates"] = report["ladder"]["rl"].pop("format_rate")
    with pytest.raises(CheckpointError, match=r"ladder\.rl\.format_rate is missing; did you mean 'format_rates'\?"):
        validate(report)


@pytest.mark.parametrize("value", [None, [], "report", 3])
def test_a_report_that_is_no_object(value: Any) -> None:
    with pytest.raises(CheckpointError, match=r"the report is .*; it must be an object"):
        validate(value)


@pytest.mark.parametrize("name", ["corpus", "tokenizer", "bits_per_byte", "curves", "samples", "lineage"])
def test_optional_parts_may_be_missing_or_null(report: dict[str, Any], name: str) -> None:
    report[name] = None
    validate(report)
    del report[name]
    validate(report)


def test_additional_keys_are_allowed_everywhere(report: dict[str, Any]) -> None:
    extra = {"more": [None, {"deep": float("inf")}]}
    for keys in [(), *(keys[:-1] for keys, _ in REQUIRED)]:
        if keys and keys[-1] in ("stages", "ladder", "skills", "lineage", "answers"):
            continue  # these hold named things of one kind
        at(report, keys)["additional"] = extra
    validate(report)


@given(keys=st.sampled_from([keys for keys, _ in REQUIRED]), value=json_values)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=80, deadline=None)
def test_no_value_makes_the_check_itself_fail(report: dict[str, Any], keys: tuple[Any, ...], value: Any) -> None:
    holder = at(report, keys[:-1])
    before = holder[keys[-1]]
    holder[keys[-1]] = value
    with contextlib.suppress(AthanorError):
        validate(report)
    holder[keys[-1]] = before


def test_rungs_come_in_the_order_of_the_work(report: dict[str, Any]) -> None:
    assert rungs({**report, "ladder": dict(sorted(report["ladder"].items()))}) == list(RUNGS)  # type: ignore[typeddict-item]
    assert ordered(["dpo", "rl", "base", "other"]) == ["base", "rl", "dpo", "other"]


def test_the_parent_is_that_of_the_lineage_or_the_usual_one(report: Any) -> None:
    assert [parent(report, name) for name in RUNGS] == [None, "base", "sft", "rl", "rl"]
    report["lineage"]["int4"]["parent"] = "sft"
    assert parent(report, "int4") == "sft"
    del report["ladder"]["rl"]
    assert parent(report, "int8") == "sft"  # the nearest that was measured
    report["lineage"] = None
    assert [parent(report, name) for name in ("sft", "int8", "int4", "dpo")] == ["base", "sft", "sft", None]
