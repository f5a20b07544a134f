"""The page's routes: what is served, under which policy, and that nothing comes from elsewhere. See test_page_browser.py."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import html5lib
import pytest
from fastapi.testclient import TestClient

from athanor.serve import page
from athanor.serve.app import create_app
from tests.serve.talker import Talker

HOME = page._HERE


@pytest.fixture
def run(tmp_path):
    (tmp_path / "run.json").write_text("{}")
    return tmp_path


def client(run=None):
    app = Talker().app
    page.install(app, run)
    return TestClient(app)


def test_the_page_on_the_real_server(fake, tokenizer, run):
    app = create_app(fake(), tokenizer, "athanor")
    page.install(app, run)
    with TestClient(app) as http:
        assert http.get("/").status_code == 200
        assert http.get("/v1/models").json()["data"][0]["id"] == "athanor"
        assert http.post("/feedback", json={}).status_code == 400
        assert (
            http.get("/page/nothing.js")
            .json()["error"]["message"]
            .startswith("the page has no part 'nothing.js': it has answer.js")
        )


def test_every_part_is_served_with_its_kind_and_a_strict_policy():
    http = client()
    assert {"/", "/page/app.js", "/page/style.css", "/page/icon.svg"} <= page.PUBLIC
    for path in page.PUBLIC:
        answer = http.get(path)
        assert answer.status_code == 200
        policy = dict(part.strip().partition(" ")[::2] for part in answer.headers["content-security-policy"].split(";"))
        assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
        assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == policy["img-src"] == "'self'"
        assert "unsafe" not in answer.headers["content-security-policy"]
        assert answer.headers["x-content-type-options"] == "nosniff"
    kinds = {path.rpartition(".")[2]: http.get(path).headers["content-type"].split(";")[0] for path in page.PUBLIC - {"/"}}
    assert kinds == {"js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}
    assert http.get("/").headers["content-type"].startswith("text/html")


@pytest.mark.parametrize("name", ["..%2Fpage.py", "../page.py", "index.html", "app.js%00"])
def test_nothing_else_of_the_folder_is_served(name):
    assert client().get(f"/page/{name}").status_code == 404


class _Links(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found, self.inline = [], []

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if name in ("src", "href", "action"):
                self.found.append(value)
            if name == "style" or name.startswith("on"):
                self.inline.append((tag, name))

    def handle_data(self, data):
        if self.lasttag in ("script", "style") and data.strip():
            self.inline.append((self.lasttag, data))


def test_nothing_comes_from_elsewhere_and_nothing_stands_in_the_html():
    links = _Links()
    links.feed((HOME / "index.html").read_text("utf-8"))
    assert links.inline == []
    assert len(links.found) >= 4
    assert [link for link in links.found if re.match(r"[a-z]+:|/", link)] == []
    for path in HOME.iterdir():
        addresses = set(re.findall(r"https?://[^\s\"')]+", path.read_text("utf-8")))
        assert addresses <= {"http://www.w3.org/2000/svg"}, path.name  # a name, not an address


def test_the_html_is_valid():
    html5lib.HTMLParser(strict=True).parse((HOME / "index.html").read_text("utf-8"))


def test_text_is_never_put_in_as_html():
    for path in HOME.glob("*.js"):
        text = path.read_text("utf-8")
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function", text), path.name


def test_both_languages_say_the_same_things():
    text = (HOME / "words.js").read_text("utf-8")
    english, chinese = (text[text.index(f"  {name}: {{") :].partition("\n  },")[0] for name in ("en", "zh"))
    keys = [sorted(re.findall(r"(?:^|[{,] |\n {4})(\w+): (?=\"|\()", part)) for part in (english, chinese)]
    assert keys[0] == keys[1]
    assert len(keys[0]) > 40
    html = (HOME / "index.html").read_text("utf-8")
    code = "".join(path.read_text("utf-8") for path in HOME.glob("*.js") if path.name != "words.js")
    used = set(re.findall(r"data-say(?:-\w+)?=\"(\w+)\"", html)) | set(re.findall(r"\b(?:say|announce)\(\"(\w+)\"", code))
    assert used <= set(keys[0])
    assert [key for key in keys[0] if f'"{key}"' not in html + code] == []  # no word that nobody says


def test_a_run_offers_its_report_and_feedback(run):
    assert 'data-report="no" data-feedback="no"' in client().get("/").text
    http = client(run)
    assert 'data-report="no" data-feedback="yes"' in http.get("/").text
    refused = http.get("/report")
    assert refused.status_code == 404
    assert (
        "this server has no report: serve a run that has one (`athanor report RUN` writes it)"
        in refused.json()["error"]["message"]
    )
    (run / "report.html").write_text("<h1>What it learned</h1>")
    assert 'data-report="yes"' in http.get("/").text  # it may be written while the server runs
    shown = http.get("/report")
    assert shown.text == "<h1>What it learned</h1>"
    assert "default-src 'none'" in shown.headers["content-security-policy"]
    assert "sandbox" in shown.headers["content-security-policy"]
    assert "script-src" not in shown.headers["content-security-policy"]
    assert client().get("/report").status_code == 404
    assert client().post("/feedback", json={}).status_code == 404


def test_the_run_of_a_model(run):
    model = run / "rl"
    model.mkdir()
    assert page.run_of(model) == run
    assert page.run_of(run) == run
    assert page.run_of(None) is None
    assert page.run_of(model / "deeper") is None
