"""Structured output: what an answer must look like, and which tokens that allows next. Loads no torch.

The grammar engine is llguidance (Earley over the bytes of tokens, Microsoft Research). A grammar is compiled once per
tokenizer; each request goes on from a copy. The front compiles too, so that an impossible grammar is refused there.
"""

import json
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, grammar_from

from soma.engine.errors import RequestError

KEPT = 64  # compiled grammars
LONGEST = 1 << 20  # characters of a grammar
# Between the parts of JSON: nothing, a space, or a new line and its indentation. Free white space has no end, and
# some models, once in it, do not find out.
WHITE_SPACE = r"[ ]|\n[ ]{0,40}"


@dataclass(frozen=True)
class Guided:
    """What an answer must be: `json_schema`, `regex`, `grammar` or `choice` make one.

    `param` is the field of the request that asked for it, for error messages; it does not count in comparisons.
    """

    kind: str
    text: str
    param: str = field(default="guided", compare=False)

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | str) -> "Guided":
        """JSON that a schema describes, as far as llguidance knows the schema's keywords; it refuses others."""
        return cls("json", schema if isinstance(schema, str) else json.dumps(schema, ensure_ascii=False))

    @classmethod
    def regex(cls, pattern: str) -> "Guided":
        """A text that the whole pattern matches: syntax of Rust's regex crate, no look-around."""
        return cls("regex", pattern)

    @classmethod
    def grammar(cls, text: str) -> "Guided":
        """A grammar in Lark's syntax (llguidance's docs/syntax.md), or in GBNF (`::=`)."""
        return cls("grammar", text)

    @classmethod
    def choice(cls, texts: Sequence[str]) -> "Guided":
        """One of several texts."""
        return cls("choice", json.dumps(list(texts), ensure_ascii=False))

    def named(self, param: str) -> "Guided":
        """The same, asked for by the field `param`."""
        return replace(self, param=param)

    def compiled(self) -> str:
        """llguidance's form of it. Raises ValueError."""
        if self.kind == "choice" and not json.loads(self.text):
            raise ValueError("there is nothing to choose from")
        if self.kind != "json":
            return grammar_from(self.kind, self.text)  # type: ignore[arg-type]
        return LLMatcher.grammar_from_json_schema(self.text, defaults={"whitespace_pattern": WHITE_SPACE})


class Guide:
    """Where one request is in its grammar."""

    def __init__(self, matcher: LLMatcher) -> None:
        self.matcher = matcher

    def allowed(self, words: np.ndarray, ahead: Sequence[int] = ()) -> None:
        """Fill int32 `words` with one bit per token: those that may come after the tokens `ahead`.

        Where the grammar does not allow `ahead` itself nothing is forbidden: such a row is of no use to anybody.
        """
        taken = self.matcher.try_consume_tokens(list(ahead)) if ahead else 0
        if taken == len(ahead):
            self.matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        else:
            words.fill(-1)
        if taken:
            self.matcher.rollback(taken)
        if self.matcher.is_error():
            raise RuntimeError(self.matcher.get_error())

    def take(self, token: int) -> None:
        """Go on by a token that was made."""
        if not self.matcher.consume_token(token):
            raise RuntimeError(self.matcher.get_error())

    @property
    def finished(self) -> bool:
        """Whether the answer is whole and nothing may follow it."""
        return self.matcher.is_stopped()


class Guides:
    """Compiles grammars for one tokenizer and keeps the last ones.

    vocab_size: entries of a row of logits, which may be more than the tokenizer has tokens.
    """

    def __init__(self, tokenizer: Any, vocab_size: int) -> None:
        self.tokenizer, self.vocab_size = tokenizer, vocab_size
        self.reading, self.lock = threading.Lock(), threading.Lock()
        self.tokens: LLTokenizer | None = None
        self.known: OrderedDict[Guided, LLMatcher] = OrderedDict()  # matchers at the start of their grammars

    def prepare(self) -> None:
        """Read the vocabulary now: it holds up the whole process for a while (0.3 s for 50,000 tokens)."""
        with suppress(RequestError):  # said to the requests that need it
            self._vocabulary("guided")

    def check(self, guided: Guided | None) -> None:
        """Raises RequestError, with the name of the field that asked, for what has no grammar or no answer at all."""
        if guided is not None:
            self._compiled(guided)

    def start(self, guided: Guided | None) -> Guide | None:
        """A request's way through a grammar. Raises RequestError."""
        return None if guided is None else Guide(self._compiled(guided).deep_copy())

    def _compiled(self, guided: Guided) -> LLMatcher:
        """Compiled without the lock, so that one that takes long holds up nobody."""
        with self.lock:
            if guided in self.known:
                self.known.move_to_end(guided)
                return self.known[guided]
        matcher = self._new(guided)
        with self.lock:
            self.known[guided] = matcher
            if len(self.known) > KEPT:
                self.known.popitem(last=False)
        return matcher

    def _new(self, guided: Guided) -> LLMatcher:
        if len(guided.text) > LONGEST:
            raise RequestError(f"{guided.param} is longer than {LONGEST} characters", guided.param)
        tokens = self._vocabulary(guided.param)
        try:
            grammar = guided.compiled()
        except ValueError as error:
            raise RequestError(f"{guided.param}: {error}", guided.param) from None
        matcher = LLMatcher(tokens, grammar, log_level=0, limits=LLParserLimits(verbose_errors=False))
        if matcher.is_error():
            raise RequestError(f"{guided.param} is not possible: {matcher.get_error()}", guided.param)
        return matcher

    def _vocabulary(self, param: str) -> LLTokenizer:
        with self.reading:
            if self.tokens is None:
                ends = list(self.tokenizer.eos_ids)
                if not ends:
                    raise RequestError(f"{param} needs a model with an end-of-text token", param)
                try:
                    text = self.tokenizer.inner.to_str()
                    self.tokens = LLTokenizer(text, n_vocab=self.vocab_size, eos_token=ends)
                except ValueError as error:
                    raise RequestError(f"{param} does not work with this model's tokenizer: {error}", param) from None
            return self.tokens
