"""The one exception that means "the user can fix this"; launchers print it as a single line and exit with 1."""

import re


class UserError(Exception):
    """An error of the user's: one line that says what is wrong, where (file, row, parameter), and the cure."""


def without_passwords(text: str) -> str:
    """`text`, but for the user and password of each address in it."""
    return re.sub(r"://[^/@\s]+@", "://", text)
