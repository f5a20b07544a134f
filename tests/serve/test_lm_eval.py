"""EleutherAI's lm-eval gives one folder the same scores through our server as through transformers.

And what it sends and reads (`lm_eval/models/openai_completions.py`) is understood, whether it is installed or not.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
import torch

import athanor
from athanor.lm import LM
from athanor.models import llama
from athanor.objectives import next_token
from athanor.serve.app import create_app, create_server
from athanor.serve.models import Served
from athanor.tokenizer.bpe import Tokenizer
from athanor.types import IGNORE, Batch

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "lm_eval"
ROLLING = ("athanor_perplexity", "long_text")
TASKS = ("athanor_choice", "athanor_answer", *ROLLING)
# Float32: of an answer's log-likelihood, both sides are up to 1e-5 away from float64's; of a long text's, 1e-6 of it.
CLOSE = {"rel": 1e-6, "abs": 1e-5}
CONTEXT = 64
LONG = """\
task: long_text
dataset_path: json
dataset_kwargs: {data_files: {test: long.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - {metric: byte_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
"""


def questions():
    return [json.loads(line) for line in (EXAMPLE / "questions.jsonl").read_text(encoding="utf-8").splitlines()]


def texts():
    """Each question with the answer that stands first, which is not always the right one."""
    return [f"Question: {q['question']}\nAnswer: {q['choices'][0]}\n" for q in questions()]


def learned(lm, steps=60):
    """Teach a model the texts almost by heart, each ended by its control token. Returns the loss per token at the end."""
    rows = [[lm.tokenizer.bos_id, *lm.tokenizer.encode(text), lm.tokenizer.end_id] for text in texts()]
    ids = torch.tensor([id for row in rows for id in row])
    labels = torch.tensor([id for row in rows for id in [*row[1:], IGNORE]])
    batch = Batch(ids, labels, torch.tensor([len(row) for row in rows]))
    optimizer = torch.optim.AdamW(lm.model.parameters(), 1e-2)
    for _ in range(steps):
        total, count, _ = next_token.loss(lm.model, batch)
        optimizer.zero_grad()
        (total / count).backward()
        optimizer.step()
    return float(total.detach() / count)


@pytest.fixture(scope="module")
def installed():
    pytest.importorskip("lm_eval", reason="the scores are lm-eval's: pip install 'lm_eval[api]'")
    pytest.importorskip("tenacity", reason="lm-eval asks servers with it: pip install 'lm_eval[api]'")


@pytest.fixture(scope="module")
def taught(installed):
    """A tiny model that has read the texts, and so has preferences, some of them right."""
    torch.manual_seed(0)
    tokenizer = Tokenizer.train(texts() * 2, 320)
    shape = {"d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "d_ff": 64, "tied": True}
    lm = LM(llama.Model(llama.Config(vocab_size=tokenizer.vocab_size, max_positions=CONTEXT, **shape)), tokenizer)
    assert 0.05 < learned(lm) < 1.5
    lm.model.eval()
    return lm


@pytest.fixture(scope="module")
def place(taught, tmp_path_factory):
    """A working folder with the model, the example's tasks and one more: a text longer than the context, several times."""
    folder = tmp_path_factory.mktemp("harness")
    taught.save(folder / "runs" / "first" / "rl")
    shutil.copytree(EXAMPLE, folder / "examples" / "lm_eval")
    (folder / "examples" / "lm_eval" / "long_text.yaml").write_text(LONG, encoding="utf-8")
    whole = "".join(texts())
    assert len(taught.tokenizer.encode(whole)) > 4 * CONTEXT
    (folder / "long.jsonl").write_text(json.dumps({"text": whole}) + "\n", encoding="utf-8")
    return folder


def shown(model, **instead):
    """The arguments of the example's command for a model of this type, some of its numbers and addresses replaced."""
    page = re.sub(r"\\\n *", "", (EXAMPLE / "README.md").read_text(encoding="utf-8"))
    (line,) = re.findall(rf"^lm_eval (run --model {model} .*)$", page, re.M)
    for name, value in instead.items():
        line, count = re.subn(rf"(\b{name}[= ])[^ ,]+", rf"\g<1>{value}", line)
        assert count == 1, name
    return shlex.split(line)


def evaluate(place, name, command):
    """Run lm-eval in a process of its own, offline. Returns its figures by task, and what it was told by document."""
    assert command[-2:] == ["--tasks", "athanor_choice,athanor_perplexity,athanor_answer"]
    out = place / name
    env = {**os.environ, "HF_HOME": str(place / "cache"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    env |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [*command[:-1], ",".join(TASKS), "--output_path", str(out), "--log_samples"]
    done = subprocess.run([sys.executable, "-m", "lm_eval", *command], cwd=place, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = out.glob("*/results_*.json")
    samples = {}
    for task in TASKS:
        (file,) = out.glob(f"*/samples_{task}_*.jsonl")
        documents = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        samples[task] = [r[0] for d in sorted(documents, key=lambda d: d["doc_id"]) for r in d["resps"]]
    return json.loads(results.read_text(encoding="utf-8"))["results"], samples


def scores(results, task):
    """The figures of a task by metric, without its name."""
    return {metric: value for metric, value in results[task].items() if isinstance(value, (int, float))}


def logprobs(samples):
    """The log-likelihoods of all answers, and of all texts."""
    return [float(x) for x, _ in samples["athanor_choice"]] + [float(x) for task in ROLLING for x in samples[task]]


@pytest.fixture(scope="module")
def theirs(place):
    """What lm-eval finds with transformers; the context is two less, see the example's page."""
    return evaluate(place, "theirs", shown("hf", max_length=CONTEXT - 2))


@pytest.fixture(scope="module")
def url(place, running):
    lm = athanor.load(place / "runs" / "first" / "rl")
    with running(create_server([Served.of(lm)])) as served:
        yield served.url


@pytest.mark.slow
@pytest.mark.parametrize(("batch", "concurrent"), [(1, 1), (5, 3)])
def test_the_scores_are_those_of_transformers(place, theirs, url, batch, concurrent):
    instead = {"base_url": f"{url}/v1/completions", "max_length": CONTEXT, "batch_size": batch, "num_concurrent": concurrent}
    results, samples = evaluate(place, f"ours-{batch}", shown("local-completions", **instead))
    expected_results, expected = theirs

    for task in ("athanor_choice", "athanor_answer"):
        assert scores(results, task) == scores(expected_results, task)
    for task in ROLLING:
        assert scores(results, task) == pytest.approx(scores(expected_results, task), rel=1e-5)

    assert samples["athanor_answer"] == expected["athanor_answer"]
    assert [greedy for _, greedy in samples["athanor_choice"]] == [greedy for _, greedy in expected["athanor_choice"]]
    assert logprobs(samples) == pytest.approx(logprobs(expected), **CLOSE)


@pytest.mark.slow
def test_the_scores_say_something(theirs):
    """Equal scores of a model that knows all or nothing would show little."""
    results, samples = theirs
    assert 0 < scores(results, "athanor_choice")["acc,none"] < 1
    assert 0 < scores(results, "athanor_answer")["exact_match,stripped"] < 1
    assert {greedy for _, greedy in samples["athanor_choice"]} == {"True", "False"}
    assert len(set(samples["athanor_answer"])) > 5


def test_both_languages_of_the_example_give_the_same_commands():
    def of(page):
        text = (EXAMPLE / page).read_text(encoding="utf-8")
        code = r"^```bash\n(.*?)^```$"
        return re.findall(code, text, re.M | re.S), set(re.findall(r"`([^`\n]+)`", re.sub(code, "", text, flags=re.M | re.S)))

    assert of("README.md") == of("README.zh-CN.md")


# What lm-eval sends, without it.


@pytest.fixture(scope="module")
def ask(lm, running):
    """Send a body to /v1/completions; returns the response."""
    with running(create_app(lm.engine(), lm.tokenizer, "tiny")) as served:

        def post(**fields):
            return httpx.post(f"{served.url}/v1/completions", json={"model": "tiny", **fields}, timeout=60)

        yield post


def asked_for_logprobs(prompt, **more):
    return {"prompt": prompt, "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True, **more}


def test_every_prompt_has_one_entry_more_than_tokens_whatever_comes_next(lm, ask):
    """lm-eval leaves the last entry out: a token that is not told, for it ends the answer, would cost one of the prompt."""
    prompts = [lm.tokenizer.prompt(text) for text in ("The lazy dog", "42", "The quick brown fox jumps")]
    for next_id in (lm.tokenizer.end_id, lm.tokenizer.think_id, lm.tokenizer.encode("x")[0]):
        answer = ask(**asked_for_logprobs(prompts, logit_bias={str(next_id): 100})).json()
        assert [c["index"] for c in answer["choices"]] == [0, 1, 2]
        for prompt, choice in zip(prompts, answer["choices"], strict=True):
            told = choice["logprobs"]
            assert {name: len(values) for name, values in told.items()} == dict.fromkeys(
                ("tokens", "token_logprobs", "top_logprobs", "text_offset"), len(prompt) + 1
            )
            assert told["tokens"] == [lm.tokenizer.token(id) for id in [*prompt, next_id]]


def test_a_batch_is_answered_as_its_prompts_alone(lm, ask):
    prompts = [lm.tokenizer.prompt(text) for text in ("The lazy dog", "42", "The quick brown fox jumps")]
    together = ask(**asked_for_logprobs(prompts)).json()["choices"]
    for prompt, choice in zip(prompts, together, strict=True):
        (alone,) = ask(**asked_for_logprobs([prompt])).json()["choices"]
        assert choice["logprobs"]["tokens"] == alone["logprobs"]["tokens"]
        for ours, wanted in zip(choice["logprobs"]["token_logprobs"][1:], alone["logprobs"]["token_logprobs"][1:], strict=True):
            assert ours == pytest.approx(wanted, abs=1e-5)


def test_a_generation_as_lm_eval_asks_for_it(lm, ask):
    """With the text of the end token among the stops, transformers' name of the limit and its beams, of which there is one."""
    sent = {"prompt": [lm.tokenizer.prompt("The lazy dog")], "temperature": 0.0, "stop": ["\n\n", "<|end|>"], "seed": 1234}
    plain = ask(**sent, max_tokens=4, ignore_eos=True)
    assert plain.json()["usage"]["completion_tokens"] == 4
    for most, lowered in ((256, 4), (4, 40), (4, None)):
        response = ask(**sent, max_tokens=most, max_new_tokens=lowered, num_beams=1, ignore_eos=True)
        assert response.status_code == 200, response.text
        assert response.json()["choices"] == plain.json()["choices"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_new_tokens": 5}, "'max_new_tokens' only lowers 'max_tokens', which is missing: send that"),
        ({"max_new_tokens": 0, "max_tokens": 5}, "'max_new_tokens' is 0: input should be greater than or equal to 1"),
        ({"num_beams": 4}, "'num_beams' is not supported yet (got 4): leave it out"),
    ],
)
def test_what_of_it_is_refused(ask, fields, message):
    response = ask(prompt="dog", **fields)
    assert response.status_code == 400
    assert response.json()["error"]["message"] == message
