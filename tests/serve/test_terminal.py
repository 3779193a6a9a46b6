"""`soma chat` through a pipe, through a terminal, and with Ctrl-C."""

import fcntl
import io
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from soma.base.errors import UserError
from soma.serve.terminal import CONTROL, Conversation, chat


def talk(folder: Path, text: str, **options: object) -> tuple[str, str]:
    """What goes to standard output and to standard error."""
    write, notes = io.StringIO(), io.StringIO()
    settings = {"temperature": 0.0, "max_tokens": 12, **options}
    chat(folder, read=io.StringIO(text), write=write, notes=notes, **settings)  # type: ignore[arg-type]
    return write.getvalue(), notes.getvalue()


def test_turns_and_reset(tiny_folder: Path) -> None:
    one, notes = talk(tiny_folder, "hello\n")
    assert "tokens/s, 12 tokens, first after" in notes
    assert "token limit reached" in notes
    both, _ = talk(tiny_folder, "hello\nhello\n")
    assert both.startswith(one)
    assert both != one * 2  # the second question knows the first
    fresh, notes = talk(tiny_folder, "hello\n/reset\nhello\n/exit\nhello\n")
    assert fresh == one * 2
    assert "forgotten" in notes
    assert talk(tiny_folder, "/help\n\n  \n")[0] == ""


def test_seeds(tiny_folder: Path) -> None:
    def sampled(seed: int) -> str:
        return talk(tiny_folder, "hello\n", temperature=1.0, seed=seed)[0]

    assert sampled(1) == sampled(1) != sampled(2)


def test_a_model_without_chat_template(base_folder: Path) -> None:
    text, notes = talk(base_folder, "hello\nhello\n")
    assert "no chat template" in notes
    first, second = text[: len(text) // 2], text[len(text) // 2 :]
    assert first == second  # nothing is remembered


def test_a_full_context(tiny_folder: Path) -> None:
    """The oldest turns go first, then the answer gets shorter, then the text is too long."""
    _, notes = talk(tiny_folder, "x" * 2500 + "\n" + "y" * 2500 + "\n", max_tokens=20)
    assert "the oldest turns are forgotten" in notes
    _, notes = talk(tiny_folder, "x" * 4000 + "\n", max_tokens=500)
    assert "tokens/s" in notes
    _, notes = talk(tiny_folder, "x" * 5000 + "\nhello\n")
    assert "error: the prompt has" in notes
    assert notes.count("tokens/s") == 1


def test_bad_settings(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="temperature"):
        talk(tiny_folder, "", temperature=-1.0)
    with pytest.raises(UserError, match="no such model folder"):
        talk(tmp_path / "none", "")
    with pytest.raises(UserError, match="precision"):
        talk(tiny_folder, "", precision="int3")
    with pytest.raises(UserError, match="device"):
        talk(tiny_folder, "", device="cuda:99")


def test_a_system_message_stays(tiny_folder: Path) -> None:
    from soma.model.tokenizer import Tokenizer

    conversation = Conversation(Tokenizer.load(tiny_folder), "be brief")
    conversation.add("a", "b")
    text = conversation.tokenizer.decode(conversation.prompt("c"), skip_special=False)
    assert text == "<|system|>be brief<|end|><|user|>a<|end|><|assistant|>b<|end|><|user|>c<|end|><|assistant|>"
    assert conversation.shorten()
    assert not conversation.shorten()
    assert "be brief" in conversation.tokenizer.decode(conversation.prompt("c"))


def test_answers_cannot_steer_the_terminal() -> None:
    assert "a\x1b[2J\x07\x9b\nb\tc\x7f".translate(CONTROL) == "a␛[2J␇\nb\tc␡"


def as_terminal_does() -> None:
    """In a new process: the terminal is its own, and SIGINT ends it, also where tests run in the background of a shell
    that has it ignored."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_stops_the_answer_and_not_the_chat(tiny_folder: Path) -> None:
    """In a real terminal: an endless answer, Ctrl-C, another question, Ctrl-D."""
    code = (
        "import sys; from soma.serve import terminal; from soma.engine.params import SamplingParams as S;"
        "terminal.SamplingParams = lambda **given: S(ignore_eos=True, **given);"
        f"terminal.chat({str(tiny_folder)!r}, max_tokens=4000)"
    )
    parent, child = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=child, stdout=child, stderr=child, start_new_session=True,
        preexec_fn=as_terminal_does,
    )  # fmt: skip
    os.close(child)

    def until(is_there: Callable[[bytes], bool], keys: bytes = b"", seconds: float = 120) -> None:
        """Read until it is there. The keys are sent every two seconds: a signal that comes between Python's look for
        one and its wait for a key shows at the next key (CPython's readline), and on a busy machine that happens.
        """
        seen, start, sent = b"", time.monotonic(), 0
        while not is_there(seen):
            waited = time.monotonic() - start
            assert waited < seconds, seen[-500:]
            if keys and waited >= 2 * sent:
                os.write(parent, keys)
                sent += 1
            if select.select([parent], [], [], 0.1)[0]:
                try:
                    seen += os.read(parent, 65536)
                except OSError:  # the terminal is gone: the process ends
                    process.wait(120)
                    assert is_there(seen), seen[-500:]

    def prompt_after(wanted: bytes) -> Callable[[bytes], bool]:
        """Keys that come before the prompt may be lost."""
        return lambda seen: b"> " in seen.partition(wanted)[2]

    try:
        until(prompt_after(b"stops an answer"))
        os.write(parent, b"hello\n")
        until(lambda seen: bool(seen.partition(b"hello")[2].strip()))  # the answer has begun
        until(prompt_after(b"stopped]"), b"\x03")
        os.write(parent, b"/reset\n")
        until(prompt_after(b"forgotten."))
        until(prompt_after(b"ends the conversation)"), b"\x03")
        until(lambda seen: process.poll() is not None, b"\x04")
        assert process.wait() == 0
    finally:
        process.kill()
        process.wait()
        os.close(parent)
