"""Toy task of the specification's cases L1 and L2: passages state where entities live, questions ask for it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from graftwork.core.example import Example
from graftwork.grafting.conversion import convert
from graftwork.methods.regrad import ReGrad, functional
from graftwork.methods.regrad.encoding.gradients import passage_gradients
from graftwork.methods.regrad.meta_training.episodes import EpisodeCollator, Episodes, passages_of, prompt_ids
from graftwork.methods.regrad.modules import step_sizes, updated
from graftwork.methods.regrad.phases import Meta
from graftwork.settings.training import TrainingSettings
from graftwork.training.encoding import EncodedExamples
from graftwork.training.trainer import PhaseData, train_phase

ENTITIES, TRAINED, CITIES, TASKS = 200, 150, 8, 16
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<nl>"]
WORDS = [*SPECIAL, "lives", "in", ".", "where", "does", "live", "?", "answer:"]
WORDS += [f"c{number}" for number in range(CITIES)] + [f"e{number}" for number in range(ENTITIES)]


def toy_tokenizer() -> Any:
    """Return a word-level tokenizer with a start token and a newline token that ends answers."""
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="<nl>", unk_token="<unk>"
    )


def toy_model(seed: int) -> Any:
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=4,
        num_attention_heads=4,
        initializer_range=0.1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=4,
        max_position_embeddings=64,
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config).eval()


def prompt_file(folder: Path) -> str:
    """Write the prompt template of the toy task and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "toy.yaml"
    user = "where does {{ question }} live ?"
    path.write_text(
        f'system: ""\ncontext: ""\npassage: "{{{{ text }}}}"\nuser: "{user}"\nassistant: "answer:"\n', encoding="utf-8"
    )
    return str(path)


def examples(entities: Sequence[int], *, passages: int, seed: int, draws: int = 1) -> list[Example]:
    """Return examples with a random city per entity; its passage is shuffled among distractors."""
    chance = random.Random(seed)
    rows = []
    for _ in range(draws):
        for entity in entities:
            home = {other: chance.randrange(CITIES) for other in range(ENTITIES)}
            mentioned = [entity, *chance.sample([other for other in entities if other != entity], passages - 1)]
            chance.shuffle(mentioned)
            texts = tuple(f"e{other} lives in c{home[other]} ." for other in mentioned)
            city = f"c{home[entity]}"
            metadata = {"question": f"e{entity}", "passages": texts, "kind": "open"}
            rows.append(Example(f"{entity}", f"e{entity}", city, (city,), metadata))
    return rows


def toy_method(folder: Path, **settings: Any) -> ReGrad:
    return ReGrad(
        **{
            "rank": 4,
            "layers": "2-3",
            "initial_step_size": 0.1,
            "prompt": prompt_file(folder),
            **settings,
        }
    )


def learn(
    folder: Path,
    *,
    steps: int,
    seed: int = 0,
    passages: int = 1,
    method: ReGrad | None = None,
    phase: Meta | None = None,
    callbacks: Sequence[Any] = (),
    **training: Any,
) -> tuple[Any, ReGrad]:
    """Meta-train the toy model with the ordinary trainer.

    Args:
        folder: Output folder.
        steps: Number of updates.
        seed: Seed of model, data and training.
        passages: Number of passages per question.
        method: Method to use; a default toy configuration otherwise.
        phase: Training phase; `Meta` otherwise.
        callbacks: Trainer callbacks.
        training: Further training settings.
    """
    method = method or toy_method(folder)
    tokenizer = toy_tokenizer()
    model = convert(toy_model(seed), method, tokenizer=tokenizer).model
    rows = examples(range(TRAINED), passages=passages, seed=seed, draws=-(-steps * TASKS // TRAINED))
    settings = TrainingSettings(
        **{
            "max_steps": steps,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "constant",
            "max_grad_norm": 0.5,
            "per_device_train_batch_size": TASKS,
            "logging_steps": 10,
            "save_steps": 1000,
            **training,
        }
    )
    phase = phase or Meta(method.config)
    encoded = EncodedExamples(rows, tokenizer, encoder_decoder=False, max_input_tokens=64, max_target_tokens=4)
    dataset, collate = phase.examples(model, encoded, None, None)
    train_phase(
        model,
        phase,
        PhaseData(dataset, collate),
        folder / "train",
        settings,
        tokenizer=tokenizer,
        seed=seed,
        callbacks=callbacks,
    )
    return model, method


@torch.no_grad()
def accuracy(
    model: Any, method: ReGrad, *, strength: float = 1.0, shift: int = 0, passages: int = 1, draws: int = 1
) -> float:
    """Accuracy on held-out entities.

    Args:
        model: Converted model.
        method: Its method.
        strength: Factor γ on the update.
        shift: Offset by which gradients are assigned to other questions; 0 for their own.
        passages: Number of passages per question.
        draws: Number of questions per entity.
    """
    tokenizer, right, count = toy_tokenizer(), 0, 0
    rows = examples(range(TRAINED, ENTITIES), passages=passages, seed=1234, draws=draws)
    episodes = Episodes(rows, tokenizer, method.config, max_input_tokens=64, max_target_tokens=4)
    for start in range(0, len(rows), ENTITIES - TRAINED):
        chosen = range(start, start + ENTITIES - TRAINED)
        batch = EpisodeCollator(0)([episodes[index] for index in chosen])
        gradients, _ = passage_gradients(model, batch["document_ids"], batch["document_mask"])
        sums = gradients.new_zeros(len(chosen), gradients.shape[1]).index_add_(0, batch["document_task"], gradients)
        with updated(model, functional.update(step_sizes(model), sums.roll(shift, 0), strength)):
            prompts = [
                prompt_ids(tokenizer, method.config, rows[index], passages_of(rows[index], method.config), 64)
                for index in chosen
            ]
            logits = model(torch.tensor(prompts)).logits[:, -1]
        # argmax over the whole vocabulary, not only over cities
        found = logits.argmax(-1)
        right += sum(int(word == WORDS.index(rows[index].target)) for word, index in zip(found, chosen, strict=True))
        count += len(chosen)
    return right / count
