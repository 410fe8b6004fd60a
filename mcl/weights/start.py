"""Initial weights of a run: ``model.init``."""

from collections.abc import Mapping, Sequence

from torch import Size, Tensor

from mcl.exporters.canonical import canonical_names
from mcl.objectives import Objective
from mcl.weights.read import read, take


def start(model: Objective, source: str, parts: Sequence[str] = ()) -> str:
    """Loads weights and BatchNorm statistics into the online network and the momentum network of a new model.

    If the source is a checkpoint of mcl with the same model and `parts` is empty, the whole state is loaded, including
    the weights of the momentum network.

    Args:
        model: changed in place.
        source: see :func:`mcl.weights.read.read`.
        parts: see :func:`mcl.weights.read.take`.

    Returns:
        Description of the loaded tensors, one line.

    Raises:
        CheckpointError, ConfigError: see :func:`~mcl.weights.read.read` and :func:`~mcl.weights.read.take`.
    """
    contents = read(source, "model.init")
    own = model.state_dict()
    if not parts and contents.model is not None and _shapes(contents.model) == _shapes(own):
        model.load_state_dict(contents.model)
        return f"{source}: all {len(own)} tensors of the model"
    names = canonical_names(model.online)
    online = model.online.state_dict()
    taken = take(contents, {name: online[ours] for ours, name in names.items()}, model.config.model.backbone, parts)
    weights = {ours: taken.weights[name] for ours, name in names.items() if name in taken.weights}
    model.online.load_state_dict(weights, strict=False)
    if model.target is not None:
        model.target.load_state_dict(model.online.state_dict())
    return str(taken)


def _shapes(weights: Mapping[str, Tensor]) -> dict[str, Size]:
    return {name: tensor.shape for name, tensor in weights.items()}
