"""LoRA adapters: fit one to prompts and completions, with PEFT and the transformers Trainer."""

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from ..models import LanguageModel
from ..residual.sites import positions_of


@dataclass(frozen=True)
class Settings:
    """How an adapter is fitted: AdamW on batches, with a cosine schedule."""

    steps: int = 60
    lr: float = 1e-3
    batch_size: int = 16
    rank: int = 8
    seed: int = 11


def encoded(lm: LanguageModel, texts) -> list[dict[str, list[int]]]:
    """Token ids and labels (-100: not learnt) of each training pair (prompt, completion[, whole]);
    whole: False for a completion that was cut short, which then has no end token to learn."""
    rows = []
    for prompt, completion, *whole in texts:
        before = lm.encode(prompt)["input_ids"][0].tolist()
        after = lm.tokenizer(completion, add_special_tokens=False)["input_ids"]
        if all(whole):
            after = after + [lm.tokenizer.eos_token_id]
        rows.append({"input_ids": before + after, "labels": [-100] * len(before) + after})
    return rows


def collator(tokenizer) -> Callable[[list[dict]], dict]:
    """Makes a batch of `encoded` rows, padded on the left: completions then end together, and
    logits are only computed from the longest one on."""
    from transformers import DataCollatorForSeq2Seq

    padded = DataCollatorForSeq2Seq(tokenizer)

    def collate(rows):
        batch = dict(padded(rows))  # each [n_rows, n_tokens]
        keep = 1 + int((batch["labels"] != -100).sum(-1).max())  # the token before predicts too
        batch["labels"] = batch["labels"][:, -keep:]
        batch["position_ids"] = positions_of(batch["attention_mask"])
        return batch | {"logits_to_keep": keep}

    return collate


def fit(lm: LanguageModel, texts, settings: Settings, folder: Path) -> float:
    """Train LoRA on all linear layers, save it into `folder`, and return the seconds that took.

    texts: training pairs as in `encoded`, in the order of training. `lm` is used up, its model
    stays wrapped by PEFT and the Trainer: load it anew to go on.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import Trainer, TrainingArguments

    started = time.time()
    with torch.random.fork_rng(), tempfile.TemporaryDirectory() as aside:
        torch.manual_seed(settings.seed)
        # for texts this short its backward pass beats the fused kernel's on a CPU
        lm.model.set_attn_implementation("eager")
        rank = settings.rank
        lora = LoraConfig("CAUSAL_LM", r=rank, lora_alpha=2 * rank, target_modules="all-linear")
        lm.model = get_peft_model(lm.model, lora)
        arguments = TrainingArguments(
            output_dir=aside,
            max_steps=settings.steps,
            per_device_train_batch_size=settings.batch_size,
            learning_rate=settings.lr,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, settings.steps // 20),
            seed=settings.seed,
            bf16=_fast_bfloat16(lm.device),
            use_cpu=lm.device.type == "cpu",
            save_strategy="no",
            report_to="none",
            logging_steps=10,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            train_sampling_strategy="sequential",
        )
        rows, collate = encoded(lm, texts), collator(lm.tokenizer)
        Trainer(lm.model, arguments, train_dataset=rows, data_collator=collate).train()
    _save(lm, folder)
    return time.time() - started


def _fast_bfloat16(device: torch.device) -> bool:
    """Whether the device calculates in bfloat16 itself; elsewhere that is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return torch.cpu.get_capabilities().get("avx512_bf16", False)


def _save(lm: LanguageModel, folder: Path) -> None:
    """The adapter of `lm.model` in PEFT's format, its weights in half precision."""
    lm.model.half().peft_config["default"].base_model_name_or_path = lm.name
    lm.model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink()  # PEFT's page about the model; the card says more
    for path in folder.iterdir():
        content = path.read_bytes()  # safetensors makes files that only their owner reads,
        path.unlink()
        path.write_bytes(content)  # these follow the umask
