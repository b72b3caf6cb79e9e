"""Tokenizer and packed batches for the tiny model."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tasks
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

PAD, BOS, EOS = range(3)  # the ids that config.json and generation_config.json name
SPECIAL = ("<|pad|>", "<|bos|>", "<|eos|>")
IGNORE = -100  # target of the tokens that are not trained on


def build_tokenizer(vocab_size: int, seed: int) -> Tokenizer:
    """Byte-level BPE in which each digit is one token; it adds no token of its own to a prompt."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    lists = (s for s in tasks.samples(seed, held_out=False) if s[0] != "fact")
    texts = [prompt + text for _, prompt, text in itertools.islice(lists, 1000)]
    texts += [prompt + text for prompt, text in tasks.FACTS.items()]
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a checkpoint folder."""
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


@dataclass
class Rows:
    """Samples packed into rows of equal length; all tensors are [rows, length] int32."""

    ids: Tensor
    positions: Tensor  # within the sample
    documents: Tensor  # index of the sample, -1 for padding
    targets: Tensor  # the next token where it belongs to the answer, else IGNORE

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, index: Tensor | slice, device: torch.device) -> tuple[Tensor, ...]:
        """The rows at `index`, on `device`, as int64."""
        fields = (self.ids, self.positions, self.documents, self.targets)
        return tuple(field[index].to(device).long() for field in fields)

    def to(self, device: torch.device) -> "Rows":
        """The same rows on `device`."""
        fields = (self.ids, self.positions, self.documents, self.targets)
        return Rows(*(field.to(device) for field in fields))


def pack(samples: Sequence[tasks.Sample], tokenizer: Tokenizer, length: int = 64) -> Rows:
    """Put the samples one after another into rows; a sample never spans two rows."""
    prompts = tokenizer.encode_batch_fast([prompt for _, prompt, _ in samples])
    answers = tokenizer.encode_batch_fast([text for _, _, text in samples])
    placed: list[tuple[list[int], int]] = []  # tokens, offset into the flat array
    cursor = 0
    for prompt, text in zip(prompts, answers, strict=True):
        tokens = [*prompt.ids, *text.ids, EOS]
        if cursor % length + len(tokens) > length:
            cursor += length - cursor % length
        placed.append((tokens, cursor))
        cursor += len(tokens)
    rows = -(-cursor // length)
    ids = np.full(rows * length, PAD, np.int32)
    positions = np.zeros_like(ids)
    documents, targets = np.full_like(ids, -1), np.full_like(ids, IGNORE)
    for index, ((tokens, start), prompt) in enumerate(zip(placed, prompts, strict=True)):
        end, answer_at = start + len(tokens), len(prompt.ids)
        ids[start:end] = tokens
        positions[start:end] = np.arange(len(tokens))
        documents[start:end] = index
        targets[start + answer_at - 1 : end - 1] = tokens[answer_at:]
    fields = (ids, positions, documents, targets)
    return Rows(*(torch.from_numpy(field).view(rows, length) for field in fields))
