"""The tokenizer runtime: text ↔ ids, chat templates, loss masks, streaming. Loads no torch."""

import functools
import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tokenizers

from soma.base.artefact import read_json
from soma.base.errors import UserError
from soma.model import chat, tokenizer_files
from soma.model.folder import local_folder

Messages = list[dict[str, Any]]
SPECIAL_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
UNSEEN = "\U0010ffff"  # a noncharacter before a name keeps it out of all text
BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")


class Tokenizer:
    """A tokenizer: what `tokenizer_files` reads, its special tokens and template.

    `encode` takes the names of special tokens in a text for these tokens, as transformers does. Documents and messages
    are data: `as_text` and the chat methods take the names in them for the characters that they are.
    """

    def __init__(
        self, inner: tokenizers.Tokenizer, special_tokens: dict[str, str] | None = None,
        chat_templates: dict[str, str] | None = None, eos_ids: tuple[int, ...] = (), content: bytes | None = None,
    ) -> None:  # fmt: skip
        self.inner = inner
        self.special_tokens = special_tokens or {}
        self.chat_templates = chat_templates or {}
        vocabulary = inner.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1  # rows an embedding needs; ids may have gaps
        self.bos_id = self._special_id("bos_token")
        self.pad_id = self._special_id("pad_token")
        own = self._special_id("eos_token")
        self.eos_ids: tuple[int, ...] = tuple(dict.fromkeys([*([] if own is None else [own]), *eos_ids]))
        self._special_ids = {id for id, token in inner.get_added_tokens_decoder().items() if token.special}
        self._special_texts = {token.content for token in inner.get_added_tokens_decoder().values()}
        self._special_names = any_of(
            token.content for token in inner.get_added_tokens_decoder().values() if token.special
        )
        self._byte_ids = {id for text, id in vocabulary.items() if BYTE_PIECE.fullmatch(text)}
        digest = hashlib.sha256(content if content is not None else inner.to_str().encode())
        for name, template in sorted(self.chat_templates.items()):
            digest.update(f"\0{name}\0{template}".encode())
        self.hash = digest.hexdigest()

    @classmethod
    def load(cls, ref: str | Path) -> "Tokenizer":
        """The tokenizer of a folder, `hf:…` or `registry:…`, or of one file (soma/model/tokenizer_files.py has the
        forms). UserError if there is none or it is broken.
        """
        place = Path(ref) if Path(ref).is_file() else local_folder(ref)
        directory = place.parent if place.is_file() else place
        settings = read_object(directory / "tokenizer_config.json")
        source = tokenizer_files.read(place, settings)
        inner, content = source.inner, source.content
        inner.no_padding()
        inner.no_truncation()
        special = source.special_tokens | read_special_tokens(directory, settings)
        add_declared_tokens(inner, settings)
        return cls(inner, special, read_templates(directory, settings), read_eos_ids(directory), content)

    def _special_id(self, role: str) -> int | None:
        text = self.special_tokens.get(role)
        return None if text is None else self.inner.token_to_id(text)

    @functools.cached_property
    def plain(self) -> tokenizers.Tokenizer:
        """`inner`, but blind to the names of special tokens.

        A unigram model knows these names as pieces too; there they are renamed to what no text holds.
        """
        content = self.inner.to_str()
        if isinstance(self.inner.model, tokenizers.models.Unigram):
            facts = json.loads(content)
            special = {token["content"] for token in facts["added_tokens"] if token["special"]}
            for piece in facts["model"]["vocab"]:
                piece[0] = UNSEEN + piece[0] if piece[0] in special else piece[0]
            for token in facts["added_tokens"]:
                token["content"] = UNSEEN + token["content"] if token["special"] else token["content"]
            content = json.dumps(facts)
        copy = tokenizers.Tokenizer.from_str(content)
        copy.encode_special_tokens = True
        return copy

    def encode(self, text: str, as_text: bool = False) -> list[int]:
        """Ids of a text; no special tokens are added. With `as_text` those named in it are characters."""
        return (self.plain if as_text else self.inner).encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str], as_text: bool = False) -> list[list[int]]:
        """Ids of many texts, on all cores that TOKENIZERS_PARALLELISM and RAYON_NUM_THREADS allow."""
        inner = self.plain if as_text else self.inner
        return [each.ids for each in inner.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: list[int], skip_special: bool = True) -> str:
        """Text of ids; bytes that are no UTF-8 become U+FFFD."""
        return self.inner.decode(ids, skip_special_tokens=skip_special)

    def token_text(self, id: int) -> str:
        """A token as the vocabulary spells it."""
        text = self.inner.id_to_token(id)
        return "" if text is None else text

    def stream_decoder(self, skip_special: bool = True) -> "StreamDecoder":
        """A decoder that is fed one id at a time."""
        return StreamDecoder(self, skip_special)

    @property
    def has_chat_template(self) -> bool:
        return bool(self.chat_templates)

    def chat_template(self, *, tools: bool = False) -> str:
        """The source of the template for conversations, or for those with tools. UserError if there is none."""
        if not self.chat_templates:
            raise UserError(
                "this model has no chat template: use plain completions, or add chat_template to tokenizer_config.json"
            )
        if tools and "tool_use" in self.chat_templates:
            return self.chat_templates["tool_use"]
        if "default" not in self.chat_templates:
            raise UserError(f"no default chat template among {', '.join(sorted(self.chat_templates))}")
        return self.chat_templates["default"]

    def render_chat(
        self, messages: Messages, add_generation_prompt: bool, tools: list[dict[str, Any]] | None = None
    ) -> str:
        """The conversation as text, by the chat template. UserError if there is none or it refuses the messages."""
        return chat.render(
            self.chat_template(tools=bool(tools)), messages, add_generation_prompt=add_generation_prompt, tools=tools,
            documents=None, **self.special_tokens,
        )[0]  # fmt: skip

    def encode_chat(
        self, messages: Messages, add_generation_prompt: bool, tools: list[dict[str, Any]] | None = None
    ) -> list[int]:
        """Ids of the rendered conversation. Special tokens come from the template, never from a message or a tool."""
        veiled, veil = chat.veil([*messages, *(tools or [])], self._special_names)
        shown = veiled[len(messages) :] or None
        return self._encode_veiled(self.render_chat(veiled[: len(messages)], add_generation_prompt, shown), veil)[0]

    def encode_chat_masked(
        self, messages: Messages, tools: list[dict[str, Any]] | None = None
    ) -> tuple[list[int], list[int]]:
        """Ids of a whole conversation, and a mask: 1 for tokens that the assistant wrote, its end-of-turn included.

        A token that reaches over an answer's border counts as the answer's. Raises UserError where the template
        leaves it open which text that is (see `chat.answer_spans`).
        """
        veiled, veil = chat.veil([*messages, *(tools or [])], self._special_names)
        text, spans = chat.answer_spans(
            self.chat_template(tools=bool(tools)), veiled[: len(messages)], self._special_texts,
            tools=veiled[len(messages) :] or None, documents=None, **self.special_tokens,
        )  # fmt: skip
        ids, offsets = self._encode_veiled(text, veil)
        mask = [0] * len(ids)
        spans = sorted(spans)
        current = 0
        for index, (start, end) in enumerate(offsets):
            while current < len(spans) and spans[current][1] <= start:
                current += 1
            if current < len(spans) and max(start, spans[current][0]) < min(end, spans[current][1]):
                mask[index] = 1
        return ids, mask

    def _encode_veiled(self, text: str, veil: str) -> tuple[list[int], list[chat.Span]]:
        """Ids of a rendered conversation and their spans in it, where a `veil` parts the special names that are data.

        Without a veil in the text these are the ids of the whole. With one, what lies between the template's special
        tokens is encoded piece by piece (a SentencePiece tokenizer may begin such a piece with a space of its own).
        """
        if veil not in text:
            encoding = self.inner.encode(text, add_special_tokens=False)
            return encoding.ids, encoding.offsets
        assert self._special_names is not None
        ids: list[int] = []
        offsets: list[chat.Span] = []
        position = 0
        for match in [*self._special_names.finditer(text), None]:
            start, end = match.span() if match else (len(text), len(text))
            kept = [index for index in range(position, start) if text[index] != veil]
            encoding = self.plain.encode("".join(text[index] for index in kept), add_special_tokens=False)
            ids += encoding.ids
            offsets += [(kept[a], kept[b - 1] + 1) if a < b else (position, position) for a, b in encoding.offsets]
            if match:
                id = self.inner.token_to_id(match[0])
                assert id is not None
                ids.append(id)
                offsets.append((start, end))
            position = end
        return ids, offsets

    @functools.cached_property
    def answer_end_ids(self) -> tuple[int, ...]:
        """`eos_ids`, then the special token with which the chat template ends an answer, where that is another."""
        if not self.has_chat_template:
            return self.eos_ids
        try:
            ids, mask = self.encode_chat_masked(
                [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}]
            )
        except UserError:  # the template has other ideas of a conversation
            return self.eos_ids
        last = [id for id, learned in zip(ids, mask, strict=True) if learned][-1:]
        return tuple(dict.fromkeys([*self.eos_ids, *(id for id in last if id in self._special_ids)]))


class StreamDecoder:
    """Text of a growing sequence of ids, in increments that end at whole characters.

    The increments joined are `decode` of all ids. Text is held back while it could still change: at the end of an
    unfinished UTF-8 sequence, and within a run of byte tokens (SentencePiece decodes such a run as a whole).
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True) -> None:
        self.tokenizer, self.skip_special = tokenizer, skip_special
        self.ids: list[int] = []
        self.context = 0  # ids from here to `sent` are decoded again, for the spaces that depend on a neighbour
        self.sent = 0

    def _pending(self) -> str:
        before = self.tokenizer.decode(self.ids[self.context : self.sent], self.skip_special)
        return self.tokenizer.decode(self.ids[self.context :], self.skip_special)[len(before) :]

    def push(self, id: int) -> str:
        """The new text that `id` completes, often empty."""
        if self.skip_special and id in self.tokenizer._special_ids:
            return ""
        self.ids.append(id)
        if id in self.tokenizer._byte_ids:
            return ""
        text = self._pending()
        if not text or text.endswith("\ufffd"):
            return ""
        self.context, self.sent = self.sent, len(self.ids)
        return text

    def flush(self) -> str:
        """What was held back; the stream is over."""
        text = self._pending()
        self.context, self.sent = self.sent, len(self.ids)
        return text


def any_of(names: Iterable[str]) -> re.Pattern[str] | None:
    """A pattern for any of the names, the longest first; None without names."""
    ordered = sorted((name for name in names if name), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered))) if ordered else None


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object from a file, empty if there is no file."""
    if not path.is_file():
        return {}
    value = read_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path}: a JSON object is expected")
    return value


def read_special_tokens(directory: Path, settings: dict[str, Any]) -> dict[str, str]:
    """bos_token, eos_token and the like, as text; tokenizer_config.json before special_tokens_map.json."""
    found: dict[str, str] = {}
    for source in (read_object(directory / "special_tokens_map.json"), settings):
        for role in SPECIAL_ROLES:
            value = source.get(role)
            text = value.get("content") if isinstance(value, dict) else value
            if isinstance(text, str):
                found[role] = text
    return found


def add_declared_tokens(inner: tokenizers.Tokenizer, settings: dict[str, Any]) -> None:
    """Make tokens known that only tokenizer_config.json declares (`added_tokens_decoder`), as transformers does."""
    declared = settings.get("added_tokens_decoder") or {}
    for _, token in sorted(declared.items(), key=lambda item: int(item[0])):
        if inner.token_to_id(token["content"]) is None:
            added = tokenizers.AddedToken(
                token["content"], single_word=token.get("single_word", False), lstrip=token.get("lstrip", False),
                rstrip=token.get("rstrip", False), normalized=token.get("normalized", True),
                special=token.get("special", False),
            )  # fmt: skip
            if added.special:
                inner.add_special_tokens([added])
            else:
                inner.add_tokens([added])


def read_templates(directory: Path, settings: dict[str, Any]) -> dict[str, str]:
    """Chat templates by name: `chat_template.jinja` before the tokenizer config's string or list."""
    value = settings.get("chat_template")
    templates = {}
    if isinstance(value, str):
        templates = {"default": value}
    elif isinstance(value, list):
        templates = {entry["name"]: entry["template"] for entry in value}
    if (directory / "chat_template.jinja").is_file():
        templates["default"] = (directory / "chat_template.jinja").read_text(encoding="utf-8")
    return templates


def read_eos_ids(directory: Path) -> tuple[int, ...]:
    """End ids that generation_config.json names (Llama 3 has several), else config.json."""
    for name in ("generation_config.json", "config.json"):
        value = read_object(directory / name).get("eos_token_id")
        if isinstance(value, int):
            return (value,)
        if isinstance(value, list):
            return tuple(value)
    return ()
