"""Runs the train command in a process of its own, and kills it (SIGKILL) at a moment that the test chooses.

usage: python train_driver.py MOMENT ARGUMENTS...; MOMENT is `never`, `step:K` (before update K), `sigterm:K` (SIGTERM during
the update after step K), `state:K:FILE` (in the middle of writing FILE of the state of step K), `rename:K` (before it gets its
name), `drop:K` (before older states go), or `double`: nothing is killed, but the network computes in float64, so that rounding
cannot hide or fake a difference.
"""

import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _to_double(module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(one.double() for one in inputs)


def _arm(moment: str) -> None:
    from deeplabzoo.training import run_dir, train, trainer

    kind, _, rest = moment.partition(":")
    if kind == "step":
        update = trainer.Trainer.train_step

        def dying_update(self: Any, batch: Any, **options: Any) -> Any:
            if self.step == int(rest):
                _kill()
            return update(self, batch, **options)

        trainer.Trainer.train_step = dying_update  # type: ignore[method-assign]
    if kind == "sigterm":
        train_step = trainer.Trainer.train_step

        def signalled_step(self: Any, batch: Any, **options: Any) -> Any:
            if self.step == int(rest):
                os.kill(os.getpid(), signal.SIGTERM)
            return train_step(self, batch, **options)

        trainer.Trainer.train_step = signalled_step  # type: ignore[method-assign]
    if kind == "state":
        step, _, name = rest.partition(":")
        save_file = run_dir.save_file

        def dying_save(tensors: Any, file: Path) -> None:
            save_file(tensors, file)
            if f"{int(step):08d}" in file.parent.name and file.stem == name:
                os.truncate(file, file.stat().st_size // 2)
                _kill()

        run_dir.save_file = dying_save
    if kind == "rename":
        rename = Path.rename

        def dying_rename(self: Path, target: Path) -> Path:
            if self.name == f".writing_{int(rest):08d}":
                _kill()
            return rename(self, target)

        Path.rename = dying_rename  # type: ignore[method-assign,assignment]
    if kind == "double":
        build = train.build_model

        def double_build(*arguments: Any) -> Any:
            net = build(*arguments).double()
            net.encoder.register_forward_pre_hook(_to_double)
            return net

        train.build_model = double_build
    if kind == "drop":

        def dying_drop(path: Any, *args: Any, **options: Any) -> None:
            if ".gone_" in str(path):
                _kill()
            original(path, *args, **options)

        original = shutil.rmtree
        run_dir.shutil.rmtree = dying_drop  # type: ignore[assignment]


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    if sys.argv[1] != "never":
        _arm(sys.argv[1])
    from deeplabzoo.cli.train import main

    sys.exit(main(sys.argv[2:]))
