"""Instruction and preference data.

* `schemas.py`: Alpaca, ShareGPT, OpenAI messages, preference pairs, KTO, Self-Instruct seeds, each read into one record
  and written from it; `patch.py` keeps what a schema cannot hold; `convert.py` does it for files.
* `samples.py`: what a row teaches; `build.py`: the stage that makes a corpus of it.
* `masks.py`: which tokens are learned; `show.py` shows them.
* `generate/`: Self-Instruct and Evol-Instruct against an endpoint.
"""

from soma.data.instruct.build import build_instruct, instruct_fingerprint

__all__ = ["build_instruct", "instruct_fingerprint"]
