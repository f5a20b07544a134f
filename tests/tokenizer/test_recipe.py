"""`athanor tokenizer --noise`: the vocabulary of a run gets what corrupts text, and no other run is changed by that."""

import pytest

from athanor.core.errors import ConfigError, TokenizerError
from athanor.core.io import read_json
from athanor.recipes import corpus, tokenizer
from athanor.tokenizer.bpe import Tokenizer


@pytest.fixture
def run(tmp_path):
    """A run with a corpus."""
    text = tmp_path / "text"
    text.mkdir()
    for i in range(12):
        words = " ".join(f"heat{j % 7} keeps {j * i % 13} steady" for j in range(400))
        (text / f"{i}.txt").write_text(f"{i}. {words}\n")
    corpus.main(corpus.Config(tmp_path / "run", text=text, heldout_fraction=0.2))
    return tmp_path / "run"


def test_noise_goes_into_the_vocabulary(run, capsys):
    config = tokenizer.Config(run, vocab_size=330, skills=0, noise=5)
    assert tokenizer.main(config) == 0
    made = Tokenizer.load(run / "tokenizer")
    assert made.mask_id == 16 and made.sentinel_ids == (17, 18, 19, 20, 21) and made.vocab_size <= 330
    assert read_json(run / "stages" / "tokenizer.json")["settings"]["noise"] == 5
    assert tokenizer.main(config) == 0  # done already, with the same settings
    with pytest.raises(ConfigError, match="already has stage 'tokenizer', done with other noise"):
        tokenizer.main(tokenizer.Config(run, vocab_size=330, skills=0, noise=6))


def test_without_noise_a_run_is_what_it_was(run):
    tokenizer.main(tokenizer.Config(run, vocab_size=300, skills=0))
    assert Tokenizer.load(run / "tokenizer").mask_id is None
    assert "noise" not in read_json(run / "stages" / "tokenizer.json")["settings"]


def test_noise_that_has_no_room(run):
    with pytest.raises(TokenizerError, match=r"vocab_size \(300\) must be at least 373: 117 control tokens and 256 bytes"):
        tokenizer.main(tokenizer.Config(run, vocab_size=300, skills=0, noise=100))
