"""Tokenizer training: byte-level BPE over the training split, written as Hugging Face reads it.

Bytes per token on held-out files of the Python 3.11 standard library, vocabulary 4096, by the pattern that cuts text
before merging: gpt2 3.39, gpt4 3.36, `code` with the line end apart from the punctuation before it 3.44, as it is
3.57. In `code` a line end and the indentation after it are one piece (joined to closing punctuation: `):\\n        `),
and a word after indentation carries no space, so a prompt may end anywhere in the indentation of a line.
"""

from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from soma.base import progress
from soma.base.artefact import write_json
from soma.base.errors import UserError
from soma.data.config import TokenizerConfig
from soma.data.corpus import read_corpus

END_OF_TEXT, IM_START, IM_END, PAD = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"
SPECIALS = [END_OF_TEXT, IM_START, IM_END, PAD]

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
PATTERNS = {
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?NUMBERS| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "gpt4": CONTRACTIONS + r"[^\r\n\p{L}\p{N}]?\p{L}+|NUMBERS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "code": CONTRACTIONS
    + r"[^\r\n\p{L}\p{N}]?\p{L}+|NUMBERS| ?[^\s\p{L}\p{N}]+(?:[\r\n]+[ \t]*)?|[\r\n]+[ \t]*|\s+(?!\S)|\s+",
}
NUMBERS = {"single": r"\p{N}", "three": r"\p{N}{1,3}"}

# ChatML. The `generation` marks bound exactly what the assistant writes, its end-of-turn token included.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def train_tokenizer(config: TokenizerConfig, corpus: Path, out: Path) -> None:
    """Fill the directory `out` with `tokenizer.json`, `tokenizer_config.json` and `special_tokens_map.json`.

    The special tokens are ids 0 to 3: end of text (also beginning of text), the two ChatML marks, padding. The
    vocabulary is smaller than asked for where the corpus has no more pairs to merge. Raises UserError for a corpus
    without training text.
    """
    tokenizer = Tokenizer(models.BPE())
    pattern = Regex(PATTERNS[config.pattern].replace("NUMBERS", NUMBERS[config.digits]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(pattern, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size, min_frequency=config.min_frequency, show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIALS],
    )  # fmt: skip
    with progress.current().task("tokenizer", unit="bytes") as task:
        tokenizer.train_from_iterator(_texts(config, corpus, task), trainer)
    size = tokenizer.get_vocab_size()
    if size < config.vocab_size:
        progress.current().note(
            f"the corpus gives a vocabulary of {size} tokens, fewer than the {config.vocab_size} asked for"
        )
    tokenizer.save(str(out / "tokenizer.json"))
    _write_configs(out)


def _texts(config: TokenizerConfig, corpus: Path, task: progress.Task) -> Iterator[str]:
    total = 0
    for row in read_corpus(corpus, "train", ["text"]):
        size = len(row["text"].encode())
        if total and total + size > config.max_bytes:
            break
        total += size
        yield row["text"]
        task.advance(size)
    if not total:
        raise UserError(f"{corpus}: the training split is empty, a tokenizer cannot be trained on it")


def _write_configs(out: Path) -> None:
    named = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "pad_token": PAD}
    extra = {"additional_special_tokens": [IM_START, IM_END]}
    added = {
        str(index): {
            "content": token, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special":
            True,
        }
        for index, token in enumerate(SPECIALS)
    }  # fmt: skip
    write_json(
        out / "tokenizer_config.json",
        {
            **named, **extra, "added_tokens_decoder": added, "chat_template": CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False, "model_max_length": 1_000_000_000,
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    )  # fmt: skip
    write_json(out / "special_tokens_map.json", {**named, **extra})
