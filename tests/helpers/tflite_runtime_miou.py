"""Score a TensorFlow Lite segmentation file with the TFLite runtime, and our conversion of it, on the same padded photos.

    python tests/helpers/tflite_runtime_miou.py --root VOCDEVKIT/VOC2012 --file deeplabv3_mnv2_pascal_quant.tflite [--limit N]

Photos stay at full resolution and are extended at the bottom and right with the grey that normalises to 0, up to the
network's input. Both answers are scored by our confusion matrix; `agreement` is the share of photo pixels with equal labels.
Prints JSON. It is an independent answer to `deeplabzoo evaluate`: no code of ours touches the runtime's labels.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from ai_edge_litert.interpreter import Interpreter
from PIL import Image

from deeplabzoo.checkpoints.converters.tensorflow.tflite import convert
from deeplabzoo.evaluation.metrics import ConfusionMatrix
from deeplabzoo.models.deeplab import DeepLab


class Runtime:
    """A TensorFlow Lite file that ends in an argmax, run by the TFLite interpreter."""

    def __init__(self, file: Path, threads: int) -> None:
        self.interpreter = Interpreter(str(file), num_threads=threads)
        self.interpreter.allocate_tensors()
        self.input, self.output = self.interpreter.get_input_details()[0], self.interpreter.get_output_details()[0]

    def labels(self, photo_HWC: np.ndarray) -> np.ndarray:
        self.interpreter.set_tensor(self.input["index"], photo_HWC[None])
        self.interpreter.invoke()
        return self.interpreter.get_tensor(self.output["index"])[0]


class Ours:
    """Our network with the converted weights, in float32."""

    def __init__(self, file: Path) -> None:
        converted = convert(file)
        assert converted.config is not None
        self.net = DeepLab.from_weights(converted.config, converted.state_dict)
        self.preprocessing = converted.preprocessing

    def labels(self, photo_HWC: np.ndarray) -> np.ndarray:
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.preprocessing.mean, self.preprocessing.std))
        image_CHW = torch.from_numpy(photo_HWC).permute(2, 0, 1) / 255
        return self.net.predict_labels(((image_CHW - mean) / std)[None])[0].numpy()


def padded(photo_HWC: np.ndarray, size: tuple[int, int], grey: int) -> np.ndarray:
    larger = np.full((*size, 3), grey, np.uint8)
    larger[: photo_HWC.shape[0], : photo_HWC.shape[1]] = photo_HWC
    return larger


def measure(root: Path, file: Path, limit: int | None, threads: int) -> dict[str, object]:
    runtime, ours = Runtime(file, threads), Ours(file)
    size, grey = ours.preprocessing.size, round(ours.preprocessing.mean[0] * 255)
    matrices = {"runtime": ConfusionMatrix(21), "ours": ConfusionMatrix(21)}
    equal = pixels = 0
    names = (root / "ImageSets" / "Segmentation" / "val.txt").read_text().split()[:limit]
    for name in names:
        photo = np.asarray(Image.open(root / "JPEGImages" / f"{name}.jpg").convert("RGB"))
        truth = np.asarray(Image.open(root / "SegmentationClass" / f"{name}.png"))
        height, width = truth.shape
        found = {"runtime": runtime.labels(padded(photo, size, grey)), "ours": ours.labels(padded(photo, size, grey))}
        found = {who: labels[:height, :width] for who, labels in found.items()}
        for who, labels in found.items():
            matrices[who].update(labels, truth)
        equal += int((found["runtime"] == found["ours"]).sum())
        pixels += truth.size
    scores = {who: matrix.scores() for who, matrix in matrices.items()}
    return {
        "file": file.name,
        "images": len(names),
        "agreement": equal / pixels,
        **{f"{who}_miou": score.miou for who, score in scores.items()},
        **{f"{who}_pixel_accuracy": score.pixel_accuracy for who, score in scores.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, required=True, help="folder VOC2012, with JPEGImages and SegmentationClass")
    parser.add_argument("--file", type=Path, required=True, help="a TensorFlow Lite segmentation file that ends in an argmax")
    parser.add_argument("--limit", type=int, help="first N images only")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads for both")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(json.dumps(measure(options.root, options.file, options.limit, options.threads), indent=2))


if __name__ == "__main__":
    main()
