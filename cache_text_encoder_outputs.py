r"""Encodes every caption of a dataset once, with LLaVA-Llama-3 and CLIP-L, so that training needs no text encoder.

Before: captions, as described in dataset/dataset_config.md; cache_latents.py may run before or after.
After:  `{name}_hv_te.safetensors` for each file with a caption, in the dataset's cache_directory.

    python cache_text_encoder_outputs.py --dataset_config dataset.toml --batch_size 16 \
        --text_encoder1 ckpts/text_encoder --text_encoder2 ckpts/text_encoder_2 --fp8_llm

You can run it again at any time: only new or changed captions are encoded. Only one text encoder is in memory at a
time. With --vram_gb 0, --fp8_llm is used only if text encoder 1 does not fit into the free GPU memory without it.
"""

from dataset.options import TextCachingOptions
from modules.options import DeviceOptions, TextEncoderOptions, require
from utils.cli import parse_options, run_script


def main() -> None:
    options, encoders, device = parse_options(__doc__, TextCachingOptions, TextEncoderOptions, DeviceOptions)
    require(encoders, "text_encoder1", "text_encoder2")
    from dataset.config_utils import load_dataset_config

    config = load_dataset_config(options.dataset_config)  # mistakes in the config are reported before torch is imported

    from modules.caching.text import TextCaching

    caching = TextCaching(config, options, encoders, device.device)
    if options.dry_run or options.vram_gb is not None:
        caching.plan_memory()
    caching.run()


if __name__ == "__main__":
    run_script(main)
