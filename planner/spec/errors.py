"""The one exception that a user is meant to see."""


class UserError(Exception):
    """Something the user can mend. The message is one line: what is wrong, and what to do. The CLI
    exits with 2."""

    def __init__(self, message: str) -> None:
        """Names from files may hold line breaks, which become spaces, and other characters that
        are not to be seen, which become escapes."""
        line = " ".join(message.splitlines())
        super().__init__("".join(c if c.isprintable() else ascii(c)[1:-1] for c in line))
