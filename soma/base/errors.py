"""The one exception for mistakes that the person at the keyboard can mend."""


class UserError(ValueError):
    """A mistake in a recipe, a file, an option or a request.

    The message says what is wrong, where (file, line, key) and what to do. The command line prints it without a
    traceback and exits with status 2. Anything that is our own fault is an `assert` or a plain exception instead.
    """
