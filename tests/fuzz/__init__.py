"""Parsers against damaged documents: what any of them may do, and inputs that once reached something new.

`target.py` says what counts as a fault, `mutate.py` damages containers from inside, `corpus/<format>/` holds small
inputs. `make test` tries the corpus and seeded mutations of it (tests/unit/test_ingest_fuzz.py); for longer, with
coverage to guide it: `python -m tests.fuzz`.
"""
