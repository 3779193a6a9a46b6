"""Names of the metrics that rooms write and dashboards read. Serving uses the names that vLLM's dashboards know."""

RUNNING = "vllm:num_requests_running"
WAITING = "vllm:num_requests_waiting"
TIME_TO_FIRST_TOKEN = "vllm:time_to_first_token_seconds"
INTER_TOKEN_LATENCY = "vllm:inter_token_latency_seconds"
END_TO_END_LATENCY = "vllm:e2e_request_latency_seconds"
PROMPT_TOKENS = "vllm:prompt_tokens"  # a counter: Prometheus clients add `_total`
GENERATION_TOKENS = "vllm:generation_tokens"  # a counter
REQUEST_SUCCESS = "vllm:request_success"  # a counter
KV_CACHE_USAGE = "vllm:kv_cache_usage_perc"  # 0 to 1, whatever the name says
PREFIX_CACHE_QUERIES = "vllm:prefix_cache_queries"  # a counter, in tokens
PREFIX_CACHE_HITS = "vllm:prefix_cache_hits"  # a counter, in tokens
PREEMPTIONS = "vllm:num_preemptions"  # a counter
DRAFT_TOKENS = "vllm:spec_decode_num_draft_tokens"  # a counter
ACCEPTED_TOKENS = "vllm:spec_decode_num_accepted_tokens"  # a counter
QUEUE_TIME = "vllm:request_queue_time_seconds"
PREFILL_TIME = "vllm:request_prefill_time_seconds"
DECODE_TIME = "vllm:request_decode_time_seconds"

MODEL_NAME = "model_name"  # label of all of them
ENGINE = "engine"  # label of all of them: which of several engines behind one front, from "0" on
FINISHED_REASON = "finished_reason"  # label of REQUEST_SUCCESS: stop, length, abort, error

# Upper bounds of histogram buckets in seconds, as in vLLM so that its dashboards' quantiles come out the same.
TTFT_BUCKETS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
INTER_TOKEN_BUCKETS = (
    0.002, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0,
)  # fmt: skip
REQUEST_BUCKETS = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0,
)  # fmt: skip
