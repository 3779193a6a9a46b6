"""Instructions made by a model behind an OpenAI-compatible endpoint.

* `self_instruct.py` (Wang et al. 2022, arXiv:2212.10560), `evolve.py` (Evol-Instruct, Xu et al. 2023,
arXiv:2304.12244), `prompts.py`: what the model is asked, in our words.
* `caller.py`: requests side by side, retries, budget, and the journal that makes a run resumable; `settings.py`.
* `rouge.py`: the novelty filter; `output.py`: duplicates, contamination, the files.
"""
