"""Rate limits: how many requests, tokens, or calls at once are let through, for a key, team, address, model, route, or
over everything. `config.py` says what rules are, `buckets.py` what a call asks of them, `memory.py` and `limits.lua`
(by `shared.py`) decide, `gate.py` stands in front of the routes.
"""
