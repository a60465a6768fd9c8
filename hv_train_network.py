r"""Trains a LoRA (or LoHa, LoKr, ...) for HunyuanVideo from caches.

Before: cache_latents.py and cache_text_encoder_outputs.py. After: hv_generate_video.py --lora_weight, convert_lora.py.

    accelerate launch --num_cpu_threads_per_process 1 --mixed_precision bf16 hv_train_network.py \
        --dit ckpts/hunyuan-video-t2v-720p/transformers/mp_rank_00_model_states.pt --dataset_config dataset.toml \
        --sdpa --mixed_precision bf16 --fp8_base --gradient_checkpointing \
        --optimizer_type adamw8bit --learning_rate 2e-4 --max_data_loader_n_workers 2 \
        --network_module networks.lora --network_dim 32 --network_alpha 16 \
        --timestep_sampling shift --discrete_flow_shift 7.0 --max_train_epochs 16 --save_every_n_epochs 1 --seed 42 \
        --output_dir output --output_name name-of-lora
"""

from collections.abc import Sequence
from pathlib import Path

from modules.training.options import LoraTrainerOptions
from modules.training.timesteps import show_timesteps
from utils.cli import run_script


def main(argv: Sequence[str] | None = None) -> None:
    options = LoraTrainerOptions.parse(__doc__, argv)
    if options.timesteps.show_timesteps is not None:
        show_timesteps(options.timesteps, options.save.output_dir or Path())
        return
    options.check()
    state, requests = options.find_state(), options.previews.requests()

    from modules.memory.training import plan_memory, with_settings
    from modules.training import network, setup

    network.check_choices(options)
    module = network.import_network_module(options.network.network_module)
    run = setup.set_up(options, state)
    plan = plan_memory(run, module, trained=network.check_network(run, module))
    run.options = with_settings(run.options, plan.settings)
    run.print_plan()
    if run.options.training.dry_run:
        print(run.settings)
        return

    run.open_outputs()
    with plan.explain_out_of_memory("while the models are loaded"):
        previewer = run.create_previewer(requests)
        dit = network.load_model(run)
        trainer = run.build_trainer(dit, network.apply_network(run, module, dit), previewer)
    with trainer.log, trainer.requests:
        with plan.explain_out_of_memory("on the largest batch, tried before training"):
            trainer.rehearse()
        with plan.explain_out_of_memory("in training"):
            trainer.train()
    trainer.close()


if __name__ == "__main__":
    run_script(main)
