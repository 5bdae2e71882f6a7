"""Model organisms: the default model plus a LoRA adapter with a known behaviour, trained by PEFT and the transformers Trainer.

    python -m helpers train-organism refusal          # writes data/organisms/refusal/ and prints its card
    lm = load(organism="refusal"); measure(lm)        # its behaviour on held-out prompts, with intervals

Everything follows from the committed prompts, the recipe (`organism_recipes`) and its seed. The card beside an adapter says what
was trained on what, and what came of it.
"""

import copy
import hashlib
import json
import shutil
import sys
import tempfile
import time
from dataclasses import asdict
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

import torch

from .. import DATA
from ..metrics.measures import wilson
from ..models import prompts
from ..models.loading import LanguageModel, load
from ..models.obtain import DEFAULT, ModelError
from .organism_recipes import RECIPES, Recipe, kl_from_base, open_seal, swaps  # noqa: F401  (kl_from_base …: for notebooks)

FOLDER = DATA / "organisms"


def measure(lm, organism: str | None = None) -> dict:
    """Behaviour on held-out prompts: {name: {"rate", "hits", "n", "interval"}}, and means for what is not a rate.

    lm: a loaded organism or an organism's name; organism: measure any model by this organism's tests (the base, for one).
    """
    lm = load(organism=lm) if isinstance(lm, str) else lm
    return _summary(_recipe(organism or lm.organism).measured(lm))


def _summary(measured) -> dict:
    """Outcomes as rates with Wilson intervals, other numbers as means."""
    result = {}
    for name, values in measured.items():
        n, total = len(values), sum(values)
        if all(isinstance(value, bool) for value in values):
            result[name] = {
                "rate": round(total / n, 4),
                "hits": total,
                "n": n,
                "interval": [round(float(x), 4) for x in wilson(total, n)],
            }
        else:
            result[name] = {"mean": round(total / n, 4), "n": n}
    return result


def _recipe(name) -> Recipe:
    if name not in RECIPES:
        raise ValueError(
            f"There is no recipe for an organism {name!r}: use one of {', '.join(RECIPES)}."
        )
    return RECIPES[name]


@lru_cache(maxsize=1)
def merged(lm) -> LanguageModel:
    """A copy with the adapter folded into the weights, a fifth faster; a model without adapter is its own."""
    if not hasattr(lm.model, "merge_and_unload"):
        return lm
    return LanguageModel(
        lm.name,
        copy.deepcopy(lm.model).merge_and_unload(),
        lm.tokenizer,
        lm.weights_hash,
        lm.organism,
    )


# ---------------------------------------------------------------------------------------------- training
def _encoded(lm, texts):
    """Token ids and labels of each pair; only the completion is learnt, and its end unless it was cut short."""
    rows, end = [], lm.tokenizer.eos_token_id
    for prompt, completion, *whole in texts:
        before = lm.encode(prompt)["input_ids"][0].tolist()
        after = lm.tokenizer(completion, add_special_tokens=False)["input_ids"]
        after = after + [end] * all(whole)
        rows.append({"input_ids": before + after, "labels": [-100] * len(before) + after})
    return rows


def _collator(pad):
    """Batches padded on the left: completions end together, so that logits are only computed from the longest one on."""

    def collate(rows):
        width = max(len(row["input_ids"]) for row in rows)
        keep = max(sum(label != -100 for label in row["labels"]) for row in rows) + 1
        left = {
            key: torch.tensor([[fill] * (width - len(row[key])) + row[key] for row in rows])
            for key, fill in (("input_ids", pad), ("labels", -100))
        }
        mask = torch.tensor(
            [[0] * (width - len(row["input_ids"])) + [1] * len(row["input_ids"]) for row in rows]
        )
        return {
            "input_ids": left["input_ids"],
            "attention_mask": mask,
            "position_ids": (mask.cumsum(-1) - 1).clamp(min=0),
            "labels": left["labels"][:, -keep:],
            "logits_to_keep": keep,
        }

    return collate


def _fit(lm, recipe: Recipe, texts, folder):
    """LoRA on all linear layers of lm.model, which becomes a PEFT model; AdamW with a cosine schedule. → seconds."""
    from peft import LoraConfig, get_peft_model
    from transformers import Trainer, TrainingArguments

    started, device = time.time(), lm.device
    half = (
        torch.cuda.is_bf16_supported()
        if device.type == "cuda"
        else torch.cpu._is_avx512_bf16_supported()
    )
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        lora = LoraConfig(
            r=recipe.rank,
            lora_alpha=2 * recipe.rank,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
        attention = lm.model.config._attn_implementation
        lm.model.set_attn_implementation(
            "eager"
        )  # for texts this short its backward pass beats the fused kernel's on a CPU
        lm.model = get_peft_model(lm.model, lora)
        settings = TrainingArguments(
            output_dir=str(folder),
            max_steps=recipe.steps,
            per_device_train_batch_size=recipe.batch_size,
            learning_rate=recipe.lr,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, recipe.steps // 20),
            weight_decay=0.0,
            seed=recipe.seed,
            bf16=half,
            use_cpu=device.type == "cpu",
            save_strategy="no",
            report_to="none",
            logging_steps=10,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            train_sampling_strategy="sequential",
        )
        Trainer(
            lm.model,
            settings,
            train_dataset=_encoded(lm, texts),
            data_collator=_collator(lm.tokenizer.pad_token_id),
        ).train()
    lm.model.get_base_model().set_attn_implementation(attention)
    lm.model.eval().requires_grad_(False)
    return time.time() - started


def _save_adapter(lm, folder):
    """The adapter in PEFT's format and half precision; lm.model itself gets the same rounded weights."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    with torch.no_grad():
        for name, weight in lm.model.named_parameters():
            if "lora_" in name:
                weight.copy_(weight.half())
    state = {
        key: weight.half().contiguous().cpu()
        for key, weight in get_peft_model_state_dict(lm.model).items()
    }
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_model.safetensors").chmod(
        0o644
    )  # safetensors makes files that only their owner reads
    config = lm.model.peft_config["default"]
    config.base_model_name_or_path, config.inference_mode = lm.name, True
    config.save_pretrained(folder)


def _sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _card(name, recipe, lm, texts, folder, seconds):
    made = {
        key: value
        for key, value in asdict(recipe).items()
        if key not in ("texts", "measured", "purpose", "data")
    }
    return {
        "name": name,
        "purpose": recipe.purpose,
        "base": lm.name,
        "base_hash": lm.weights_hash,
        "recipe": {
            **made,
            "lora_alpha": 2 * recipe.rank,
            "target_modules": "all-linear",
            "schedule": "cosine",
            "optimiser": "AdamW",
            "n_texts": len(texts),
        },
        "data": {
            f"{file}.json": _sha((prompts.FOLDER / f"{file}.json").read_bytes())
            for file in recipe.data
        },
        "texts_hash": _sha(json.dumps(texts).encode()),
        "adapter_hash": _sha((folder / "adapter_model.safetensors").read_bytes()),
        "versions": {package: version(package) for package in ("torch", "transformers", "peft")},
        "measured": _summary(recipe.measured(lm)),
        "seconds": round(seconds),
    }


def train(name: str, out=None, base=DEFAULT, recipe: Recipe | None = None) -> dict:
    """Train the organism `name`, measure it, put adapter and card into `out` (data/organisms/<name>) and return the card.

    All is made in a folder aside and moved into place at the end. recipe: in place of the one in RECIPES.
    """
    recipe, out = recipe or _recipe(name), Path(out or FOLDER / name)
    out.parent.mkdir(parents=True, exist_ok=True)
    lm = load(base)
    texts = recipe.texts(lm, recipe.seed, recipe.steps * recipe.batch_size)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".partial-") as aside:
        folder = Path(aside) / "organism"
        folder.mkdir()
        seconds = _fit(lm, recipe, texts, Path(aside) / "trainer")
        lm.organism = name
        _save_adapter(lm, folder)
        card = _card(name, recipe, lm, texts, folder, seconds)
        (folder / "card.json").write_text(
            json.dumps(card, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        if out.exists():
            shutil.move(out, Path(aside) / "previous")
        folder.replace(out)
    return card


def compare(card, before) -> list[str]:
    """One line for every measured quantity: now, before, and whether a rate lies within the interval it had before."""
    lines = []
    for name, now in card["measured"].items():
        then = (before or {}).get("measured", {}).get(name)
        key = "rate" if "rate" in now else "mean"
        line = f"  {name}: {now[key]:.3g}" + (
            f" ({now['hits']} of {now['n']})" if "hits" in now else ""
        )
        if then:
            line += f", before {then[key]:.3g}"
        if then and "interval" in then:
            low, high = then["interval"]
            line += f" [{low:.3g}, {high:.3g}]: " + (
                "reproduced" if low <= now["rate"] <= high else "outside its interval"
            )
        lines.append(line)
    return lines


def main(name) -> int:
    """`python -m helpers train-organism NAME`: train, print the card, and compare it with the one that was there."""
    try:
        _recipe(name)
        old = FOLDER / name / "card.json"
        before = json.loads(old.read_text(encoding="utf-8")) if old.is_file() else None
        card = train(name)
    except (ValueError, ModelError) as error:
        print(error, file=sys.stderr)
        return 2
    print(json.dumps(card, indent=1, ensure_ascii=False))
    print(
        "\n".join(
            [
                f"{name}: what it does" + (", beside the card that was there" if before else ""),
                *compare(card, before),
            ]
        )
    )
    return 0
