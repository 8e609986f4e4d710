"""Tables and lists in Markdown."""

from collections.abc import Iterable, Sequence

WORD_COLUMNS = 2  # the first columns of every table are words, the others figures


def markdown_table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose figures are aligned to the right.

    >>> print(markdown_table(["plan", "pool", "GB"], [["split", "actor", "71.5"]]))
    | plan | pool | GB |
    | --- | --- | ---: |
    | split | actor | 71.5 |
    """
    alignment = ["---"] * WORD_COLUMNS + ["---:"] * (len(titles) - WORD_COLUMNS)
    lines = [titles, alignment, *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def markdown_list(items: Iterable[str]) -> str:
    """A list with an item a line."""
    return "\n".join(f"- {item}" for item in items)
