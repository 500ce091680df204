"""The HTTP interface, one file per resource. Routes only translate; the logic is in app/service.py."""
