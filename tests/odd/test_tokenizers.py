"""Every kind of tokenizer on every odd text: the document is cut, shown and copied to the last byte."""

from __future__ import annotations

import asyncio
import random
import re
import unicodedata

import pytest
from odd_texts import TEXTS, tokenizer_folders

from megatron_rlpt.config import DataConfig, RewriterConfig
from megatron_rlpt.data import Cutter, Document
from megatron_rlpt.teacher.generator import Reply
from megatron_rlpt.teacher.rewriter import Rewriter
from megatron_rlpt.tokens.control_tokens import break_up_common
from megatron_rlpt.tokens.tokenizer import PolicyTokenizer, prefix_text
from megatron_rlpt.types import Candidate, Failed

KINDS = ("smollm2", "sentencepiece", "llama 2", "mistral", "qwen", "tekken")
LENGTH = 12


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory, smollm2):
    folders = tokenizer_folders(tmp_path_factory.mktemp("tokenizers"), smollm2)
    assert set(folders) == set(KINDS)
    return {kind: PolicyTokenizer(folder) for kind, folder in folders.items()}


@pytest.fixture(params=KINDS)
def tokenizer(request, tokenizers):
    return tokenizers[request.param]


def episodes(tokenizer, text, max_prefix=30, control_tokens=False):
    """Return episodes at many character boundaries, not only where one suffix ends and the next begins."""
    found = []
    for start in range(0, LENGTH, 5):
        config = DataConfig(suffix_length=LENGTH, min_prefix=1 + start, max_prefix=max_prefix)
        cutter = Cutter(config, tokenizer.encode, starts_character=tokenizer.starts_character)
        tokens = cutter.tokenize(Document("document", text), control_tokens)
        found += [cutter.cut("corpus", "document", tokens, offset) for offset in cutter.offsets(tokens)]
    assert all(LENGTH - 3 <= len(one.suffix) <= LENGTH for one in found)
    return found


def test_a_document_is_read_back_whole(tokenizer, subtests):
    for name in TEXTS:
        with subtests.test(text=name):
            text = TEXTS[name]
            tokens = tokenizer.encode(text)
            # SentencePiece reads a text with and without a leading space alike; Qwen normalizes to NFC.
            assert tokenizer.text_of(tokens) in (text, text.removeprefix(" "), unicodedata.normalize("NFC", text))
            assert not tokenizer.control_in(tokens)


def test_prefix_and_suffix_are_a_piece_of_the_document(tokenizer, subtests):
    for name in TEXTS:
        with subtests.test(text=name):
            whole = tokenizer.text_of(tokenizer.encode(TEXTS[name]))
            cut = episodes(tokenizer, TEXTS[name])
            assert cut
            for one in cut:
                shown = prefix_text(tokenizer, one) + tokenizer.text_of(one.suffix, one.prefix)
                assert shown in whole, one.offset
                assert "\ufffd" in TEXTS[name] or "\ufffd" not in shown


async def ask_copyist(request, begin_again=False, strip=False, more=""):
    """A teacher that copies the passage as a server shows it, with control tokens split up."""
    content = break_up_common(request.prompt[0].content)
    passage = re.search(r"\[begin passage \w+\]\n(.*)\n\[end passage", content, re.DOTALL)[1] + more
    # If the answer starts inside a control token, the passage has a space there that the start lacks.
    said = 0 if begin_again else len("".join(break_up_common(request.answer_start).split()))
    start = 0
    while said:
        said -= not passage[start].isspace()
        start += 1
    return Reply(passage[start:].strip() if strip else passage[start:], (), "stop")


def rewrites(tokenizer, episodes, ask):
    rewriter = Rewriter(tokenizer, RewriterConfig(), LENGTH, seed=1, longest_answer=1000)

    async def all_of_them():
        return [await rewriter.rewrite_one(one, ask) for one in episodes]

    return zip(episodes, asyncio.run(all_of_them()), strict=True)


def test_a_word_for_word_copy_has_the_suffixs_own_tokens(tokenizer, subtests):
    for name in TEXTS:
        with subtests.test(text=name):
            for one, rewrite in rewrites(tokenizer, episodes(tokenizer, TEXTS[name]), ask_copyist):
                if tokenizer.is_blank(one.suffix):
                    assert isinstance(rewrite, Failed)
                    continue
                assert isinstance(rewrite, Candidate), (rewrite, tokenizer.text_of(one.suffix, one.prefix))
                assert rewrite.tokens == one.suffix, (rewrite, tokenizer.text_of(one.suffix, one.prefix))


@pytest.mark.parametrize("way", [{"begin_again": True}, {"strip": True}, {"more": " And more of it."}])
def test_copies_by_teachers_with_habits(tokenizer, way):

    async def ask(request):
        return await ask_copyist(request, **way)

    for name in ("chinese", "thai", "english", "emoji", "control tokens"):
        for one, rewrite in rewrites(tokenizer, episodes(tokenizer, TEXTS[name])[::3], ask):
            assert isinstance(rewrite, Candidate)
            assert rewrite.tokens == one.suffix, (name, one.offset)


def test_tokens_of_a_continuation_read_back_as_it(tokenizer, subtests):
    """Any text of a teacher, not only copies, becomes tokens of that text without control tokens."""
    for name in TEXTS:
        with subtests.test(text=name):
            text = unicodedata.normalize("NFC", TEXTS[name])
            tokens = tokenizer.encode(TEXTS["english"])
            for count in (5, 9, 14):
                for start in (0, 1, 7):
                    written = tokenizer.continue_with(tokens[:count], text[start:])
                    assert tokenizer.text_of(written, tokens[:count]) == text[start:]
                    assert not tokenizer.control_in(written)


def test_the_rest_of_a_document_continues_it_with_its_own_tokens(tokenizer, subtests):
    """Tokens of a continuation depend on the preceding text, such as blank lines with Qwen."""
    for name in ["blank lines", "spaces", "thai"]:
        with subtests.test(text=name):
            tokens = tokenizer.encode(TEXTS[name])
            for place in range(1, len(tokens)):
                if tokenizer.starts_character(tokens[place]):
                    rest = tokenizer.text_of(tokens[place:], tokens[:place])
                    assert tokenizer.continue_with(tokens[:place], rest) == tokens[place:]
                    begin = max(0, place - 6)  # a prefix may begin anywhere
                    assert tokenizer.continue_with(tokens[begin:place], rest) == tokens[place:]


def test_what_a_policy_breaks_off_in_mid_character_is_left_out(tokenizer):
    tokens = tokenizer.encode("so 龘靐𠮷👨‍👩‍👧")
    for count in range(2, len(tokens) + 1):
        part = tokens[:count]
        text = tokenizer.text_of(part)
        assert "so 龘靐𠮷👨‍👩‍👧".startswith(text)
        whole = tokenizer.whole_characters(part)
        assert (whole == count) == (count == len(tokens) or tokenizer.starts_character(tokens[count]))
    assert tokenizer.whole_characters(tokens) == len(tokens)


def test_bytes_that_are_no_text_are_spelled(tokenizer):
    """An untrained policy samples them; the text contains no U+FFFD."""
    character = tokenizer.encode("a龘")[-1]
    assert not tokenizer.starts_character(character), "the character has several tokens in every vocabulary"
    text = tokenizer.text_of([*tokenizer.encode("so"), character, *tokenizer.continue_with([], " it goes")])
    assert re.fullmatch(r"so(<0x[0-9A-F]{2}>)+ it goes", text)
    assert tokenizer.is_blank([character])


def test_a_corpus_that_means_its_control_tokens_has_them(tokenizer):
    spelling = next(token for token in tokenizer.control_tokens if token in ("<|im_end|>", "</s>"))
    text = f"What is it?{spelling}\nIt is good{spelling}\n" * 6
    (meant,) = set(tokenizer.control_in(tokenizer.encode(text, True)))
    assert tokenizer.control_in([meant]) == {meant: spelling}
    assert not tokenizer.control_in(tokenizer.encode(text))
    for one, rewrite in rewrites(tokenizer, episodes(tokenizer, text, control_tokens=True), ask_copyist):
        shown = tokenizer.text_of(one.suffix, one.prefix)
        assert shown.count(spelling) == one.suffix.count(meant)
        assert rewrite.tokens == one.suffix


def test_a_reply_full_of_control_tokens_that_are_meant_has_them_all(tokenizer):
    spelling = next(token for token in tokenizer.control_tokens if token in ("<|im_end|>", "</s>"))
    (meant,) = tokenizer.encode(spelling, True)
    written = tokenizer.continue_with(tokenizer.encode("so"), f"{spelling}it goes" * 1500, [meant])
    assert written.count(meant) == 1500
    assert tokenizer.text_of(written, tokenizer.encode("so")) == f"{spelling}it goes" * 1500


def test_what_shows_nothing_is_blank(tokenizer):
    spaces = tokenizer.encode(" \n\t\u00a0\u3000\u200b\ufeff\x00\x1b")
    ends = [token for token in range(tokenizer.size) if tokenizer.control_in([token])][:5]
    assert all(tokenizer.is_blank(tokens) for tokens in ([], spaces, ends, spaces + ends))
    assert not tokenizer.is_blank([*spaces, *tokenizer.encode("."), *ends])


MARKS = ["\u0323\u0308", "\u0301", "\u0308x", "\u11a8", "\u1161 ok", "\u093c", " \u0323", "\u0338=", "e\u0301"]


@pytest.mark.parametrize("before", ["k", "hell", "nai\u0308", "\uac00\ub098\ub2e4", "\u1100", "\u0915", "x =", "a"])
def test_a_mark_that_belongs_to_the_character_before_is_not_lost(tokenizers, before, subtests):
    """A normalizer merges both, so that the boundary between prefix and suffix disappears."""
    tokenizer = tokenizers["qwen"]
    prefix = tokenizer.encode(before)
    for text in MARKS:
        with subtests.test(text=text):
            whole = tokenizer.text_of([*prefix, *tokenizer.continue_with(prefix, text)])
            assert unicodedata.normalize("NFC", whole) == unicodedata.normalize("NFC", before + text)
            assert "<0x" not in whole


def built(folder, model, normalizer):
    """Build a tokenizer of a few words; most others are unknown to it."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    known = {"vocab_size": 120, "special_tokens": ["<unk>"], "show_progress": False}
    if model == "wordpiece":
        tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(limit_alphabet=20, **known)
    else:
        tokenizer = Tokenizer({
            "bpe": models.BPE(unk_token="<unk>"),
            "fused bpe": models.BPE(unk_token="<unk>", fuse_unk=True),
            "bpe without unknown": models.BPE(),
            "unigram": models.Unigram(),
        }[model])  # fmt: skip
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        if model == "unigram":
            trainer = trainers.UnigramTrainer(unk_token="<unk>", **known)
        else:
            trainer = trainers.BpeTrainer(limit_alphabet=20, **known)
    if normalizer != "none":
        tokenizer.normalizer = getattr(normalizers, normalizer)()
    tokenizer.train_from_iterator(["the cat sat on the mat and hello kk hell cafe\u0301"] * 20, trainer)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>"}'
    )
    return PolicyTokenizer(folder)


@pytest.mark.parametrize("normalizer", ["none", "NFC", "NFKD", "Strip", "BertNormalizer"])
@pytest.mark.parametrize("model", ["bpe", "fused bpe", "bpe without unknown", "unigram", "wordpiece"])
def test_words_that_a_vocabulary_does_not_have_neither_end_a_run_nor_swallow_what_follows(tmp_path, model, normalizer):
    tokenizer = built(tmp_path / "tokenizer", model, normalizer)
    draw = random.Random(0)
    parts = [
        "the cat",
        "hell",
        " sat",
        "\u0323",
        "k",
        "\u65e5\u672c",
        " zebra",
        "<unk>",
        "  ",
        " mat",
        "\u0301",
        "Q",
        "ﬁ",
        "\n",
    ]
    for _ in range(300):
        prefix = tokenizer.encode("".join(draw.choices(parts, k=draw.randrange(1, 7))))
        prefix = prefix[: draw.randrange(len(prefix) + 1)]
        text = "".join(draw.choices(parts, k=draw.randrange(1, 4))) + " cat"
        tokens = tokenizer.continue_with(prefix, text)
        assert tokenizer.text_of([*prefix, *tokens]).endswith("cat")
        assert len(tokenizer.text_of(tokens, prefix or [0]).strip()) >= len("cat")
