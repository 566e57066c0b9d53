"""What an exported file shall be, as plain data; and what cannot be, in a sentence."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from deeplabzoo.errors import OutputError, UsageError
from deeplabzoo.inference.onnx_graph import Output

Format = Literal["onnx", "torch-export", "openvino"]
SUFFIXES: dict[Format, str] = {"onnx": ".onnx", "torch-export": ".pt2", "openvino": ".xml"}
NOT_OFFERED = {
    "coreml": "coremltools converts on Linux but runs on macOS alone, so its file could not be proven here",
    "executorch": "its exporter pins a torch release of its own and would replace the installed one",
    "litert": "its converter pins a torch release of its own and would replace the installed one",
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
        if self.calibrate is not None and self.format == "torch-export":
            raise UsageError("--int8 is for the formats onnx and openvino; leave it out with torch-export.")
        if self.size is not None and min(self.size) < 33:
            raise UsageError(f"--size must be at least 33 x 33 pixels, not {self.size[0]} x {self.size[1]}.")
