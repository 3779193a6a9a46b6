"""The page at / in a real browser."""

import json
import re
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from browser import open_browser
from http_tools import JSON, LONG, call, connection, metric, open_stream, wait_for

pytestmark = pytest.mark.page


@pytest.fixture(scope="module")
def page() -> Iterator[Any]:
    with open_browser() as driver:
        yield driver


def visit(driver: Any, url: str) -> None:
    driver.get(url)
    assert wait_for(lambda: driver.find_element("id", "input").is_enabled())


def say(driver: Any, text: str, key: str = "\ue007") -> None:
    driver.find_element("id", "input").send_keys(text + key)


def set_number(driver: Any, field: str, value: object) -> None:
    driver.execute_script("document.getElementById(arguments[0]).value = arguments[1]", field, str(value))


def finished(driver: Any, turns: int) -> bool:
    """Whether `turns` answers are there and none is being written."""
    answers = driver.find_elements("css selector", ".assistant")
    return len(answers) == turns and not driver.find_elements("css selector", ".running")


def texts(driver: Any, selector: str) -> list[str]:
    """At one moment: the page draws itself anew meanwhile."""
    found: list[str] = driver.execute_script(
        "return [...document.querySelectorAll(arguments[0])].map(item => item.textContent)", selector
    )
    return found


def ask_for_all_tokens(driver: Any) -> None:
    """Answers end at max_tokens alone: one drawn at random may else be empty."""
    driver.execute_script("""
        const real = window.fetch;
        window.fetch = (path, given) => given?.body
            ? real(path, {...given, body: JSON.stringify({...JSON.parse(given.body), ignore_eos: true})})
            : real(path, given);
    """)


def problems(driver: Any) -> list[str]:
    """Errors of scripts and of the content policy; refused requests are no errors of the page."""
    rows = [row for row in driver.get_log("browser") if row["level"] == "SEVERE"]
    return [row["message"] for row in rows if row["source"] != "network"]


def test_chat_streams_and_measures(page: Any, service_url: str) -> None:
    visit(page, service_url)
    assert page.title == "tiny"
    assert page.find_element("id", "mode").text == "chat"
    set_number(page, "max_tokens", 40)
    set_number(page, "temperature", 0)
    say(page, "hello")
    assert wait_for(lambda: finished(page, 1))
    answer = texts(page, ".assistant .answer")[0]
    assert answer
    measured = texts(page, ".stats")[0]
    assert re.search(r"[\d.]+ tokens/s · 40 tokens · first after \d+ ms · token limit reached", measured)
    say(page, "hello")
    assert wait_for(lambda: finished(page, 2))
    assert texts(page, ".assistant .answer")[1] != answer  # the first turns went along
    page.find_element("id", "clear").click()
    assert texts(page, ".turn") == []
    say(page, "hello")
    assert wait_for(lambda: finished(page, 1))
    assert texts(page, ".assistant .answer")[0] == answer
    assert problems(page) == []


def test_text_is_never_html(page: Any, service_url: str) -> None:
    visit(page, service_url)
    set_number(page, "max_tokens", 5)
    attack = "<img src=x onerror=\"document.title='broken'\"><script>document.title='broken'</script>"
    say(page, attack)
    assert wait_for(lambda: finished(page, 1))
    assert texts(page, ".user .text") == [attack]
    assert page.find_elements("css selector", "main img, main script") == []
    # and the same of what the model says
    page.execute_script("element(log, 'div', 'x', arguments[0]); log.lastChild.append(arguments[0])", attack)
    assert page.find_elements("css selector", "main img, main script") == []
    assert page.title == "tiny"


def test_enter_shift_enter_and_escape(page: Any, service_url: str) -> None:
    visit(page, service_url)
    set_number(page, "max_tokens", 3500)
    ask_for_all_tokens(page)
    box = page.find_element("id", "input")
    box.send_keys("one\ue008\ue007\ue000two")  # Shift held while Enter is pressed
    assert box.get_property("value") == "one\ntwo"
    assert texts(page, ".turn") == []
    box.send_keys("\ue007")
    assert texts(page, ".user .text") == ["one\ntwo"]
    assert wait_for(lambda: texts(page, ".assistant .answer") not in ([], [""]))
    assert page.find_element("id", "stop").is_displayed()
    box.send_keys("\ue00c")
    assert wait_for(lambda: finished(page, 1))
    assert texts(page, ".stats")[0].endswith("stopped")
    assert wait_for(lambda: metric(service_url, "vllm:num_requests_running") == 0)
    say(page, "again")
    assert wait_for(lambda: len(texts(page, ".assistant .answer")) == 2)
    page.find_element("id", "stop").click()
    assert wait_for(lambda: finished(page, 2))
    assert not page.find_element("id", "stop").is_displayed()


def test_errors_are_shown(page: Any, service_url: str) -> None:
    visit(page, service_url)
    ask_for_all_tokens(page)
    set_number(page, "max_tokens", 8)
    page.execute_script("input.value = 'x'.repeat(6000)")
    say(page, "")
    assert wait_for(lambda: texts(page, ".error") != [])
    assert "the prompt has" in texts(page, ".error")[0]
    set_number(page, "temperature", -5)  # the browser itself says what is wrong with a number
    say(page, "hello")
    assert not page.execute_script("return document.getElementById('form').checkValidity()")
    assert len(texts(page, ".turn")) == 2
    set_number(page, "temperature", 1)
    page.find_element("id", "input").clear()
    say(page, "hello")
    assert wait_for(lambda: finished(page, 2))
    assert texts(page, ".assistant .answer")[1]


def test_a_full_context_forgets_the_oldest_turns(page: Any, service_url: str) -> None:
    visit(page, service_url)
    set_number(page, "max_tokens", 100)
    ask_for_all_tokens(page)
    page.execute_script("turns = [{role: 'user', content: 'x'.repeat(4100)}, {role: 'assistant', content: 'x'}]")
    say(page, "hello")
    assert wait_for(lambda: finished(page, 1))
    assert texts(page, ".note") == ["The context is full: the oldest turns were forgotten."]
    assert texts(page, ".assistant .answer")[0]


def test_completion_mode(page: Any, base_url: str) -> None:
    visit(page, base_url)
    assert page.find_element("id", "mode").text == "completion"
    set_number(page, "max_tokens", 10)
    ask_for_all_tokens(page)
    say(page, "the quick")
    assert wait_for(lambda: finished(page, 1))
    assert texts(page, ".given") == ["the quick"]
    assert texts(page, ".assistant .text")[0].startswith("the quick")
    assert len(texts(page, ".assistant .text")[0]) > len("the quick")


@pytest.mark.parametrize(("width", "dark"), [(320, False), (390, True), (1280, True)])
def test_widths_and_schemes(service_url: str, width: int, dark: bool) -> None:
    with open_browser(width, 700, dark=dark) as driver:
        visit(driver, service_url)
        set_number(driver, "max_tokens", 60)
        say(driver, "a " * 100 + "x" * 200)
        assert wait_for(lambda: finished(driver, 1))
        assert driver.execute_script("return document.documentElement.scrollWidth") <= width
        assert driver.execute_script("return document.documentElement.scrollHeight") <= 700
        back = driver.execute_script("return getComputedStyle(document.body).backgroundColor")
        assert (int(re.findall(r"\d+", back)[0]) < 100) == dark
        assert problems(driver) == []


def test_live_figures(page: Any, service_url: str) -> None:
    """What the page shows while requests run, and that it goes back to rest."""
    visit(page, service_url)
    assert wait_for(lambda: texts(page, "#running") == ["0"])
    links = [open_stream(service_url, n=4)[0], connection(service_url)]
    links[1].request("POST", "/v1/completions", json.dumps({**LONG, "n": 3}), JSON)  # 4 places: 3 wait
    assert wait_for(lambda: texts(page, "#running, #waiting") == ["4", "3"])
    assert wait_for(lambda: float(texts(page, "#rate")[0]) > 1)
    assert wait_for(lambda: float(texts(page, "#cache")[0].removesuffix(" %")) > 0)
    for link in links:
        assert link.sock is not None
        link.sock.shutdown(socket.SHUT_RDWR)
        link.close()
    assert wait_for(lambda: texts(page, "#running, #waiting") == ["0", "0"])
    assert wait_for(lambda: texts(page, "#rate") == ["0.0"])
    assert all(re.fullmatch(r"[\d.]+ m?s", text) for text in texts(page, "#ttft, #itl"))
    assert len(page.find_element("id", "curve").get_attribute("points").split()) > 3
    assert problems(page) == []


def test_live_figures_are_computed_right(page: Any, base_url: str) -> None:
    """Of a histogram's growth by 4, 3 lie below 0.1: the median is two thirds into that bucket."""
    visit(page, base_url)

    def buckets(*counts: int) -> str:
        bounds = zip(("0.1", "0.2", "+Inf"), counts, strict=True)
        return "\\n".join(f'vllm:x_bucket{{le="{bound}",model_name="m"}} {count}' for bound, count in bounds)

    text, before = buckets(12, 14, 14), buckets(9, 10, 10)
    value = page.execute_script(f"return median('vllm:x', read('{text}'), read('{before}'))")
    assert value == pytest.approx(0.1 * 2 / 3)
    assert page.execute_script(f"return median('vllm:x', read('{text}'), read('{text}'))") is None
    assert page.execute_script("return [seconds(0.0301), seconds(0.00123), seconds(2.34), seconds(null)]") == [
        "30.1 ms", "1.2 ms", "2.3 s", "–",
    ]  # fmt: skip


def test_figures_of_several_engines(page: Any, base_url: str) -> None:
    """Requests are added, shares of the caches are averaged, and what each engine has stands beside it."""
    visit(page, base_url)
    lines = [
        f'vllm:{name}{{engine="{engine}",model_name="m"}} {value}'
        for name, values in (("num_requests_running", (3, 4)), ("num_requests_waiting", (0, 2)),
                             ("kv_cache_usage_perc", (0.5, 0.25)), ("generation_tokens_total", (10, 20)))
        for engine, value in enumerate(values)
    ]  # fmt: skip
    shown = page.execute_script(
        "show(read(arguments[0]));"
        "return ['engines', 'running', 'running-each', 'waiting-each', 'cache', 'cache-each']"
        ".map(id => at(id).textContent)",
        "\n".join(lines),
    )
    assert shown == ["2 engines", "7", "3 · 4", "0 · 2", "37.5 %", "50 · 25"]
    assert page.execute_script("show(read(arguments[0])); return at('running-each').textContent", lines[0]) == ""
    assert wait_for(lambda: texts(page, "#running, #engines") == ["", "0"])  # the service's own again


def test_the_page_stands_alone(service_url: str) -> None:
    _, headers, data = call(service_url, "GET", "/")
    text = data.decode()
    assert re.findall(r"(?:src|href)=[\"']?(?!data:)[^\"'>]*//[^\"'>]*", text) == []
    assert "default-src 'none'" in headers["content-security-policy"]
