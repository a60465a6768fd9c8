"""Options, declared once: each group is a frozen dataclass whose fields are the command line.

    @dataclass(frozen=True, kw_only=True)
    class VaeOptions:
        \"\"\"VAE\"\"\"                                            # the group's heading in --help
        vae: Path = option(help="VAE checkpoint", path="any")    # no default: required

    vae, run = parse_options("Caches latents.", VaeOptions, RunOptions)

A field's annotation sets the type: `bool` is a flag, `list[T]` takes any number of values, `tuple[T, T]` exactly two.
A `Path` loses invisible characters and, with `path=`, must exist. Any other class is called with the text. It raises
ValueError if the text is wrong, and its class attribute `expected` describes a correct text.

`--config_file FILE.toml` gives the same options from a file. They are checked in the same way; the command line wins.
Nothing heavy is imported here, so that --help and error messages appear at once.
"""

import argparse
import dataclasses
import errno
import json
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from utils.errors import UserError, did_you_mean, one_line, printable
from utils.files import read_toml, user_path

_UNSET = object()
# A full, broken or read-only disk, a missing permission and an impossible path are not bugs of ours.
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM)
_NEGATIVE_NUMBER = re.compile(r"-(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$", re.IGNORECASE)
_PATH_ERRORS = (errno.ENOTDIR, errno.ENAMETOOLONG)


def option(
    default: Any = dataclasses.MISSING,
    *,
    help: str,
    choices: Sequence[str] | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
    path: str | None = None,
    secret: bool = False,
) -> Any:
    """A dataclass field that is a command-line option.

    Args:
        default: the value if the option is not given. Without a default the option is required.
        help: one sentence for --help.
        choices: the allowed values.
        minimum, maximum: inclusive bounds of a number.
        path: the path must exist and be a "file", a "dir" or "any" of the two.
        secret: the value is never saved by `settings_toml`.
    """
    metadata = {"help": help, "choices": choices, "minimum": minimum, "maximum": maximum, "path": path}
    metadata["secret"] = secret
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class _Option:
    """The command-line option of one dataclass field."""

    name: str
    kind: type
    count: int | str | None  # None: one value; an int: exactly that many; "*": any number
    required: bool
    default: Any
    help: str
    choices: Sequence[str] | None
    minimum: float | None
    maximum: float | None
    path: str | None
    secret: bool

    @classmethod
    def from_field(cls, field: dataclasses.Field, annotation: Any) -> "_Option":
        kind, count = _value_type(annotation)
        has_factory = field.default_factory is not dataclasses.MISSING
        default = field.default_factory() if has_factory else field.default
        required = default is dataclasses.MISSING
        return cls(field.name, kind, count, required, None if required else default, **field.metadata)

    @property
    def expected(self) -> str:
        """What one value is, in words."""
        words = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", Path: "a path"}
        return words.get(self.kind) or self.kind.expected

    def add_to(self, group: argparse._ArgumentGroup) -> None:
        flag = f"--{self.name}"
        text = self.help.replace("%", "%%")
        if self.required:
            text += " (required)"
        elif self.default is not None and self.default is not False and self.default not in ([], ()):
            text += f" (default: {_shown(self.default)})"
        if self.kind is bool:
            group.add_argument(flag, action="store_true", default=_UNSET, help=text)
            return
        metavar = "{" + ",".join(self.choices) + "}" if self.choices else self.kind.__name__.upper()
        action = _Extend if self.count == "*" else "store"
        group.add_argument(
            flag, type=self.convert, nargs=self.count, default=_UNSET, metavar=metavar, help=text, action=action
        )

    def convert(self, text: str) -> Any:
        """One value from its text; raises ArgumentTypeError with what was expected."""
        if self.kind is Path:
            return self._existing(user_path(text))
        if self.choices is not None and text not in self.choices:
            hint = did_you_mean(text, list(self.choices))
            raise argparse.ArgumentTypeError(f"'{text}' is not one of {', '.join(self.choices)}{hint}")
        try:
            value = self.kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"'{text}' is not {self.expected}") from None
        if self.kind in (int, float):
            self._check_range(value, text)
        return value

    def _check_range(self, value: float, text: str) -> None:
        if value != value or value in (float("inf"), float("-inf")):
            raise argparse.ArgumentTypeError(f"{text} is not a finite number")
        if self.minimum is not None and value < self.minimum:
            raise argparse.ArgumentTypeError(f"{text} is too small: the minimum is {self.minimum}")
        if self.maximum is not None and value > self.maximum:
            raise argparse.ArgumentTypeError(f"{text} is too large: the maximum is {self.maximum}")

    def _existing(self, path: Path) -> Path:
        if self.path is None:
            return path
        if not path.exists():
            raise argparse.ArgumentTypeError(f"{path}: no such file or folder")
        if self.path == "file" and not path.is_file():
            raise argparse.ArgumentTypeError(f"{path}: is a folder, a file is expected")
        if self.path == "dir" and not path.is_dir():
            raise argparse.ArgumentTypeError(f"{path}: is a file, a folder is expected")
        return path


def _value_type(annotation: Any) -> tuple[type, int | str | None]:
    """The type of one value and the count of values: `int | None` -> (int, None), `list[str]` -> (str, "*")."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (types.UnionType, typing.Union):
        (annotation,) = [argument for argument in arguments if argument is not type(None)]
        return _value_type(annotation)
    if origin is list:
        return arguments[0], "*"
    if origin is tuple:
        return arguments[0], len(arguments)
    return annotation, None


def _shown(default: Any) -> str:
    return " ".join(map(str, default)) if isinstance(default, (list, tuple)) else str(default)


def _options_of(group: type) -> list[_Option]:
    annotations = typing.get_type_hints(group)
    return [_Option.from_field(field, annotations[field.name]) for field in dataclasses.fields(group) if field.metadata]


class _Extend(argparse.Action):
    """`--path a --path b` is `--path a b`."""

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        given = getattr(namespace, self.dest)
        setattr(namespace, self.dest, values if given is _UNSET else [*given, *values])


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are UserErrors and whose unknown options get a suggestion."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._negative_number_matcher = _NEGATIVE_NUMBER  # argparse's own takes -5e-1 for an option

    def error(self, message: str) -> NoReturn:
        raise UserError(message.removeprefix("argument "))

    def refuse_unknown(self, words: Sequence[str], prefix: str = "") -> None:
        if words:
            name = words[0].split("=")[0]
            known = [flag for action in self._actions for flag in action.option_strings]
            raise UserError(f"{prefix}unknown option {name}{did_you_mean(name, known)}; --help lists all")


def _config_table(path: Path) -> dict[str, Any]:
    """The settings of a TOML file. Its sections have no meaning.

    Raises:
        UserError: not TOML, or a key is given twice.
    """
    table: dict[str, Any] = {}
    for key, value in read_toml(path, "config file").items():
        for name, setting in value.items() if isinstance(value, dict) else [(key, value)]:
            if name in table:
                raise UserError(f"{path}: '{name}' is given twice")
            table[name] = setting
    return table


def _setting_words(path: Path, table: Mapping[str, Any], options: dict[str, _Option]) -> list[str]:
    """Settings from a file as command-line words.

    Raises:
        UserError: a key is not an option, or a value is of the wrong kind.
    """
    words: list[str] = []
    for name, value in table.items():
        known = options.get(name)
        if known is None:
            raise UserError(f"{path}: unknown option '{name}'{did_you_mean(name, list(options))}")
        if isinstance(value, list):
            if known.count is None:
                raise UserError(f"{path}: {name} = {value!r}: one value is expected, not a list")
            words += [f"--{name}", *(_config_word(path, known, item) for item in value)]
        elif known.kind is bool:
            words += [f"--{name}"] if _config_word(path, known, value) == "True" else []
        elif known.count is None:
            words.append(f"--{name}={_config_word(path, known, value)}")
        else:
            words += [f"--{name}", _config_word(path, known, value)]
    return words


def _config_word(path: Path, known: _Option, value: Any) -> str:
    """One value of a config file as it would be typed; raises UserError if it is of the wrong kind."""
    right = {bool: bool, int: (int, float), float: (int, float)}.get(known.kind, (int, float, str))
    looks_like_an_option = isinstance(value, str) and value.startswith("-") and known.count is not None
    if not isinstance(value, right) or isinstance(value, bool) != (known.kind is bool) or looks_like_an_option:
        raise UserError(f"{path}: {known.name} = {value!r}: {known.expected} is expected")
    return str(value)


def parse_options(
    description: str,
    *groups: type,
    argv: Sequence[str] | None = None,
    expand: Callable[[dict[str, Any]], tuple[Path, Mapping[str, Any]] | None] = lambda given: None,
) -> list[Any]:
    """Parses the command line (and `--config_file`) into one instance of each group, in order.

    The command line wins over the config file; there, `--name=false` unsets a flag. A group's `__post_init__` may check
    several options together and raise UserError.

    Args:
        expand: called with the options that are given, by name. It may remove some of them, and return a file and the
            settings in it, which are used for the options that are not given.

    Raises:
        UserError: the command line or the config file is wrong.
        SystemExit: after --help.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _Parser(description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    per_group = {group: _options_of(group) for group in groups}
    options = {known.name: known for members in per_group.values() for known in members}
    for group, members in per_group.items():
        heading = parser.add_argument_group((group.__doc__ or group.__name__).strip().splitlines()[0])
        for known in members:
            known.add_to(heading)
    parser.add_argument(
        "--config_file",
        type=Path,
        help="TOML file with these options; the command line wins, --FLAG=false unsets a flag",
    )

    values = _given(parser, options, argv)
    if (config := values.pop("config_file", None)) is not None:
        values = _from_file(parser, config, _config_table(config), options) | values
    if (found := expand(values)) is not None:
        values = _from_file(parser, *found, options) | values

    missing = [f"--{name}" for name, known in options.items() if known.required and name not in values]
    if missing:
        raise UserError(f"required and not given: {', '.join(missing)}")
    return [
        group(**{known.name: _final(known, values[known.name]) for known in members if known.name in values})
        for group, members in per_group.items()
    ]


def _given(parser: _Parser, options: dict[str, _Option], words: Sequence[str], place: str = "") -> dict[str, Any]:
    """The options among the words, by name; `place` begins the message if a word is not an option."""
    unset = {f"--{known.name}=false": known.name for known in options.values() if known.kind is bool}
    given, unknown = parser.parse_known_args([word for word in words if word not in unset])
    parser.refuse_unknown(unknown, place)
    values = {name: value for name, value in vars(given).items() if value is not _UNSET and value is not None}
    return values | {unset[word]: False for word in words if word in unset}


def _from_file(parser: _Parser, path: Path, table: Mapping[str, Any], options: dict[str, _Option]) -> dict[str, Any]:
    """Settings from a file, checked as if they were typed."""
    try:
        return _given(parser, options, _setting_words(path, table, options), f"{path}: ")
    except UserError as error:
        raise UserError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from None


def _final(known: _Option, value: Any) -> Any:
    return tuple(value) if isinstance(known.count, int) else value


def settings_toml(*groups: Any) -> str:
    """The options of these groups as TOML for `--config_file`, without secrets and without options that are None."""
    lines: list[str] = []
    for group in groups:
        lines += ["", f"[{_toml_value((type(group).__doc__ or type(group).__name__).strip().splitlines()[0])}]"]
        for known in _options_of(type(group)):
            value = getattr(group, known.name)
            if value is not None and not known.secret:
                lines.append(f"{known.name} = {_toml_value(value)}")
    return "\n".join(lines[1:]) + "\n"


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_toml_value, value))}]"
    if type(value) in (int, float):
        return str(value)
    # A JSON string is a valid TOML string, except that TOML requires DEL to be escaped.
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")


def unused_options(group: Any, used: Mapping[str, bool]) -> list[str]:
    """Names of the options that differ from their default but have no effect.

    Args:
        used: by name, whether an option has an effect; an option that is not listed has one.
    """
    defaults = {known.name: known.default for known in _options_of(type(group)) if not used.get(known.name, True)}
    return [name for name, default in defaults.items() if getattr(group, name) != default]


def one_value_each(option: str, values: Sequence[float], count: int, what: str) -> list[float]:
    """One number for each of `count` things, from an option that takes one for each, one for all, or none for 1.0.

    Args:
        option: the option, for the message.
        what: the things, for the message.

    Raises:
        UserError: another number of values.
    """
    if len(values) not in (0, 1, count):
        raise UserError(f"{option}: {len(values)} values for {count} {what}; give one for each, or one for all")
    return list(values) if len(values) == count else [*values, 1.0][:1] * count


def run_script(main: Callable[[], None]) -> NoReturn:
    """Runs a script's `main` and exits.

    A UserError or a failing disk ends in one line on stderr and exit code 2, Ctrl+C in exit code 130. Any other
    exception is a bug and keeps its traceback.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # a Windows console may not know the characters of a file name
    try:
        main()
    except UserError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        os._exit(1)
    except OSError as error:
        if error.errno not in (*_DISK_ERRORS, *_PATH_ERRORS):
            raise
        print(f"error: {printable(error.filename or 'writing a file')}: {error.strerror}", file=sys.stderr)
        sys.exit(2)
    sys.exit(0)


def print_table(title: str, rows: Sequence[Sequence[object]], header: Sequence[str] = ()) -> None:
    """Prints a plain-text table with aligned columns; most scripts end with one."""
    lines = [[printable(cell) for cell in row] for row in ([header] if header else []) + list(rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    print(f"\n{printable(title)}")
    for index, line in enumerate(lines):
        print("  " + "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
        if header and index == 0:
            print("  " + "  ".join("-" * width for width in widths))
