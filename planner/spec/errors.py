"""The one exception that a user is meant to see."""


class UserError(Exception):
    """Something the user can mend. The message is one line: what is wrong, and what to do. The CLI
    exits with 2."""
