"""What a pixel of a street scene can be."""

CLASSES = (
    "sky",
    "building",
    "road",
    "sidewalk",
    "vegetation",
    "car",
    "truck",
    "person",
    "bicycle",
    "pole",
    "traffic light",
    "traffic sign",
    "fence",
)
SMALL_CLASSES = ("pole", "traffic light", "traffic sign", "fence")

SKY, BUILDING, ROAD, SIDEWALK, VEGETATION, CAR, TRUCK, PERSON, BICYCLE, POLE, LIGHT, SIGN, FENCE = range(13)
