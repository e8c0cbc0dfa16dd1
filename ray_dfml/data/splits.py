"""Class splits of the known few-shot sets, as literals, and the rules for sets that bring no split of their own.

A split maps "train", "val" and "test" to sorted class names, and the three are disjoint. Classes are known by their
names, since an index would depend on the order in which some tool listed a folder.

    cifar-fs       Bertinetto et al., Meta-learning with differentiable closed-form solvers, ICLR 2019: 64/16/20 classes
    mini-imagenet  Ravi and Larochelle, Optimization as a model for few-shot learning, ICLR 2017: 64/16/20 classes
    cub            class i of the 200 sorted names: train if i%2==0, val if i%4==1, test if i%4==3 (100/50/50 classes)
    omniglot       background characters train, evaluation characters test; val: every sixth background alphabet
"""

from collections.abc import Mapping, Sequence

import numpy as np

from ray_dfml.errors import RejectedError

ClassSplits = Mapping[str, tuple[str, ...]]

SPLITS = ("train", "val", "test")


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


CIFAR_FS: ClassSplits = {
    "train": _words(
        """
        apple aquarium_fish bear bee bottle bowl boy bridge bus can castle caterpillar chair clock cloud cockroach
        couch cup dinosaur dolphin elephant forest girl hamster house kangaroo keyboard lawn_mower lion lizard
        lobster mountain mouse mushroom oak_tree orange orchid palm_tree pear pine_tree plate porcupine possum
        rabbit raccoon ray road seal shrew skunk skyscraper snake spider squirrel streetcar sunflower tank tiger
        train trout tulip turtle willow_tree wolf
        """
    ),
    "val": _words(
        """
        beaver beetle butterfly camel cattle crab crocodile flatfish lamp maple_tree motorcycle otter sea shark
        television tractor
        """
    ),
    "test": _words(
        """
        baby bed bicycle chimpanzee fox leopard man pickup_truck plain poppy rocket rose snail sweet_pepper table
        telephone wardrobe whale woman worm
        """
    ),
}

MINI_IMAGENET: ClassSplits = {
    "train": _words(
        """
        n01532829 n01558993 n01704323 n01749939 n01770081 n01843383 n01910747 n02074367 n02089867 n02091831
        n02101006 n02105505 n02108089 n02108551 n02108915 n02111277 n02113712 n02120079 n02165456 n02457408
        n02606052 n02687172 n02747177 n02795169 n02823428 n02966193 n03017168 n03047690 n03062245 n03207743
        n03220513 n03337140 n03347037 n03400231 n03476684 n03527444 n03676483 n03838899 n03854065 n03888605
        n03908618 n03924679 n03998194 n04067472 n04243546 n04251144 n04258138 n04275548 n04296562 n04389033
        n04435653 n04443257 n04509417 n04515003 n04596742 n04604644 n04612504 n06794110 n07584110 n07697537
        n07747607 n09246464 n13054560 n13133613
        """
    ),
    "val": _words(
        """
        n01855672 n02091244 n02114548 n02138441 n02174001 n02950826 n02971356 n02981792 n03075370 n03417042
        n03535780 n03584254 n03770439 n03773504 n03980874 n09256479
        """
    ),
    "test": _words(
        """
        n01930112 n01981276 n02099601 n02110063 n02110341 n02116738 n02129165 n02219486 n02443484 n02871525
        n03127925 n03146219 n03272010 n03544143 n03775546 n04146614 n04149813 n04418357 n04522168 n07613480
        """
    ),
}

# alphabet -> number of characters
OMNIGLOT_BACKGROUND: Mapping[str, int] = {
    "Alphabet_of_the_Magi": 20,
    "Anglo-Saxon_Futhorc": 29,
    "Arcadian": 26,
    "Armenian": 41,
    "Asomtavruli_(Georgian)": 40,
    "Balinese": 24,
    "Bengali": 46,
    "Blackfoot_(Canadian_Aboriginal_Syllabics)": 14,
    "Braille": 26,
    "Burmese_(Myanmar)": 34,
    "Cyrillic": 33,
    "Early_Aramaic": 22,
    "Futurama": 26,
    "Grantha": 43,
    "Greek": 24,
    "Gujarati": 48,
    "Hebrew": 22,
    "Inuktitut_(Canadian_Aboriginal_Syllabics)": 16,
    "Japanese_(hiragana)": 52,
    "Japanese_(katakana)": 47,
    "Korean": 40,
    "Latin": 26,
    "Malay_(Jawi_-_Arabic)": 40,
    "Mkhedruli_(Georgian)": 41,
    "N_Ko": 33,
    "Ojibwe_(Canadian_Aboriginal_Syllabics)": 14,
    "Sanskrit": 42,
    "Syriac_(Estrangelo)": 23,
    "Tagalog": 17,
    "Tifinagh": 55,
}

# alphabet -> number of characters
OMNIGLOT_EVALUATION: Mapping[str, int] = {
    "Angelic": 20,
    "Atemayar_Qelisayer": 26,
    "Atlantean": 26,
    "Aurek-Besh": 26,
    "Avesta": 26,
    "Ge_ez": 26,
    "Glagolitic": 45,
    "Gurmukhi": 45,
    "Kannada": 41,
    "Keble": 26,
    "Malayalam": 47,
    "Manipuri": 40,
    "Mongolian": 30,
    "Old_Church_Slavonic_(Cyrillic)": 45,
    "Oriya": 46,
    "Sylheti": 28,
    "Syriac_(Serto)": 23,
    "Tengwar": 25,
    "Tibetan": 42,
    "ULOG": 26,
}

OMNIGLOT_VAL_ALPHABETS: tuple[str, ...] = (
    "Balinese",
    "Early_Aramaic",
    "Inuktitut_(Canadian_Aboriginal_Syllabics)",
    "Mkhedruli_(Georgian)",
    "Tifinagh",
)


def checked(name: str, where: str, classes: Sequence[str], splits: ClassSplits) -> ClassSplits:
    """`splits` itself. Raises RejectedError, which names the difference, unless `classes` are exactly its classes."""
    wanted = {c for part in splits.values() for c in part}
    missing, extra = sorted(wanted - set(classes)), sorted(set(classes) - wanted)
    if missing or extra:
        said = [f"lacks {_some(missing)}"] if missing else []
        said += [f"holds {_some(extra)}, not of its split"] if extra else []
        raise RejectedError(
            f"{where}: as {name} it {' and '.join(said)}; add the whole set, or load it as folder:PATH or parquet:PATH"
        )
    return splits


def omniglot(where: str, classes: Sequence[str]) -> ClassSplits:
    """Splits of the 1,623 characters, each named "Alphabet/characterNN". Raises RejectedError if some are missing."""
    counts: dict[str, int] = {}
    for name in classes:
        alphabet = name.split("/")[0]
        counts[alphabet] = counts.get(alphabet, 0) + 1
    known = {**OMNIGLOT_BACKGROUND, **OMNIGLOT_EVALUATION}
    checked("omniglot", where, sorted(counts), {"all": tuple(known)})
    for alphabet, count in counts.items():
        if count != known[alphabet]:
            raise RejectedError(
                f"{where}: alphabet {alphabet} has {count} characters, omniglot has {known[alphabet]}; "
                "add the whole set (1,623 characters), or load it as folder:PATH or parquet:PATH"
            )
    parts: dict[str, list[str]] = {split: [] for split in SPLITS}
    for name in sorted(classes):
        alphabet = name.split("/")[0]
        held_out = "val" if alphabet in OMNIGLOT_VAL_ALPHABETS else "train"
        parts["test" if alphabet in OMNIGLOT_EVALUATION else held_out].append(name)
    return {split: tuple(part) for split, part in parts.items()}


def cub(where: str, classes: Sequence[str]) -> ClassSplits:
    """Splits of the 200 bird classes by the rule above. Raises RejectedError if there are not 200."""
    if len(classes) != 200:
        raise RejectedError(
            f"{where}: as cub it needs 200 class folders, found {len(classes)}; "
            "point to the folder that holds 001.Black_footed_Albatross, or load it as folder:PATH"
        )
    ordered = sorted(classes)
    return {"train": tuple(ordered[0::2]), "val": tuple(ordered[1::4]), "test": tuple(ordered[3::4])}


def by_share(ordered: Sequence[str]) -> ClassSplits:
    """64/16/20 percent of the names, in the given order. Each part is sorted, and may be empty if names are few."""
    first, second = round(0.64 * len(ordered)), round(0.80 * len(ordered))
    parts = ordered[:first], ordered[first:second], ordered[second:]
    return {split: tuple(sorted(part)) for split, part in zip(SPLITS, parts, strict=True)}


def with_val(parts: ClassSplits) -> ClassSplits:
    """`parts`, with a val if they have none: the last fifth of train by name (16 of 80, as in `by_share`)."""
    train, val, test = (tuple(sorted(parts[split])) for split in SPLITS)
    if not val:
        kept = len(train) - len(train) // 5
        train, val = train[:kept], train[kept:]
    return {"train": train, "val": val, "test": test}


def last_tenth_per_class(labels: np.ndarray, image_splits: np.ndarray) -> np.ndarray:
    """A copy of `image_splits` (int8 [n], 0 = train) in which the last 10 % of each class's train images are val (1).

    The number is rounded down, so a class with fewer than ten train images gives none to val.
    """
    out = image_splits.copy()
    for label in np.unique(labels):
        train = np.flatnonzero((labels == label) & (image_splits == 0))
        out[train[len(train) - len(train) // 10 :]] = 1
    return out


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    return f"{len(names)} classes ({shown}, ...)" if len(names) > 3 else f"class {shown}"
