"""Objectives, one file each: `loss(model, batch) -> (sum, count, metrics)`.

The loop adds sums and counts of all micro-batches and divides once (law L3). A file may define besides:

| name                                       | what it is                                                                     |
| ------------------------------------------ | ------------------------------------------------------------------------------ |
| KINDS                                      | kinds of model (`model.kind`) that it trains; ("decoder",) where it is left out |
| NEEDS                                      | methods that a model must have besides                                         |
| DATA                                       | what it learns from where that is not texts, in words: pre-training refuses it |
| Config                                     | a frozen dataclass of its options, which checks them                           |
| build(config)                              | the loss with these options, in place of `loss`                                |
| prepare(batch, config, vocabulary, rng)    | the batch that the loss takes, of one that `data.pack.Rows.batch` makes        |
| check(config, vocabulary, context)         | tokens of the longest sequence that prepare makes; refuses vocabularies        |
| ready(model, config, generator)            | gives a model the heads that it lacks, or refuses it                           |

`prepare` is a pure function: rng is a generator made of (seed, step, micro-batch), so noise is drawn afresh in each epoch and is
the same when a run goes on. What it reads are sequences laid end to end, pieces of documents, and their next tokens; objectives
that corrupt text read the tokens alone, masked labels or not. What it makes:

- for decoders `ids` and `labels`, next tokens; `extras["prefix"]` (S,) where attention is open within a prefix;
- for encoders `ids` corrupted and `labels` at chosen places only, not shifted: labels[i] is what stood at i; `extras` may have
  "segments" (N,) and "next" (S,);
- for encoder-decoders `source` for the encoder, `ids` for the decoder, which begin with the start token, and `labels`, the
  answers; `extras["lost"]` (S,) counts tokens of sequences that were too short.

0 in an extra means nothing, so that a batch may be filled up afterwards (`data.pack.fill`).

`_pretraining.choose` reads all this and builds an objective; `_pretraining.fits` says which architectures it fits.
"""
