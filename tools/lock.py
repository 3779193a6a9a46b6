"""Write requirements.lock and requirements-dev.lock: what pip resolves for the extras `quickstart` and `dev`.

torch is pinned without a local tag and without its CUDA packages: pip then takes whichever build of that version the
index in use offers (the CPU index, or PyPI's with CUDA).
"""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TORCH = "2.13.0"
TRITON = "triton==3.7.1; sys_platform == 'linux'"  # what this torch's CUDA build asks for; tests need it too
SKIP = re.compile("somacube$|triton$|cuda-|nvidia-")  # come with torch's CUDA build, where that is what is installed


def resolve(extra: str, constraints: list[str]) -> list[str]:
    """Sorted `name==version` lines of everything that an extra needs."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--dry-run",
        "--ignore-installed",
        "--quiet",
        "--report",
        "-",
        f"torch=={TORCH}",
        f"{ROOT}[{extra}]",
        *constraints,
    ]
    report = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    pairs = [
        (item["metadata"]["name"].lower().replace("_", "-"), item["metadata"]["version"]) for item in report["install"]
    ]
    return [f"{name}=={version.partition('+')[0]}" for name, version in sorted(pairs) if not SKIP.match(name)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--constraints", type=Path, help="a pip constraints file")
    chosen = parser.parse_args().constraints
    constraints = ["-c", str(chosen)] if chosen else []
    for extra, name in (("quickstart", "requirements.lock"), ("dev", "requirements-dev.lock")):
        lines = resolve(extra, constraints)
        if extra == "dev":
            lines = sorted([*lines, TRITON])
        python = f"{sys.version_info.major}.{sys.version_info.minor}"
        head = f"# Made by `make lock` for Python {python}: the extra `{extra}`.\n"
        (ROOT / name).write_text(head + "\n".join(lines) + "\n")
        print(f"{name}: {len(lines)} packages")


if __name__ == "__main__":
    main()
