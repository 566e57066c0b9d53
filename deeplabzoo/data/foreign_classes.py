"""Class names of data sets that other people's weights were trained on; there is no reader of their pictures here.

Words are as the publishers write them, with a space for `_`; order is that of the label numbers.
"""


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
