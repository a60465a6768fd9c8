r"""Fine-tunes the HunyuanVideo DiT itself, all of it or some of its modules, from caches.

Before: cache_latents.py and cache_text_encoder_outputs.py. After: hv_generate_video.py --dit, which loads the result.

    accelerate launch --num_cpu_threads_per_process 1 --mixed_precision bf16 hv_train.py \
        --dit ckpts/hunyuan-video-t2v-720p/transformers/mp_rank_00_model_states.pt --dataset_config dataset.toml \
        --sdpa --mixed_precision bf16 --dit_dtype bfloat16 --trainable_modules img_attn txt_attn \
        --gradient_checkpointing --optimizer_type adamw8bit --learning_rate 1e-5 --max_data_loader_n_workers 2 \
        --timestep_sampling shift --discrete_flow_shift 7.0 --max_train_epochs 16 --save_every_n_epochs 4 --seed 42 \
        --output_dir output --output_name my-model
"""

from collections.abc import Sequence

from modules.options import FINE_TUNING_ADVICE
from modules.training.options import FullTrainerOptions
from utils.cli import run_script


def main(argv: Sequence[str] | None = None) -> None:
    options = FullTrainerOptions.parse(__doc__, argv)
    options.check()
    state, requests = options.find_state(), options.previews.requests()

    from modules.memory.plan import explain_out_of_memory
    from modules.memory.training import print_weight_memory
    from modules.training import full_model, setup

    setup.check_choices(options)
    run = setup.set_up(options, state)
    if run.options.tuning.full_fp16:
        run.accelerator.scaler = full_model.HalfGradScaler()
    shapes = full_model.dit_shapes(run)
    names = full_model.trained_names(list(shapes), run.options.tuning.trainable_modules)
    full_model.check_trained(run, shapes, names)
    run.print_plan()
    print_weight_memory(run, shapes, names)
    if run.options.training.dry_run:
        print(run.settings)
        return

    run.open_outputs()
    with explain_out_of_memory("while the models are loaded", FINE_TUNING_ADVICE):
        previewer = run.create_previewer(requests)
        dit = full_model.load_model(run, names)
        trainer = run.build_trainer(dit, full_model.select_trained(run, dit, names), previewer)
    with trainer.log, trainer.requests:
        with explain_out_of_memory("on the largest batch, tried before training", FINE_TUNING_ADVICE):
            trainer.rehearse()
        with explain_out_of_memory("in training", FINE_TUNING_ADVICE):
            trainer.train()
    trainer.close()


if __name__ == "__main__":
    run_script(main)
