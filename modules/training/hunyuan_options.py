"""The options that every training script for HunyuanVideo has. Importing this module does not import torch."""

from dataclasses import dataclass

from modules.options import BlockSwapOptions, DitOptions, TextEncoderOptions, VaeOptions, require
from modules.training.trainer_options import TrainerOptions
from modules.training.training_options import TrainingAttentionOptions


@dataclass(frozen=True)
class HunyuanTrainerOptions(TrainerOptions):
    """Groups of options; a script's own groups are the fields of a subclass."""

    dit: DitOptions
    attention: TrainingAttentionOptions
    swap: BlockSwapOptions
    vae: VaeOptions
    text: TextEncoderOptions

    def check(self) -> None:
        require(self.dit, "dit")
        super().check()
        if self.previews.sample_prompts is not None:
            require(self.text, "text_encoder1", "text_encoder2")
            require(self.vae, "vae")
