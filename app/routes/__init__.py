"""The HTTP interface, a file a resource. Routes translate; what is done stands in app/service.py."""
