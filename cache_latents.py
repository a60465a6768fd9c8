r"""Encodes images and clips of a dataset into latent caches.

Before: media files and captions, described in a dataset config (dataset/dataset_config.md). After: one
`{item}_{width}x{height}_hv.safetensors` per image or clip in the cache directory; then run
cache_text_encoder_outputs.py. You can run it again at any time: only what is new or changed is encoded.

    python cache_latents.py --dataset_config dataset.toml --vae ckpts/hunyuan-video-t2v-720p/vae/pytorch_model.pt \
        --vae_chunk_size 32 --vae_tiling

To look at the dataset first, without any model, use --debug_mode html. To share the work between GPUs, start it with
`accelerate launch --multi_gpu --num_processes 4 cache_latents.py ...`.
"""

from dataset.options import LatentCachingOptions, PreviewOptions
from modules.options import DeviceOptions, VaeOptions, require
from utils.cli import parse_options, run_script


def main() -> None:
    options, vae, device, preview = parse_options(
        __doc__, LatentCachingOptions, VaeOptions, DeviceOptions, PreviewOptions
    )
    if preview.debug_mode is None:
        require(vae, "vae")
    from dataset.config_utils import load_dataset_config

    config = load_dataset_config(options.dataset_config)  # mistakes in the config are reported before torch is imported

    from dataset.preview import show
    from modules.caching.latents import LatentCaching, scan_and_report

    if preview.debug_mode is not None:
        show(scan_and_report(config, options), preview)
        return
    caching = LatentCaching(options, vae, device.device)
    datasets = scan_and_report(config, options)
    if options.dry_run or options.vram_gb is not None:
        caching.plan_memory(datasets)
    if not options.dry_run:
        caching.run(datasets)


if __name__ == "__main__":
    run_script(main)
