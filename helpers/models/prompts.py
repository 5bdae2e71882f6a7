"""The prompt sets in data/prompts: read, validated, and split into train / validation / test.

    texts("everyday", split="train", n=4)        # what notebooks use most: a list of strings
    items("distance_check")                      # the full records, as dicts

A file is {"description": …, "source": …, "items": [{"id": …, …}, …]}; the fields of an item are in `FIELDS`.
"""

import json

from .. import DATA

FOLDER = DATA / "prompts"
SPLITS = ("train", "validation", "test")
PROMPT_FIELDS = ("id", "text", "category", "split")
FIELDS = {  # the sets with other fields than these four; an item may have more
    "reference_texts": ("id", "text", "category"),
    "geography": (*PROMPT_FIELDS, "answer"),
    "distance_check": ("id", "question", "original", "paraphrase", "persona", "unrelated"),
}


def names() -> list[str]:
    """The prompt sets there are."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def items(
    name: str, split: str | None = None, category: str | None = None, n: int | None = None
) -> list[dict]:
    """The records of the set `name` in the file's order, of one split and category if given, the first `n` of them.

    Raises ValueError for an unknown set, split or category, for fewer than `n` records, and for a malformed file.
    """
    found = _read(name)
    for field, wanted in (("split", split), ("category", category)):
        if wanted is not None:
            there = sorted({item[field] for item in found if field in item})
            found = [item for item in found if item.get(field) == wanted]
            if not found:
                raise ValueError(
                    f"{name} has no items with {field} {wanted!r} here: use one of {', '.join(there) or '(none)'}."
                )
    if n is not None and not 1 <= n <= len(found):
        raise ValueError(
            f"n is {n}, but this selection of {name} has {len(found)} items: use 1 … {len(found)}."
        )
    return found[:n]


def texts(
    name: str, split: str | None = None, category: str | None = None, n: int | None = None
) -> list[str]:
    """The `text` of the records that `items` gives."""
    if "text" not in FIELDS.get(name, PROMPT_FIELDS):
        raise ValueError(f"{name} has no single text per item: use items({name!r}).")
    return [item["text"] for item in items(name, split, category, n)]


def _read(name: str) -> list[dict]:
    if name not in names():
        raise ValueError(
            f"There is no prompt set {name!r}: data/prompts has {', '.join(names()) or 'none'}."
        )
    file = f"{name}.json"
    try:
        content = json.loads((FOLDER / file).read_text(encoding="utf-8"))
    except ValueError as error:  # broken JSON or UTF-8
        raise ValueError(f"{file} is not JSON: {error}.") from None
    for field, kind in (("description", str), ("source", str), ("items", list)):
        value = content.get(field) if isinstance(content, dict) else None
        if not isinstance(value, kind) or not value:
            raise ValueError(
                f"{file} needs a {field!r} that is a non-empty {'list' if kind is list else 'string'}."
            )
    _check_items(file, content["items"], FIELDS.get(name, PROMPT_FIELDS))
    return content["items"]


def _check_items(file: str, found: list, fields: tuple[str, ...]):
    """One-sentence ValueError for a field that is missing or not text, an unknown split, an id or a text that comes twice."""
    seen = {}
    for index, item in enumerate(found):
        where = f"{file}, item {index}"
        for field in fields:
            value = item.get(field) if isinstance(item, dict) else None
            if not isinstance(value, str) or not value.strip():
                raise ValueError(
                    f"{where}: the field {field!r} is {value!r}, a non-empty string is needed."
                )
        if "split" in fields and item["split"] not in SPLITS:
            raise ValueError(
                f"{where}: the field 'split' is {item['split']!r}, not one of {', '.join(SPLITS)}."
            )
        for field in ("id", "text"):  # a text in two splits would leak from training into the test
            key = (field, " ".join(item.get(field, str(index)).lower().split()))
            if key in seen:
                raise ValueError(
                    f"{where}: its field {field!r} is the same as that of item {seen[key]}."
                )
            seen[key] = index
