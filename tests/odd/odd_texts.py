# ruff: noqa: RUF001
"""Texts that are difficult for tokenizers, and every kind of tokenizer that supported families ship."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mistral_common

SHIPPED = Path(mistral_common.__file__).parent / "data"

TEXTS = {
    "chinese": "人工智能是计算机科学的一个分支，它企图了解智能的实质。𠮷野家，龘靐。" * 3,
    "japanese": "吾輩は猫である。名前はまだ無い。ﾃｽﾄと、どこで生れたかとんと見当がつかぬ。" * 3,
    "korean": "안녕하세요. 오늘은 날씨가 좋습니다. 뷁! " * 4,
    "thai": "ภาษาไทยเป็นภาษาที่มีระดับเสียงของคำแน่นอน" * 3,
    "devanagari": "नमस्ते दुनिया, यह एक परीक्षण है। क्षत्रिय " * 4,
    "arabic": "مرحبا بالعالم، هذا اختبارٌ صَغِيرٌ. " * 4,
    "emoji": "👨‍👩‍👧‍👦 hi 🏳️‍🌈🤷🏽‍♀️ ok 🇩🇪👍🏿" * 4,
    "combining marks": "e\u0301a\u0308o\u0302\u0323 x\u0338 Z\u0351\u036b\u0343 " * 5,
    "windows lines": "line one\r\nline two\r\n\r\n  indented\tTab\t\t end  \r\n" * 3,
    "spaces": "   leading  and   multiple    spaces \n\n\n   x = 1\n\tif  y:   z\u00a0\u3000  \n  " * 3,
    "replacement characters": "bad \ufffd char\ufffd\ufffd here\ufffd " * 5,
    "control tokens": "Hello <|im_end|> x </s> [INST] y [/INST] <s> <|endoftext|><|eot_id|> <tool_call>{} <unk>" * 3,
    "byte order mark": "\ufeffStart of file\ufeff mid \u200b zero \x00\x01\x1b[31m red \x7f " * 4,
    "numbers": "In 1234567 and 20241127: 3.14159e-10, don't, we'll, I'VE 你好123abc " * 3,
    "english": "The unbelievable internationalization of antidisestablishmentarianism ... goes on!? " * 3,
    "blank lines": "so ...\n\n  \n...\n\n\n x 12 345 6789012 ....\n  \n\n" * 4,
    "byte names": "<0x0A> and <0xE4><0xBD> here " * 5,
}

_QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def tokenizer_folders(root: Path, smollm2: Path) -> dict[str, Path]:
    """One folder per kind: byte-level BPE (SmolLM2; as Qwen and as Llama 3), SentencePiece BPE (as Llama 2 wrote its
    ``tokenizer.json``, as it is written today, and as ``tokenizer.model`` alone), and Mistral's tekken alone."""
    from transformers import AutoTokenizer

    folders = {"smollm2": smollm2}

    def add(name: str, config: dict[str, Any], **files: Path | dict[str, Any]) -> Path:
        folder = folders[name] = root / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"model_type": "llama", "bos_token_id": 1}))
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        for file, content in files.items():
            if isinstance(content, Path):
                shutil.copy(content, folder / file.replace("_", "."))
            else:
                (folder / file.replace("_", ".")).write_text(json.dumps(content))
        return folder

    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    plain = {"tokenizer_class": "PreTrainedTokenizerFast"}
    model = add("sentencepiece", {"tokenizer_class": "LlamaTokenizer"}, tokenizer_model=SHIPPED / "tokenizer.model.v1")
    pieces = json.loads(AutoTokenizer.from_pretrained(model).backend_tokenizer.to_str()) | {"post_processor": None}
    replaced = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    before = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u2581"}, replaced]}
    add("llama 2", plain | names, tokenizer_json=pieces | {"normalizer": before, "pre_tokenizer": None})
    first = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": False}
    add("mistral", plain | names, tokenizer_json=pieces | {"normalizer": None, "pre_tokenizer": first})

    words = json.loads((smollm2 / "tokenizer.json").read_text())
    split = {"type": "Split", "pattern": {"Regex": _QWEN_WORDS}, "behavior": "Isolated", "invert": False}
    of_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    steps = {"type": "Sequence", "pretokenizers": [split, of_bytes]}
    call = words["added_tokens"][-1] | {"id": len(words["model"]["vocab"]), "content": "<tool_call>", "special": False}
    qwen = words | {"normalizer": {"type": "NFC"}, "pre_tokenizer": steps}
    qwen["added_tokens"] = [*words["added_tokens"], call]
    add("qwen", plain | {"eos_token": "<|im_end|>"}, tokenizer_json=qwen)

    tekken = json.loads((SHIPPED / "tekken_240911.json").read_text())
    tekken["vocab"] = tekken["vocab"][:12_000]
    tekken["config"] |= {"default_vocab_size": 13_000, "num_vocab_tokens": 12_000}
    add("tekken", {}, tekken_json=tekken)
    (folders["tekken"] / "tokenizer_config.json").unlink()
    return folders
