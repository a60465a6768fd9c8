"""The names of dtypes that options accept. Torch is not imported here, so that options are checked before it is."""

# Name that a user types -> name in torch.
TORCH_NAMES = {
    "float32": "float32",
    "fp32": "float32",
    "float": "float32",
    "float16": "float16",
    "fp16": "float16",
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
}
DTYPE_NAMES = tuple(TORCH_NAMES)
