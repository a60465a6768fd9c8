"""Fine-tunes the HunyuanVideo DiT itself, all of it or some of its modules, from caches.

Before: cache_latents.py and cache_text_encoder_outputs.py. After: hv_generate_video.py --dit, which loads the result.

    accelerate launch --num_cpu_threads_per_process 1 --mixed_precision bf16 hv_train.py \
        --dit ckpts/hunyuan-video-t2v-720p/transformers/mp_rank_00_model_states.pt --dataset_config dataset.toml \
        --sdpa --mixed_precision bf16 --dit_dtype bfloat16 --trainable_modules img_attn txt_attn \
        --gradient_checkpointing --optimizer_type adamw8bit --learning_rate 1e-5 --max_data_loader_n_workers 2 \
        --timestep_sampling shift --discrete_flow_shift 7.0 --max_train_epochs 16 --save_every_n_epochs 4 --seed 42 \
        --output_dir output --output_name my-model
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from modules.training.full_options import (
    SAVE_MEMORY,
    FineTuningOptions,
    FullAttentionOptions,
    FullDitOptions,
    FullMetadataOptions,
    FullSaveOptions,
    FullSwapOptions,
    FullTimestepOptions,
    FullTrainingOptions,
)
from modules.training.hunyuan_options import HunyuanTrainerOptions
from networks.files.metadata import checkpoint_metadata
from utils.cli import print_table, run_script
from utils.errors import UserError

if TYPE_CHECKING:
    import torch

    from hunyuan_model.models import HunyuanVideoConfig, HYVideoDiffusionTransformer
    from modules.training.setup import Run
    from modules.training.state import Progress


@dataclass(frozen=True)
class Options(HunyuanTrainerOptions):
    """Every option of this script."""

    training: FullTrainingOptions
    timesteps: FullTimestepOptions
    save: FullSaveOptions
    metadata: FullMetadataOptions
    dit: FullDitOptions
    attention: FullAttentionOptions
    swap: FullSwapOptions
    tuning: FineTuningOptions

    @property
    def saved_dtype(self) -> str:
        return self.dit.dit_dtype or self.tuning.dtype


def main(argv: Sequence[str] | None = None) -> None:
    options = Options.parse(__doc__, argv)
    options.check()
    state = options.find_state()
    requests = options.preview_requests()

    from hunyuan_model.checkpoints.identification import identify
    from modules.memory.plan import explain_out_of_memory
    from modules.training.full_model import TrainedModel, trained_names
    from modules.training.half_precision import HalfGradScaler
    from modules.training.hunyuan_video import (
        check_choices,
        create_previewer,
        load_datasets,
        read_dit_config,
        training_model,
    )
    from modules.training.loop import rehearse, train
    from modules.training.setup import build_trainer, close_run, prepare_run

    check_choices(options)
    run = prepare_run(options, state, lambda seed: load_datasets(options, seed))
    options = run.options
    if options.tuning.full_fp16:
        run.accelerator.scaler = HalfGradScaler()
    run.check_optimizer()
    shapes = dit_shapes(read_dit_config(options, run))
    names = trained_names(list(shapes), options.tuning.trainable_modules)
    check_trained(options, shapes, names, run)
    run.print_plan()
    print_memory(options, shapes, names, run)
    if options.training.dry_run:
        print(run.settings)
        return

    run.open_outputs()
    source_config = identify(options.dit.dit).checkpoint.config
    with explain_out_of_memory("while the models are loaded", lambda: SAVE_MEMORY):
        previewer = create_previewer(options, requests, run)
        dit = load_model(options, names, run)
        trainer = build_trainer(
            run,
            training_model(options, dit, run.accelerator),
            TrainedModel(dit, names, untouched=state is None),
            previewer(dit),
            lambda progress: metadata(options, run, source_config, progress),
            lambda path: [],
        )
    with trainer.log, trainer.requests:
        with explain_out_of_memory("on the largest batch, tried before training", lambda: SAVE_MEMORY):
            rehearse(trainer, run.train_set.largest_batch())
        with explain_out_of_memory("in training", lambda: SAVE_MEMORY):
            train(trainer)
    close_run(trainer)


def dit_shapes(config: "HunyuanVideoConfig") -> "dict[str, torch.Size]":
    """The shape of every parameter by its official name."""
    import torch

    from hunyuan_model.models import HYVideoDiffusionTransformer

    with torch.device("meta"):
        return {name: weight.shape for name, weight in HYVideoDiffusionTransformer(config).named_parameters()}


def check_trained(options: Options, shapes: "Mapping[str, torch.Size]", names: set[str], run: "Run") -> None:
    """Whether what is trained goes together with the other options and with the state.

    Raises:
        UserError: it does not.
    """
    from modules.training.state import check_network

    check_dtypes(options, frozen=len(names) < len(shapes), run=run)
    if options.swap.img_in_txt_in_offloading and any(name.startswith(("img_in.", "txt_in.")) for name in names):
        raise UserError("--img_in_txt_in_offloading: --trainable_modules trains what it would offload; leave it out")
    if run.state is not None:
        check_network(run.state, {name: shapes[name] for name in names})
        if run.validation_set is not None and run.progress.base_validation_loss is None:
            raise UserError(
                f"--resume: {run.state} knows no validation loss from before training, and those weights are gone; "
                "resume without validation, or start anew"
            )


def check_dtypes(options: Options, frozen: bool, run: "Run") -> None:
    """Whether the dtypes of weights and autocast go together; `frozen`: some weights are not trained.

    Raises:
        UserError: they do not.
    """
    from utils.device_utils import DTYPES

    trained, autocast = options.tuning.dtype, run.accelerator.mixed_precision
    if trained == "float16" and autocast != "fp16":
        raise UserError("--full_fp16 needs --mixed_precision fp16, whose scaled loss keeps gradients from vanishing")
    if trained == "bfloat16" and autocast == "fp16":
        raise UserError("--full_bf16 and --mixed_precision fp16 contradict each other; give bf16 or no")
    if frozen and autocast == "no" and DTYPES[options.saved_dtype] != DTYPES[trained]:
        raise UserError(
            f"--dit_dtype {options.dit.dit_dtype}: the trained weights are {trained}; give --mixed_precision bf16, "
            "with which both compute together"
        )


def print_memory(options: Options, shapes: "Mapping[str, torch.Size]", names: set[str], run: "Run") -> None:
    """What the weights need by themselves; activations come on top.

    Raises:
        UserError: the optimizer does not work with the dtype of the trained weights.
    """
    from modules.memory.plan import format_bytes
    from modules.training.half_precision import try_optimizer
    from utils.device_utils import DTYPES

    trained, frozen = DTYPES[options.tuning.dtype], DTYPES[options.saved_dtype]
    state_bytes = try_optimizer(options.optimizer, trained, run.accelerator.device)
    total, count = sum(map(math.prod, shapes.values())), sum(math.prod(shapes[name]) for name in names)
    rows = [
        ("trained weights", format_bytes(count * trained.itemsize)),
        ("their gradients", format_bytes(count * trained.itemsize)),
        ("their optimizer's states", format_bytes(count * state_bytes)),
        ("frozen weights", format_bytes((total - count) * frozen.itemsize)),
    ]
    print_table(f"memory beside activations, {count / 1e6:,.1f} of {total / 1e6:,.1f} M numbers are trained", rows)


def load_model(options: Options, names: set[str], run: "Run") -> "HYVideoDiffusionTransformer":
    """The DiT with trained weights in the dtype of the training and all others in --dit_dtype."""
    from hunyuan_model.block_swap import offload_embedders
    from hunyuan_model.checkpoints import load_dit
    from modules.blocks.activation_checkpointing import apply_activation_checkpointing
    from modules.training.hunyuan_video import verify_attention
    from utils.device_utils import DTYPES

    device, attention = run.accelerator.device, options.attention.mode
    trained, frozen = DTYPES[options.tuning.dtype], DTYPES[options.saved_dtype]
    verify_attention(options, run.accelerator, trained)
    dit = load_dit(options.dit.dit, device, lambda name: trained if name in names else frozen, attention=attention)
    if options.swap.img_in_txt_in_offloading:
        offload_embedders(dit, device)
    apply_activation_checkpointing(dit, options.training.checkpointing_policy or "none", device)
    return dit


def metadata(options: Options, run: "Run", source_config: Mapping, progress: "Progress") -> Mapping[str, str]:
    """The metadata of a checkpoint, with the config that the file had from which training started."""
    names = {"sd_model_name": str(options.dit.dit), "vae_name": options.vae.vae and str(options.vae.vae)}
    facts, title = run.facts(progress, **names), options.save.output_name
    texts = checkpoint_metadata(facts, options.metadata, *vars(options).values(), title=title)
    return texts | ({"config": json.dumps(source_config)} if source_config else {})


if __name__ == "__main__":
    run_script(main)
