"""Class names to be read by people and text encoders, where a dataset's own are codes or missing.

`CLASS_NAMES` holds names in the order of the labels, for the datasets whose own are numbers, codes
or absent until the download; all others have good names, which `readable` cleans.
"""

import re

__all__ = ["CLASS_NAMES", "readable"]

_DIGITS = tuple("0123456789")

_GTSRB = (
    "speed limit 20 km/h",
    "speed limit 30 km/h",
    "speed limit 50 km/h",
    "speed limit 60 km/h",
    "speed limit 70 km/h",
    "speed limit 80 km/h",
    "end of speed limit 80 km/h",
    "speed limit 100 km/h",
    "speed limit 120 km/h",
    "no overtaking",
    "no overtaking for trucks",
    "right of way at the next crossing",
    "priority road",
    "yield",
    "stop",
    "no vehicles",
    "no trucks",
    "no entry",
    "general danger",
    "dangerous curve to the left",
    "dangerous curve to the right",
    "double curve",
    "bumpy road",
    "slippery road",
    "road narrows on the right",
    "road works",
    "traffic lights ahead",
    "pedestrians",
    "children crossing",
    "bicycles crossing",
    "beware of ice or snow",
    "wild animals crossing",
    "end of all speed and overtaking limits",
    "turn right ahead",
    "turn left ahead",
    "straight ahead only",
    "straight ahead or right",
    "straight ahead or left",
    "keep right",
    "keep left",
    "roundabout",
    "end of no overtaking",
    "end of no overtaking for trucks",
)

_CIFAR10 = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)

_STL10 = (
    "airplane",
    "bird",
    "car",
    "cat",
    "deer",
    "dog",
    "horse",
    "monkey",
    "ship",
    "truck",
)

# fmt: off
_CIFAR100 = (
    "apple", "aquarium fish",
    "baby", "bear", "beaver", "bed", "bee", "beetle", "bicycle", "bottle", "bowl", "boy",
    "bridge", "bus", "butterfly",
    "camel", "can", "castle", "caterpillar", "cattle", "chair", "chimpanzee", "clock", "cloud",
    "cockroach", "couch", "crab",
    "crocodile", "cup",
    "dinosaur", "dolphin",
    "elephant",
    "flatfish", "forest", "fox",
    "girl",
    "hamster", "house",
    "kangaroo", "keyboard",
    "lamp", "lawn mower", "leopard", "lion", "lizard", "lobster",
    "man", "maple tree", "motorcycle", "mountain", "mouse", "mushroom",
    "oak tree", "orange", "orchid", "otter",
    "palm tree", "pear", "pickup truck", "pine tree", "plain", "plate", "poppy", "porcupine",
    "possum",
    "rabbit", "raccoon", "ray", "road", "rocket", "rose",
    "sea", "seal", "shark", "shrew", "skunk", "skyscraper", "snail", "snake", "spider",
    "squirrel", "streetcar", "sunflower",
    "sweet pepper",
    "table", "tank", "telephone", "television", "tiger", "tractor", "train", "trout", "tulip",
    "turtle",
    "wardrobe", "whale", "willow tree", "wolf", "woman", "worm",
)

# As the folders of CUB-200-2011 are called; TFDS numbers them.
_BIRDS = (
    "black footed albatross", "laysan albatross", "sooty albatross", "groove billed ani",
    "crested auklet", "least auklet", "parakeet auklet", "rhinoceros auklet", "brewer blackbird",
    "red winged blackbird", "rusty blackbird", "yellow headed blackbird", "bobolink",
    "indigo bunting", "lazuli bunting", "painted bunting", "cardinal", "spotted catbird",
    "gray catbird", "yellow breasted chat", "eastern towhee", "chuck will widow",
    "brandt cormorant", "red faced cormorant", "pelagic cormorant", "bronzed cowbird",
    "shiny cowbird", "brown creeper", "american crow", "fish crow", "black billed cuckoo",
    "mangrove cuckoo", "yellow billed cuckoo", "gray crowned rosy finch", "purple finch",
    "northern flicker", "acadian flycatcher", "great crested flycatcher", "least flycatcher",
    "olive sided flycatcher", "scissor tailed flycatcher", "vermilion flycatcher",
    "yellow bellied flycatcher", "frigatebird", "northern fulmar", "gadwall", "american goldfinch",
    "european goldfinch", "boat tailed grackle", "eared grebe", "horned grebe", "pied billed grebe",
    "western grebe", "blue grosbeak", "evening grosbeak", "pine grosbeak", "rose breasted grosbeak",
    "pigeon guillemot", "california gull", "glaucous winged gull", "heermann gull", "herring gull",
    "ivory gull", "ring billed gull", "slaty backed gull", "western gull", "anna hummingbird",
    "ruby throated hummingbird", "rufous hummingbird", "green violetear", "long tailed jaeger",
    "pomarine jaeger", "blue jay", "florida jay", "green jay", "dark eyed junco",
    "tropical kingbird", "gray kingbird", "belted kingfisher", "green kingfisher",
    "pied kingfisher", "ringed kingfisher", "white breasted kingfisher", "red legged kittiwake",
    "horned lark", "pacific loon", "mallard", "western meadowlark", "hooded merganser",
    "red breasted merganser", "mockingbird", "nighthawk", "clark nutcracker",
    "white breasted nuthatch", "baltimore oriole", "hooded oriole", "orchard oriole",
    "scott oriole", "ovenbird", "brown pelican", "white pelican", "western wood pewee", "sayornis",
    "american pipit", "whip poor will", "horned puffin", "common raven", "white necked raven",
    "american redstart", "geococcyx", "loggerhead shrike", "great grey shrike", "baird sparrow",
    "black throated sparrow", "brewer sparrow", "chipping sparrow", "clay colored sparrow",
    "house sparrow", "field sparrow", "fox sparrow", "grasshopper sparrow", "harris sparrow",
    "henslow sparrow", "le conte sparrow", "lincoln sparrow", "nelson sharp tailed sparrow",
    "savannah sparrow", "seaside sparrow", "song sparrow", "tree sparrow", "vesper sparrow",
    "white crowned sparrow", "white throated sparrow", "cape glossy starling", "bank swallow",
    "barn swallow", "cliff swallow", "tree swallow", "scarlet tanager", "summer tanager",
    "artic tern", "black tern", "caspian tern", "common tern", "elegant tern", "forsters tern",
    "least tern", "green tailed towhee", "brown thrasher", "sage thrasher", "black capped vireo",
    "blue headed vireo", "philadelphia vireo", "red eyed vireo", "warbling vireo",
    "white eyed vireo", "yellow throated vireo", "bay breasted warbler", "black and white warbler",
    "black throated blue warbler", "blue winged warbler", "canada warbler", "cape may warbler",
    "cerulean warbler", "chestnut sided warbler", "golden winged warbler", "hooded warbler",
    "kentucky warbler", "magnolia warbler", "mourning warbler", "myrtle warbler",
    "nashville warbler", "orange crowned warbler", "palm warbler", "pine warbler",
    "prairie warbler", "prothonotary warbler", "swainson warbler", "tennessee warbler",
    "wilson warbler", "worm eating warbler", "yellow warbler", "northern waterthrush",
    "louisiana waterthrush", "bohemian waxwing", "cedar waxwing", "american three toed woodpecker",
    "pileated woodpecker", "red bellied woodpecker", "red cockaded woodpecker",
    "red headed woodpecker", "downy woodpecker", "bewick wren", "cactus wren", "carolina wren",
    "house wren", "marsh wren", "rock wren", "winter wren", "common yellowthroat",
)
# fmt: on

# The balanced split merges the lower-case letters that look like their capitals.
_EMNIST = (
    *_DIGITS,
    *(f"capital letter {letter}" for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ"),
    *(f"small letter {letter}" for letter in "abdefghnqrt"),
)

CLASS_NAMES: dict[str, tuple[str, ...]] = {
    "mnist": _DIGITS,
    "svhn": _DIGITS,
    "cmaterdb": _DIGITS,
    "emnist": _EMNIST,
    "fashion_mnist": (
        "t-shirt",
        "trousers",
        "pullover",
        "dress",
        "coat",
        "sandal",
        "shirt",
        "sneaker",
        "bag",
        "ankle boot",
    ),
    "kmnist": ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"),
    "cifar10": _CIFAR10,
    "cifar100": _CIFAR100,
    "stl10": _STL10,
    "gtsrb": _GTSRB,
    "eurosat": (
        "annual crop land",
        "forest",
        "meadow or shrubland",
        "highway or road",
        "industrial buildings",
        "pasture",
        "permanent crop land",
        "residential buildings",
        "river",
        "sea or lake",
    ),
    "caltech_birds2011": _BIRDS,
    "uc_merced": (
        "agricultural land",
        "airplane",
        "baseball diamond",
        "beach",
        "buildings",
        "chaparral",
        "dense residential area",
        "forest",
        "freeway",
        "golf course",
        "harbor",
        "intersection",
        "medium residential area",
        "mobile home park",
        "overpass",
        "parking lot",
        "river",
        "runway",
        "sparse residential area",
        "storage tanks",
        "tennis court",
    ),
    "colorectal_histology": (
        "tumor",
        "simple stroma",
        "complex stroma",
        "lymphocyte",
        "debris",
        "mucosa",
        "adipose",
        "empty background",
    ),
    "tf_flowers": ("dandelion", "daisy", "tulip", "sunflower", "rose"),
    "horses_or_humans": ("horse", "human"),
    "beans": ("angular leaf spot", "bean rust", "healthy"),
    "cassava": (
        "bacterial blight",
        "brown streak disease",
        "green mite damage",
        "mosaic disease",
        "healthy",
    ),
    "deep_weeds": (
        "chinee apple",
        "lantana",
        "parkinsonia",
        "parthenium",
        "prickly acacia",
        "rubber vine",
        "siam weed",
        "snake weed",
        "no weed",
    ),
    "imagenette": (
        "tench",
        "English springer",
        "cassette player",
        "chain saw",
        "church",
        "French horn",
        "garbage truck",
        "gas pump",
        "golf ball",
        "parachute",
    ),
    "animal10n": (
        "cat",
        "lynx",
        "wolf",
        "coyote",
        "cheetah",
        "jaguar",
        "chimpanzee",
        "orangutan",
        "hamster",
        "guinea pig",
    ),
}
"""In the order of the labels, by the name in `matu_jax.data.datasets.DATASETS`."""

_PREFIX = re.compile(r"^(/[a-z](?=/)|n\d{8}[-_ ]+|\d{1,5}[._ -]+(?=\D))")
_HUMP = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")


def readable(label: str) -> str:
    """Cleans a label of a dataset, or the name of a class's folder, for prompts and tables.

    Drops the prefixes that datasets sort by (`/a/abbey`, `001.Laysan_Albatross`,
    `n02085620-chihuahua`), turns underscores and slashes into spaces, and splits and lowers what is
    `WrittenLikeThis`. Labels with spaces of their own keep their capitals, since they are names.

    Args:
        label: Such as `"AnnualCrop"`.

    Returns:
        Such as `"annual crop"`; the label itself if nothing would be left.
    """
    text = _PREFIX.sub("", label.strip())
    if not re.search(r"\s", text):
        text = _HUMP.sub(" ", text).lower()
    return " ".join(re.sub(r"[_/]+", " ", text).split()) or label
