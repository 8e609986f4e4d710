"""Prompts and right answers of the task, as text and as tokens."""

import random

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from executor.digits.recipe import Recipe

DIGITS = "0123456789"
VOCABULARY = ["<pad>", "<eos>", "<unk>", *DIGITS, "sort", ":"]
PAD, EOS, FIRST_DIGIT = 0, 1, VOCABULARY.index("0")


def make_lines(recipe: Recipe, seed: int) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """The lines of train.jsonl and eval.jsonl; no prompt occurs twice."""
    count = recipe.train_prompts + recipe.held_out_prompts
    numbers = random.Random(seed).sample(range(10**recipe.digits), count)
    strings = [f"{number:0{recipe.digits}d}" for number in numbers]
    lines = [
        {"prompt": f"sort {' '.join(text)} :", "answer": " ".join(sorted(text))} for text in strings
    ]
    return lines[: recipe.train_prompts], lines[recipe.train_prompts :]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A token per word; nothing is added to a prompt."""
    words = {word: number for number, word in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
    )


def encode(tokenizer: PreTrainedTokenizerFast, lines: list[dict[str, str]]) -> Tensor:
    """The prompt, the right answer and the end of the sequence as token ids `[N, T]`. All lines are
    equally long."""
    return torch.tensor(
        tokenizer([f"{line['prompt']} {line['answer']} <eos>" for line in lines])["input_ids"]
    )


def draw(sequences: Tensor, count: int) -> Tensor:
    return sequences[torch.randint(len(sequences), (count,))]
