"""The commands, their groups and their exit codes, as plain data."""

COMMANDS: dict[str, str] = {
    "list": "models or released checkpoints by size, GFLOPs, mIoU",
    "info": "full details of one model and its checkpoints",
    "predict": "segment images: palette PNG, overlay with legend, areas",
    "evaluate": "mIoU, Dice and plots on a labelled dataset",
    "demo": "local web demo for images and the webcam",
    "benchmark": "speed and memory against other libraries, same weights",
    "prepare": "training data: VOC 2012, trainaug, a check of your own",
    "train": "train a recipe, or resume a run",
    "convert": "convert a checkpoint to or from another library",
    "export": "export to ONNX, OpenVINO or torch.export, verified",
    "publish": "package a finished run as a release with a model card",
    "weights": "list, check, verify and record released checkpoints",
    "completion": "completion script for bash, zsh or fish",
}
"""Every command, and what it does in one line of a screen of 80 columns."""

SUBCOMMANDS: dict[str, tuple[str, ...]] = {"benchmark": ("--train",)}
"""First arguments that select other options of a command."""

GROUPS: dict[str, tuple[str, ...]] = {
    "explore": ("list", "info"),
    "run": ("predict", "evaluate", "demo", "benchmark"),
    "train": ("prepare", "train"),
    "share": ("convert", "export", "publish", "weights"),
    "shell": ("completion",),
}
"""The commands by purpose, as `--help` shows them."""

EXIT_CODES: dict[int, str] = {
    0: "success",
    1: "the command failed; stderr has a one-sentence error (`weights check`: a file is changed or missing)",
    2: "invalid arguments; nothing was done",
    130: "interrupted by Ctrl-C",
    143: "training stopped by SIGTERM; the state is saved, resume with `--resume`",
}
"""Exit codes of every command."""
