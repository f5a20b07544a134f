"""`athanor plan` of a model or a budget; what it says of lives is tested with lives."""

import json

import pytest

from athanor import cli
from athanor.core import plugins
from athanor.train import devices

SMALL = ("llama", "--shape.vocab-size", 512, "--shape.d-model", 64, "--shape.n-layers", 1, "--shape.n-heads", 2)
QUICK = ("--device", "h100", "--context", 64, "--batch-tokens", 512)


@pytest.fixture
def run(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")

    def go(*arguments):
        status = cli.main(["plan", *map(str, arguments)])
        out, err = capsys.readouterr()
        return status, out, " ".join(err.split())

    return go


def found(run, *arguments):
    status, out, err = run(*arguments, "--json")
    assert status == 0, err
    return json.loads(out)


def test_a_model_as_tables(run):
    status, out, err = run(*SMALL, *QUICK)
    assert (status, err) == (0, "")
    for words in (
        "(llama, 1 layer, 64 wide, vocabulary 512).",
        "An update is 512 tokens in rows of 64, 8 in each of 1 micro-batches; bf16, adamw, checkpointing none, one process.",
        "weights", "activations", "kept for the backward pass", "fits into 80.0", "a loss that held them would need", "6N:",
        "20 for each parameter", "1 x H100 SXM 80 GB: 989.4 TFLOP/s at 40% of the peak (assumed)",
        "an hour (assumed unless given)", "Besiroglu et al. 2024, refitted", "Kaplan et al. 2020",
        "context, workspaces, allocator (assumed)",
    ):  # fmt: skip
        assert words in out, words


def test_as_json_and_into_a_file(run, tmp_path):
    plan = found(run, *SMALL, *QUICK, "--out", tmp_path / "plan.json")
    assert plan == json.loads((tmp_path / "plan.json").read_text())
    assert plan["need"]["peak"] == sum(plan["need"]["parts"].values()) and plan["fits"]
    assert plan["shape"]["d_model"] == 64 and plan["setup"]["layout"] == "one process" and plan["devices"] == 1
    assert plan["cost"]["tokens"] == 20 * plan["parameters"]


@pytest.fixture(scope="module")
def plain():
    """The plan that the options below change, made once."""
    return {}


@pytest.mark.parametrize(
    ("arguments", "path"),
    [
        (("--price", 100), "cost.dollars"),
        (("--mfu", 0.1), "cost.seconds"),
        (("--tokens", "1M"), "cost.tokens"),
        (("--hours", 1), "cost.tokens"),
        (("--precision", "fp32"), "cost.seconds"),
        (("--precision", "bf16-pure"), "need.peak"),
        (("--checkpointing", "full"), "need.peak"),
        (("--optimizer", "sgd"), "need.parts.optimizer"),
        (("--tune", "lora"), "need.trainable"),
        (("--accumulate", 4), "need.peak"),
        (("--parallel", "fsdp=2"), "need.parts.weights"),
        (("--memory", "1MB"), "fits"),
        (("--shape.max-positions", 4096), "shape.max_positions"),
    ],
)
def test_every_option_changes_something(run, plain, arguments, path):
    def at(plan):
        for key in path.split("."):
            plan = plan[key]
        return plan

    plain |= {} if plain else found(run, *SMALL, *QUICK)
    assert at(found(run, *SMALL, *QUICK, *arguments)) != at(plain)


def test_what_would_fit_is_tried_where_it_does_not(run):
    status, out, _ = run(*SMALL, *QUICK, "--memory", "1501MB")
    assert status == 0 and "does NOT fit into" in out and "--checkpointing full" in out and "--tune qlora" in out


def test_too_little_time_and_no_bfloat16_are_said(run):
    _, out, _ = run(*SMALL, *QUICK[2:], "--device", "v100", "--tokens", "1T", "--hours", 1)
    assert "too long" in out and "V100 SXM2 32 GB has no bfloat16: its speed in float16 is taken" in out


def test_presets_and_their_changes(run):
    plain = found(run, "llama:tiny", *QUICK)
    wide = found(run, "llama:tiny", "--shape.d-model", 64, *QUICK)
    assert wide["shape"]["d_model"] == 64 and wide["shape"]["head_dim"] == 16 and plain["shape"]["d_model"] == 32
    assert wide["name"] == "llama:tiny, changed"


def test_a_folder(run, lm, tmp_path):
    plan = found(run, lm.save(tmp_path / "base"), *QUICK[:2], "--batch-tokens", 512, "--context", 32)
    assert plan["parameters"] == lm.model.n_parameters() and plan["setup"]["context"] == 32


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_a_picture(run, tmp_path, suffix):
    path = tmp_path / f"plan{suffix}"
    status, _, err = run(*SMALL, *QUICK, "--picture", path)
    assert status == 0, err
    data = path.read_bytes()
    assert data.startswith({".svg": b"<?xml", ".png": b"\x89PNG", ".pdf": b"%PDF"}[suffix])
    if suffix == ".svg":
        text = data.decode()
        assert all(word in text for word in ("as asked", "--checkpointing full", "activations", "optimizer", "80.0"))


def test_the_best_of_tokens(run):
    plan = found(run, "--tokens", "100M", *QUICK)
    assert plan["cost"]["tokens"] == 1e8 and 20 * plan["parameters"] <= 1e8 and plan["shape"]["d_model"] == 128


@pytest.mark.slow
def test_the_best_of_other_budgets(run):
    small = found(run, "--flops", "1e16", *QUICK)
    large = found(run, "--flops", "1e17", *QUICK)
    assert small["parameters"] < large["parameters"] and large["cost"]["flops"] <= 1e17 and large["optima_flops"] == 1e17
    by_time = found(run, "--hours", 0.1, *QUICK)
    assert by_time["cost"]["seconds"] <= 360 and by_time["optima_flops"] == pytest.approx(360 * 989.4e12 * 0.4)
    by_memory = found(run, "--memory", "1.6GB", "--shape.vocab-size", 512, *QUICK)
    assert by_memory["fits"] and by_memory["need"]["peak"] + by_memory["beside"] <= 1.6e9
    assert by_memory["shape"]["vocab_size"] == 512 and by_memory["need"]["peak"] > 5e7


def test_this_machine(run, monkeypatch):
    monkeypatch.setattr(devices, "this", lambda: devices.Device("a desk", 16e9, 2e10, 1e11, 3e11, True, 0.0, "cpu"))
    status, out, _ = run(*SMALL, *QUICK[2:])
    assert status == 0 and "1 x a desk: 0.3 TFLOP/s" in out and "holes between tensors" in out and "no price known" in out


def test_lives_are_planned_as_ever(run, monkeypatch, tmp_path):
    recipe = plugins.load("recipes", "plan")
    made = []
    plan = recipe.planning.Plan(
        minutes=3.0, precision="fp32", threads=1, flops=1e9, tokens_per_second=1e3, parameters=1,
        shape={"n_layers": 2, "d_model": 3}, vocab_size=9, tokenizer_sample=1, context=1, batch_tokens=1, pretrain_steps=5,
        sft_steps=5, grpo_steps=5, prompts=1, group=1, problems=1, heldout_fraction=0.1, seconds={"pretrain": 7.0},
    )  # fmt: skip
    monkeypatch.setattr(recipe.planning, "make", lambda minutes, device: made.append(minutes) or plan)
    monkeypatch.setattr(recipe, "tune_allocator", lambda: None)
    status, out, _ = run("--minutes", 3, "--out", tmp_path / "plan.json")
    assert status == 0 and made == [3.0] and "A life of 3 minutes: 1 parameters" in out and "pretrain" in out
    assert json.loads((tmp_path / "plan.json").read_text())["minutes"] == 3.0
    assert json.loads(run("--json")[1])["pretrain_steps"] == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("llama:lama",), "llama has no preset 'lama'"),
        (("lama:tiny",), "no architecture computes model_type 'lama'; did you mean 'llama'?"),
        (("nowhere",), "nowhere is not a folder"),
        (("llama", "--shape.d-model", 64), "llama without a preset needs --shape.vocab-size"),
        (("rnn_lm:lstm-200", "--shape.n-heads", 2), "shape.n_heads is no field of a rnn_lm"),
        (("llama:tiny", "--minutes", 3), "minutes (3) is of a life, which has neither a model nor a budget: leave it out"),
        (("llama:tiny", *QUICK, "--flops", "1e20"), "flops (1e+20) is a budget to find a model for: leave the model out"),
        (("llama:tiny", "--checkpoint", "base"), "checkpoint ('base') is of a run folder, and llama:tiny is none: leave it out"),
        (("--memory", "3GBx", *QUICK), "memory ('3GBx') must be a number and a unit"),
        (("--tokens", "0", *QUICK), "tokens (0) must be above 0, as 300M or 20B"),
        (("--hours", 0, *QUICK), "hours (0) must be above 0, as 24"),
        (("--tokens", "1B", "--device", "h10"), "device ('h10') is none that is known; did you mean 'h100'?"),
        (("--tokens", "1B", *QUICK, "--price", -1), "price (-1) is dollars an hour of a device: it must not be negative"),
        (("--tokens", "1B", *QUICK, "--mfu", 2), "mfu (2) is the share of the peak that is used"),
        (("--tokens", "1B", *QUICK, "--shape.d-model", 64), "checkpoint and shape (but vocab_size) are of a model"),
        (("--tokens", "1k", *QUICK), "not even a model 64 wide with 2 layers"),
        (("--device", "h100"), "device (h100) says nothing about a life: name a model, as llama:llama-3-8b, or a budget"),
        ((*SMALL, *QUICK, "--picture", "x.gif"), "picture (x.gif) must end with .svg, .png, .pdf: rename it"),
        (
            (*SMALL, *QUICK[2:], "--device", "v100", "--precision", "bf16-pure"),
            "precision ('bf16-pure') needs a device with bfloat16, and V100 SXM2 32 GB has none: use fp32",
        ),
        ((*SMALL, *QUICK, "--parallel", "fdsp=2"), "did you mean 'fsdp'?"),
    ],
)
def test_refused(run, arguments, message):
    status, _, err = run(*arguments)
    assert status == 1 and message in err


def test_a_shape_of_a_folder_is_refused(run, lm, tmp_path):
    folder = lm.save(tmp_path / "base")
    status, _, err = run(folder, "--shape.d-model", 64)
    assert status == 1 and "shape (d_model) is of a model to be" in err
