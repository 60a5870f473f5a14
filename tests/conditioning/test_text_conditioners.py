"""Tokenizers and the text models that use them."""

import io
import logging
import shutil
from pathlib import Path

import pytest
import torch

from ldm.conditioning.text import CLIPTextConditioner, TextConditioner, TokenConditioner
from ldm.conditioning.tokenizers import HuggingFaceTokenizer, TrainedTokenizer, load_pretrained
from ldm.errors import UserError

CAPTIONS = ["a red circle above a blue square", "Two green triangles, and a red square"]


@pytest.fixture
def tokenizer() -> TrainedTokenizer:
    tokenizer = TrainedTokenizer(max_length=12, vocab_size=200)
    tokenizer.fit(CAPTIONS)
    return tokenizer


def decode(tokenizer: TrainedTokenizer, text: str) -> list[str]:
    tokens = tokenizer.tokens()
    return [tokens[i] for i in tokenizer([text])[0]]


def test_words_of_the_captions_are_one_token_each(tokenizer):
    expected = ["[CLS]", "two", "red", "circle", ",", "[SEP]"] + ["[PAD]"] * 6
    assert decode(tokenizer, "Two RED circle,") == expected


def test_new_words_are_spelled_and_foreign_letters_unknown(tokenizer):
    assert decode(tokenizer, "rect")[:6] == ["[CLS]", "r", "##e", "##c", "##t", "[SEP]"]
    assert decode(tokenizer, "火")[1] == "[UNK]"


def test_empty_text_is_start_and_end(tokenizer):
    assert tokenizer([""]).tolist() == [[2, 3] + [0] * 10]
    assert tokenizer([]).shape == (0, 12)


def test_fitting_is_deterministic(tokenizer):
    again = TrainedTokenizer(max_length=12, vocab_size=200)
    again.fit(iter(CAPTIONS))
    assert again.tokens() == tokenizer.tokens()


def test_vocabulary_survives_a_folder(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    again = TrainedTokenizer(max_length=12, vocab_size=200, path=str(tmp_path))
    assert torch.equal(again(CAPTIONS), tokenizer(CAPTIONS))


def test_vocabulary_survives_in_the_state_dict_alone(tokenizer):
    trained, fresh = (
        TextConditioner(which, 16, 1) for which in (tokenizer, TrainedTokenizer(max_length=12, vocab_size=200))
    )
    with pytest.raises(UserError, match="no vocabulary yet"):
        fresh({"caption": CAPTIONS})
    fresh.load_state_dict(trained.state_dict())
    torch.testing.assert_close(fresh({"caption": CAPTIONS}).context, trained({"caption": CAPTIONS}).context)
    assert "tokenizer.vocabulary" in trained.state_dict()


def test_long_texts_are_cut_with_one_warning(tokenizer, caplog):
    long = "a red circle a red circle a red circle a blue square"
    with caplog.at_level(logging.WARNING):
        ids = tokenizer([long, long])
    assert ids.shape == (2, 12) and ids[0, -1] == 3
    assert [record.getMessage() for record in caplog.records] == [
        "the text is longer than 12 tokens and was cut; without effect: 'blue square' (further texts are cut silently)"
    ]


def test_tokenizer_mistakes_are_told(tokenizer, tmp_path):
    small = TrainedTokenizer(max_length=12, vocab_size=5)
    with pytest.raises(UserError, match="vocab_size is 5"):
        small.load(_saved(tokenizer, tmp_path))
    with pytest.raises(UserError, match="no words"):
        TrainedTokenizer().fit(["", " "])
    with pytest.raises(UserError, match="no vocabulary at"):
        TrainedTokenizer(path=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="max_length is 2"):
        TrainedTokenizer(max_length=2)
    (tmp_path / "vocab.txt").write_text("a\nb\n")
    with pytest.raises(UserError, match="must begin with"):
        TrainedTokenizer(path=str(tmp_path))


def _saved(tokenizer, folder):
    tokenizer.save(folder)
    return folder


def test_vocabulary_never_exceeds_its_table():
    tokenizer = TrainedTokenizer(vocab_size=104)
    tokenizer.fit("".join(chr(97 + (i * k) % 26) for k in range(9)) for i in range(200))
    assert len(tokenizer.tokens()) <= 104 and tokenizer(["abc"]).max() < 104


def test_a_vocabulary_in_which_words_are_unknown_is_refused_with_the_size_that_is_enough():
    captions = ["a red triangle above a black square", "a yellow circle below a green circle"]
    with pytest.raises(UserError, match=r"vocab_size 32 .*\(.*red.*\); ([0-9]+) is enough") as error:
        TrainedTokenizer(vocab_size=32).fit(captions)
    enough = TrainedTokenizer(vocab_size=int(str(error.value).rpartition("; ")[2].split()[0]))
    enough.fit(captions)
    assert not (enough(captions) == enough.tokens().index("[UNK]")).any()


def test_bert_frames_pads_and_cuts_as_published(bert_folder, caplog):
    tokenizer = HuggingFaceTokenizer(str(bert_folder), max_length=6, vocab_size=20)
    assert tokenizer(["A red square", ""]).tolist() == [[2, 5, 6, 9, 3, 0], [2, 3, 0, 0, 0, 0]]
    with caplog.at_level(logging.WARNING):
        ids = tokenizer(["a", "a red square two green triangles", "a a a a a a a"])
    assert ids.tolist() == [[2, 5, 3, 0, 0, 0], [2, 5, 6, 9, 10, 3], [2, 5, 5, 5, 5, 3]]
    (message,) = [record.getMessage() for record in caplog.records]
    assert "longer than 6 tokens" in message and "'green triangles'" in message


def test_absent_tokenizer_says_what_to_fetch(tmp_path):
    absent = HuggingFaceTokenizer("someone/no-such-tokenizer")
    with pytest.raises(UserError, match="someone/no-such-tokenizer.*HF_HOME") as caught:
        absent(["a"])
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="the folder lacks files"):
        HuggingFaceTokenizer(str(tmp_path))(["a"])


def test_tokenizer_larger_than_the_table_is_refused(bert_folder):
    with pytest.raises(UserError, match="13 .*10"):
        HuggingFaceTokenizer(str(bert_folder), vocab_size=10)(["a"])


def test_text_is_the_transformer_on_its_tokens(bert_folder):
    conditioner = TextConditioner(HuggingFaceTokenizer(str(bert_folder), 6, 20), 16, 1).eval()
    ids = conditioner.tokenizer(CAPTIONS)
    torch.testing.assert_close(conditioner({"caption": CAPTIONS}).context, conditioner.transformer(ids))
    torch.testing.assert_close(conditioner({"caption": ids}).context, conditioner.transformer(ids))
    assert all(name.startswith("transformer.") for name in conditioner.state_dict())


def test_dropped_ids_are_the_empty_text(tokenizer):
    conditioner = TextConditioner(tokenizer, 16, 1).eval()
    drop = torch.tensor([True, False])
    by_ids = conditioner({"caption": tokenizer(CAPTIONS)}, drop).context
    torch.testing.assert_close(by_ids, conditioner({"caption": CAPTIONS}, drop).context)
    torch.testing.assert_close(by_ids[:1], conditioner.unconditional(1).context)


def test_text_table_smaller_than_the_tokenizer_is_refused(tokenizer):
    with pytest.raises(UserError, match="12 .*200"):
        TextConditioner(tokenizer, 16, 1, max_length=8)


def test_null_tokens_must_exist():
    with pytest.raises(UserError, match="4 .*0 to 9"):
        TokenConditioner(10, 4, 16, 1, null_tokens=[10])
    conditioner = TokenConditioner(10, 4, 16, 1, null_tokens=[7]).eval()
    expected = conditioner.transformer(torch.tensor([[7, 0, 0, 0]]))
    torch.testing.assert_close(conditioner.unconditional(1).context, expected)


def test_clip_reads_its_folder_at_first_use(clip_folder):
    from transformers import CLIPTextModel

    conditioner = CLIPTextConditioner(str(clip_folder), 8)
    expected = CLIPTextModel.from_pretrained(clip_folder)(conditioner.tokenizer(CAPTIONS)).last_hidden_state
    torch.testing.assert_close(conditioner({"caption": CAPTIONS}).context, expected)
    assert expected.shape == (2, 8, 16)


def test_clip_takes_published_names_and_the_old_constant(clip_folder):
    trained = CLIPTextConditioner(str(clip_folder), 8)
    trained.load_weights()
    state = {name: tensor + 1 for name, tensor in trained.state_dict().items()}
    assert all(name.startswith("transformer.text_model.") for name in state)
    state["transformer.text_model.embeddings.position_ids"] = torch.arange(8)[None]
    fresh = CLIPTextConditioner(str(clip_folder), 8)
    fresh.load_state_dict(state, strict=True)
    fresh({"caption": CAPTIONS})
    for name, tensor in fresh.state_dict().items():
        torch.testing.assert_close(tensor, state[name])


def test_clip_that_is_absent_says_what_to_fetch():
    with pytest.raises(UserError, match="someone/no-such-clip"):
        CLIPTextConditioner("someone/no-such-clip")


def test_the_warning_names_whole_words(tokenizer, caplog):
    with caplog.at_level(logging.WARNING):
        tokenizer(["a red circle a red circle a red elbat square"])
    assert "'elbat square'" in caplog.text


class Harmful:
    def __reduce__(self):
        return (print, ("this must not run",))


def pickled(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("model.safetensors", b""),
        ("model.safetensors", bytes(range(256)) * 9),
        ("pytorch_model.bin", b"junk"),
        ("pytorch_model.bin", pickled({"a": Harmful()})),
        ("pytorch_model.bin", pickled({"a": torch.ones(1)})),
        ("config.json", b"{"),
        ("config.json", b"[]"),
    ],
)
def test_a_folder_with_other_files_is_refused_in_one_line(clip_folder, tmp_path, capsys, name, content):
    folder = Path(shutil.copytree(clip_folder, tmp_path / "clip"))
    if name == "pytorch_model.bin":
        (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_pretrained("CLIPTextModel", str(folder), "text model")
    message = str(caught.value)
    assert str(folder) in message and message.isprintable() and "weights_only" not in message
    assert "must not run" not in capsys.readouterr().out
