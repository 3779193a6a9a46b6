"""`soma gateway CONFIG`: the front of `soma serve` before other services that speak OpenAI's API. `config.py` says what
there is, `pool.py` who gets a request, `stream.py` what is read of an answer, `proxy.py` passes it on, `app.py` is the
application, `server.py` runs it.
"""
