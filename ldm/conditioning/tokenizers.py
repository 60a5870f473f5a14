"""Text to token ids: a published tokenizer from disk, or one trained on the captions at hand.

A tokenizer maps B texts to int64 ids (B, max_length) as BERT does: a start token, the words, an end token, padding.
As in the published text models, padding is not masked. Nothing is downloaded.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ldm.bounds import Natural, Size
from ldm.errors import UserError, shown, writable
from ldm.weights.load import is_hub_name, read
from ldm.writing import write_text

VOCABULARY_FILE = "vocab.txt"
INSIDE = "##"  # begins a piece that continues a word
PAD, UNKNOWN, START, END = SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
_log = logging.getLogger(__name__)


class Tokenizer(Protocol):
    """Turn texts into ids below vocab_size."""

    max_length: int
    vocab_size: int

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Return ids int64 (B, max_length) on the CPU."""


class TruncationWarning:
    """Warn, once, of the words of a text that are cut off and have no effect."""

    def __init__(self, max_length: int) -> None:
        self.max_length = max_length
        self.given = False

    def __call__(self, text: str, first_cut: int) -> None:
        """Warn that `text` is cut at the word that contains character `first_cut`."""
        if not self.given:
            self.given = True
            while first_cut > 0 and text[first_cut - 1 : first_cut + 1].isalnum():
                first_cut -= 1
            _log.warning(
                "the text is longer than %d tokens and was cut; without effect: '%s' (further texts are cut silently)",
                self.max_length,
                text[first_cut:].strip(),
            )


class HuggingFaceTokenizer:
    """A published tokenizer from a local folder, or by its name from the Hugging Face cache.

    It is read at the first call and never downloaded; UserError says what to fetch and where to put it. vocab_size is
    the number of rows of the model's embedding; pad_id the token that fills up texts, if not the tokenizer's own.
    """

    def __init__(
        self,
        name_or_path: str = "bert-base-uncased",
        max_length: Size = 77,
        vocab_size: Size = 30522,
        pad_id: Natural | None = None,
    ) -> None:
        self.name_or_path = name_or_path
        self.max_length = max_length
        self.vocab_size, self.pad_id = vocab_size, pad_id
        self._warn = TruncationWarning(max_length)
        self._loaded: Any = None

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Return ids int64 (B, max_length) on the CPU."""
        tokenizer = self._tokenizer()
        settings = {"truncation": True, "max_length": self.max_length, "padding": "max_length"}
        encoded = tokenizer(list(texts), return_offsets_mapping=True, return_overflowing_tokens=True, **settings)
        rows: dict[int, list[int]] = {}
        for i, source in enumerate(encoded["overflow_to_sample_mapping"]):
            if source not in rows:
                rows[source] = self._filled_up(encoded["input_ids"][i], encoded["attention_mask"][i])
            else:  # the first part that did not fit
                starts = [start for start, end in encoded["offset_mapping"][i] if end > start]
                self._warn(texts[source], min(starts, default=0))
        return torch.tensor([rows[i] for i in range(len(texts))], dtype=torch.long).view(-1, self.max_length)

    def _filled_up(self, ids: list[int], mask: list[int]) -> list[int]:
        return ids if self.pad_id is None else [i if used else self.pad_id for i, used in zip(ids, mask, strict=True)]

    def save_folder(self, folder: Path) -> None:
        """Write the tokenizer as transformers reads it."""
        tokenizer = self._tokenizer()
        tokenizer.model_max_length = self.max_length
        if self.pad_id is not None:
            tokenizer.pad_token = tokenizer.convert_ids_to_tokens(self.pad_id)
        tokenizer.save_pretrained(folder)

    def _tokenizer(self) -> Any:
        if self._loaded is None:
            self._loaded = load_pretrained("AutoTokenizer", self.name_or_path, "tokenizer", trust_remote_code=False)
            if len(self._loaded) > self.vocab_size:
                raise UserError(
                    f"tokenizer '{self.name_or_path}' has {len(self._loaded)} tokens, the model's table "
                    f"{self.vocab_size}: set vocab_size, or use the tokenizer that the model was trained with"
                )
        return self._loaded


def load_pretrained(kind: str, name_or_path: str, what: str, hub: str | None = None, **options: Any) -> Any:
    """Return `transformers.<kind>` from a local folder or the local cache. UserError if it is in neither, or damaged.

    Weights that are pickles are read here first: transformers would ask torch, which advises to trust them.

    hub: name of what could be fetched into a folder that does not exist.
    """
    import transformers  # heavy: only when a published text model is used

    loader, folder = getattr(transformers, kind), Path(name_or_path)
    is_model = issubclass(loader, transformers.PreTrainedModel)
    if is_model and not any(folder.glob("*.safetensors")):
        for file in folder.glob("*.bin"):
            read(file)
    try:
        if not is_model:  # False, lest transformers asks on the terminal whether to run Python files of the folder
            options |= {"local_files_only": True, "trust_remote_code": False}
            return loader.from_pretrained(name_or_path, **options)
        with _without_reports():  # of weights that are there, and of another model
            model, found = loader.from_pretrained(
                name_or_path, local_files_only=True, output_loading_info=True, **options
            )
        missing = sorted(name for name in found["missing_keys"] if not name.endswith("position_ids"))
        if missing:
            raise ValueError(f"has no weights for {missing[0]}")
        return model
    except Exception as error:  # whatever transformers and its readers make of files that are none of theirs
        if folder.is_dir():
            problem = f"the folder lacks files or has damaged ones ({shown(str(error) or type(error).__name__, 80)})"
            raise UserError(f"{what} '{name_or_path}': {problem}; copy the whole {what} there") from error
        is_own_folder = not is_hub_name(name_or_path) or Path(name_or_path).name == Path(hub or "").name
        if hub is not None and name_or_path != hub and is_own_folder:
            hint = f"run `hf download {hub} --local-dir {name_or_path}`, or copy such a folder there"
            raise UserError(f"{what} '{name_or_path}' is not on this machine: {hint}") from error
        raise UserError(
            f"{what} '{name_or_path}' is not on this machine: run `hf download {name_or_path}` (it fills the cache in "
            f"HF_HOME; copy that to an offline machine), or give the path of a local folder with its files"
        ) from error


@contextmanager
def _without_reports() -> Iterator[None]:
    """Silence transformers' warnings inside the block."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


class TrainedTokenizer(nn.Module):
    """A WordPiece vocabulary (lower case), learned from captions by `fit` or read from `path`.

    vocab_size is fixed before training, so that the embedding has a known shape; unused rows stay empty. The vocabulary
    is a buffer of bytes, one row per token, and so part of the checkpoint; `save` also writes it as vocab.txt, the
    format of BERT tokenizers.
    """

    MAX_BYTES = 32  # of one token; longer words are spelled in pieces

    def __init__(self, max_length: Size = 77, vocab_size: Size = 4096, path: str | None = None) -> None:
        super().__init__()
        if max_length < 3:
            raise UserError(f"TrainedTokenizer: max_length is {max_length}; a word with its start and end needs 3")
        self.max_length = max_length
        self.vocab_size = vocab_size
        self.register_buffer("vocabulary", torch.zeros(vocab_size, self.MAX_BYTES, dtype=torch.uint8))
        self.register_load_state_dict_post_hook(lambda module, _: module._forget())
        self._warn = TruncationWarning(max_length)
        self._built: Any = None
        if path is not None:
            self.load(path)

    @property
    def is_fitted(self) -> bool:
        """Return whether there is a vocabulary."""
        return bool(self.vocabulary.any())

    def tokens(self) -> list[str]:
        """Return the vocabulary in the order of ids."""
        rows = (bytes(row).rstrip(b"\0").decode() for row in self.vocabulary.cpu().numpy())
        return [token for token in rows if token]

    def fit(self, captions: Iterable[str]) -> None:
        """Learn the vocabulary; equal captions give an equal one.

        UserError if they have no words, or if vocab_size is so small that more than one word in 50 cannot be spelled.
        """
        from tokenizers import models, trainers

        learner = _pipeline(models.WordPiece(unk_token=UNKNOWN))
        words = [
            word for caption in map(writable, captions) for word in learner.normalizer.normalize_str(caption).split()
        ]
        letters = _letters(words, self.vocab_size // 4)
        if not letters:
            raise UserError("TrainedTokenizer: the captions have no words; is the caption key of the data set right?")
        self._check_spelling(words, letters)
        # The trainer numbers letters inside words in the order of a hash map, and so breaks ties at random; given as
        # special tokens they have fixed numbers, and any word of known letters can be spelled.
        spelling = [form for letter in sorted(letters) for form in (letter, INSIDE + letter)]
        trainer = trainers.WordPieceTrainer(
            vocab_size=self.vocab_size, special_tokens=[*SPECIAL_TOKENS, *spelling], show_progress=False
        )
        learner.train_from_iterator((word for word in words if letters.issuperset(word)), trainer)
        ids = learner.get_vocab()
        tokens = [token for token in sorted(ids, key=ids.get) if len(token.encode()) <= self.MAX_BYTES]
        self._store(tokens, "the captions")

    def _check_spelling(self, words: list[str], letters: set[str]) -> None:
        lost = Counter(word for word in words if not letters.issuperset(word))
        if (share := lost.total() / len(words)) > 1 / 50:
            names, needed = ", ".join(word for word, _ in lost.most_common(3)), 4 * len(set("".join(words)))
            raise UserError(
                f"TrainedTokenizer: with vocab_size {self.vocab_size} {share:.0%} of the captions' words cannot be "
                f"spelled ({shown(names, 60)}); {needed} is enough for all their letters"
            )

    def save(self, folder: str | Path) -> None:
        """Write the vocabulary into a folder."""
        write_text(Path(folder) / VOCABULARY_FILE, "".join(f"{token}\n" for token in self.tokens()))

    def save_folder(self, folder: Path) -> None:
        """Write the tokenizer as transformers reads it, as one of BERT."""
        folder.mkdir(parents=True, exist_ok=True)
        self.save(folder)
        kinds = {"pad": PAD, "unk": UNKNOWN, "cls": START, "sep": END, "mask": UNKNOWN}  # there is no token for masks
        config = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": self.max_length}
        config |= {f"{kind}_token": token for kind, token in kinds.items()}
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")

    def load(self, path: str | Path) -> None:
        """Read the vocabulary from a file or a folder. UserError if it is missing or does not fit."""
        file = Path(path) / VOCABULARY_FILE if Path(path).is_dir() else Path(path)
        if not file.is_file():
            raise UserError(f"TrainedTokenizer: no vocabulary at {file}; give the vocab.txt of a training run")
        self._store([line for line in file.read_text(encoding="utf-8-sig").split("\n") if line], str(file))

    def forward(self, texts: Sequence[str]) -> Tensor:
        """Return ids int64 (B, max_length) on the CPU. UserError before the vocabulary is there."""
        if self._built is None:
            self._built = self._build()
        ids = torch.zeros(len(texts), self.max_length, dtype=torch.long)  # padding is token 0
        for row, text, encoded in zip(
            ids, texts, self._built.encode_batch([writable(text) for text in texts]), strict=True
        ):
            words, cut = encoded.ids[: self.max_length - 2], encoded.offsets[self.max_length - 2 :]
            if cut:
                self._warn(text, cut[0][0])
            framed = [SPECIAL_TOKENS.index(START), *words, SPECIAL_TOKENS.index(END)]
            row[: len(framed)] = torch.tensor(framed)
        return ids

    def _build(self) -> Any:
        if not self.is_fitted:
            raise UserError("TrainedTokenizer: no vocabulary yet; fit it to captions, give path, or load a checkpoint")
        from tokenizers import models

        return _pipeline(models.WordPiece({token: i for i, token in enumerate(self.tokens())}, unk_token=UNKNOWN))

    def _store(self, tokens: list[str], source: str) -> None:
        if len(tokens) > self.vocab_size:
            raise UserError(
                f"TrainedTokenizer: {source} need {len(tokens)} tokens, vocab_size is {self.vocab_size}; raise it"
            )
        if tuple(tokens[: len(SPECIAL_TOKENS)]) != SPECIAL_TOKENS:
            raise UserError(f"TrainedTokenizer: {source} must begin with {', '.join(SPECIAL_TOKENS)}")
        rows = torch.zeros(self.vocabulary.shape, dtype=torch.uint8)
        for row, token in zip(rows, tokens, strict=False):
            encoded = token.encode()
            if len(encoded) > self.MAX_BYTES:
                raise UserError(f"TrainedTokenizer: {source}: token '{token}' is longer than {self.MAX_BYTES} bytes")
            row[: len(encoded)] = torch.tensor(list(encoded), dtype=torch.uint8)
        self.vocabulary.copy_(rows)
        self._forget()

    def _forget(self) -> None:
        self._built = None


def _letters(words: list[str], limit: int) -> set[str]:
    """Return the most frequent characters."""
    counts = Counter("".join(words))
    return set(sorted(counts, key=lambda letter: (-counts[letter], letter))[:limit])


def _pipeline(model: Any) -> Any:
    """Return a tokenizer that splits lower-cased text at spaces and punctuation, and its words by `model`."""
    from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers

    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer
