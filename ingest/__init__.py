"""From an upload to searchable chunks: store the bytes, recognise, parse, chunk, embed, index.

Knows nothing of HTTP or models. Start at `pipeline.ingest_document`; `jobs.IngestWorker` runs it on leased documents.
"""
