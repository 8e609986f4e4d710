"""Example reward functions: prompts and responses as text in, one number per response out."""

import re


def exact(prompts: list[str], responses: list[str], answers: list[str | None]) -> list[float]:
    """1 if the last word of the response is the answer, else 0."""
    del prompts
    last = [(response.split() or [""])[-1].rstrip(".") for response in responses]
    return [float(word == answer) for word, answer in zip(last, answers, strict=True)]


def length(prompts: list[str], responses: list[str], answers: list[str | None]) -> list[float]:
    """The share of 256 characters that the response fills, 1 at most: needs no answers."""
    del prompts, answers
    return [min(len(response) / 256, 1.0) for response in responses]


def gsm8k(prompts: list[str], responses: list[str], answers: list[str | None]) -> list[float]:
    """1 if the last number of the response is the one after the #### of GSM8K's answer, else 0."""
    del prompts
    given = [re.findall(r"-?\d[\d,]*", response) for response in responses]
    last = [numbers[-1].replace(",", "") if numbers else "" for numbers in given]
    wanted = [(answer or "").rpartition("####")[2].strip().replace(",", "") for answer in answers]
    return [float(number == answer) for number, answer in zip(last, wanted, strict=True)]
