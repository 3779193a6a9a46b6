"""Text of PDF files, page by page, by pypdf. What is a picture of text has none: such a file is set aside."""

import io
import logging
from collections.abc import Iterator
from typing import IO

from soma.data.readers import Document, Dropped
from soma.data.sources import Item

PDF_BYTES = 256 << 20
PAGES = 5000


def read_pdf(item: Item, file: IO[bytes]) -> Iterator[Document | Dropped]:
    """One document with a blank line between pages."""
    from pypdf import PdfReader
    from pypdf.errors import PyPdfError

    data = file.read(PDF_BYTES + 1)
    if len(data) > PDF_BYTES:
        yield Dropped(item.name, "too_large", f"a PDF of more than {PDF_BYTES >> 20} MiB")
        return
    logging.getLogger("pypdf").setLevel(logging.ERROR)  # its warnings on every second file are not for our user
    pages: list[str] = []
    broken = ""
    try:
        reader = PdfReader(io.BytesIO(data))
        if reader.is_encrypted and not reader.decrypt(""):
            yield Dropped(item.name, "encrypted", "the file asks for a password")
            return
        for number, page in enumerate(reader.pages[:PAGES], start=1):
            try:
                pages.append(page.extract_text().strip())
            except Exception as error:  # noqa: BLE001  (pypdf raises whatever a broken page makes it raise)
                broken = broken or f"page {number}: {type(error).__name__}: {error}"
    except (PyPdfError, OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        broken = f"{type(error).__name__}: {error}"
    text = "\n\n".join(page for page in pages if page)
    if text:
        yield Document(text, item.name, "pdf", {"pages": len(pages)})
    if broken:
        yield Dropped(item.name, "corrupt", broken)
    elif not text:
        yield Dropped(item.name, "no_text", f"{len(pages)} pages, none with text (scanned?)")
