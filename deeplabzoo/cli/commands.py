"""The commands, their groups and their exit codes, as plain data."""

COMMANDS: dict[str, str] = {
    "list": "models or released weights by size, GFLOPs, mIoU",
    "info": "everything about one model and its weights",
    "predict": "label photos: palette PNG, overlay with legend, areas",
    "evaluate": "mIoU, Dice and plots on a labelled data set",
    "demo": "a page on this computer: drop a photo or use the webcam",
    "benchmark": "speed and memory against other libraries, same weights",
    "prepare": "training data: VOC 2012, trainaug, a check of your own",
    "train": "train a recipe, or go on with a run that was stopped",
    "convert": "a checkpoint of any known origin as one of ours, proved",
    "export": "a model as ONNX, OpenVINO or torch.export, proved",
    "publish": "a finished run as a release: weights, figures, card",
    "weights": "list, check, verify, record, tabulate released files",
    "completion": "a script for bash, zsh or fish that completes all this",
}
"""Every command, and what it does in one line of a screen of 80 columns."""

SUBCOMMANDS: dict[str, tuple[str, ...]] = {"benchmark": ("--train",)}
"""First words that make another thing of a command, with options of its own."""

GROUPS: dict[str, tuple[str, ...]] = {
    "look up": ("list", "info"),
    "run": ("predict", "evaluate", "demo", "benchmark"),
    "training": ("prepare", "train"),
    "hand on": ("convert", "export", "publish", "weights"),
}
"""What the commands are for, as `--help` shows them; those that stand nowhere here come last."""

EXIT_CODES: dict[int, str] = {
    0: "done",
    1: "the work failed, and one sentence on stderr says why (`weights check`: a file is changed or gone)",
    2: "the call was wrong, and one sentence on stderr says how; nothing was done",
    130: "interrupted by Ctrl-C",
    143: "a training run was stopped by SIGTERM; its state is saved, and `--resume` goes on (after Ctrl-C, too)",
}
"""Exit status of every command."""
