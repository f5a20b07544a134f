"""llama.cpp itself, in float32 and on one thread (how it is run and how to get it: bench/inference/llamacpp.py).

    npm install --prefix build/llamacpp @node-llama-cpp/linux-x64@3.22.1
    ATHANOR_LLAMACPP=$PWD/build/llamacpp/node_modules python -m pytest tests/models/test_gguf.py

Without the variable, or on a machine that is not Linux on x86-64, these tests are skipped.
"""

import ctypes
from contextlib import contextmanager
from ctypes import POINTER, c_bool, c_char_p, c_int32, c_void_p

import numpy as np
import pytest

from athanor.core.errors import MissingExtraError
from bench.inference import llamacpp
from bench.inference.llamacpp import Token

VOCABULARY = (
    ("llama_vocab_bos", c_int32, [c_void_p]),
    ("llama_vocab_eos", c_int32, [c_void_p]),
    ("llama_vocab_get_add_bos", c_bool, [c_void_p]),
    ("llama_vocab_is_control", c_bool, [c_void_p, c_int32]),
    ("llama_model_chat_template", c_char_p, [c_void_p, c_char_p]),
    ("llama_tokenize", c_int32, [c_void_p, c_char_p, c_int32, POINTER(c_int32), c_int32, c_bool, c_bool]),
    ("llama_detokenize", c_int32, [c_void_p, POINTER(c_int32), c_int32, c_char_p, c_int32, c_bool, c_bool]),
)


class Model(llamacpp.Model):
    """A loaded GGUF file. Keys and values are cached in float32 and attention is the plain one."""

    def __init__(self, library, handle):
        super().__init__(library, handle)
        llamacpp.declare(library, VOCABULARY)
        self.bos, self.eos = library.llama_vocab_bos(self._vocab), library.llama_vocab_eos(self._vocab)
        self.adds_bos = library.llama_vocab_get_add_bos(self._vocab)
        template = library.llama_model_chat_template(handle, None)
        self.chat_template = template and template.decode()

    def _context(self, size):
        threads = {llamacpp.N_THREADS: 1, llamacpp.N_THREADS_BATCH: 1}
        return self.context({llamacpp.N_CTX: size, llamacpp.FLASH: 0, llamacpp.TYPE_K: 0, llamacpp.TYPE_V: 0} | threads)

    def logits(self, ids, size=256):
        """float32 (T, V) after each of `ids`, in a context of `size` tokens."""
        with self._context(size) as context:
            return np.stack(self.run(context, [Token(id, i, 0, True) for i, id in enumerate(ids)]))

    def greedy(self, ids, count):
        """`count` ids after `ids`, the most probable each, one at a time."""
        whole, done = list(ids), 0
        with self._context(len(ids) + count) as context:
            while len(whole) < len(ids) + count:
                step = [Token(id, done + i, 0, True) for i, id in enumerate(whole[done:])]
                done = len(whole)
                whole.append(int(self.run(context, step)[-1].argmax()))
        return whole[len(ids) :]

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
    """The GGUF file `path` in llama.cpp; skips the test when there is none here."""
    try:
        llamacpp.library()
    except MissingExtraError as error:
        pytest.skip(str(error))  # which says what is missing and how to get it
    with llamacpp.load(path, Model) as model:
        yield model
