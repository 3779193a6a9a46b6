"""Requests to encoders and rerankers that run elsewhere, from threads."""

import json
import time
import urllib.error
import urllib.request
from typing import Any

from soma.base.errors import UserError
from soma.base.secrets import redact_url, scrub

TIMEOUT = 120.0  # seconds for an answer
TRIES = 4
AGAIN = (429, 502, 503, 504)  # statuses after which another try may help
LONGEST_WAIT = 30.0  # seconds, whatever Retry-After says
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def ask(url: str, body: dict[str, Any] | None, key: str | None, *, tries: int = TRIES) -> Any:
    """The JSON answer to a POST of `body`, or to a GET. What is busy or away is asked again, after what its
    Retry-After says or 0.5, 1, 2 … seconds. Raises UserError."""
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    data = None if body is None else json.dumps(body).encode()
    for attempt in range(1, tries + 1):
        wait = 0.5 * 2 ** (attempt - 1)
        try:
            with OPENER.open(urllib.request.Request(url, data, headers), timeout=TIMEOUT) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            said = f"it answers {error.code}: {words(error)}"
            if error.code not in AGAIN:
                break
            after = error.headers.get("Retry-After", "")
            wait = min(float(after), LONGEST_WAIT) if after.isdigit() else wait
        except (OSError, ValueError) as error:
            said = f"no answer that can be read ({scrub(str(error), url)})"
        if attempt < tries:
            time.sleep(wait)
    raise UserError(f"{redact_url(url)}: {said}")


def words(error: urllib.error.HTTPError) -> str:
    """The message of an error in OpenAI's shape, or its reason."""
    try:
        said = json.loads(error.read(65_536))
        message = said["error"]["message"] if isinstance(said["error"], dict) else said["error"]
        return str(message)[:500]
    except (OSError, ValueError, KeyError, TypeError):
        return str(error.reason)
