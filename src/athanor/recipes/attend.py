"""Show what a model looks at: attention of every layer and head, as a picture and as a page.

    athanor attend runs/first "The cat sat on the mat because it was tired"
    athanor attend runs/first "The cat sat on the mat" --layers 0 --layers 5
    athanor attend runs/t5 "translate English to German: The house" --answer "Das Haus" --out attention

Encoder-decoders are shown reading a source, writing an answer, and looking from one to the other; without --answer they write
their own. The page is one file that needs no network.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from athanor.core.errors import ConfigError
from athanor.lm import LM, load
from athanor.models._attention import attention_maps
from athanor.report import attention
from athanor.report.attention import Panel

POSITIONAL = ("path", "text")
LONGEST = 512  # tokens; beyond that nobody finds anything
LARGEST = 24_000_000  # probabilities of a page
TITLES = {
    "attention": "what tokens look at",
    "encoder": "encoder: the source looks at itself",
    "decoder": "decoder: the answer looks at what came before",
    "cross": "cross: the answer looks at the source",
}


@dataclass(frozen=True)
class Config:
    path: Path
    """A checkpoint folder, or a run folder (its last checkpoint)."""
    text: str
    """What the model reads."""
    answer: str | None = None
    """What an encoder-decoder writes; by default what it says itself."""
    out: Path = Path("attention")
    """Folder for attention.png and attention.html."""
    layers: tuple[int, ...] | None = None
    """Numbers of the layers to show, the first is 0; repeat it for more (--layers 2 --layers 5). All by default."""
    checkpoint: str | None = None
    """Which checkpoint of a run folder: base, sft, rl ...; by default the run's own choice."""
    json: bool = False
    """Print tokens and, for each token, what it looks at most, as JSON."""


def main(config: Config) -> None:
    lm = load(config.path, config.checkpoint)
    ids, answer = _ids(lm, config)
    maps = attention_maps(lm.model, ids, answer)
    panels = []
    for name, weights in maps.items():
        layers = _layers(config.layers, len(weights))
        chosen = weights[layers]
        if chosen.numel() > LARGEST:
            raise ConfigError(f"{chosen.numel():,} probabilities are too many for a page: name fewer layers with --layers")
        rows = _tokens(lm, ids if name in ("attention", "encoder") else answer)
        columns = _tokens(lm, ids if name in ("attention", "encoder", "cross") else answer)
        panels.append(Panel(TITLES[name], rows, columns, layers, chosen.numpy()))
    config.out.mkdir(parents=True, exist_ok=True)
    title = f"What {lm.name} looks at"
    attention.draw(title, panels, config.out / "attention.png")
    attention.write(title, panels, config.out / "attention.html")
    if config.json:
        print(json.dumps([_said(panel) for panel in panels], indent=1, ensure_ascii=False))
        return
    names = [f"{name} " if len(maps) > 1 else "" for name in maps]
    heads = ", ".join(f"{n}{len(p.layers)} layers of {p.weights.shape[1]} heads" for n, p in zip(names, panels, strict=True))
    print(f"{lm.name}: {len(ids)} tokens, {heads}\n  {config.out / 'attention.png'}\n  {config.out / 'attention.html'}")


def _ids(lm: LM, config: Config) -> tuple[Tensor, Tensor | None]:
    """Of the text, and of an encoder-decoder's answer."""
    if not config.text:
        raise ConfigError("text is empty: give a few words to look at")
    ids = lm.prompt_ids(config.text)
    answer: list[int] | None = None
    if lm.model.kind == "encoder_decoder":
        start = lm.model.token_ids.start
        if not start:
            raise ConfigError(f"{lm.name} does not say what its answers begin with: add decoder_start_token_id to config.json")
        if config.answer is None and lm.model.task != "lm":
            raise ConfigError(f"{lm.name} has no language-model head and writes no answer of its own: give one with --answer")
        written = (
            lm.complete(config.text, temperature=0, max_tokens=32).ids
            if config.answer is None
            else lm.tokenizer.encode(config.answer)
        )
        answer = [*start, *written]
    elif config.answer is not None:
        raise ConfigError(f"answer ({config.answer!r}) is for encoder-decoders, and {lm.name} reads one text: leave it out")
    for what, found in (("text", ids), ("answer", answer or [])):
        longest = min(LONGEST, lm.config.max_positions)
        if len(found) > longest:
            raise ConfigError(f"{what} has {len(found)} tokens and at most {longest} are shown: shorten it")
    return torch.tensor(ids, device=lm.model.device), None if answer is None else torch.tensor(answer, device=lm.model.device)


def _layers(wanted: tuple[int, ...] | None, there: int) -> list[int]:
    for number in wanted or ():
        if not 0 <= number < there:
            raise ConfigError(f"layers names {number}, and there are layers 0 to {there - 1}: choose among these")
    return list(wanted or range(there))


def _tokens(lm: LM, ids: Tensor | None) -> list[str]:
    assert ids is not None, "there is an answer where there is a decoder"
    return [lm.tokenizer.token(id) for id in ids.tolist()]


def _said(panel: Panel) -> dict[str, Any]:
    best: Sequence[int] = panel.weights.mean((0, 1)).argmax(1).tolist()
    looks = [{"token": row, "looks_at": panel.columns[j], "place": j} for row, j in zip(panel.rows, best, strict=True)]
    shape = {"layers": list(panel.layers), "heads": panel.weights.shape[1]}
    return {"attention": panel.title, **shape, "tokens": list(panel.rows), "most": looks}
