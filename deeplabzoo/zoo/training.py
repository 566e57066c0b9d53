"""How weights of our own came to be, as plain data of their manifest row: enough to train them again and to compare."""

from dataclasses import dataclass
from typing import Literal

from deeplabzoo.errors import WeightsError

_DIGITS = frozenset("0123456789abcdef")


@dataclass(frozen=True, kw_only=True)
class Training:
    """One training run, told by its recipe; fields that the run did not record are None."""

    recipe: str
    """Name of the recipe: `python -m deeplabzoo.train RECIPE`."""
    recipe_sha256: str
    """Digest of everything in it that decides the result (`Recipe.digest`)."""
    overrides: tuple[str, ...]
    """`--set` arguments by which the run differs from the recipe filed under that name when the weights were published."""
    commit: str | None
    """Of the source that trained."""
    seed: int
    steps: int
    step: int | None
    """Of the weights that are released: the best on val, or the last ones."""
    epochs: float | None
    """How often each training picture was seen, on average."""
    data: str
    split: str
    images: int | None
    """Training pictures."""
    split_sha256: str | None
    """`split_hash` of their names: two rows with the same one were trained on the same pictures."""
    initial_weights: str
    chosen: Literal["best", "last"]
    """Whether val chose the step, or nothing did."""
    hours: float
    """Spent in updates, without evaluations."""
    hardware: str
    torch: str
    date: str
    """On which the run ended."""
    changed_after: tuple[int, ...] = ()
    """Steps after which it was resumed with another recipe; where there are any, the command trains a sibling."""

    def __post_init__(self) -> None:
        for name, value in (("recipe_sha256", self.recipe_sha256), ("split_sha256", self.split_sha256)):
            if value is not None and (len(value) != 64 or not _DIGITS.issuperset(value)):
                raise WeightsError(f"training.{name} must be 64 hexadecimal digits, not {value!r}.")
        if self.steps < 1:
            raise WeightsError(f"training.steps must be at least 1, not {self.steps}.")

    @property
    def command(self) -> str:
        """What repeats the run, where its data lie in DATA."""
        data = "" if self.data == "shapes" else " --data DATA"
        changes = "".join(f" {_quoted(one)}" for one in self.overrides)
        return f"python -m deeplabzoo.train {self.recipe}{data} --out DIR{' --set' if changes else ''}{changes}"

    def __str__(self) -> str:
        pictures = f"{self.images} pictures of " if self.images else ""
        changed = " (changed)" if self.overrides or self.changed_after else ""
        return f"trained here with recipe {self.recipe}{changed} on {pictures}{self.data} {self.split}, seed {self.seed}"


def _quoted(argument: str) -> str:
    """Quote for a shell, with single quotes, where a character asks for it."""
    plain = all(character.isalnum() or character in "=.,_-+:/" for character in argument)
    return argument if plain else "'" + argument.replace("'", "'\"'\"'") + "'"
