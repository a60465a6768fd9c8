"""Inspects, adds, shrinks, extracts and averages LoRAs of any format, on a CPU, without loading a model.

    python lora_tool.py info lora.safetensors --png norms.png
    python lora_tool.py merge a.safetensors b.safetensors --multiplier 1 0.5 --output_file both.safetensors
    python lora_tool.py resize lora.safetensors --rank 16 --output_file small.safetensors
    python lora_tool.py extract --base dit.safetensors --tuned tuned.safetensors --rank 32 --output_file l.safetensors
    python lora_tool.py ema out/my-lora-*.safetensors --output_file my-lora-ema.safetensors

`python lora_tool.py COMMAND --help` lists the options of a command.
"""

import sys
from pathlib import Path

from networks.lora_command_options import COMMANDS
from utils.cli import parse_options, run_script
from utils.errors import UserError, did_you_mean


def main() -> None:
    command, *words = sys.argv[1:] or ["--help"]
    if command in ("-h", "--help"):
        print(__doc__)
        return
    if command not in COMMANDS:
        hint = did_you_mean(command, list(COMMANDS))
        raise UserError(f"unknown command {command}{hint}; the commands are {', '.join(COMMANDS)}")
    words = expand_patterns(words)
    positional = bool(words) and not words[0].startswith("-")
    try:
        (options,) = parse_options(__doc__, COMMANDS[command], argv=["--path"] * positional + words)
    except UserError as error:
        raise UserError(str(error).removeprefix("--path: " if positional else "")) from None

    from networks import lora_commands

    getattr(lora_commands, command)(options)


def expand_patterns(words: list[str]) -> list[str]:
    """Replaces patterns such as out/*.safetensors by the files that match; the shells of Windows do not do it."""
    expanded: list[str] = []
    for word in words:
        folder, pattern = Path(word).parent, Path(word).name
        matches = sorted(map(str, folder.glob(pattern))) if "*" in pattern else []
        expanded += matches or [word]
    return expanded


if __name__ == "__main__":
    run_script(main)
