"""The house keeps its order: imports point down, `utils` knows no model, files and functions stay short.

docs/design.md draws the floors. Each rule is a function of a source tree that lists what breaks it, so that the same
function is tried on the project and on a small tree with made-up violations.
"""

import ast
import io
import re
import textwrap
import tokenize
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# A room may import rooms with a smaller number and itself. Scripts, in the root folder, never import each other.
FLOORS = {"scripts": 4, "modules": 3, "networks": 2, "hunyuan_model": 1, "dataset": 1, "utils": 0}
# These may import everything; no room may import them.
OUTSIDE = ("examples", "benchmarks", "tests")
MOST_LINES_OF_A_FILE = 400
MOST_LINES_OF_A_FUNCTION = 60
MOST_MODULES_IN_A_FOLDER = 18
# Such imports keep --help and option errors fast, or load an optional package only when it is chosen.
MOST_IMPORTS_INSIDE_FUNCTIONS = 40
# Files that hold a table of data and little else may be longer.
DATA_TABLES: tuple[str, ...] = ()
# What `utils` does not know: the model, its adapters, its data and the job.
DOMAIN_WORDS = re.compile(
    r"hunyuan|\bhv_|\bdit\b|\bvae\b|\blora|latent|denois|diffusion|timestep|caption|\btrain", re.I
)

Rule = Callable[[Path], list[str]]  # the violations in a source tree


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def modules_in(root: Path) -> dict[str, Path]:
    """Every script and every module of the rooms and of what stands outside of them, by dotted name."""
    folders = [folder for folder in (*FLOORS, *OUTSIDE) if (root / folder).is_dir()]
    paths = [*root.glob("*.py"), *(path for folder in folders for path in (root / folder).rglob("*.py"))]
    return {module_name(path, root): path for path in sorted(paths)}


def room_of(module: str) -> str:
    room = module.partition(".")[0]
    return room if room in FLOORS or room in OUTSIDE else "scripts"


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def import_statements(node: ast.AST, at_top: bool = True) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    """Every import statement below `node` that runs, and whether it stands outside of functions."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            yield child, at_top
        elif not is_type_checking(child):
            yield from import_statements(child, at_top and not isinstance(child, (ast.FunctionDef, ast.Lambda)))


@cache
def imports_of(path: Path, root: Path) -> set[str]:
    """The modules of this tree that a file imports. `from a import b` means the module a.b where there is one."""
    known, found = modules_in(root), set()
    for statement, _ in import_statements(ast.parse(path.read_text("utf-8"))):
        if isinstance(statement, ast.Import):
            found.update(alias.name for alias in statement.names)
        else:
            source = _source_of(statement, path, root)
            below = [f"{source}.{alias.name}" for alias in statement.names]
            found.update(name if name in known else source for name in below)
    return found & known.keys()


def _source_of(statement: ast.ImportFrom, path: Path, root: Path) -> str:
    """`a.b` of `from a.b import c`; relative imports are resolved."""
    folder = path.relative_to(root).parts[: -statement.level] if statement.level else ()
    return ".".join((*folder, *filter(None, [statement.module])))


def upward_imports(root: Path) -> list[str]:
    """Imports from a lower floor to a higher one, to another room of the same floor, and between scripts."""
    wrong = []
    for name, path in modules_in(root).items():
        room = room_of(name)
        for imported in imports_of(path, root) if room in FLOORS else ():
            target = room_of(imported)
            inside = room == target != "scripts"
            if not inside and (target in OUTSIDE or FLOORS[target] >= FLOORS[room]):
                wrong.append(f"{name} -> {imported}")
    return sorted(wrong)


def import_circles(root: Path) -> list[str]:
    """Groups of modules that import each other, directly or through others; imports inside functions count as well."""
    direct = {name: imports_of(path, root) - {name} for name, path in modules_in(root).items()}

    def reached_from(start: str) -> set[str]:
        reached, waiting = set(), [start]
        while waiting:
            new = direct[waiting.pop()] - reached
            reached |= new
            waiting += new
        return reached

    reached = {name: reached_from(name) for name in direct}
    groups = {tuple(sorted({name, *(o for o in reached[name] if name in reached[o])})) for name in direct}
    return sorted(" <-> ".join(group) for group in groups if len(group) > 1)


def imports_inside_functions(root: Path) -> list[str]:
    """Where import statements stand inside functions, tests aside."""
    return [
        f"{path.relative_to(root).as_posix()}:{statement.lineno}"
        for name, path in modules_in(root).items()
        if room_of(name) != "tests"
        for statement, at_top in import_statements(ast.parse(path.read_text("utf-8")))
        if not at_top
    ]


def without_examples(docstring: str) -> str:
    """A docstring without its examples: blocks that follow an empty line and are indented deeper than the text.

    The entries of `Args:` and the like follow their heading directly, so they stay.
    """
    lines = docstring.expandtabs().splitlines()
    depths = [len(line) - len(line.lstrip()) if line.strip() else None for line in lines]
    margin = min((depth for depth in depths[1:] if depth is not None), default=0)
    kept, in_example = lines[:1], False
    for line, depth, depth_above in zip(lines[1:], depths[1:], depths, strict=False):
        if depth is not None:
            in_example = depth > margin and (in_example or depth_above is None)
        kept.append("" if in_example else line)
    return "\n".join(kept)


def domain_words(folder: Path) -> list[str]:
    """Lines in the code, comments and docstrings of a folder that name what it must not know."""
    found = []
    for path in sorted(folder.rglob("*.py")):
        text = path.read_text("utf-8")
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            content = token.string
            if token.type == tokenize.STRING and content.startswith('"""'):
                content = without_examples(content)
            for number, line in enumerate(content.splitlines()):
                if token.type != tokenize.NEWLINE and DOMAIN_WORDS.search(line):
                    found.append(f"{path.name}:{token.start[0] + number}: {line.strip()}")
    return found


def long_files(root: Path, tables: Sequence[str] = DATA_TABLES) -> list[str]:
    paths = {path.relative_to(root).as_posix(): path for name, path in modules_in(root).items() if not is_test(name)}
    counts = {path: len(file.read_text("utf-8").splitlines()) for path, file in paths.items() if path not in tables}
    return [path for path, count in counts.items() if count > MOST_LINES_OF_A_FILE]


def long_functions(root: Path) -> list[str]:
    return [
        f"{name}.{node.name}"
        for name, path in modules_in(root).items()
        if not is_test(name)
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= MOST_LINES_OF_A_FUNCTION
    ]


def is_test(module: str) -> bool:
    return room_of(module) == "tests"


def full_folders(root: Path) -> list[str]:
    """Folders with too many modules beside their subfolders."""
    modules = [path for name, path in modules_in(root).items() if not is_test(name) and path.name != "__init__.py"]
    counts = Counter(path.parent.relative_to(root).as_posix() for path in modules)
    return [folder for folder, count in counts.items() if count > MOST_MODULES_IN_A_FOLDER]


def domain_words_in_utils(root: Path) -> list[str]:
    return domain_words(root / "utils")


RULES = (upward_imports, import_circles, long_files, long_functions, full_folders, domain_words_in_utils)


@pytest.mark.parametrize("rule", RULES)
def test_the_project_keeps_the_rule(rule: Rule) -> None:
    assert rule(ROOT) == []


def test_few_imports_stand_inside_functions() -> None:
    found = imports_inside_functions(ROOT)
    assert len(found) <= MOST_IMPORTS_INSIDE_FUNCTIONS, "\n".join(found)


def tree(folder: Path, files: Mapping[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


ORDERLY = {
    "run.py": "from modules import loop\n\n\ndef main():\n    import networks.lora\n",
    "modules/__init__.py": "",
    "modules/loop.py": "from networks.lora import LoRA\nfrom hunyuan_model import models\n",
    "networks/lora.py": "from hunyuan_model.models import Model\n",
    "hunyuan_model/models.py": "from utils.files import read\n",
    "dataset/cache.py": "import utils.files\n",
    "utils/files.py": '"""Reads files.\n\n    read("lora.safetensors")\n"""\n',
    "examples/world.py": "import run\nfrom utils.files import read\n",
    "tests/test_run.py": "import run\n" + "\n" * 500,
}
FUNCTION = "def work():\n" + "    print()\n" * 60
# By rule: what is put into the orderly tree, and what the rule then says.
MADE_UP = [
    (upward_imports, "utils/files.py", "def f():\n    from networks import lora\n", "utils.files -> networks.lora"),
    (upward_imports, "dataset/cache.py", "import hunyuan_model.models\n", "dataset.cache -> hunyuan_model.models"),
    (upward_imports, "other.py", "from run import main\n", "other -> run"),
    (upward_imports, "modules/loop.py", "import run\n", "modules.loop -> run"),
    (upward_imports, "modules/loop.py", "from examples.world import Scene\n", "modules.loop -> examples.world"),
    (import_circles, "utils/files.py", "from utils import cli\n", "utils.cli <-> utils.files"),
    (import_circles, "utils/files.py", "from .cli import option\n", "utils.cli <-> utils.files"),
    (long_files, "utils/files.py", "\n" * 401, "utils/files.py"),
    (long_functions, "utils/files.py", FUNCTION, "utils.files.work"),
    (long_functions, "utils/files.py", f"class A:\n{textwrap.indent(FUNCTION, '    ')}", "utils.files.work"),
    (domain_words_in_utils, "utils/files.py", "# of a LoRA\n", "files.py:1: # of a LoRA"),
    (domain_words_in_utils, "utils/files.py", "def read_latents(): ...\n", "files.py:1: read_latents"),
    (
        domain_words_in_utils,
        "utils/files.py",
        '"""Reads.\n\nArgs:\n    a: for training.\n"""\n',
        "files.py:4: a: for training.",
    ),
    (domain_words_in_utils, "utils/files.py", 'def f():\n    """Reads.\n\n    A VAE.\n    """\n', "files.py:4: A VAE."),
]


@pytest.mark.parametrize("rule", RULES)
def test_an_orderly_tree_passes(rule: Rule, tmp_path: Path) -> None:
    assert rule(tree(tmp_path, ORDERLY)) == []


@pytest.mark.parametrize(("rule", "file", "text", "violation"), MADE_UP)
def test_a_violation_is_named(rule: Rule, file: str, text: str, violation: str, tmp_path: Path) -> None:
    cli = {"utils/cli.py": "from utils.files import read\n"}
    assert rule(tree(tmp_path, {**ORDERLY, **cli, file: text})) == [violation]


def test_imports_for_type_checkers_do_not_count(tmp_path: Path) -> None:
    text = "from typing import TYPE_CHECKING\n\nif TYPE_CHECKING:\n    from networks.lora import LoRA\n"
    assert upward_imports(tree(tmp_path, {**ORDERLY, "utils/files.py": text})) == []


def test_a_table_of_data_may_be_long(tmp_path: Path) -> None:
    root = tree(tmp_path, {**ORDERLY, "networks/names.py": "\n" * 401})
    assert long_files(root) == ["networks/names.py"]
    assert long_files(root, tables=["networks/names.py"]) == []


def test_a_full_folder_is_named(tmp_path: Path) -> None:
    files = {f"networks/n{number}.py": "" for number in range(MOST_MODULES_IN_A_FOLDER)}
    assert full_folders(tree(tmp_path, {**ORDERLY, **files})) == ["networks"]


def test_imports_inside_functions_are_found(tmp_path: Path) -> None:
    files = {"modules/loop.py": "class A:\n    import os\n\n    def f(self):\n        if 1:\n            import os\n"}
    assert imports_inside_functions(tree(tmp_path, {**ORDERLY, **files})) == ["modules/loop.py:6", "run.py:5"]
