"""Every skill of the house: its answers recomputed from the text of the question alone."""

import calendar
import datetime
import heapq
import random
import re
from itertools import islice

import pytest

from athanor.evals import skill

NAMES = skill.names()
ZH_DAYS = ["星期一", "星期二", "星期三", "星期四", "星期五", "星期六", "星期日"]
DIGITS_OUT = str.maketrans("0123456789", " " * 10)
SMALL = {"add", "subtract", "next_in_sequence", "clock", "weekday"}  # skills whose problems can be told one by one


def numbers(text):
    return [int(n) for n in re.findall(r"\d+", text)]


def letters(text):
    return re.findall(r"(?<![A-Za-z])[a-z](?![A-Za-z])", text)


def later(days, language, text):
    names = list(calendar.day_name) if language == "en" else ZH_DAYS
    (start,) = [i for i, name in enumerate(names) if name in text]
    date = datetime.date(2001, 1, 1) + datetime.timedelta(days=start) + days
    return names[date.weekday()]


def clock(language, text):
    now = datetime.datetime.strptime(re.search(r"\d\d:\d\d", text).group(), "%H:%M")
    (minutes,) = re.findall(r"(?<![:\d])(\d+)(?: minutes|分钟)", text)
    return (now + datetime.timedelta(minutes=int(minutes))).strftime("%H:%M")


def removed(language, text):
    found = letters(text)
    *rest, target = found if text.startswith("从") else [*found[1:], found[0]]
    return " ".join("".join(rest).replace(target, ""))


# What the answer must be, from language and question.
SOLVERS = {
    "add": lambda lang, q: str(sum(numbers(q))),
    "subtract": lambda lang, q: str(max(numbers(q)) - min(numbers(q))),
    "sort_numbers": lambda lang, q: ",".join(map(str, heapq.nsmallest(99, numbers(q)))),
    "sort_letters": lambda lang, q: " ".join(heapq.nsmallest(99, letters(q))),
    "count_letter": lambda lang, q: str("".join(letters(q)[1:]).count(letters(q)[0])),
    "compare": lambda lang, q: str((max if re.search("larger|大", q) else min)(numbers(q))),
    "maximum": lambda lang, q: str(heapq.nlargest(1, numbers(q))[0]),
    "reverse": lambda lang, q: " ".join(letters(q))[::-1],
    "nth_letter": lambda lang, q: letters(q)[numbers(q)[0] - 1],
    "remove_letter": removed,
    "weekday": lambda lang, q: later(datetime.timedelta(weeks=numbers(q)[0], days=numbers(q)[1]), lang, q),
    "next_in_sequence": lambda lang, q: str(2 * numbers(q)[-1] - numbers(q)[-2]),
    "count_even": lambda lang, q: str(len(re.findall(r"[02468](?!\d)", q))),
    "clock": clock,
}

# That the answer can be read off the reasoning, without the question.
FOLLOWS = {
    "add": lambda r, a: a == r.rpartition("=")[2] + r.partition(",")[0][-1],
    "subtract": lambda r, a: int(a) == int(r.rpartition("+")[2] + r.partition(",")[0][-1]),
    "sort_numbers": lambda r, a: r == ",".join(n[0] for n in a.split(",")),
    "sort_letters": lambda r, a: a == r.replace("<", " "),
    "count_letter": lambda r, a: a == str(r.count("_")),
    "compare": lambda r, a: a[r.count(":") - 1] in r.rpartition(" ")[2],
    "maximum": lambda r, a: a == max(r.split(",")),
    "reverse": lambda r, a: a == " ".join(letters(r.partition(",")[2].translate(DIGITS_OUT))),
    "nth_letter": lambda r, a: a == r[-1],
    "remove_letter": lambda r, a: a == " ".join(letters(r.partition(": ")[2].translate(DIGITS_OUT).replace("_", " "))),
    "weekday": lambda r, a: a in (calendar.day_name[numbers(r)[-1] - 1], ZH_DAYS[numbers(r)[-1] - 1]),
    "next_in_sequence": lambda r, a: a[-1] == r.split(", ")[1][-1] and (r.count(",") < 2 or a[:-1] == r.rpartition("=")[2]),
    "count_even": lambda r, a: a == r[-1],
    "clock": lambda r, a: a[3] == str(numbers(r)[2] % 6) and (len(numbers(r)) == 3 or int(a[:2]) == numbers(r)[-1]),
}


def drawn(name, n, seed=0):
    rng = random.Random(seed)
    module = skill.skill(name)
    return [module.problem(rng) for _ in range(n)]


def tokens(text):
    """About how many tokens: words, digits, signs and Chinese characters count one each."""
    return len(re.findall(r"[A-Za-z]+|[^\sA-Za-z]", text))


def all_texts(problem):
    return [(lang, text) for lang, phrasings in problem.question.items() for text in phrasings]


def test_every_skill_of_the_house_has_a_solver_here():
    assert sorted(SOLVERS) == sorted(FOLLOWS) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_answers_are_those_of_another_computation(name):
    for example in islice(skill.examples([name], "train", 1), 2000):
        question, answer = example.conversation
        assert SOLVERS[name](example.language, question.content) == answer.content, question


@pytest.mark.parametrize("name", NAMES)
def test_every_phrasing_asks_the_same(name):
    for problem in drawn(name, 200):
        for language, text in all_texts(problem):
            answer = problem.answer if isinstance(problem.answer, str) else problem.answer[language]
            assert SOLVERS[name](language, text) == answer, text


@pytest.mark.parametrize("name", NAMES)
def test_every_step_written_is_true_and_leads_to_the_answer(name):
    for example in islice(skill.examples([name], "train", 2), 2000):
        _, answer = example.conversation
        for a, b, total in re.findall(r"(\d+)\+(\d+)=(\d+)(?![\d+])", answer.reasoning):
            assert int(a) + int(b) == int(total), answer
        for total, a, b in re.findall(r"(?<![\d+])(\d+)=(\d+)\+(\d+)", answer.reasoning):
            assert int(total) == int(a) + int(b), answer
        for a, b, sign in re.findall(r"(\d):(\d)([<=>])", answer.reasoning):
            assert sign == "<=>"[(int(a) > int(b)) - (int(a) < int(b)) + 1], answer
        assert FOLLOWS[name](answer.reasoning, answer.content), answer


@pytest.mark.parametrize("name", NAMES)
def test_two_languages_with_two_to_four_phrasings_and_the_same_operands(name):
    for problem in drawn(name, 100):
        assert set(problem.question) == {"en", "zh"}
        for language, phrasings in problem.question.items():
            assert 2 <= len(set(phrasings)) == len(phrasings) <= 4
            for text in phrasings:
                assert bool(re.search(r"[\u4e00-\u9fff]", text)) == (language == "zh"), text
        assert len({(*sorted(numbers(text)), *sorted(letters(text))) for _, text in all_texts(problem)}) == 1


def template(text):
    text = re.sub(r"[A-Z][a-z]+day|星期[一二三四五六日]", "DAY", text)
    text = re.sub(r"\d+", "N", re.sub(r"(?<![A-Za-z])[a-z](?![A-Za-z])", "L", text))
    return re.sub(r"L( L)+", "LIST", re.sub(r"N(,N)+", "LIST", text))


def test_no_two_skills_share_a_phrasing():
    owner = {}
    for name in NAMES:
        for problem in drawn(name, 200):
            for language, text in all_texts(problem):
                assert owner.setdefault(template(text), (name, language)) == (name, language), text


@pytest.mark.parametrize("name", NAMES)
def test_texts_are_short_and_letters_stand_alone(name):
    for example in islice(skill.examples([name], "train", 3), 2000):
        question, answer = example.conversation
        assert tokens(question.content) <= 26
        assert 1 <= tokens(answer.reasoning) <= 45
        assert 1 <= tokens(answer.content) <= 11
        assert question.content == question.content.strip()
        assert not re.search(r"[a-z][\u4e00-\u9fff]|[\u4e00-\u9fff：，][a-z]", question.content)


@pytest.mark.parametrize("name", NAMES)
def test_at_least_3000_problems_and_300_held_out(name):
    keys = {problem.key for problem in drawn(name, 60_000 if name in SMALL else 5_000)}
    assert len(keys) >= 3000
    assert sum(skill.split_of(name, key) == "heldout" for key in keys) >= 300


@pytest.mark.parametrize("name", NAMES)
def test_a_key_stands_for_one_task(name):
    answers, operands = {}, {}
    for problem in drawn(name, 20_000):
        assert answers.setdefault(problem.key, problem.answer) == problem.answer
        if name in {"add", "sort_numbers", "sort_letters", "maximum", "count_even"}:  # their order does not matter
            text = problem.question["en"][0]
            assert operands.setdefault((*sorted(numbers(text)), *sorted(letters(text))), problem.key) == problem.key


@pytest.mark.parametrize("name", NAMES)
def test_train_and_heldout_never_meet(name):
    sides = [{e.problem.key for e in islice(skill.examples([name], side, 4), 5000)} for side in ("train", "heldout")]
    assert all(sides)
    assert not sides[0] & sides[1]


@pytest.mark.parametrize("name", NAMES)
def test_the_reference_scores_1_and_others_0(name):
    first, *others = skill.heldout([name], 100, 0)
    reference = first.conversation[1]
    assert skill.score(first, reference) == 1
    for other in others:
        wrong = other.conversation[1]
        assert skill.score(first, wrong) == (wrong.content == reference.content)
