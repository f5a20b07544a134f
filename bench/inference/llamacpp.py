"""llama.cpp as a side of `bench/infer.py`, by the C interface of the library that the npm package node-llama-cpp ships.

    npm install --prefix build/llamacpp @node-llama-cpp/linux-x64@3.22.1
    ATHANOR_LLAMACPP=$PWD/build/llamacpp/node_modules python bench/infer.py

The tests of GGUF files run it through the same declarations (tests/models/llamacpp.py).

Legend: V vocabulary.
"""

from __future__ import annotations

import copy
import ctypes
import os
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int8, c_int32, c_void_p
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from athanor.core.errors import ConfigError, MissingExtraError, VerificationError
from athanor.models import _gguf

from .requests import Ask  # relative: tests import this package as bench.inference

VARIABLE = "ATHANOR_LLAMACPP"
LIBRARIES = "@node-llama-cpp/linux-x64/bins/linux-x64"
INSTALL = "npm install --prefix build/llamacpp @node-llama-cpp/linux-x64@3.22.1"
# Largest difference of logits by kind of file, as a share of their spread: what `sides.py` allows, and twice that where llama.cpp
# rounds activations to blocks of 8 bits, which the model with the file's weights does not.
TOLERANCES: dict[_gguf.Kind, float] = {"bf16": 0.1, "q8_0": 0.2, "q4_0": 0.2}
SEQUENCES = 64  # that run at once: as many as the engine's

# Structures of parameters are passed by value and only their first fields are touched: room for more than there are.
Params = type("Params", (ctypes.Structure,), {"_fields_": [("words", c_int32 * 256)]})
# Places in llama_context_params, in words of 4 bytes, and the defaults by which a changed layout is noticed.
N_CTX, N_BATCH, N_UBATCH, N_SEQ_MAX, N_THREADS, N_THREADS_BATCH, FLASH, TYPE_K, TYPE_V = 0, 1, 2, 3, 7, 8, 13, 26, 27
BATCH = 2048  # tokens that one call takes
DEFAULTS = {N_CTX: 512, N_BATCH: BATCH, N_UBATCH: 512, N_SEQ_MAX: 1, N_THREADS: 4, N_THREADS_BATCH: 4}
DEFAULTS |= {FLASH: -1, TYPE_K: 1, TYPE_V: 1}
LOG = ctypes.CFUNCTYPE(None, c_int32, c_char_p, c_void_p)


class Batch(ctypes.Structure):
    _fields_ = (
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", c_void_p),
        ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)),
        ("seq_id", POINTER(POINTER(c_int32))),
        ("logits", POINTER(c_int8)),
    )


class Token(NamedTuple):
    """One token of a batch: its place, whose it is, and whether the logits after it are wanted."""

    id: int
    position: int
    sequence: int
    wanted: bool


FUNCTIONS = (
    ("llama_model_default_params", Params, []),
    ("llama_context_default_params", Params, []),
    ("llama_model_load_from_file", c_void_p, [c_char_p, Params]),
    ("llama_init_from_model", c_void_p, [c_void_p, Params]),
    ("llama_model_get_vocab", c_void_p, [c_void_p]),
    ("llama_vocab_n_tokens", c_int32, [c_void_p]),
    ("llama_get_memory", c_void_p, [c_void_p]),
    ("llama_memory_clear", None, [c_void_p, c_bool]),
    ("llama_decode", c_int32, [c_void_p, Batch]),
    ("llama_get_logits_ith", POINTER(c_float), [c_void_p, c_int32]),
    ("llama_attach_threadpool", None, [c_void_p, c_void_p, c_void_p]),
    ("llama_detach_threadpool", None, [c_void_p]),
    ("ggml_threadpool_params_default", Params, [c_int32]),
    ("ggml_backend_reg_get", c_void_p, [ctypes.c_size_t]),
    ("ggml_backend_reg_get_proc_address", c_void_p, [c_void_p, c_char_p]),
    ("llama_log_set", None, [LOG, c_void_p]),
    ("llama_free", None, [c_void_p]),
    ("llama_model_free", None, [c_void_p]),
)


def declare(library: ctypes.CDLL, functions: Sequence[tuple[str, Any, list[Any]]]) -> None:
    """Say what functions of `library` take and return: (name, result, arguments) each."""
    for name, result, arguments in functions:
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments


@cache
def library() -> tuple[ctypes.CDLL, list[str]]:
    """The library and the lines it logs.

    Raises:
        MissingExtraError: ATHANOR_LLAMACPP is not set, or the machine is another than the package is for.
        ConfigError: the variable names a folder without the package, or with another version of it.
    """
    if VARIABLE not in os.environ:
        raise MissingExtraError(
            f"{VARIABLE} is not set, so there is no llama.cpp: {INSTALL}; set it to build/llamacpp/node_modules"
        )
    if (system := (platform.system(), platform.machine())) != ("Linux", "x86_64"):
        raise MissingExtraError(
            f"llama.cpp is run on Linux on x86_64 only, and this is {system[0]} on {system[1]}: unset {VARIABLE}"
        )
    folder = Path(os.environ[VARIABLE]) / LIBRARIES
    found = [next(folder.glob(f"lib{name}.v*.so"), None) for name in ("ggml", "llama")]
    if None in found:
        raise ConfigError(f"{VARIABLE} ({os.environ[VARIABLE]!r}) must be a folder with {LIBRARIES}/libllama.v*.so: {INSTALL}")
    backends, llama = ctypes.CDLL(str(found[0]), mode=ctypes.RTLD_GLOBAL), ctypes.CDLL(str(found[1]))
    declare(llama, FUNCTIONS)
    words = llama.llama_context_default_params().words
    if {place: words[place] for place in DEFAULTS} != DEFAULTS:
        raise ConfigError(f"{VARIABLE} ({os.environ[VARIABLE]!r}) has a version of llama.cpp with other parameters: {INSTALL}")
    lines: list[str] = []
    llama.keep = LOG(lambda _level, text, _data: lines.append(text.decode("utf-8", "replace")))
    llama.llama_log_set(llama.keep, None)
    if backends.ggml_backend_reg_count() == 0:  # they are the process's
        backends.ggml_backend_load_all_from_path(str(folder).encode())
    return llama, lines


class Model:
    """A loaded GGUF file."""

    def __init__(self, library: ctypes.CDLL, handle: int) -> None:
        self._library, self._model = library, handle
        self._vocab = library.llama_model_get_vocab(handle)
        self.vocab_size = library.llama_vocab_n_tokens(self._vocab)

    @contextmanager
    def context(self, changes: Mapping[int, int]) -> Iterator[int]:
        """A context with llama.cpp's default parameters but for `changes`, by place."""
        params = self._library.llama_context_default_params()
        for place, value in changes.items():
            params.words[place] = value
        context = self._library.llama_init_from_model(self._model, params)
        assert context, "no context: see what llama.cpp logs"
        try:
            yield context
        finally:
            self._library.llama_free(context)

    @contextmanager
    def threads(self, context: int, count: int) -> Iterator[None]:
        """`count` threads that stay for all calls, as llama.cpp's own programs have; without, every call starts its own."""
        cpu = self._library.ggml_backend_reg_get(0)
        new, free = (
            self._library.ggml_backend_reg_get_proc_address(cpu, b"ggml_threadpool_" + name) for name in (b"new", b"free")
        )
        pool = ctypes.CFUNCTYPE(c_void_p, POINTER(Params))(new)(self._library.ggml_threadpool_params_default(count))
        self._library.llama_attach_threadpool(context, pool, pool)
        try:
            yield
        finally:
            self._library.llama_detach_threadpool(context)
            ctypes.CFUNCTYPE(None, c_void_p)(free)(pool)

    def forget(self, context: int) -> None:
        """Forget all sequences."""
        self._library.llama_memory_clear(self._library.llama_get_memory(context), False)

    def run(self, context: int, tokens: Sequence[Token]) -> list[np.ndarray]:
        """float32 (V,) after each token whose logits are wanted, in order; they stand until the next call."""
        ids, positions, sequences, wanted = zip(*tokens, strict=True)
        ints = c_int32 * len(tokens)
        owners = ints(*sequences)
        start, width = ctypes.addressof(owners), ctypes.sizeof(c_int32)
        pointers = (c_void_p * len(tokens))(*range(start, start + width * len(tokens), width))
        batch = Batch(
            n_tokens=len(tokens),
            token=ints(*ids),
            pos=ints(*positions),
            n_seq_id=ints(*[1] * len(tokens)),
            seq_id=ctypes.cast(pointers, POINTER(POINTER(c_int32))),
            logits=(c_int8 * len(tokens))(*wanted),
        )
        assert self._library.llama_decode(context, batch) == 0, "not decoded: see what llama.cpp logs"
        rows = [self._library.llama_get_logits_ith(context, i) for i, want in enumerate(wanted) if want]
        return [np.ctypeslib.as_array(row, (self.vocab_size,)) for row in rows]


@contextmanager
def load(path: Path, kind: type[Model] = Model) -> Iterator[Any]:
    """The GGUF file `path` in llama.cpp, as a `kind`; fails with what it logged when it refuses the file."""
    llama, lines = library()
    del lines[:]
    handle = llama.llama_model_load_from_file(str(path).encode(), llama.llama_model_default_params())
    assert handle, "".join(lines)
    try:
        yield kind(llama, handle)
    finally:
        llama.llama_model_free(handle)


class LlamaCpp:
    """llama.cpp over one file, with its own defaults (keys and values in float16, flash attention) and `threads` threads.

    Every sequence has keys and values of its own (the default): together in one store, attention goes over those of all.
    """

    def __init__(self, model: Model, threads: int) -> None:
        self._model, self._threads = model, threads
        self.vocab_size = model.vocab_size

    @contextmanager
    def _context(self, sequences: int, size: int) -> Iterator[int]:
        """A context for `sequences` of up to `size` tokens."""
        threads = {N_THREADS: self._threads, N_THREADS_BATCH: self._threads}
        changes = {N_CTX: sequences * size, N_SEQ_MAX: sequences} | threads
        with self._model.context(changes) as context, self._model.threads(context, self._threads):
            yield context

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """float32 (T, V) after each of `ids`."""
        with self._context(1, len(ids)) as context:
            return np.stack(self._model.run(context, [Token(id, i, 0, True) for i, id in enumerate(ids)]))

    def _together(self, context: int, asks: Sequence[Ask]) -> list[list[int]]:
        """Answers to at most SEQUENCES: all prompts, BATCH tokens a call, then one token of every running sequence a call."""
        prompts = [Token(id, i, s, i + 1 == len(ask.prompt)) for s, ask in enumerate(asks) for i, id in enumerate(ask.prompt)]
        parts = (prompts[first : first + BATCH] for first in range(0, len(prompts), BATCH))
        made = [[int(logits.argmax())] for part in parts for logits in self._model.run(context, part)]
        for count in range(1, max(ask.new for ask in asks)):
            running = [s for s, ask in enumerate(asks) if ask.new > count]
            last = [Token(made[s][-1], len(asks[s].prompt) + count - 1, s, True) for s in running]
            for s, logits in zip(running, self._model.run(context, last), strict=True):
                made[s].append(int(logits.argmax()))
        return made

    def answers(self, asks: Sequence[Ask]) -> tuple[list[list[int]], float]:
        """Greedy answers to all `asks`, in their order, and the seconds that they took."""
        # Longest answers first: those that still run then have numbers without gaps, which llama.cpp computes in one go.
        order = sorted(range(len(asks)), key=lambda i: asks[i].new, reverse=True)
        made: dict[int, list[int]] = {}
        with self._context(min(len(asks), SEQUENCES), max(len(ask.prompt) + ask.new for ask in asks)) as context:
            start = time.perf_counter()
            for first in range(0, len(order), SEQUENCES):
                group = order[first : first + SEQUENCES]
                self._model.forget(context)
                made.update(zip(group, self._together(context, [asks[i] for i in group]), strict=True))
            seconds = time.perf_counter() - start
        return [made[i] for i in range(len(asks))], seconds

    def single(self, prompt: Sequence[int], new: int) -> float:
        """Tokens per second of one answer, the prompt's time included."""
        return self.mixed([Ask(list(prompt), new)])

    def mixed(self, asks: Sequence[Ask]) -> float:
        """Tokens per second of all answers together."""
        return sum(ask.new for ask in asks) / self.answers(asks)[1]


def rounded(ours: Any, kind: _gguf.Kind) -> Any:
    """A copy of the model in float32 whose matrices have the values that a file of `kind` has."""
    from gguf import GGMLQuantizationType, quants

    model, dtype = copy.deepcopy(ours).float(), GGMLQuantizationType[kind.upper()]
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                values = quants.dequantize(quants.quantize(p.numpy(), dtype), dtype)
                p.copy_(torch.from_numpy(np.array(values)).view(p.shape))
    return model


def check(side: LlamaCpp, ours: Any, kind: _gguf.Kind) -> None:
    """Raises VerificationError unless llama.cpp gives the logits of `ours` with the weights that the file of `kind` has."""
    ids = list(range(20, 60))
    with torch.no_grad():
        expected = rounded(ours, kind)(torch.tensor([ids]))[0].numpy()
    found = float(np.abs(side.logits(ids) - expected).max() / expected.std())
    if not found <= TOLERANCES[kind]:
        raise VerificationError(
            f"logits of llama.cpp from a {kind} file differ by {found:.3g} of their spread, but must agree within"
            f" {TOLERANCES[kind]:g} for speeds to be comparable: see tests/models/test_gguf.py"
        )


@contextmanager
def sides(ours: Any, folder: Path, threads: int) -> Iterator[dict[str, LlamaCpp]]:
    """llama.cpp by kind of file, over files of `ours` in `folder`; they have no vocabulary: llama.cpp takes and gives ids.

    Raises:
        VerificationError: llama.cpp computes something else.
    """
    with ExitStack() as stack:
        found: dict[str, LlamaCpp] = {}
        for kind in TOLERANCES:
            path = folder / f"{kind}.gguf"
            _gguf.write(path, ours.config.to_hf(), ours.to_hf(ours.state_dict()).items(), None, kind)
            found[kind] = LlamaCpp(stack.enter_context(load(path)), threads)
            check(found[kind], ours, kind)
        yield found
