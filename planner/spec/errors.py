"""The one exception that a user is meant to see."""


class UserError(Exception):
    """Something the user can mend. The message is one line: what is wrong, and what to do. The CLI
    exits with 2."""

    def __init__(self, message: str) -> None:
        """Names from files may hold line breaks and the like, which are shown as escapes."""
        super().__init__("".join(c if c.isprintable() else ascii(c)[1:-1] for c in message))
