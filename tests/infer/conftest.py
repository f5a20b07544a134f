"""The plain forward pass that every answer of the engine is compared with."""

import pytest
import torch

from athanor.infer.engine import Engine
from athanor.types import Request, SamplingParams


@pytest.fixture(scope="session")
def model(tiny):
    return tiny()


@pytest.fixture
def engine(model, tokenizer):
    """`engine(model=..., **options)`: a new engine, over the tiny model by default."""
    return lambda model=model, **options: Engine(model, tokenizer, **options)


@pytest.fixture(scope="session")
def prompts(tokenizer):
    texts = ("The athanor", "keeps", "12 + 30 = ", "one steady heat through every stage", "", "naïve café")
    return [[tokenizer.bos_id, *tokenizer.encode(text)] for text in texts]


@pytest.fixture(scope="session")
def plainly(tokenizer):
    """`plainly(model, prompt, ids, temperature=1)`: log-probabilities of the tokens `ids` after `prompt`, and of the best tokens
    there, by one whole forward pass for each."""

    def run(model, prompt, ids, temperature=1.0):
        own, best = [], []
        for i, token in enumerate(ids):
            with torch.no_grad():
                logits = model(torch.tensor([[*prompt, *ids[:i]]]))[0, -1]
            logprobs = torch.log_softmax(logits.double() / temperature, -1)
            own.append(float(logprobs[token]))
            best.append(int(logprobs.argmax()))
        return own, best

    return run


@pytest.fixture
def request_of():
    """`request_of(id, prompt, **params)`."""
    return lambda id, prompt, **params: Request(str(id), prompt, SamplingParams(**params))
