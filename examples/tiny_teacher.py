"""A stand-in for your teacher: a Llama of 0.1 M parameters, trained here in seconds, so that nothing is downloaded.

With a model of your own you do not need this file: pass its folder or its Hub name to the other examples.
"""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, logging

VOCAB_SIZE, CONTEXT_TOKENS = 512, 256


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE that puts <s> before every text, as most models do."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")


def make_teacher(folder: Path, texts: list[str], steps: int = 120) -> Path:
    """Train a model on the texts and save it as a Hugging Face folder, unless the folder is there already."""
    if (folder / "model.safetensors").exists():
        return folder
    torch.manual_seed(0)
    logging.disable_progress_bar()
    tokenizer = make_tokenizer(texts)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB_SIZE, hidden_size=64, intermediate_size=192, num_hidden_layers=1, num_attention_heads=4,
            max_position_embeddings=CONTEXT_TOKENS, bos_token_id=0, eos_token_id=1, tie_word_embeddings=True,
        )
    )  # fmt: skip
    ids = torch.tensor([i for text in texts for i in tokenizer(text)["input_ids"]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        starts = torch.randint(0, len(ids) - 128, (8,))
        batch = torch.stack([ids[start : start + 128] for start in starts])
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return folder
