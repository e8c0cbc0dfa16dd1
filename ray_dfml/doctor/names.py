"""What the class names of a pool tell: which are shared, which are nearly equal, and which data sets there are."""

import itertools
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from ray_dfml.doctor.findings import Finding
from ray_dfml.errors import first_of

TYPO = 6
"""The fewest letters of a name in which one letter more, less or other is taken for a slip of the pen."""


def same_thing(name: str) -> str:
    """A class name without what people write differently: case, accents, spaces and signs, and the plural s."""
    data, slash, word = name.rpartition("/")
    plain = unicodedata.normalize("NFKD", word).casefold()
    plain = "".join(letter for letter in plain if letter.isalnum())
    return data.casefold() + slash + (plain.removesuffix("s") if len(plain) > 3 and not plain.endswith("ss") else plain)


def nearly_equal(names: Sequence[str]) -> list[tuple[str, ...]]:
    """Groups of different names that probably mean one class, in the order of `names`.

    They are equal as `same_thing`, or are words of TYPO letters or more, without digits, that differ in one letter.
    """
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for name in dict.fromkeys(names):
        groups[same_thing(name)].append(name)
    found = [tuple(group) for group in groups.values() if len(group) > 1]
    slips: defaultdict[str, list[str]] = defaultdict(list)
    for key in groups:
        word = key.rpartition("/")[2]
        if len(word) >= TYPO and not re.search(r"\d", word):
            start = key.removesuffix(word)
            for n in range(len(word)):
                slips[f"{start}{word[:n]}*{word[n + 1 :]}"].append(key)
                slips[f"{start}{word[:n]}*{word[n:]}"].append(key)
            slips[f"{start}{word}*"].append(key)
    pairs = {pair for keys in slips.values() if len(keys) > 1 for pair in itertools.pairwise(keys)}
    return found + sorted((groups[one][0], groups[other][0]) for one, other in pairs if one != other)


def label_spaces(classes: Mapping[str, Sequence[str]]) -> list[Finding]:
    """Notes on the class names of each teacher: how many there are, how many are shared, and which look like one."""
    count = Counter(name for names in classes.values() for name in names)
    data = Counter(name.rpartition("/")[0] or "no data set" for name in count)
    shared = sum(number > 1 for number in count.values())
    sets = ", ".join(f"{one} {number}" for one, number in data.most_common(5)) + (" .." if len(data) > 5 else "")
    found = [
        Finding("note", "labels", (), f"{len(count)} classes ({sets}), {shared} of them known to several teachers")
    ]
    for group in nearly_equal(list(count)):
        who = tuple(id for id, names in classes.items() if set(names) & set(group))
        text = (
            f"the class names {first_of(list(group))} are nearly equal; teachers share a class only if it has one name"
        )
        found.append(Finding("note", "near-names", who, text))
    return found
