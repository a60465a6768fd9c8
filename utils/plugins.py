"""Classes that a user names on the command line, and the `key=value` arguments of their constructors.

Only `load_class` imports the user's package. The other functions check without it.
"""

import ast
import importlib
import importlib.util
import inspect
from collections.abc import Collection, Sequence
from typing import Any

from utils.errors import UserError, did_you_mean, one_line


def parse_arguments(words: Sequence[str], option: str) -> dict[str, Any]:
    """`["weight_decay=0.01", "betas=0.9,0.999"]` as a dict of Python values.

    Raises:
        UserError: a word is not `key=value`, a key is given twice, or a value is not a Python literal.
    """
    arguments: dict[str, Any] = {}
    for word in words:
        key, separator, text = word.partition("=")
        if not separator or not key.isidentifier():
            raise UserError(f"{option} {word}: key=value is expected, for example weight_decay=0.01")
        if key in arguments:
            raise UserError(f"{option} {word}: '{key}' is given twice")
        try:
            arguments[key] = ast.literal_eval(text.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            raise UserError(
                f"{option} {word}: '{text}' is not a Python value; write 0.1, True, 0.9,0.999 or \"'text'\" in quotes"
            ) from None
    return arguments


def require_package(dotted: str, option: str) -> None:
    """Raises a UserError if the package of `package.module.Class` is not installed. Imports nothing."""
    package, _, rest = dotted.partition(".")
    if not rest or not all(part.isidentifier() for part in dotted.split(".")):
        raise UserError(f"{option} {dotted}: a dotted path such as package.module.Class is expected")
    if importlib.util.find_spec(package) is None:
        raise UserError(f"{option} {dotted}: the package {package} is not installed; pip install {package}")


def load_class(dotted: str, option: str) -> type:
    """Imports `package.module.Class`.

    Raises:
        UserError: the module cannot be imported or has no such class.
    """
    require_package(dotted, option)
    module_name, _, name = dotted.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a foreign module may raise anything while it is imported
        raise UserError(f"{option} {dotted}: {module_name} cannot be imported: {one_line(error)}") from error
    found = getattr(module, name, None)
    if not inspect.isclass(found):
        classes = [word for word, value in vars(module).items() if inspect.isclass(value)]
        raise UserError(f"{option} {dotted}: {module_name} has no class {name}{did_you_mean(name, classes)}")
    return found


def refuse_taken(arguments: Collection[str], option: str, taken: dict[str, str]) -> None:
    """Raises a UserError for constructor arguments that another option sets.

    Args:
        taken: by argument, the option that sets it.
    """
    for name in arguments:
        if name in taken:
            raise UserError(f"{option} {name}=...: {name} is set by {taken[name]}")


def check_arguments(cls: type, arguments: Collection[str], option: str, taken: dict[str, str]) -> None:
    """Raises a UserError for arguments that the constructor does not have or that are `taken` (see above)."""
    refuse_taken(arguments, option, taken)
    parameters = inspect.signature(cls).parameters.values()
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        return
    known = [parameter.name for parameter in parameters if parameter.name not in taken]
    for name in arguments:
        if name not in known:
            hint = did_you_mean(name, known)
            raise UserError(f"{option}: {cls.__name__} has no argument '{name}'{hint}; it knows {', '.join(known)}")
