"""A graph as a tree of text, with the latency of each node where a service that runs says it."""

import json
import urllib.error
import urllib.request
from typing import Any

from rich.markup import escape
from rich.tree import Tree

from soma.base.errors import UserError
from soma.serve.graphs.config import GraphConfig, Node
from soma.serve.graphs.graph import is_model, model_of

WORDS = {"sequence": "one after another", "switch": "the first that holds", "ensemble": "side by side",
         "splitter": "by weight", "guarded": "what it says is checked"}  # fmt: skip


def ask(url: str, path: str, key: str | None, method: str = "GET") -> Any:
    """The JSON that a service answers. Raises UserError."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    request = urllib.request.Request(f"{url.rstrip('/')}{path}", headers=headers, method=method)
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=600) as answer:
            return json.loads(answer.read() or b"null")
    except urllib.error.HTTPError as error:
        raise UserError(f"{url}: it answers {error.code} for {path}{said_in(error)}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{url}: no graph service answers there ({error})") from None


def said_in(error: urllib.error.HTTPError) -> str:
    """The message of an error in either protocol's form."""
    try:
        told = json.loads(error.read())["error"]
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    return f": {told['message'] if isinstance(told, dict) else told}"


def live(url: str, name: str, key: str | None) -> dict[str, Any]:
    """What the service at `url` says of its graph's nodes. Raises UserError."""
    return nodes_of(url, ask(url, f"/graphs/{name}", key))


def all_live(url: str, key: str | None) -> list[dict[str, Any]]:
    """What the service at `url` says of all of its graphs that the key may use. Raises UserError."""
    found = ask(url, "/graphs", key)
    if not isinstance(found, dict) or not isinstance(found.get("data"), list):
        raise UserError(f"{url}: no graph service answers there")
    return [graph for graph in found["data"] if nodes_of(url, graph)]


def nodes_of(url: str, graph: Any) -> dict[str, Any]:
    """The nodes of what a service says of a graph."""
    if not isinstance(graph, dict) or not isinstance(graph.get("nodes"), dict):
        raise UserError(f"{url}: no graph service answers there")
    return graph["nodes"]


def describe(name: str, graph: GraphConfig) -> dict[str, Any]:
    """A graph as JSON: nodes, what they are and where they lead."""
    inputs, outputs = ([tensor.name for tensor in side] for side in (graph.inputs, graph.outputs))
    nodes = {
        each: {
            "kind": node.kind, "model": model_of(name, each, node) if is_model(node) else None,
            "at": node.v2 or node.openai, "version": node.version or None,
            "targets": node.targets, "edges": [list(edge) for edge in edges(node)],
        }
        for each, node in graph.nodes.items()
    }  # fmt: skip
    return {"name": name, "start": graph.start, "inputs": inputs, "outputs": outputs, "nodes": nodes}


def draw(name: str, graph: GraphConfig, nodes: dict[str, Any] | None = None) -> Tree:
    """The tree from the first node down. nodes: what a running service says of them."""
    described = describe(name, graph)
    for each, node in described["nodes"].items():
        node |= (nodes or {}).get(each, {})
    return draw_described(described)


def draw_described(described: dict[str, Any]) -> Tree:
    """The tree of what `describe`, or a service that runs, says."""
    inputs, outputs = (escape(", ".join(described[side])) for side in ("inputs", "outputs"))
    tree = Tree(f"[bold]{escape(described['name'])}[/]  {inputs} → {outputs}")
    add(tree, described["nodes"], described["start"], "")
    return tree


def add(tree: Tree, nodes: dict[str, Any], name: str, edge: str) -> None:
    """A node, and below it those that it leads to."""
    node = nodes[name]
    does = f"{node['kind']} {node['model']}" if node["model"] else WORDS[node["kind"]]
    where = (f" version {node['version']}" if node["version"] else "") + (f" at {node['at']}" if node["at"] else "")
    branch = tree.add(f"{escape(edge)}[bold]{escape(name)}[/]  {escape(does + where)}{figures(node)}")
    for target, words in node["edges"]:
        add(branch, nodes, target, words)


def edges(node: Node) -> list[tuple[str, str]]:
    """Where a node leads, and when."""
    if node.switch:
        return [(each.node, f"{condition(each.when)}: ") for each in node.switch]
    if node.splitter:
        total = sum(share.weight for share in node.splitter)
        return [(each.node, "shadow: " if each.shadow else f"{each.weight / total:.0%}: ") for each in node.splitter]
    return [(target, "") for target in node.targets]


def condition(when: dict[str, Any]) -> str:
    return " and ".join(f"{tensor} = {value}" for tensor, value in when.items()) or "else"


def figures(seen: dict[str, Any]) -> str:
    """Latency and counts of a node that has run."""
    if "count" not in seen:
        return ""
    if not seen["count"]:
        return "  [dim]no requests yet[/]"
    failed = f", [red]{seen['failed']} failed[/]" if seen["failed"] else ""
    return f"  [green]p50 {seen['p50_ms']:.1f} ms, p95 {seen['p95_ms']:.1f} ms[/], {seen['count']} requests{failed}"
