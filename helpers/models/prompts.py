"""The prompt sets in data/prompts, split into train / validation / test.

`texts("everyday", split="train", n=4)` is a list of strings, `items("distance_check")` of records.
A file is {"description": …, "source": …, "items": [{"id": …, "text": …, …}, …]}.
"""

import json

from .. import DATA

FOLDER = DATA / "prompts"
SPLITS = ("train", "validation", "test")


def names() -> list[str]:
    """The prompt sets there are."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def items(
    name: str, split: str | None = None, category: str | None = None, n: int | None = None
) -> list[dict]:
    """The first `n` records of the set `name`, in its order, of one split and category if given.

    ValueError: an unknown set, split or category, fewer than `n` records, a broken file.
    """
    found = _read(name)
    for field, wanted in (("split", split), ("category", category)):
        if wanted is not None:
            there = {item[field] for item in found if field in item}
            found = [item for item in found if item.get(field) == wanted]
            if not found:
                raise ValueError(
                    f"{name} has no items with {field} {wanted!r} here: "
                    f"use one of {', '.join(sorted(there)) or '(none)'}."
                )
    if n is not None and not 1 <= n <= len(found):
        raise ValueError(
            f"n is {n}, but this selection of {name} has {len(found)} items: use 1 … {len(found)}."
        )
    return found[:n]


def texts(name: str, split=None, category=None, n=None) -> list[str]:
    """The `text` of the records that `items` gives for the same arguments."""
    found = items(name, split, category, n)
    if not all("text" in item for item in found):
        raise ValueError(f"{name} has no single text per item: use items({name!r}).")
    return [item["text"] for item in found]


def _read(name: str) -> list[dict]:
    if name not in names():
        raise ValueError(
            f"There is no prompt set {name!r}: data/prompts has {', '.join(names()) or 'none'}."
        )
    try:
        content = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    except ValueError as error:  # broken JSON or UTF-8
        raise ValueError(f"{name}.json is not JSON: {error}.") from None
    found = content.get("items") if isinstance(content, dict) else None
    if not isinstance(found, list) or not found or not all(isinstance(i, dict) for i in found):
        raise ValueError(f"{name}.json needs a list 'items' of records that is not empty.")
    return found
