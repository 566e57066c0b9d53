"""`python -m deeplabzoo.train RECIPE --data ROOT --out DIR`: train a recipe, or go on with a run that was stopped."""

from collections.abc import Sequence
from pathlib import Path

from deeplabzoo.cli.parser import Parser, run
from deeplabzoo.errors import UsageError
from deeplabzoo.training.overrides import apply_overrides
from deeplabzoo.training.recipe import Recipe
from deeplabzoo.training.recipes import get_recipe, recipe_table

_EPILOG = """\
The run folder holds recipe.json, log.jsonl, state/ (for --resume), last.safetensors, best.safetensors, report.json and \
curves.png. Fields for --set are those of deeplabzoo.training.recipe.Recipe (docs/custom_data.md).

examples:
  python -m deeplabzoo.train shapes --out runs/shapes --set steps=60
  python -m deeplabzoo.train folder --root my_data --out runs/mine --set model=deeplabv3plus_mobilenetv2 epochs=40
  torchrun --nproc-per-node 4 -m deeplabzoo.train deeplabv3plus_resnet101_voc --root ~/data --out runs/voc
  python -m deeplabzoo.train deeplabv3plus_resnet101_voc --root ~/data --out runs/voc --resume"""


def build_parser() -> Parser:
    """Return the command's options; they are frozen, since a knob belongs into a recipe."""
    options = Parser("train", "Train a recipe: from a name to weights that can be measured again.", _EPILOG)
    options.add_argument("recipe", metavar="RECIPE", nargs="?", help="what to train; --list shows them")
    options.add_argument("--root", metavar="DIR", type=Path, help="folder of the recipe's dataset (shapes needs none)")
    options.accept_old_spelling("--data", "--root")
    options.add_argument("--out", metavar="DIR", type=Path, help="folder of this run")
    options.add_argument("--resume", action="store_true", help="go on from the last state saved in DIR, exactly")
    options.add_argument(
        "--set", metavar="key=value", nargs="+", action="extend", default=[], help="change fields of the recipe, e.g. lr=0.01"
    )
    options.add_argument("--list", action="store_true", help="list the recipes and leave")
    return options


def train_command(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and train; returns 0, or raises one of deeplabzoo's errors."""
    options = build_parser().parse_args(argv)
    if options.list:
        print(recipe_table())
        return 0
    if options.recipe is None or options.out is None:
        missing = "RECIPE" if options.recipe is None else "--out DIR"
        raise UsageError(f"{missing} is missing; for example: python -m deeplabzoo.train shapes --out runs/shapes")
    recipe = _recipe(options.recipe, options.out, options.set, resume=options.resume)
    from deeplabzoo.training.train import train  # torch, only now

    train(recipe, options.root, options.out, resume=options.resume)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status: 0 done, 1 the work failed, 2 the call was wrong."""
    return run(train_command, argv)


def _recipe(name: str, out: Path, assignments: Sequence[str], *, resume: bool) -> Recipe:
    """Return the recipe by name; when resuming, the one of the run's own folder, so that --set need not be repeated."""
    recipe = get_recipe(name)
    if resume:
        from deeplabzoo.training.run_dir import RunDir

        before = RunDir(out).recipe_to_resume()
        if before is not None and before.name != recipe.name:
            raise UsageError(
                f"'{out}' holds a run of '{before.name}', not of '{recipe.name}'; name that one, or another --out."
            )
        recipe = before or recipe
    return apply_overrides(recipe, assignments)
