"""Which routes need no key, and which need one that names them."""

# Without a key: health checks, and pages that hold nothing (what they show they fetch, with a key).
PUBLIC = frozenset((
    "/", "/health", "/health/live", "/health/ready", "/v2/health/live", "/v2/health/ready", "/openapi.json", "/docs",
    "/docs/start.js", "/docs/swagger-ui.css", "/docs/swagger-ui-bundle.js",
))  # fmt: skip
# Routes that change the service: for keys that name them (or `*`) among their routes.
MANAGING = (
    "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/v2/repository/models/*/load",
    "/v2/repository/models/*/unload", "/inference.GRPCInferenceService/RepositoryModelLoad",
    "/inference.GRPCInferenceService/RepositoryModelUnload",
)  # fmt: skip
