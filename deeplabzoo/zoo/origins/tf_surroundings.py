"""What stands around the network in a frozen graph of TensorFlow's zoo: its input's scale and size, pooling, enlarging."""

import numpy as np

from deeplabzoo.errors import WeightsError
from deeplabzoo.models.config import Preprocessing
from deeplabzoo.zoo.origins.graphdef import GraphDef, Node
from deeplabzoo.zoo.origins.tf_convolutions import Convolution

_HALF = (0.5, 0.5, 0.5)
_CROP = (513, 513)
"""Input of the zoo's VOC networks."""
_MAX_SIDE = 1 << 14
_MAX_HOPS = 64

Size = tuple[int, int]


def pooling(graph: GraphDef, pool: Convolution, output_stride: int) -> tuple[Size | None, Size, tuple[str, ...]]:
    """Return the pooling window in pixels (None for the whole map), the input's size, and what had to be assumed.

    The window is as large as the map of the size that the graph was exported for, unless the map that it is enlarged to is
    larger.
    """
    source = pool.source
    if source.op == "Mean":
        return None, _CROP, (f"the graph pools over any size: {_CROP[0]} x {_CROP[1]} assumed as the input's",)
    ksize = source.integers("ksize")
    if source.op != "AvgPool" or len(ksize) != 4 or not all(1 <= side <= _MAX_SIDE // output_stride for side in ksize[1:3]):
        raise WeightsError(f"The image pooling of the graph reads a {source.op}; expected an average over a window of the map.")
    window = (ksize[1], ksize[2])
    cells = window
    resize = next((one for one in _after(graph, pool.end) if one.op == "ResizeBilinear"), None)
    if resize is not None and graph.input_of(resize, 1).op == "Const":
        target = [int(side) for side in graph.values(graph.input_of(resize, 1)).reshape(-1)]
        if len(target) == 2 and all(1 <= side <= _MAX_SIDE // output_stride for side in target):
            cells = (target[0], target[1])
    size = ((cells[0] - 1) * output_stride + 1, (cells[1] - 1) * output_stride + 1)
    if cells == window:
        return None, size, ()
    return (window[0] * output_stride, window[1] * output_stride), size, ()


def aligned_corners(graph: GraphDef, classifier: Convolution) -> tuple[bool, tuple[str, ...]]:
    """Return how logits are enlarged, and what had to be assumed about it."""
    modes = {
        (one.flag("align_corners"), one.flag("half_pixel_centers"))
        for one in _after(graph, classifier.end)
        if one.op == "ResizeBilinear"
    }
    if not modes:
        return True, ("the graph's logits are not enlarged: aligned corners assumed, as TensorFlow's DeepLab does",)
    if len(modes) > 1 or modes == {(False, False)}:
        raise WeightsError("The graph enlarges its logits from pixel corners, or in two ways, which no network here does.")
    return modes.pop()[0], ()


def preprocessing(graph: GraphDef, stem: Convolution, size: Size) -> tuple[Preprocessing, tuple[str, ...]]:
    """Return how photos are fed, and what had to be assumed: pixels times a factor minus an offset, if the graph says so."""
    fitted = Preprocessing(size=size, resize="longest", only_shrink=True, pad=True, mean=_HALF, std=_HALF)
    shift = stem.source
    if shift.op == "Sub":
        scale = graph.input_of(shift, 0)
        offset = _scalar(graph, graph.input_of(shift, 1))
        factors = [_scalar(graph, graph.input_of(scale, index)) for index in (0, 1)] if scale.op == "Mul" else []
        factor = next((value for value in factors if value is not None), None)
        if offset is not None and factor is not None and 1e-6 < factor < 1e3 and abs(offset) < 1e6:
            # a pixel p becomes factor * p - offset; ours becomes (p / 255 - mean) / std
            mean, std = round(offset / (factor * 255), 6), round(1 / (factor * 255), 6)
            return Preprocessing(size=size, resize="longest", only_shrink=True, pad=True, mean=(mean,) * 3, std=(std,) * 3), ()
    return fitted, ("the graph does not say how pixels are scaled: -1 to 1 assumed, as in TensorFlow's zoo",)


def _scalar(graph: GraphDef, node: Node) -> float | None:
    if node.op != "Const":
        return None
    values = graph.values(node)
    return float(values.reshape(-1)[0]) if values.size == 1 and np.isfinite(values.astype(np.float64)).all() else None


def _after(graph: GraphDef, node: Node) -> list[Node]:
    """Return nodes that a node's value goes on to, through activations and other enlargements, up to the next convolution."""
    found: list[Node] = []
    seen = {node.name}
    waiting = [node]
    while waiting and len(found) < _MAX_HOPS:
        for reader in graph.readers_of(waiting.pop()):
            if reader.name not in seen:
                seen.add(reader.name)
                found.append(reader)
                if reader.op in ("Relu", "AddN", "ResizeBilinear"):
                    waiting.append(reader)
    return found
