"""A graph as a tree of text, with the latency of each node where a service that runs says it."""

import json
import urllib.error
import urllib.request
from typing import Any

from rich.tree import Tree

from soma.base.errors import UserError
from soma.serve.graphs.config import GraphConfig, Node
from soma.serve.graphs.graph import is_model, model_of

WORDS = {"sequence": "one after another", "switch": "the first that holds", "ensemble": "side by side",
         "splitter": "by weight"}  # fmt: skip


def live(url: str, name: str, key: str | None) -> dict[str, Any]:
    """What the service at `url` says of its graph's nodes. Raises UserError."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    request = urllib.request.Request(f"{url.rstrip('/')}/graphs/{name}", headers=headers)
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=10) as answer:
            nodes: dict[str, Any] = json.load(answer)["nodes"]
            return nodes
    except urllib.error.HTTPError as error:
        raise UserError(f"{url}: it answers {error.code} for the graph {name}") from None
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{url}: no graph service answers there ({error})") from None


def draw(name: str, graph: GraphConfig, nodes: dict[str, Any] | None = None) -> Tree:
    """The tree from the first node down. nodes: what a running service says of them."""
    tree = Tree(f"[bold]{name}[/]  {sides(graph)}")
    add(tree, name, graph, graph.start, "", nodes)
    return tree


def sides(graph: GraphConfig) -> str:
    inputs, outputs = (", ".join(tensor.name for tensor in side) for side in (graph.inputs, graph.outputs))
    return f"{inputs} → {outputs}"


def add(tree: Tree, graph_name: str, graph: GraphConfig, name: str, edge: str, nodes: dict[str, Any] | None) -> None:
    """A node, and below it those that it leads to."""
    node = graph.nodes[name]
    does = f"{node.kind} {model_of(graph_name, name, node)}" if is_model(node) else WORDS[node.kind]
    where = f" at {node.v2 or node.openai}" if node.kind in ("v2", "openai") else ""
    branch = tree.add(f"{edge}[bold]{name}[/]  {does}{where}{figures(nodes, name)}")
    for target, words in edges(node):
        add(branch, graph_name, graph, target, words, nodes)


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


def figures(nodes: dict[str, Any] | None, name: str) -> str:
    """Latency and counts of a node that has run."""
    if nodes is None or name not in nodes:
        return ""
    seen = nodes[name]
    if not seen["count"]:
        return "  [dim]no requests yet[/]"
    failed = f", [red]{seen['failed']} failed[/]" if seen["failed"] else ""
    return f"  [green]p50 {seen['p50_ms']:.1f} ms, p95 {seen['p95_ms']:.1f} ms[/], {seen['count']} requests{failed}"
