"""Speed of every architecture beside transformers, on the CPU: `python bench/models.py --help`.

forward        logits of whole sequences, no gradients
forward + backward   the loss of every token and all gradients, as a training step computes them

Both sides have the same weights (through a file), the same ids and the same dtype of weights, live each in a process of its own
with the same threads, and take turns; nothing goes through torch.compile. Our process has the allocator as our recipes set it
(`tune_allocator`), and `--tuned-peer` sets it for transformers too. transformers runs its fastest attention and, for mixtures,
the fastest of its implementations of experts. A ratio is the median of the ratios of the rounds. Before anything is timed, both
sides must compute the same logits. `ATHANOR_NATIVE=0` shows what mixtures gain by C++ of our own.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from training.rounds import Round, Timing, elsewhere, fastest, ratio, repeated, take_turns

from athanor.core import io as files
from athanor.core import plugins
from athanor.core.device import machine, supports_bf16, tune_allocator
from athanor.core.errors import AthanorError, ConfigError, MissingExtraError, VerificationError
from athanor.models import io

OURS, PEER = "athanor", "transformers"
TIME = 128  # tokens of a row
BATCHES = (1, 8)
ROUNDS = 5
WANTED, WANTED_OF_MIXTURES = 1.0, 1.2
PASSES = ("forward", "forward + backward")
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}  # of the spread of the logits

_COMMON = {"vocab_size": 8192, "d_model": 256, "n_layers": 4, "n_heads": 4, "max_positions": 1024}


def _decoder(**more: Any) -> dict[str, Any]:
    return _COMMON | {"n_kv_heads": 2, "d_ff": 704} | more


_ENCODER = _COMMON | {"d_ff": 1024}

# By family (a preset of another shape follows a colon): the fields of its config.
SHAPES: dict[str, dict[str, Any]] = {
    "llama": _decoder(),
    "qwen2": _decoder(),
    "qwen3": _decoder(head_dim=64),
    "mistral": _decoder(window=64),
    "gemma": _decoder(
        version=3, head_dim=64, window=64, layer_types=("sliding_attention", "full_attention") * 2, query_scale=64, tied=True
    ),
    "gpt2": _COMMON | {"d_ff": 1024},
    "phi3": _decoder(),
    "bert": _ENCODER,
    "roberta": _ENCODER,
    "longformer": _ENCODER | {"windows": (64,) * 4},
    "t5": _ENCODER,
    "bart": _ENCODER,
    "pegasus": _ENCODER | {"activation": "relu"},
    "mixtral": _decoder(n_experts=8, top_k=2),
    "qwen3_moe": _decoder(n_experts=64, top_k=8, d_expert=128, head_dim=64, normalise=True),
    "deepseek_v3": _COMMON
    | {
        **{"d_ff": 704, "n_experts": 64, "top_k": 6, "d_expert": 128, "n_groups": 4, "top_groups": 2, "first_dense": 1},
        **{"query_rank": 128, "latent_rank": 64, "head_dim": 32, "nope_dim": 64, "value_dim": 64},
    },
    "switch": _ENCODER | {"n_experts": 8, "capacity": 64},
}
# Implementations of experts that transformers lets one choose; where there are none it has its own loop.
MIXTURES: dict[str, tuple[str, ...]] = {
    "mixtral": ("grouped_mm",),
    "qwen3_moe": ("grouped_mm",),
    "deepseek_v3": ("grouped_mm",),
    "switch": (),
}


def prepare(name: str, dtype: torch.dtype, folder: Path) -> Any:
    """Our model; its files are in `folder`, for the other side."""
    import transformers

    config = plugins.load("models", name).Config(**SHAPES[name])
    fields = config.to_hf()
    settings = transformers.AutoConfig.for_model(**fields)
    torch.manual_seed(0)
    class_of(fields)._from_config(settings, dtype=dtype).save_pretrained(folder)
    return io.load(folder)


def class_of(fields: Mapping[str, Any]) -> Any:
    import transformers

    return getattr(transformers, fields["architectures"][0])


def their_models(name: str, dtype: torch.dtype, folder: Path) -> dict[str, Any]:
    """transformers' models from the files in `folder`, by the implementation of experts ("" where there are none)."""
    cls = class_of(files.read_json(folder / "config.json"))
    more = [(kind, {"experts_implementation": kind}) for kind in MIXTURES.get(name, ())] or [("", {})]
    models = {kind: cls.from_pretrained(folder, dtype=dtype, **chosen).eval() for kind, chosen in more}
    for model in models.values():  # in evaluation, for dropout is not what is compared
        model.config.use_cache = False
    return models


def inputs(name: str, batch: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(batch)
    ids = torch.randint(3, SHAPES[name]["vocab_size"], (batch, TIME), generator=generator)
    pairs = plugins.load("models", name).Model.kind == "encoder_decoder"
    return {"input_ids": ids, "decoder_input_ids": ids.flip(1)} if pairs else {"input_ids": ids}


def passes(model: Any, given: Mapping[str, Tensor], ours: bool) -> dict[str, Callable[[], int]]:
    """The two passes as steps that return how many tokens they computed."""
    targets = given["input_ids"].roll(-1, 1)
    arguments = list(given.values())
    generator = torch.Generator().manual_seed(7)

    def draw() -> None:
        """New ids: the same ones again would let caches and branches learn which experts they go to."""
        for ids in arguments:
            torch.randint(3, model.config.vocab_size, ids.shape, generator=generator, out=ids)

    @torch.no_grad()
    def forward() -> int:
        draw()
        model(*arguments) if ours else model(**given)
        return targets.numel()

    def both() -> int:
        draw()
        if ours:
            hidden = whole(model, arguments)
            loss = model.cross_entropy(hidden.flatten(0, 1), targets.flatten())[0] / targets.numel()
        else:
            loss = F.cross_entropy(model(**given).logits.flatten(0, 1).float(), targets.flatten())
        loss.backward()
        model.zero_grad(set_to_none=True)
        return targets.numel()

    return dict(zip(PASSES, (forward, both), strict=True))


def whole(model: Any, arguments: Sequence[Tensor]) -> Tensor:
    """Hidden states of whole sequences."""
    from athanor.nn.context import Bidirectional, Causal, Memory, WithMemory

    ids = arguments[0]
    if model.kind == "decoder":
        return model.hidden(ids, Causal(*ids.shape))
    if model.kind == "encoder":
        return model.hidden(ids, Bidirectional(*ids.shape))
    memory = Memory(model.encode(ids, Bidirectional(*ids.shape)))
    return model.hidden(arguments[1], WithMemory(Causal(*arguments[1].shape), memory))


def agree(name: str, ours: Any, theirs: Any, given: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    with torch.no_grad():
        expected = theirs(**given).logits.float()
        apart = (ours(*given.values()).float() - expected).abs().amax(-1) / expected.std()
    # In bfloat16 a token that stands between two experts may be computed by the other one, here or there.
    distance = float(apart.flatten().quantile(0.8) if name in MIXTURES and dtype == torch.bfloat16 else apart.max())
    if not distance <= TOLERANCE[dtype]:
        raise VerificationError(
            f"{name}: logits differ by {distance:.3g} of their spread in {dtype} and may by {TOLERANCE[dtype]:.3g} for speeds to"
            " be comparable: see which of the two changed (tests/models/test_parity.py)"
        )


def contenders(name: str, model: Any, side: str) -> dict[str, Round]:
    """One for each number of rows and pass, called "SIDE, N rows, PASS"."""
    made = {}
    for batch in BATCHES:
        for which, step in passes(model, inputs(name, batch), side == OURS).items():
            made[f"{side}, {batch} rows, {which}"] = repeated(step, time.perf_counter)
    return made


def peers(name: str, dtype: torch.dtype, folder: Path) -> tuple[dict[str, Round], dict[str, float]]:
    """For `elsewhere`: the contenders of the other side."""
    made: dict[str, Round] = {}
    for kind, model in their_models(name, dtype, folder).items():
        made |= contenders(name, model, f"{PEER} {kind}".strip())
    return made, {}


def measure(name: str, dtype: torch.dtype, seconds: float, tuned: bool) -> dict[int, dict[str, Any]]:
    """Per number of rows and pass: tokens per second of each side and the ratio to the fastest of theirs."""
    found: dict[int, dict[str, Any]] = {batch: {} for batch in BATCHES}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        ours = prepare(name, dtype, folder)
        for model in their_models(name, dtype, folder).values():
            for batch in BATCHES:
                agree(name, ours, model, inputs(name, batch), dtype)
        mine = contenders(name, ours, OURS)
        with elsewhere(peers, name, dtype, folder, tuned=tuned) as (theirs, _):
            for batch in BATCHES:
                for which in PASSES:
                    end = f", {batch} rows, {which}"
                    among = {k.removesuffix(end): turn for k, turn in (mine | theirs).items() if k.endswith(end)}
                    rates = take_turns(among, Timing(seconds, ROUNDS))
                    best = fastest(rates, among.keys() - {OURS})
                    found[batch][which] = {
                        "tokens_per_second": rates,
                        "peer": best,
                        "ratio": ratio(rates[OURS], rates[best]),
                    }
    return found


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Speed of architectures beside transformers; see docs/benchmarks.md.")
    parser.add_argument("--seconds", type=float, default=2.0, help="timed seconds of each contender (default %(default)g)")
    parser.add_argument("--models", nargs="+", choices=sorted(SHAPES), default=sorted(SHAPES), help="default: all")
    parser.add_argument("--dtypes", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--tuned-peer", action="store_true", help="transformers with our settings of the allocator")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write everything that was measured there")
    options = parser.parse_args(argv)
    if not options.seconds > 0:
        raise ConfigError(f"--seconds ({options.seconds:g}) must be above 0: 2 is usual")
    return options


def run(options: argparse.Namespace) -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    facts = machine() | {PEER: metadata.version(PEER)}
    for key, value in facts.items():
        print(f"{key:<14}{value}")
    print(f"{'allocator':<14}{'tuned for both' if options.tuned_peer else 'tuned by us, as it comes for transformers'}")
    tune_allocator()
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    if not supports_bf16(torch.device("cpu")):
        dtypes.pop("bf16")
    how = {"seconds": options.seconds, "rounds": ROUNDS, "tuned_peer": options.tuned_peer}
    results: dict[str, Any] = {"machine": facts, **how, "models": {}}
    columns = [(d, b, p) for d in options.dtypes if d in dtypes for b in BATCHES for p in PASSES]
    print(f"\nTimes as fast as transformers ({TIME} tokens a row; f: forward, fb: forward + backward)\n{'':<14}", end="")
    print("".join(f"{d} x{b} {'fb' if '+' in p else 'f':<4}".rjust(13) for d, b, p in columns), flush=True)
    for name in options.models:
        cells: dict[tuple[str, int, str], float] = {}
        results["models"][name] = {}
        print(f"{name:<14}", end="", flush=True)
        for d in options.dtypes:
            if d not in dtypes:
                continue
            for batch, found in measure(name, dtypes[d], options.seconds, options.tuned_peer).items():
                results["models"][name][f"{d} batch {batch}"] = found
                for which in PASSES:
                    cells[d, batch, which] = found[which]["ratio"]
                    print(f"{found[which]['ratio']:>13.2f}", end="", flush=True)
        wanted = WANTED_OF_MIXTURES if name in MIXTURES else WANTED
        low = min(cells.values())
        print(f"   {'' if low >= wanted else f'below {wanted}'}")
    if options.json:
        files.write_json(options.json, results)


def main(argv: Sequence[str] | None = None) -> int:
    try:
        options = arguments(argv)
        if importlib.util.find_spec(PEER) is None:
            raise MissingExtraError(f"{PEER} is not installed, to compare with: pip install 'athanor-lm[dev]'")
        run(options)
    except AthanorError as error:
        print(f"bench/models.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
