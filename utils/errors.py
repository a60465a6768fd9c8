"""The two ways in which a run may end early without being our bug."""


class UserError(ValueError):
    """Something the user can put right: one line that says what, where, what was expected and what to do.

    Scripts print it on stderr and exit with code 2 (`utils.cli.run_script`).
    """


def one_line(text: object) -> str:
    """Any message folded into a single line, for errors that quote what a library said."""
    return " ".join(str(text).split())


def did_you_mean(word: str, known: "list[str]") -> str:
    """` (did you mean 'x'?)` for the nearest known word, or an empty string."""
    import difflib

    nearest = difflib.get_close_matches(word, known, n=1)
    return f" (did you mean '{nearest[0]}'?)" if nearest else ""
