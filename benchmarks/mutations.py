"""Applies small mistakes to a copy of the project, one by one, and checks that a test notices each.

    python -m benchmarks.mutations                      # all: about ten minutes on 2 cores
    python -m benchmarks.mutations --only "T21|scheduler"

mutations.toml beside this file lists the mistakes. Only the tests that are named there run, so the list also says which
test guards what. The working tree is not changed. A mistake that no test notices is a gap in the tests: close it, or
give the entry a `reason`.
"""

import argparse
import multiprocessing
import os
import queue
import re
import shutil
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from tqdm import tqdm

from utils.cli import print_table

ROOT = Path(__file__).resolve().parent.parent
TABLE = Path(__file__).with_suffix(".toml")
WORKERS = 2
SECONDS = 600  # for the tests of one mistake; a mistake that makes them hang is noticed
NOT_COPIED = shutil.ignore_patterns(".*", "__pycache__", "results", "shared")
CAUGHT, SURVIVED, DOES_NOT_RUN = "caught", "SURVIVED", "DOES NOT RUN"

# Where there are forks, a server imports the large packages once, and the process of each mistake is a copy of it.
_CONTEXT = multiprocessing.get_context("forkserver" if sys.platform != "win32" else "spawn")
IMPORTED_ONCE = [
    "pytest",
    "torch",
    "accelerate",
    "transformers",
    "diffusers.models",
    "diffusers.pipelines",
    "av",
    "cv2",
]


@dataclass(frozen=True, kw_only=True)
class Mutation:
    """A small mistake.

    Attributes:
        row: where it comes from, or what it belongs to.
        what: the mistake in words.
        file: path from the root.
        old, new: the text that is replaced, once in the file, and what replaces it.
        tests: node ids of the tests that must notice it.
        reason: why no test can notice it; empty if one must.
    """

    row: str
    what: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    reason: str = ""

    @property
    def name(self) -> str:
        return f"{self.row}: {self.what}"


def read_table(path: Path = TABLE) -> list[Mutation]:
    entries = tomllib.loads(path.read_text(encoding="utf-8"))["mutation"]
    return [Mutation(**entry | {"tests": tuple(entry["tests"])}) for entry in entries]


def problems_of(mutation: Mutation, root: Path = ROOT) -> list[str]:
    """Why an entry no longer fits the project: its text is not found once, or a test is gone."""
    path, found = root / mutation.file, []
    count = path.read_text(encoding="utf-8").count(mutation.old) if path.is_file() else 0
    if count != 1 or mutation.old == mutation.new:
        found.append(f"{mutation.name}: the old text is {count} times in {mutation.file}")
    for test in mutation.tests:
        file, _, function = test.partition("::")
        name = re.escape(function.partition("[")[0])
        text = (root / file).read_text(encoding="utf-8") if (root / file).is_file() else ""
        if not re.search(rf"^def {name}\(", text, re.MULTILINE):
            found.append(f"{mutation.name}: there is no test {test}")
    return found


def run_tests(tree: Path, tests: Sequence[str], *options: str) -> tuple[int, str]:
    """Runs tests in a tree; returns pytest's exit status (1: some failed) and what it printed."""
    with tempfile.NamedTemporaryFile() as output:
        process = _CONTEXT.Process(target=_run_pytest, args=(tree, [*options, *tests], output.name))
        process.start()
        process.join(SECONDS)
        if process.is_alive():
            process.kill()
            return 1, "timed out"
        return process.exitcode, Path(output.name).read_text(encoding="utf-8", errors="replace")


def _run_pytest(tree: Path, words: Sequence[str], output: str) -> None:
    """In a process of its own: forgets the modules of the project that this tool has imported, then calls pytest."""
    own = {path.stem for path in ROOT.iterdir()}
    for name in [name for name in sys.modules if name.partition(".")[0] in own]:
        del sys.modules[name]
    # Without bytecode: two texts of the same length, written within a second, would share it.
    sys.dont_write_bytecode = True
    sys.path[:] = [str(tree), *(entry for entry in sys.path if entry and Path(entry).resolve() != ROOT)]
    os.chdir(tree)
    with open(output, "w", encoding="utf-8") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
        sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "--tb=line", *words]))


def outcome_of(mutation: Mutation, tree: Path) -> str:
    """Applies a mistake to a copy of the project, runs its tests, and takes the mistake back."""
    path = tree / mutation.file
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
    try:
        status, _ = run_tests(tree, mutation.tests, "-x")
    finally:
        path.write_text(text, encoding="utf-8")
    # Other numbers: a test could not be imported, so the mistake is no mistake that anybody would commit.
    return {0: SURVIVED, 1: CAUGHT}.get(status, DOES_NOT_RUN)


def outcomes(mutations: Sequence[Mutation], root: Path = ROOT, workers: int = WORKERS) -> list[str]:
    """What became of each mistake: caught, survived, or does not run.

    Raises:
        RuntimeError: the tests fail without a mistake.
    """
    with tempfile.TemporaryDirectory() as folder:
        trees: queue.Queue[Path] = queue.Queue()
        for number in range(workers):
            trees.put(Path(shutil.copytree(root, Path(folder) / str(number), ignore=NOT_COPIED)))
        tests = sorted({test for mutation in mutations for test in mutation.tests})
        status, output = run_tests(Path(folder) / "0", tests)
        if status != 0:
            raise RuntimeError(f"tests fail without a mistake:\n{output}")

        def outcome(mutation: Mutation) -> str:
            tree = trees.get()
            try:
                return outcome_of(mutation, tree)
            finally:
                trees.put(tree)

        with ThreadPoolExecutor(workers) as pool:
            results = []
            bar = tqdm(pool.map(outcome, mutations), total=len(mutations), desc="mistakes", unit="")
            for mutation, result in zip(mutations, bar, strict=True):
                results.append(result)
                if result != CAUGHT:
                    bar.write(f"{result}: {mutation.name}", file=sys.stderr)
        return results


def main() -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    multiprocessing.set_forkserver_preload(IMPORTED_ONCE)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a regular expression: entries whose row, words or file match it")
    only = re.compile(parser.parse_args().only)
    mutations = [each for each in read_table() if only.search(f"{each.name} {each.file}")]
    stale = [problem for mutation in mutations for problem in problems_of(mutation)]
    if stale:
        sys.exit("mutations.toml does not fit the code:\n" + "\n".join(stale))
    found = outcomes(mutations)
    rows = [(mutation.name, result, mutation.reason) for mutation, result in zip(mutations, found, strict=True)]
    print_table("mistakes", rows, ("mistake", "outcome", "reason"))
    gaps = [name for name, result, reason in rows if result != CAUGHT and not reason]
    print(f"{found.count(CAUGHT)} of {len(found)} caught, {found.count(SURVIVED)} survived")
    if gaps:
        sys.exit("no test notices: " + "; ".join(gaps))


if __name__ == "__main__":
    main()
