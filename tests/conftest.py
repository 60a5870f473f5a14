"""Fixtures that several test folders use: small text models in the layout in which they are published."""

from pathlib import Path

import pytest
import torch

WORDS = ["a", "red", "blue", "circle", "square", "two", "green", "triangles"]
BEGIN, END = "<|startoftext|>", "<|endoftext|>"
BERT_WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]


@pytest.fixture(scope="session")
def bert_folder(tmp_path_factory) -> Path:
    """Give a folder with a BERT tokenizer whose vocabulary is BERT_WORDS."""
    from transformers import BertTokenizerFast  # heavy: only for the tests that need it

    folder = tmp_path_factory.mktemp("bert")
    (folder / "vocab.txt").write_text("\n".join(BERT_WORDS))
    BertTokenizerFast.from_pretrained(str(folder)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory) -> Path:
    """Give a folder with a CLIP text model of width 16 and context 8, and a word-level tokenizer."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("clip")
    vocabulary = {word: i for i, word in enumerate([BEGIN, END, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=END))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A {END}", special_tokens=[(BEGIN, 0), (END, 1)]
    )
    special = {"bos_token": BEGIN, "eos_token": END, "unk_token": END, "pad_token": END}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=8,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    CLIPTextModel(config).eval().save_pretrained(folder)
    return folder
