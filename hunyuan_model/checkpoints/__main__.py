"""Says what model files are.

python -m hunyuan_model.checkpoints FILE...            # what is this?
python -m hunyuan_model.checkpoints --check FILE...    # is also every tensor there, finite and undamaged?
"""

import argparse
from pathlib import Path

from hunyuan_model import checkpoints
from hunyuan_model.checkpoints.identification import CLIP, DIT, LLM, VAE, fp8_map_path, identify
from hunyuan_model.checkpoints.tensors import require_checksums
from utils.cli import print_table, run_script
from utils.errors import UserError

# Names, not functions: only text encoders need transformers, which takes seconds to import.
_LOADERS = {DIT: "load_dit", VAE: "load_vae", LLM: "load_text_encoder_1", CLIP: "load_text_encoder_2"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, help="model files or folders")
    parser.add_argument(
        "--check",
        action="store_true",
        help="also load each file on the CPU, and check that every tensor is there, has its shape and is finite, and "
        "that a .pt file has the checksums that it was written with",
    )
    options = parser.parse_args()
    files = [identify(path) for path in options.files]
    rows = [
        (file.path.name, file.what, file.variant, file.layout, file.dtype, file.fp8, f"{file.parameters:,}", depths)
        for file in files
        for depths in [", ".join(f"{depth} {name}" for name, depth in file.depths.items())]
    ]
    print_table("Model files", rows, ("file", "what", "variant", "layout", "dtype", "fp8", "parameters", "depths"))
    for file in files if options.check else []:
        if not file.prefixes:
            raise UserError(f"{file.path}: {file.what}: not a model of HunyuanVideo")
        scales = fp8_map_path(file.checkpoint)
        for path in [*file.checkpoint.paths, *([scales] if scales else [])]:
            require_checksums(path)
        for part in file.prefixes:
            getattr(checkpoints, _LOADERS[part])(file.path)


if __name__ == "__main__":
    run_script(main)
