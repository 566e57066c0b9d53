"""`python -m deeplabzoo.benchmark MODEL … --peers torchvision,onnxruntime`: how fast, against whom, on this machine.

The same weights run here and in the other libraries, in turns, after proof that both label alike. `--train …` measures a
training step, `table --write DOCUMENT` writes the recorded runs as tables. What is measured and how: docs/speed.md.
"""

import sys
from collections.abc import Sequence

from deeplabzoo.cli import run


def benchmark_command(argv: Sequence[str] | None = None) -> int:
    """Hand the words to the command that they mean: the tables, the training step, or the comparison."""
    words = list(sys.argv[1:] if argv is None else argv)
    if "--train" in words:
        from deeplabzoo.benchmarking.training_step import training_command

        return training_command([word for word in words if word != "--train"])
    if words[:1] == ["table"]:
        from deeplabzoo.benchmarking.documents import table_command

        return table_command(words[1:])
    from deeplabzoo.benchmarking.command import comparison_command

    return comparison_command(words)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    return run(benchmark_command, argv)


if __name__ == "__main__":
    sys.exit(main())
