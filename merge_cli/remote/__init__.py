"""Models in object stores and on web servers: s3://, gs://, https:// and what else fsspec knows.

filesystem    fsspec's file system of an address, and its exceptions as messages
models        a model there: its files, their versions, headers by range, downloads that resume
"""
