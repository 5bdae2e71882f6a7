"""Model organisms: a base model plus a LoRA adapter with a known behaviour.

    python -m helpers train-organism refusal      # writes data/organisms/refusal/, prints its card
    lm = load(organism="refusal")

Everything follows from the committed prompts, the recipe (`organism_recipes`) and its seed. The
card beside an adapter says what was trained on what, and what came of it.
"""

import hashlib
import json
import shutil
import sys
import tempfile
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from .. import DATA, ledger
from ..metrics import wilson
from ..models import DEFAULT, LanguageModel, load, prompts, with_adapter
from ..training import adapters
from . import store
from .organism_recipes import PURPOSES, RECIPES, Recipe, open_seal  # noqa: F401

FOLDER = DATA / "organisms"


def folder_of(name: str, base: str = DEFAULT) -> Path:
    """Where an organism lies: of the default model in data/organisms, of another below build/,
    and there `load(base, organism=folder)` finds it."""
    if base == DEFAULT:
        return FOLDER / name
    return ledger.build_folder() / "organisms" / store.as_file_name(base) / name


def train(name: str, base: str = DEFAULT) -> dict:
    """Train the organism `name`, measure it, put adapter and card into `folder_of(name, base)`
    (made aside, and moved into place at the end) and return the card. ValueError: no such recipe,
    or a folder that cannot be written."""
    if name not in RECIPES:
        raise ValueError(
            f"There is no organism {name!r} to train: use one of {', '.join(RECIPES)}."
        )
    recipe, out = RECIPES[name], folder_of(name, base)
    with store.usable(f"The folder {out.parent}", "free space or make it writable, and try again"):
        store.try_to_write(out.parent)
        _restore(out)
        return _train(name, recipe, base, out)


def _train(name: str, recipe: Recipe, base: str, out: Path) -> dict:
    lm = load(base)
    settings = recipe.settings
    texts = recipe.texts(lm, settings.seed, settings.steps * settings.batch_size)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".partial-") as aside:
        folder = Path(aside) / "organism"
        folder.mkdir()
        seconds = adapters.fit(lm, texts, settings, folder)
        lm = with_adapter(load(base), folder, name)  # measured as users will have it
        card = _card(recipe, lm, texts, folder)
        card["measured"] = _summary(recipe.measured(lm))
        card["seconds"] = round(seconds)
        text = json.dumps(card, indent=1, ensure_ascii=False) + "\n"
        (folder / "card.json").write_text(text, encoding="utf-8")
        _put(folder, out)
    return card


def _previous(out: Path) -> Path:
    """Where the old organism waits while the new one is put into its place."""
    return out.parent / f".previous-{out.name}" / out.name


def _restore(out: Path) -> None:
    """The old organism comes back where a training was killed just before the new one was there."""
    if _previous(out).exists() and not out.exists():
        _previous(out).replace(out)


def _put(folder: Path, out: Path) -> None:
    """The new organism into its place; the old one goes last, whatever ends this."""
    previous = _previous(out)
    if out.exists():
        shutil.rmtree(previous.parent, ignore_errors=True)
        previous.parent.mkdir()
        out.replace(previous)
    try:
        folder.replace(out)
    except BaseException:
        _restore(out)
        raise
    shutil.rmtree(previous.parent, ignore_errors=True)


def _card(recipe: Recipe, lm: LanguageModel, texts, folder: Path) -> dict:
    """What was trained on what."""
    settings = asdict(recipe.settings) | {"lora_alpha": 2 * recipe.settings.rank}
    fixed = {"target_modules": "all-linear", "schedule": "cosine", "optimiser": "AdamW"}
    files = [prompts.FOLDER / f"{name}.json" for name in recipe.data]
    return {
        "name": lm.organism,
        "purpose": PURPOSES.get(lm.organism),
        "base": lm.name,
        "base_hash": lm.weights_hash,
        "recipe": settings | fixed | {"n_texts": len(texts)},
        "data": {path.name: _sha(path.read_bytes()) for path in files},
        "texts_hash": _sha(json.dumps(texts).encode()),
        "adapter_hash": _sha((folder / "adapter_model.safetensors").read_bytes()),
        "versions": {package: version(package) for package in ("torch", "transformers", "peft")},
    }


def _sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _summary(measured: dict[str, list]) -> dict[str, dict]:
    """Outcomes (True or False) as rates with Wilson intervals, other numbers as means."""
    result = {}
    for name, values in measured.items():
        n, total = len(values), sum(values)
        share = round(total / n, 4)
        result[name] = {"mean": share, "n": n}
        if all(isinstance(value, bool) for value in values):
            interval = [round(float(end), 4) for end in wilson(total, n)]
            result[name] = {"rate": share, "hits": total, "n": n, "interval": interval}
    return result


def compare(card: dict, before: dict | None) -> list[str]:
    """A line per measured quantity: now, before, and whether a rate is within its old interval."""
    lines = []
    for name, now in card["measured"].items():
        then = (before or {}).get("measured", {}).get(name, {})
        key = "rate" if "rate" in now else "mean"
        line = f"  {name}: {now[key]:.3g}"
        if "hits" in now:
            line += f" ({now['hits']} of {now['n']})"
        if then:
            line += f", before {then[key]:.3g}"
        if "interval" in then:
            low, high = then["interval"]
            again = "reproduced" if low <= now["rate"] <= high else "outside its interval"
            line += f" [{low:.3g}, {high:.3g}]: {again}"
        lines.append(line)
    return lines


def main(name: str, model: str | None = None) -> int:
    """Train, print the card, `compare` it with the one that was there; returns the exit status."""
    base = model or DEFAULT
    out = folder_of(name, base)
    before = _card_in(out)
    try:
        card = train(name, base=base)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print(json.dumps(card, indent=1, ensure_ascii=False))
    print(f"{name}: what it does" + (", beside the card that was there" if before else ""))
    print("\n".join(compare(card, before)))
    if base != DEFAULT:
        print(f"It lies in {out}: load({base!r}, organism={str(out)!r}).")
    return 0


def _card_in(folder: Path) -> dict | None:
    """The card there, to compare with; None where there is none, or a broken one."""
    try:
        card = json.loads((folder / "card.json").read_text(encoding="utf-8"))
        measured = card["measured"].values()
        return card if all("rate" in one or "mean" in one for one in measured) else None
    except (OSError, *store.FOREIGN):
        return None
