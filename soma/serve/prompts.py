"""From single tokens to what clients are shown."""

import functools
import re

from soma.model.tokenizer import Tokenizer

BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")


@functools.cache
def byte_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes as printable characters (byte-level BPE): `Ġ` is the space, `Ċ` the newline."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


class TokenNames:
    """How single tokens are shown beside log-probabilities."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.is_byte_level = "ByteLevel" in str(tokenizer.inner.decoder)
        self.added = tokenizer.inner.get_added_tokens_decoder()

    def bytes_of(self, token: int) -> bytes:
        """The bytes that a token stands for; one token may be only a part of a character."""
        text = self.tokenizer.token_text(token)
        if token in self.added:
            return text.encode()
        if piece := BYTE_PIECE.fullmatch(text):
            return bytes([int(piece[1], 16)])
        alphabet = byte_alphabet()
        if self.is_byte_level and all(letter in alphabet for letter in text):
            return bytes(alphabet[letter] for letter in text)
        return text.replace("\u2581", " ").encode()

    def text_of(self, token: int) -> str:
        """The token's text; what is no whole character is spelled in OpenAI's way, `bytes:\\xe2\\x82`."""
        data = self.bytes_of(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
