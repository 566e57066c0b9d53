"""What an exported file shall be, as plain data; and what cannot be, in a sentence."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from deeplabzoo.errors import OutputError, UsageError
from deeplabzoo.inference.onnx_graph import Output

Format = Literal["onnx", "torch-export", "openvino", "executorch"]
SUFFIXES: dict[Format, str] = {"onnx": ".onnx", "torch-export": ".pt2", "openvino": ".xml", "executorch": ".pte"}
NOT_OFFERED = {
    "coreml": "coremltools converts it on Linux, but a CoreML file runs on macOS alone, so it could not be proven",
    "litert": "litert-torch asks for torch below 2.15, and what it wrote with torch 2.15 did not run (docs/export.md)",
}
"""Formats that people ask for -> why there is no such file."""


@dataclass(frozen=True)
class Wish:
    """One file: format, what it answers, whether its sizes are open, and whether it counts in 8 bits."""

    format: Format
    out: Path
    output: Output = "logits"
    size: tuple[int, int] | None = None
    """(height, width) of the only image it takes; None leaves batch, height and width open."""
    calibrate: str | None = None
    """Folder of photos for an int8 file; None is float32."""

    def check(self) -> None:
        """Raise UsageError or OutputError for what cannot be made, before any work is done."""
        suffix = SUFFIXES[self.format]
        if self.out.suffix != suffix:
            raise UsageError(f"--out '{self.out}' must end in {suffix}, as files of the format {self.format} do.")
        if not self.out.parent.is_dir():
            raise OutputError(f"The folder '{self.out.parent}' of --out does not exist; make it, or name another place.")
        if self.calibrate is not None and self.format not in ("onnx", "openvino"):
            raise UsageError(f"--int8 is for the formats onnx and openvino; leave it out with {self.format}.")
        if self.size is None and self.format == "executorch":
            raise UsageError("A file of the format executorch takes images of one size; name it with --size H W.")
        if self.size is not None and min(self.size) < 33:
            raise UsageError(f"--size must be at least 33 x 33 pixels, not {self.size[0]} x {self.size[1]}.")
