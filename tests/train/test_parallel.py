"""Law L5: any layout of processes gives the losses and weights of one process (ragged data, clipping active)."""

from functools import partial

import pytest

from athanor.core.errors import ConfigError
from athanor.models import io as models
from athanor.train import support
from athanor.train.checkpointing import checkpoint
from athanor.train.compiled import compile_blocks
from athanor.train.parallel.layout import Layout, parse
from athanor.train.parallel.support import reason
from tests.train import layouts
from tests.train.layouts import compare

STEPS = 50


@pytest.mark.parametrize("layout", [case.parallel for case in support.LAYOUT_CASES])
def test_every_layout_is_one_process(crew, alone, layout):
    compare(crew.run(layout, steps=STEPS), alone(steps=STEPS))


def test_zero_bubble_is_one_process_where_torch_cannot_split_the_backward_pass(crew, alone):
    found = crew.run("pp=2,schedule=zero_bubble", steps=STEPS, pipeline={"_CUTS_RIGHT": False})
    compare(found, alone(steps=STEPS))


@pytest.mark.parametrize("batches", [layouts.joined, layouts.single], ids=["one batch", "separate sequences"])
def test_accumulated_and_packed_are_one_batch_and_separate_sequences(alone, batches):
    compare([alone(steps=STEPS, batches=batches)], alone(steps=STEPS))


@pytest.mark.parametrize("how", ["full", "selective"])
def test_checkpointed_is_plain(alone, how):
    compare([alone(steps=STEPS, change=partial(checkpoint, how=how))], alone(steps=STEPS))


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch", "ignore::UserWarning:torch", "ignore::FutureWarning:torch")
@pytest.mark.parametrize("batches", [layouts.even, layouts.ragged], ids=["one length", "ragged"])
@pytest.mark.parametrize("case", support.COMPILE_CASES, ids=str)
def test_compiled_is_plain(alone, case, batches):
    def change(model):
        compile_blocks(model, lambda: None)

    options = {"arch": case.architecture, "steps": STEPS, "batches": batches, "fields": (("n_layers", 2),)}
    compare([alone(change=change, **options)], alone(**options))


@pytest.mark.parametrize("case", support.FAMILY_CASES, ids=str)
def test_other_families_too(crew, alone, case):
    options = {"arch": case.architecture, "steps": 6, "clip": 0.3}
    compare(crew.run(case.parallel, **options), alone(**options), clip=0.3)


@pytest.mark.parametrize("case", support.EXPERT_CASES, ids=str)
def test_mixtures_of_experts(crew, alone, case):
    """Without the loss that balances experts, which is not a sum over tokens (law L3 says so)."""
    options = {"arch": case.architecture, "steps": 6, "fields": (("balance_loss", 0.0),)}
    compare(crew.run(case.parallel, **options), alone(**options))


@pytest.mark.parametrize("case", support.OPTIMIZER_CASES, ids=str)
def test_every_optimiser_sees_whole_matrices(crew, alone, case):
    options = {"steps": 6, "optim": case.optimizer}
    compare(crew.run(case.parallel, **options), alone(**options))


def test_untied_output_in_a_pipeline(crew, alone):
    options = {"steps": 6, "fields": (("tied", False),)}
    compare(crew.run("pp=2", **options), alone(**options))


@pytest.mark.parametrize("case", support.PRECISION_CASES, ids=str)
def test_bfloat16_is_near(crew, alone, case):
    options = {"steps": 6, "precision": case.precision}
    (losses, *_), results = alone(**options), crew.run(case.parallel, **options)
    assert max(abs(a - b) for a, b in zip(losses, results[0][0], strict=True)) <= 2e-3


@pytest.mark.parametrize(
    ("text", "layout"),
    [
        ("", Layout()),
        ("ddp=2", Layout(ddp=2)),
        (" fsdp=4, zero=2", Layout(fsdp=4, zero=2)),
        ("hsdp=2x3", Layout(ddp=2, fsdp=3)),
        ("tp=2,pp=2,schedule=gpipe", Layout(tp=2, pp=2, schedule="gpipe")),
        ("ddp=4,ep=4", Layout(ddp=4, ep=4)),
    ],
)
def test_layouts_are_read(text, layout):
    assert parse(text) == layout


def test_what_a_layout_counts():
    layout = parse("ddp=2,fsdp=3,tp=2,pp=2,schedule=interleaved")
    assert (layout.world, layout.data, layout.stages, layout.in_flight) == (24, 6, 4, 4)
    assert str(layout) == "ddp=2,fsdp=3,tp=2,pp=2,schedule=interleaved" and str(Layout()) == "one process"
    assert str(parse("fsdp=2,zero=2")) == "fsdp=2,zero=2"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dpp=2", r"unknown part 'dpp'; did you mean 'pp'\? Known: ddp"),
        ("ddp", r"ddp is given as '' and must be ddp=N with N from 1, as ddp=2"),
        ("fsdp=0", r"fsdp is given as '0' and must be fsdp=N"),
        ("hsdp=2", r"hsdp is given as '' and must be hsdp=COPIESxSHARDS, as hsdp=2x2"),
        ("ddp=2,ddp=4", "says ddp twice: say it once"),
        ("ddp=2,hsdp=2x2", "says ddp twice: say it once"),
        ("fsdp=2,zero=1", r"zero \(1\) must be 2 or 3: 1 is no saving over 2 here"),
        ("ddp=2,zero=2", "zero says how fsdp shares, so it needs fsdp=N with N above 1"),
        ("ddp=2,schedule=gpipe", "schedule is of the pipeline, so it needs pp=N with N above 1"),
        ("ddp=2,micro=2", "micro is of the pipeline, so it needs pp=N with N above 1"),
        ("pp=2,schedule=1f1", r"schedule \('1f1'\) must be one of 1f1b, gpipe, interleaved, zero_bubble; did you mean '1f1b'\?"),
        ("pp=4,micro=2", r"micro \(2\) must be at least the 4 stages of the pipeline, or 0"),
        ("ddp=4,ep=3", r"ep \(3\) must divide the 4 processes that take different data"),
        ("ddp=4,ep=2", r"ep \(2\) must be ddp \(4\): experts are dealt out to the copies"),
        ("ddp=2,ep=2,tp=2", "ep goes with ddp alone; fsdp shares experts by itself"),
    ],
)
def test_layouts_that_make_no_sense(text, message):
    with pytest.raises(ConfigError, match=message):
        parse(text)


@pytest.mark.parametrize(
    ("arch", "layout", "message"),
    [
        (
            "mixtral",
            "tp=2",
            "mixtral is a mixture of experts, whose experts tp and pp do not split: use ddp, fsdp or ddp with ep",
        ),
        ("llama", "ddp=2,ep=2", "ep deals out experts and llama has none: leave ep out"),
        ("llama", "tp=4", r"tp \(4\) must divide n_heads \(4\) and n_kv_heads \(2\)"),
        ("t5", "tp=2", "tensor parallelism splits decoders and encoders, and t5 is neither"),
        ("longformer", "tp=2", "tensor parallelism splits plain attention and feed-forward, and longformer has a"),
        ("bert", "pp=2", "a pipeline is cut between the blocks of a plain decoder, and bert is none"),
        ("gpt2", "pp=2", "a pipeline is cut between the blocks of a plain decoder, and gpt2 is none"),
    ],
)
def test_what_is_refused_says_why(arch, layout, message):
    from re import search

    from athanor.core import plugins

    module = plugins.load("models", arch)
    config = layouts.config(arch) if arch in ("llama", "mixtral", "gpt2") else module.PRESETS["tiny"]
    assert search(message, reason(models.build(arch, config, seed=0), parse(layout)))


def test_the_inner_width_must_be_divisible():
    model = models.build("llama", layouts.config(d_ff=49), seed=0)
    assert reason(model, parse("tp=2")) == "tp (2) must divide the inner width of the feed-forward block (49)"


def test_too_few_sequences_and_too_few_blocks_are_errors(crew):
    with pytest.raises(AssertionError, match="pp has 4 stages and the model 3 blocks"):
        layouts.Crew.run(crew, "pp=4", steps=1, fields=(("n_layers", 3),))
