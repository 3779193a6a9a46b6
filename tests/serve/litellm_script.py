"""What a user of LiteLLM does, run by a Python that has it: BASE_URL MODEL. Prints what came as JSON."""

import json
import os
import sys

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it asks the internet for prices
import litellm  # the variable is read at import
import openai

MESSAGES = [{"role": "user", "content": "hello"}]


def main(url: str, model: str) -> None:
    where = {"api_base": url + "/v1", "api_key": "none", "num_retries": 0}
    options = {**where, "model": f"openai/{model}", "messages": MESSAGES, "max_tokens": 12, "seed": 4}
    whole = litellm.completion(**options)
    chunks = list(litellm.completion(**options, stream=True, stream_options={"include_usage": True}))
    vectors = litellm.embedding(model=f"openai/{model}", input=["hello", "hello", "world"], **where)
    errors = {}
    for name, change in (("model", {"model": "openai/nobody"}), ("parameter", {"top_p": 7.0})):
        try:
            litellm.completion(**{**options, **change})
        except openai.APIStatusError as error:  # what LiteLLM's own are made of
            errors[name] = [type(error).__name__, error.status_code, str(error)]
    print(json.dumps({
        "text": whole.choices[0].message.content, "reason": whole.choices[0].finish_reason,
        "usage": whole.usage.model_dump(include={"prompt_tokens", "completion_tokens", "total_tokens"}),
        "streamed": "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices),
        "streamed_tokens": [chunk.usage.completion_tokens for chunk in chunks if getattr(chunk, "usage", None)],
        "vectors": [row["embedding"] for row in vectors.data], "embedded_tokens": vectors.usage.prompt_tokens,
        "errors": errors,
    }))  # fmt: skip


main(*sys.argv[1:])
