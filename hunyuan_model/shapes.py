"""What the shapes of a state dict tell about the sizes of its model."""

from collections.abc import Mapping, Sequence

Shapes = Mapping[str, Sequence[int]]


def depth(shapes: Shapes, prefix: str) -> int:
    """The length of the module list whose tensors are called `{prefix}{index}.*`; 0 if there is none."""
    return len({key[len(prefix) :].split(".")[0] for key in shapes if key.startswith(prefix)})
