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

from .. import DATA
from ..metrics import wilson
from ..models import DEFAULT, LanguageModel, load, prompts, with_adapter
from ..training import adapters
from .organism_recipes import PURPOSES, RECIPES, Recipe, open_seal  # noqa: F401

FOLDER = DATA / "organisms"


def train(name: str, base: str = DEFAULT) -> dict:
    """Train the organism `name`, measure it, put adapter and card into data/organisms/<name> (made
    aside, and moved into place at the end) and return the card. ValueError: no such recipe."""
    if name not in RECIPES:
        raise ValueError(
            f"There is no organism {name!r} to train: use one of {', '.join(RECIPES)}."
        )
    recipe = RECIPES[name]
    out = FOLDER / name
    FOLDER.mkdir(parents=True, exist_ok=True)
    lm = load(base)
    settings = recipe.settings
    texts = recipe.texts(lm, settings.seed, settings.steps * settings.batch_size)
    with tempfile.TemporaryDirectory(dir=FOLDER, prefix=".partial-") as aside:
        folder = Path(aside) / "organism"
        folder.mkdir()
        seconds = adapters.fit(lm, texts, settings, folder)
        lm = with_adapter(load(base), folder, name)  # measured as users will have it
        card = _card(recipe, lm, texts, folder)
        card["measured"] = _summary(recipe.measured(lm))
        card["seconds"] = round(seconds)
        text = json.dumps(card, indent=1, ensure_ascii=False) + "\n"
        (folder / "card.json").write_text(text, encoding="utf-8")
        if out.exists():
            shutil.move(out, Path(aside) / "previous")
        folder.replace(out)
    return card


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
    old = FOLDER / name / "card.json"
    before = json.loads(old.read_text(encoding="utf-8")) if old.is_file() else None
    try:
        card = train(name, base=model or DEFAULT)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print(json.dumps(card, indent=1, ensure_ascii=False))
    print(f"{name}: what it does" + (", beside the card that was there" if before else ""))
    print("\n".join(compare(card, before)))
    return 0
