"""llama.cpp itself, by the C interface of the library that the npm package node-llama-cpp ships ready to run.

    npm install --prefix build/llamacpp @node-llama-cpp/linux-x64@3.22.1
    ATHANOR_LLAMACPP=$PWD/build/llamacpp/node_modules python -m pytest tests/models/test_gguf.py

Without the variable, or on a machine that is not Linux on x86-64, these tests are skipped.
"""

import ctypes
import os
import platform
from contextlib import contextmanager
from ctypes import c_bool, c_char_p, c_float, c_int8, c_int32, c_void_p
from functools import cache
from pathlib import Path

import numpy as np
import pytest

VARIABLE = "ATHANOR_LLAMACPP"
LIBRARIES = "@node-llama-cpp/linux-x64/bins/linux-x64"

# Structures of parameters are passed by value and only their first fields are touched: room for more than there are.
Params = type("Params", (ctypes.Structure,), {"_fields_": [("words", c_int32 * 256)]})
# Places in llama_context_params, in words of 4 bytes, and the defaults by which a changed layout is noticed.
N_CTX, N_BATCH, N_UBATCH, N_THREADS, N_THREADS_BATCH, FLASH, TYPE_K, TYPE_V = 0, 1, 2, 7, 8, 13, 26, 27
DEFAULTS = {N_CTX: 512, N_BATCH: 2048, N_UBATCH: 512, FLASH: -1, TYPE_K: 1, TYPE_V: 1}
LOG = ctypes.CFUNCTYPE(None, c_int32, c_char_p, c_void_p)


class Batch(ctypes.Structure):
    _fields_ = [
        ("n_tokens", c_int32),
        ("token", ctypes.POINTER(c_int32)),
        ("embd", c_void_p),
        ("pos", c_void_p),
        ("n_seq_id", c_void_p),
        ("seq_id", c_void_p),
        ("logits", ctypes.POINTER(c_int8)),
    ]


@cache
def _library():
    """The library and the lines it logs; skips the test when there is none here."""
    if VARIABLE not in os.environ:
        pytest.skip(f"no llama.cpp: set {VARIABLE} (see tests/models/llamacpp.py)")
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        pytest.skip("llama.cpp is tested on Linux on x86-64 only")
    folder = Path(os.environ[VARIABLE]) / LIBRARIES
    (path,) = folder.glob("libllama.v*.so")  # a variable that points elsewhere is an error, not a skip
    (ggml,) = folder.glob("libggml.v*.so")
    backends, library = ctypes.CDLL(str(ggml), mode=ctypes.RTLD_GLOBAL), ctypes.CDLL(str(path))
    for name, result, arguments in (
        ("llama_model_default_params", Params, []),
        ("llama_context_default_params", Params, []),
        ("llama_model_load_from_file", c_void_p, [c_char_p, Params]),
        ("llama_init_from_model", c_void_p, [c_void_p, Params]),
        ("llama_model_get_vocab", c_void_p, [c_void_p]),
        ("llama_vocab_n_tokens", c_int32, [c_void_p]),
        ("llama_vocab_bos", c_int32, [c_void_p]),
        ("llama_vocab_eos", c_int32, [c_void_p]),
        ("llama_vocab_get_add_bos", c_bool, [c_void_p]),
        ("llama_vocab_is_control", c_bool, [c_void_p, c_int32]),
        ("llama_model_chat_template", c_char_p, [c_void_p, c_char_p]),
        ("llama_tokenize", c_int32, [c_void_p, c_char_p, c_int32, ctypes.POINTER(c_int32), c_int32, c_bool, c_bool]),
        ("llama_detokenize", c_int32, [c_void_p, ctypes.POINTER(c_int32), c_int32, c_char_p, c_int32, c_bool, c_bool]),
        ("llama_decode", c_int32, [c_void_p, Batch]),
        ("llama_get_logits_ith", ctypes.POINTER(c_float), [c_void_p, c_int32]),
        ("llama_log_set", None, [LOG, c_void_p]),
        ("llama_free", None, [c_void_p]),
        ("llama_model_free", None, [c_void_p]),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    words = library.llama_context_default_params().words
    assert {place: words[place] for place in DEFAULTS} == DEFAULTS, "llama_context_params has another layout in this version"
    lines = []
    library.keep = LOG(lambda _level, text, _data: lines.append(text.decode("utf-8", "replace")))
    library.llama_log_set(library.keep, None)
    backends.ggml_backend_load_all_from_path(str(folder).encode())
    return library, lines


class Model:
    """A loaded GGUF file. Keys and values are cached in float32 and attention is the plain one."""

    def __init__(self, library, handle):
        self._library, self._model = library, handle
        self._vocab = library.llama_model_get_vocab(handle)
        self.vocab_size = library.llama_vocab_n_tokens(self._vocab)
        self.bos, self.eos = library.llama_vocab_bos(self._vocab), library.llama_vocab_eos(self._vocab)
        self.adds_bos = library.llama_vocab_get_add_bos(self._vocab)
        template = library.llama_model_chat_template(handle, None)
        self.chat_template = template and template.decode()

    @contextmanager
    def _context(self, size):
        params = self._library.llama_context_default_params()
        for place, value in {N_CTX: size, N_THREADS: 1, N_THREADS_BATCH: 1, FLASH: 0, TYPE_K: 0, TYPE_V: 0}.items():
            params.words[place] = value
        context = self._library.llama_init_from_model(self._model, params)
        assert context
        try:
            yield context
        finally:
            self._library.llama_free(context)

    def _decode(self, context, ids):
        batch = Batch(len(ids), (c_int32 * len(ids))(*ids), None, None, None, None, (c_int8 * len(ids))(*[1] * len(ids)))
        assert self._library.llama_decode(context, batch) == 0
        rows = [self._library.llama_get_logits_ith(context, i) for i in range(len(ids))]
        return np.stack([np.ctypeslib.as_array(row, (self.vocab_size,)).copy() for row in rows])

    def logits(self, ids, size=256):
        """float32 (T, V) after each of `ids`, in a context of `size` tokens."""
        with self._context(size) as context:
            return self._decode(context, ids)

    def greedy(self, ids, count):
        """`count` ids after `ids`, the most probable each, one at a time."""
        made, step = [], list(ids)
        with self._context(len(ids) + count) as context:
            while len(made) < count:
                step = [int(self._decode(context, step)[-1].argmax())]
                made += step
        return made

    def is_control(self, token):
        return self._library.llama_vocab_is_control(self._vocab, token)

    def encode(self, text, special=False):
        """Ids of `text`; with `special`, control tokens in it are read and BOS is added where the file says so."""
        raw = text.encode()
        ids = (c_int32 * (len(raw) + 8))()
        count = self._library.llama_tokenize(self._vocab, raw, len(raw), ids, len(ids), special, special)
        assert count >= 0
        return list(ids[:count])

    def decode(self, ids):
        """The text of `ids` without control tokens."""
        buffer = ctypes.create_string_buffer(64 * len(ids) + 64)
        count = self._library.llama_detokenize(
            self._vocab, (c_int32 * len(ids))(*ids), len(ids), buffer, len(buffer), True, False
        )
        assert count >= 0
        return buffer.raw[:count].decode("utf-8", "replace")


@contextmanager
def load(path):
    """The GGUF file `path` in llama.cpp; fails with what it logged when it refuses the file."""
    library, lines = _library()
    del lines[:]
    handle = library.llama_model_load_from_file(str(path).encode(), library.llama_model_default_params())
    assert handle, "".join(lines)
    try:
        yield Model(library, handle)
    finally:
        library.llama_model_free(handle)
