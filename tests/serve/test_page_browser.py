"""The page driven in headless Chromium: send, stream, stop, rate, compare, both languages, phone width."""

from __future__ import annotations

import os
import re
import shutil

import pytest
from playwright.sync_api import Error, expect, sync_playwright

from athanor.serve import feedback, page
from athanor.serve.app import create_app
from tests.serve.talker import MODELS, Talker

pytestmark = pytest.mark.browser
EXECUTABLES = ("chromium", "chromium-browser", "google-chrome", "chrome", "chromium-headless-shell")
expect.set_options(timeout=30_000)
PLAIN = "athanor.test"  # this machine under a name that browsers do not trust without HTTPS, as they do 127.0.0.1
WIDE, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def chromium():
    path = os.environ.get("ATHANOR_CHROMIUM") or next(filter(None, map(shutil.which, EXECUTABLES)), None)
    with sync_playwright() as playwright:
        try:
            # Without its own sandbox, which containers do not allow: it shows nothing but our own page.
            arguments = ["--no-sandbox", f"--host-resolver-rules=MAP {PLAIN} 127.0.0.1"]
            browser = playwright.chromium.launch(executable_path=path, args=arguments)
        except Error as error:
            pytest.skip(f"no Chromium starts here: {error.message.splitlines()[0]}")
        yield browser
        browser.close()


@pytest.fixture
def run(tmp_path):
    (tmp_path / "run.json").write_text("{}")
    return tmp_path


@pytest.fixture
def talker(run):
    talker = Talker()
    page.install(talker.app, run)
    return talker


@pytest.fixture
def visit(chromium, running, talker):
    """`visit(**options of the browser)`: the page, opened; nothing may go wrong in it or come from elsewhere."""
    said, contexts = [], []
    with running(talker.app) as served:

        def open_page(app_url=None, locale="en-US", viewport=WIDE, quiet=True, **options):
            context = chromium.new_context(locale=locale, viewport=viewport, **options)
            contexts.append(context)
            context.set_default_timeout(30_000)
            shown = context.new_page()
            shown.on("request", lambda r: r.url.startswith((served.url, app_url or served.url)) or said.append(f"asked {r.url}"))
            shown.on("pageerror", lambda error: said.append(str(error)))
            if quiet:
                shown.on("console", lambda message: said.append(message.text))
            shown.goto(app_url or served.url)
            return shown

        yield open_page
        for context in contexts:
            context.close()
    assert said == []


def ask(shown, question, answers=1, state="done"):
    """Type and send a question and wait until as many answers to it are in `state`."""
    expect(shown.locator("#send")).to_be_visible()  # nothing is sent while an answer comes
    shown.get_by_role("textbox", name=re.compile("Ask something|输入问题")).fill(question)
    shown.keyboard.press("Enter")
    turn = shown.locator("#turns > li").last
    expect(turn.locator(f"[data-state={state}]")).to_have_count(answers)
    return turn


def until(shown, condition):
    """Wait for what no locator can wait for: the page's own policy forbids `wait_for_function`."""
    for _ in range(1500):
        if condition():
            return
        shown.wait_for_timeout(20)
    pytest.fail("it never came true")


def test_send_stream_and_history(visit, talker):
    shown = visit()
    expect(shown.get_by_label("Model", exact=True).locator("option")).to_have_text(list(MODELS))
    turn = ask(shown, "How?")
    answer = turn.locator("article > .text")
    assert "The furnace keeps one steady heat" in answer.inner_text()
    assert "This is answer 1 of first/rl." in answer.inner_text()
    expect(answer.locator("pre code")).to_contain_text("def heat(stage: int) -> float:")
    expect(answer.locator("p code")).to_have_text("heat(2)")
    assert re.search(r"\d+ tokens · \d+ tokens/s · first after \d+\.\d\d s", turn.locator(".cost").inner_text())
    thought = turn.locator("details")
    assert thought.get_attribute("open") is None  # folded once the answer has begun
    expect(thought.locator(".text")).to_be_hidden()
    thought.locator("summary").click()
    expect(thought.locator(".text")).to_have_text("First I think about it, for a while.")
    expect(shown.get_by_role("status")).to_have_text("The answer is complete.")

    ask(shown, "And\nthen?")
    first, second = talker.asked
    assert first["messages"] == [{"role": "user", "content": "How?"}]
    assert {"temperature", "top_p", "max_tokens", "seed"}.isdisjoint(first)  # the server's own defaults count
    roles = [message["role"] for message in second["messages"]]
    assert roles == ["user", "assistant", "user"]
    assert second["messages"][1]["content"].endswith("This is answer 1 of first/rl.")
    assert second["messages"][1]["reasoning_content"] == "First I think about it, for a while. "
    assert second["messages"][2]["content"] == "And\nthen?"

    shown.get_by_role("button", name="New chat").click()
    expect(shown.locator("#turns > li")).to_have_count(0)
    ask(shown, "Afresh?")
    assert len(talker.asked[-1]["messages"]) == 1


def test_text_comes_piece_by_piece_and_can_be_stopped(visit, talker):
    shown = visit()
    for stop in (lambda: shown.keyboard.press("Escape"), lambda: shown.get_by_role("button", name="Stop").click()):
        turn = ask(shown, "endless", state="streaming")
        expect(turn.locator("article > .text")).to_contain_text("on on on on")  # while it goes on
        stop()
        expect(turn.locator("[data-state=stopped]")).to_have_count(1)
        expect(turn.locator(".cost")).to_contain_text("stopped")
        expect(shown.get_by_role("button", name="Send")).to_be_visible()
        expect(shown.get_by_role("textbox", name="Ask something")).to_be_focused()
    until(shown, lambda: (talker.left, talker.running) == (2, 0))  # the server has noticed
    ask(shown, "And now?")
    assert talker.asked[-1]["messages"][1]["content"].startswith("on on")  # what was said stays said


def test_keys(visit, talker):
    shown = visit()
    field = shown.get_by_role("textbox", name="Ask something")
    expect(field).to_be_focused()
    field.press("Enter")
    field.type("one")
    low = field.bounding_box()["height"]
    field.press("Shift+Enter")
    field.type("two")
    assert field.bounding_box()["height"] > low
    field.dispatch_event("keydown", {"key": "Enter", "isComposing": True, "bubbles": True, "cancelable": True})  # input method
    assert (field.input_value(), talker.asked) == ("one\ntwo", [])
    field.press("Enter")
    expect(shown.locator("[data-state=done]")).to_have_count(1)
    expect(shown.locator(".question")).to_have_text("one\ntwo", use_inner_text=True)
    for _ in range(40):  # all can be reached by Tab, and one sees where one is
        shown.keyboard.press("Tab")
        if shown.evaluate("document.activeElement.ariaLabel") == "Good answer":
            break
    focused = shown.locator(":focus")
    expect(focused).to_have_accessible_name("Good answer")
    assert focused.evaluate("e => getComputedStyle(e).outlineStyle") == "solid"
    shown.keyboard.press("Space")
    expect(focused).to_have_attribute("aria-pressed", "true")


def test_parameters_and_system_prompt_are_sent_and_kept(visit, talker):
    shown = visit()
    shown.get_by_role("button", name="Settings").click()
    for label, value in (
        ("System prompt", "Be brief."),
        ("Temperature", "0.5"),
        ("Top p", "0.9"),
        ("Longest", "6"),
        ("Seed", "7"),
    ):
        shown.get_by_label(re.compile(label)).fill(value)
    turn = ask(shown, "How?")
    sent = talker.asked[-1]
    assert {name: sent[name] for name in ("temperature", "top_p", "max_tokens", "seed")} == {
        "temperature": 0.5, "top_p": 0.9, "max_tokens": 6, "seed": 7
    }  # fmt: skip
    assert sent["messages"][0] == {"role": "system", "content": "Be brief."}
    expect(turn.locator(".cost")).to_contain_text("cut off at the limit of tokens")
    shown.reload()
    shown.get_by_role("button", name="Settings").click()
    expect(shown.get_by_label(re.compile("System prompt"))).to_have_value("Be brief.")
    shown.get_by_label(re.compile("Temperature")).fill("3")
    shown.get_by_role("button", name="Settings").click()
    shown.get_by_role("textbox", name="Ask something").fill("How?")
    shown.keyboard.press("Enter")
    expect(shown.get_by_label(re.compile("Temperature"))).to_be_focused()  # what is wrong is shown, and nothing was sent
    assert len(talker.asked) == 1


def test_another_answer_thumbs_and_notes_become_a_pair(visit, run):
    shown = visit()
    turn = ask(shown, "How?")
    turn.get_by_role("button", name="Bad answer").click()
    expect(turn.get_by_role("button", name="Bad answer")).to_have_attribute("aria-pressed", "true")
    turn.get_by_role("button", name="Answer again").click()
    expect(turn.locator("article > .text")).to_contain_text("This is answer 2 of first/rl.")
    expect(turn.locator(".place")).to_have_text("2 of 2")
    good = turn.get_by_role("button", name="Good answer")
    expect(good).to_have_attribute("aria-pressed", "false")
    good.click()
    turn.get_by_role("button", name="Note").click()
    turn.get_by_role("textbox", name="Note").fill("Clear and short.")
    turn.get_by_role("button", name="Save").click()
    expect(turn.get_by_role("button", name="Note: Clear and short.")).to_be_visible()
    expect(turn.get_by_role("textbox", name="Note")).to_be_hidden()

    rows = feedback.Store(run / feedback.FILE).rows()
    assert sorted((row.rating, row.note, row.model, row.finish_reason) for row in rows) == [
        ("down", "", "first/rl", "stop"),
        ("up", "Clear and short.", "first/rl", "stop"),
    ]
    assert all(re.fullmatch("req-[0-9a-f]{32}", row.request_id) for row in rows)
    (made,) = feedback.pair(rows).pairs
    assert made.prompt[0].content == "How?"
    assert made.chosen.content.endswith("This is answer 2 of first/rl.")
    assert made.rejected.content.endswith("This is answer 1 of first/rl.")
    assert made.chosen.reasoning == "First I think about it, for a while. "

    turn.get_by_role("button", name="Previous answer").click()
    expect(turn.locator("article > .text")).to_contain_text("This is answer 1 of first/rl.")
    bad = turn.get_by_role("button", name="Bad answer")
    expect(bad).to_have_attribute("aria-pressed", "true")
    bad.click()  # taken back
    expect(bad).to_have_attribute("aria-pressed", "false")
    assert feedback.pair(feedback.Store(run / feedback.FILE).rows()).counts["unrated"] == 1


def test_an_answer_can_be_copied(visit):
    shown = visit()
    turn = ask(shown, "html")
    shown.context.grant_permissions(["clipboard-read", "clipboard-write"])
    turn.get_by_role("button", name="Copy the answer").click()
    expect(turn.get_by_role("button", name="Copied")).to_be_visible()
    assert shown.evaluate("navigator.clipboard.readText()").startswith("<img src=x onerror=")


def test_where_nothing_can_be_copied_the_answer_is_selected(visit):
    trusted = visit()
    shown = visit(trusted.url.replace("127.0.0.1", PLAIN))  # as over a network: no HTTPS, so no clipboard
    assert shown.evaluate("[isSecureContext, navigator.clipboard === undefined]") == [False, True]
    turn = ask(shown, "html")
    turn.get_by_role("button", name="Copy the answer").click()
    until(shown, lambda: "onerror" in shown.evaluate("getSelection().toString()"))
    expect(turn.get_by_role("button", name="Copied")).to_have_count(0)


def test_feedback_that_is_not_kept_is_not_shown_as_kept(visit, run):
    shown = visit(quiet=False)
    turn = ask(shown, "How?")
    (run / feedback.FILE).mkdir()  # no file can be written there
    turn.get_by_role("button", name="Good answer").click()
    expect(turn.get_by_role("alert")).to_contain_text("Not saved: internal error; the server's log has it under the id req-")
    expect(turn.get_by_role("button", name="Good answer")).to_have_attribute("aria-pressed", "false")


def test_two_models_side_by_side(visit, talker):
    shown = visit()
    ask(shown, "Alone?")
    shown.get_by_role("button", name="Compare").click()
    turn = ask(shown, "Which?", answers=2)
    left, right = turn.locator("article").all()
    assert (left.locator(".model").inner_text(), right.locator(".model").inner_text()) == MODELS
    assert abs(left.bounding_box()["y"] - right.bounding_box()["y"]) < 2
    assert left.bounding_box()["x"] + left.bounding_box()["width"] < right.bounding_box()["x"] + 24
    asked = {body["model"]: body["messages"] for body in talker.asked[1:]}
    assert asked["first/rl"] == asked["first/sft"]  # what was said before is both panes' history

    ask(shown, "And?", answers=2)
    histories = {body["model"]: body["messages"] for body in talker.asked[3:]}
    assert histories["first/rl"][3]["content"].endswith("of first/rl.")
    assert histories["first/sft"][3]["content"].endswith("of first/sft.")
    right = shown.locator("#turns > li").last.locator("article").last
    right.get_by_role("button", name="Answer again").click()
    expect(right.locator(".place")).to_have_text("2 of 2")
    assert [body["model"] for body in talker.asked[5:]] == ["first/sft"]
    ask(shown, "endless", answers=2, state="streaming")
    shown.keyboard.press("Escape")
    expect(shown.locator("[data-state=stopped]")).to_have_count(2)
    shown.get_by_role("button", name="Compare").click()
    expect(shown.get_by_label("Second model")).to_be_hidden()
    assert ask(shown, "Alone again?").locator("article").count() == 1


@pytest.mark.parametrize(
    ("question", "state", "message"),
    [
        ("refuse", "failed", "this is refused"),
        ("fail", "failed", "it went wrong"),
        ("break", "broken", "The connection broke before the answer was complete."),
    ],
)
def test_errors_are_told_and_can_be_tried_again(visit, talker, question, state, message):
    shown = visit(quiet=False)
    turn = ask(shown, question, state=state)
    expect(turn.get_by_role("alert")).to_have_text(message)
    turn.get_by_role("button", name="Answer again").click()
    expect(turn.locator(".place")).to_have_text("2 of 2")
    expect(turn.locator(f"[data-state={state}]")).to_have_count(1)
    ask(shown, "How?")
    questions = [m["content"] for m in talker.asked[-1]["messages"] if m["role"] == "user"]
    assert questions == ["How?"]  # a question without an answer is no history


def test_an_answer_cannot_become_html(visit):
    shown = visit()
    turn = ask(shown, "html")
    assert "<img src=x onerror=" in turn.inner_text() and "</code><script>" in turn.inner_text()
    assert turn.locator("img, b, script").count() == 0
    assert shown.title() == "Athanor"


def test_chinese(visit, talker):
    shown = visit(locale="zh-CN")
    expect(shown.locator("html")).to_have_attribute("lang", "zh-CN")
    turn = ask(shown, "炉子怎么保持温度？")
    expect(turn.locator("summary")).to_have_text("推理过程")
    expect(turn.locator(".cost")).to_contain_text("个词元")
    turn.get_by_role("button", name="回答很好").click()
    expect(turn.get_by_role("button", name="回答很好")).to_have_attribute("aria-pressed", "true")
    assert talker.asked[-1]["messages"] == [{"role": "user", "content": "炉子怎么保持温度？"}]
    assert re.findall("[A-Za-z]{3,}", shown.locator("header").inner_text().replace("first/rl", "").replace("first/sft", "")) == [
        "Athanor",
        "English",
    ]
    shown.get_by_role("button", name="English").click()
    expect(shown.get_by_role("button", name="Send")).to_be_visible()
    expect(turn.get_by_role("button", name="Good answer")).to_be_visible()  # what is there already too
    shown.reload()
    expect(shown.get_by_role("button", name="Send")).to_be_visible()  # remembered


@pytest.mark.parametrize("locale", ["en-US", "zh-CN"])
def test_phone_width(visit, locale):
    shown = visit(locale=locale, viewport=PHONE)
    shown.locator("#compare").click()
    turn = ask(shown, "x" * 300, answers=2)
    shown.locator("#settings-button").click()
    expect(shown.locator("#system")).to_be_in_viewport()
    assert shown.evaluate("document.documentElement.scrollWidth") == PHONE["width"]  # nothing sticks out
    for control in shown.locator("button:visible, select:visible, a:visible, input:visible, textarea:visible").all():
        box = control.bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= PHONE["width"]
        assert box["height"] >= 34  # a finger finds it
    one, two = turn.locator("article").all()
    assert two.bounding_box()["y"] > one.bounding_box()["y"] + one.bounding_box()["height"] - 1  # below each other
    pre = one.locator("pre")
    assert pre.evaluate("e => e.scrollWidth > e.clientWidth")  # long code is scrolled by itself


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out(visit, scheme):
    """Contrast by WCAG 2, 1.4.3: at least 4.5."""
    shown = visit(color_scheme=scheme)
    turn = ask(shown, "How?")
    paper = _luminance(shown.locator("html").evaluate("e => getComputedStyle(e).backgroundColor"))
    assert (paper > 0.5) == (scheme == "light")
    for element in (
        turn.locator("article > .text p").first,
        turn.locator(".cost"),
        turn.locator(".model"),
        turn.locator("summary"),
    ):
        light, dark = sorted((_luminance(element.evaluate("e => getComputedStyle(e).color")), paper), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5


def _luminance(colour):
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("locale", ["en-US", "zh-CN"])
def test_every_control_has_a_name(visit, locale):
    shown = visit(locale=locale)
    shown.locator("#compare").click()
    ask(shown, "How?", answers=2)
    shown.locator("#settings-button").click()
    controls = shown.locator("button:visible, select:visible, a:visible, input:visible, textarea:visible").all()
    assert len(controls) > 20
    for control in controls:
        expect(control).to_have_accessible_name(re.compile(r"\S"))


def test_the_report(visit, run):
    shown = visit()
    expect(shown.get_by_role("link", name="Report")).to_be_hidden()
    (run / "report.html").write_text(
        "<style>h1 { color: rgb(1, 2, 3) }</style><h1>Learned</h1><script>document.title = 'x'</script>"
    )
    shown.reload()
    with shown.context.expect_page() as opened:
        shown.get_by_role("link", name="Report").click()
    expect(opened.value.get_by_role("heading")).to_have_text("Learned")
    assert opened.value.title() == ""
    expect(opened.value.get_by_role("heading")).to_have_css("color", "rgb(1, 2, 3)")


def test_a_key_is_asked_for_and_sent(visit, running, run):
    talker = Talker(key="open sesame")
    page.install(talker.app, run)
    (run / "report.html").write_text("<h1>Learned</h1>")
    with running(talker.app) as served:
        shown = visit(served.url, quiet=False)
        for key in ("wrong", "open sesame"):
            expect(shown.get_by_role("dialog")).to_be_visible()
            shown.get_by_label("API key").fill(key)
            shown.keyboard.press("Enter")
        expect(shown.get_by_role("dialog")).to_be_hidden()
        ask(shown, "How?")
        with shown.expect_download() as kept:  # a link would not carry the key
            shown.get_by_role("link", name="Report").click()
        assert kept.value.suggested_filename == "report.html"
        shown.reload()
        ask(shown, "Still there?")


def test_a_server_that_is_gone_is_told(visit, running, run):
    talker = Talker(models=())
    page.install(talker.app, run)
    with running(talker.app) as served:
        shown = visit(served.url, quiet=False)
        expect(shown.get_by_role("alert")).to_have_text("The server names no model.")
        talker.models = MODELS
        ask(shown, "And now?")  # it is looked for again
        expect(shown.locator("#model-0 option")).to_have_count(2)
    turn = ask(shown, "Anybody?", state="failed")
    expect(turn.get_by_role("alert")).to_have_text("The server cannot be reached.")


def test_with_our_own_server_and_model(visit, running, lm, run):
    app = create_app(lm.engine(), lm.tokenizer, "tiny/rl")
    page.install(app, run)
    with running(app) as served:
        shown = visit(served.url)
        shown.get_by_role("button", name="Settings").click()
        shown.get_by_label(re.compile("Longest")).fill("20")
        expect(shown.get_by_role("button", name="New chat")).to_be_disabled()
        shown.locator("#question").fill("Are you there?")
        shown.keyboard.press("Enter")
        said = []
        for seed in ("3", "3", "4"):
            shown.get_by_label(re.compile("Seed")).fill(seed)
            shown.get_by_role("button", name="New chat").click()
            turn = ask(shown, "12 + 30 = ?")
            said.append(turn.locator("article > .text, details .text").evaluate_all("all => all.map((e) => e.textContent)"))
            assert re.search(r"\d+ tokens?", turn.locator(".cost").inner_text())
        assert said[0] == said[1] != said[2]
