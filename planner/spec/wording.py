"""How messages write counts, bytes and what an error says."""


def plural(noun: str, count: int) -> str:
    """The noun as it stands after a count.

    >>> plural("GPU", 1), plural("GPU", 2)
    ('GPU', 'GPUs')
    """
    return noun if count == 1 else f"{noun}s"


def counted(count: int, noun: str) -> str:
    """A count with its noun.

    >>> counted(1, "GPU"), counted(1024, "GPU")
    ('1 GPU', '1,024 GPUs')
    """
    return f"{count:,} {plural(noun, count)}"


def gigabytes(count: int) -> str:
    """Bytes in gigabytes, with two significant digits below ten.

    >>> gigabytes(2_340_000_000), gigabytes(1_400_000_000_000)
    ('2.3 GB', '1,400 GB')
    """
    return f"{count / 1e9:,.0f} GB" if count >= 10e9 else f"{count / 1e9:.2g} GB"


def reason_of(error: BaseException, *, named: bool = False, most: int = 200) -> str:
    """What an error says, in one line of `most` characters at most: after its kind if that is to be
    `named`, and its kind alone where it says nothing.

    >>> reason_of(ValueError("no\\nnumber")), reason_of(ValueError("x"), named=True)
    ('no number', 'ValueError: x')
    >>> reason_of(KeyboardInterrupt())
    'KeyboardInterrupt'
    """
    kind, text = type(error).__name__, " ".join(str(error).split())
    line = f"{kind}: {text}" if named and text else text
    return line[:most] or kind
