"""The one exception that means "the user can fix this"; launchers print it as a single line and exit with 1."""


class UserError(Exception):
    """An error of the user's: one line that says what is wrong, where (file, row, parameter), and the cure."""
