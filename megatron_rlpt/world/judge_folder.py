"""The folder that ``rlpt init`` makes a judge or a rewriter of: a tokenizer with a chat template, and a small Llama.

The tokenizer takes any text, byte by byte (BPE), as those of real teachers do; words of the world, of the brief prompts
and of the answers are single tokens. Codes of markers stay single letters.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from megatron_rlpt.config import AnswerForm, PromptLength
from megatron_rlpt.teacher.prompts import VERSIONS, build_prompt
from megatron_rlpt.teacher.verdicts.parsing import COMPARISON, FACTUALITY, SAFETY
from megatron_rlpt.world.corruptions import Corruption
from megatron_rlpt.world.policy_folder import Shape, llama_config, write_json

END, USER, ASSISTANT = "<|end|>", "<|user|>", "<|assistant|>"
JUDGE_SHAPE = Shape(layers=6, hidden=192, head_size=32, context=4096)
"""Its context is the default of ``teacher.max_context``; brief prompts about whole documents take up to 300 tokens."""
MOST_TOKENS = 2048
SAMPLE = 4000
"""Documents that the tokenizer is trained on, at most: enough for all words of some hundred entities."""
_TEMPLATE = (
    "{% for message in messages %}"
    f"{{% if message['role'] == 'user' %}}{USER}{{{{ message['content'] }}}}"
    f"{{% elif message['role'] == 'assistant' %}}{ASSISTANT}{{{{ message['content'] }}}}{END}"
    "{% else %}{{ raise_exception('this model knows the roles user and assistant only') }}{% endif %}"
    "{% endfor %}"
    f"{{% if add_generation_prompt %}}{ASSISTANT}{{% endif %}}"
)
_TEXTS = ("prefix", "first", "second", "reference", "text", "passage")


def write_judge_folder(folder: Path, vocabulary: Sequence[str], documents: Iterable[str], shape: Shape) -> int:
    """Write ``tokenizer.json``, ``tokenizer_config.json`` and ``config.json`` into a new folder.

    Args:
        folder: to create.
        vocabulary: every word of the world.
        documents: texts to train the tokenizer on; equal ones give equal files.
        shape: of the model.

    Returns:
        The number of tokens.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=MOST_TOKENS,
        min_frequency=2,
        show_progress=False,
        special_tokens=[AddedToken(token, special=True) for token in (END, USER, ASSISTANT)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(_texts(vocabulary, documents), trainer)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(
        folder / "tokenizer_config.json",
        {
            "eos_token": END,
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": shape.context,
            "chat_template": _TEMPLATE,
        },
    )
    tokens, end = tokenizer.get_vocab_size(), tokenizer.token_to_id(END)
    assert end is not None
    write_json(folder / "config.json", llama_config(shape, tokens, bos=None, eos=end))
    return tokens


def _texts(vocabulary: Sequence[str], documents: Iterable[str]) -> Iterator[str]:
    """Yield what the tokenizer is trained on: words alone, twice, so that rare ones become tokens too."""
    yield from documents
    spoken = [f" {word}" for word in vocabulary if word not in ".,"]
    yield from spoken + spoken
    yield from [*_frames(), *_answers()] * len(Corruption)


def _frames() -> Iterator[str]:
    """Yield all brief prompts without texts and without codes, whose pairs of letters would become tokens."""
    for name in VERSIONS[PromptLength.brief]:
        if name == "continue_in_parts":
            continue  # all its words are in the others, and tokenizers stay what they were
        for form in AnswerForm:
            prompt = build_prompt(name, 0, form, PromptLength.brief, **dict.fromkeys(_TEXTS, ""))
            yield prompt.text.replace(prompt.fence, "")


def _answers() -> Iterator[str]:
    """Yield every verdict as a word and as an object with a reason, and the tags of a thought."""
    yield "<think> </think> "
    for verdict in {**COMPARISON, **SAFETY, **FACTUALITY}:
        yield verdict
        for kind in Corruption:
            yield json.dumps({"reasoning": f"1 is {kind.value}. 2 is {kind.value}.", "verdict": verdict})
