"""From an upload to searchable chunks: store the bytes, detect the type, parse, chunk, embed, index.

Independent of HTTP and of models. Start at `pipeline.ingest_document`; `jobs.IngestWorker` runs it on leased documents.
"""
