"""What a user can be told: an error that says what was expected, what was found, and what to do next."""


class PrunelensError(Exception):
    """A mistake in the input or a limit of the environment; the command line prints it and exits with 2."""
